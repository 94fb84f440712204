//! An installation on the move: everything that it keeps as one stream, and back, whatever keeps
//! it on either side.
//!
//! ```text
//!  manifest ─► artifacts' bytes ─► transcripts ─► rows of each table ─► totals
//! ```
//!
//! Rows come from one snapshot, so that a server may run meanwhile. Bytes come first: they are
//! kept under their digests, and an import that was cut off finds them again. Rows are written in one
//! transaction, which ends only when what the target gives back has the number and the digest of
//! what was sent: an installation is there as a whole or not at all.

mod export;
mod import;
pub mod tape;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::{
    export::{Exported, export},
    import::{Imported, Into, import},
};
use crate::{
    blob::{Blobs, Store},
    db::{Engine, transfer::Tally},
};

/// The form of the stream.
const FORMAT: u32 = 1;

/// Tables of servers that run, which mean nothing elsewhere.
const OF_SERVERS: &[&str] = &["instances", "locks", "runners", "runner_orders"];

/// What of a table travels: uploads that are complete, and bytes that an artifact has. Bytes that
/// are to be deleted lie where they are; what is imported in place of everything is not among them.
fn only(table: &str) -> &'static str {
    match table {
        "uploads" => "artifact_id IS NOT NULL",
        "artifact_bytes" => {
            "deleting = 0 AND EXISTS (SELECT 1 FROM artifacts a
             WHERE a.type = artifact_bytes.type AND a.sha256 = artifact_bytes.sha256)"
        }
        "artifact_garbage" => "FALSE",
        _ => "",
    }
}

/// Where an installation keeps what is not in tables.
pub struct Bytes {
    /// Of artifacts.
    pub artifacts: Store,
    /// Of transcripts of ended tasks.
    pub transcripts: Blobs,
}

/// Files, and the bytes that they have together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// How many.
    pub files: u64,
    /// Their size.
    pub bytes: u64,
}

impl Files {
    fn add(&mut self, size: u64) {
        self.files += 1;
        self.bytes += size;
    }
}

/// What the stream begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    baton_export: u32,
    /// Where it comes from: `sqlite` or `postgres`.
    engine: String,
    /// Last migration there.
    schema: i64,
    /// Microseconds since the Unix epoch.
    time: i64,
    tables: Vec<TableHead>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TableHead {
    name: String,
    columns: Vec<String>,
}

/// What the stream ends with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Totals {
    artifacts: Files,
    transcripts: Files,
    tables: BTreeMap<String, TableTotal>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TableTotal {
    rows: u64,
    /// Of the lines, in any order; hexadecimal.
    digest: String,
}

impl From<Tally> for TableTotal {
    fn from(tally: Tally) -> Self {
        Self { rows: tally.rows, digest: format!("{:032x}", tally.digest) }
    }
}

fn engine_name(engine: Engine) -> &'static str {
    match engine {
        Engine::Sqlite => "sqlite",
        Engine::Postgres => "postgres",
    }
}

/// The line of a row: a JSON list of its cells, bytes as `{"base64": …}`.
mod line {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde_json::Value;

    use crate::{
        db::transfer::Cell,
        error::{Error, Result},
        moving::tape::damaged,
    };

    pub fn write(cells: Vec<Cell>, to: &mut Vec<u8>) -> Result<()> {
        let value = |cell| match cell {
            Cell::Null => Value::Null,
            Cell::Int(value) => value.into(),
            Cell::Text(text) => text.into(),
            Cell::Bytes(bytes) => serde_json::json!({ "base64": STANDARD.encode(bytes) }),
        };
        let values: Vec<_> = cells.into_iter().map(value).collect();
        serde_json::to_writer(&mut *to, &values).map_err(Error::internal)?;
        to.push(b'\n');
        Ok(())
    }

    pub fn read(line: &[u8]) -> Result<Vec<Cell>> {
        let values: Vec<Value> = serde_json::from_slice(line).map_err(damaged)?;
        let cell = |value: Value| match value {
            Value::Null => Some(Cell::Null),
            Value::Number(number) => number.as_i64().map(Cell::Int),
            Value::String(text) => Some(Cell::Text(text)),
            Value::Object(fields) => {
                STANDARD.decode(fields.get("base64")?.as_str()?).ok().map(Cell::Bytes)
            }
            _ => None,
        };
        let cells: Option<Vec<_>> = values.into_iter().map(cell).collect();
        cells.ok_or_else(|| damaged("a row has a value that no row has"))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_row_comes_back_as_it_was() {
            let cells = vec![
                Cell::Null,
                Cell::Int(i64::MIN),
                Cell::Int(i64::MAX),
                Cell::Text("a\u{0}\n\"ä".into()),
                Cell::Bytes(vec![0, 255, 10]),
                Cell::Bytes(Vec::new()),
            ];
            let mut text = Vec::new();
            write(cells.clone(), &mut text).unwrap();
            assert_eq!(text.split_inclusive(|byte| *byte == b'\n').count(), 1);
            assert_eq!(read(&text).unwrap(), cells);
            for wrong in ["", "{}", "[1.5]", "[true]", "[{\"base64\": 1}]"] {
                assert!(read(wrong.as_bytes()).is_err(), "{wrong}");
            }
        }
    }
}
