//! From an installation to a stream.

use std::{collections::HashSet, pin::pin};

use futures_util::TryStreamExt as _;
use tokio::io::AsyncWrite;

use super::{
    Bytes, FORMAT, Files, Manifest, OF_SERVERS, TableHead, Totals, engine_name, line, only, tape,
};
use crate::{
    blob::{Digest, Key, hash::Hasher},
    clock::Micros,
    db::{
        self, Location,
        transfer::{Cell, Snapshot, Table, Tally},
    },
    error::{Error, Kind, Reason, Result},
};

/// Bytes of rows that go as one file, at least.
const CHUNK: usize = 1 << 20;

/// What an export has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Rows of each table.
    pub rows: Vec<(String, u64)>,
    /// Bytes of artifacts, each kept once.
    pub artifacts: Files,
    /// Transcripts of ended tasks.
    pub transcripts: Files,
    /// Uploads that are not complete, which do not travel.
    pub uploads_left: u64,
    /// Bytes of the stream.
    pub bytes: u64,
}

/// Writes everything that an installation keeps, and that it did not change since the call began,
/// to `to`.
pub async fn export<W: AsyncWrite + Unpin>(
    at: &Location,
    bytes: &Bytes,
    now: Micros,
    to: W,
) -> Result<Exported> {
    let status = db::status(at).await?;
    if !status.pending().is_empty() || status.legacy {
        let message = format!("{at} has migrations pending; apply them: baton db migrate");
        return Err(Error::new(Kind::FailedPrecondition, Reason::StateConflict, message));
    }
    let mut snapshot = Snapshot::take(at).await?;
    let exported = Export {
        snapshot: &mut snapshot,
        bytes,
        tape: tape::Writer::new(to),
        totals: Totals::default(),
        done: Exported::default(),
    };
    let schema = status.applied.last().copied().unwrap_or_default();
    let exported = exported.run(engine_name(status.engine), schema, now).await;
    snapshot.close().await;
    exported
}

struct Export<'a, W> {
    snapshot: &'a mut Snapshot,
    bytes: &'a Bytes,
    tape: tape::Writer<W>,
    totals: Totals,
    done: Exported,
}

impl<W: AsyncWrite + Unpin> Export<'_, W> {
    async fn run(mut self, engine: &str, schema: i64, now: Micros) -> Result<Exported> {
        let tables: Vec<Table> = self
            .snapshot
            .tables()
            .iter()
            .filter(|table| !OF_SERVERS.contains(&table.name.as_str()))
            .cloned()
            .collect();
        let head = |table: &Table| TableHead {
            name: table.name.clone(),
            columns: table.columns.iter().map(|column| column.name.clone()).collect(),
        };
        let manifest = Manifest {
            baton_export: FORMAT,
            engine: engine.to_owned(),
            schema,
            time: now.0,
            tables: tables.iter().map(head).collect(),
        };
        self.tape.file("baton/manifest.json", &json(&manifest)?).await?;
        for table in &tables {
            match table.name.as_str() {
                "artifact_bytes" => self.artifacts(table).await?,
                "transcripts" => self.transcripts(table).await?,
                "uploads" => {
                    let open = self.snapshot.count(table, "artifact_id IS NULL").await?;
                    self.done.uploads_left = open;
                }
                _ => {}
            }
        }
        for table in &tables {
            self.rows(table).await?;
        }
        self.tape.file("baton/totals.json", &json(&self.totals)?).await?;
        let (_, bytes) = self.tape.finish().await?;
        Ok(Exported {
            artifacts: self.totals.artifacts,
            transcripts: self.totals.transcripts,
            bytes,
            ..self.done
        })
    }

    async fn artifacts(&mut self, table: &Table) -> Result<()> {
        let places = ["type", "sha256", "generation", "size_bytes"].map(|name| place(table, name));
        let mut rows = self.snapshot.rows(table, only(&table.name));
        while let Some(row) = rows.try_next().await? {
            let [
                Some(Cell::Text(kind)),
                Some(Cell::Text(digest)),
                Some(Cell::Text(generation)),
                Some(Cell::Int(size)),
            ] = places.map(|place| place.and_then(|at| row.get(at)).cloned())
            else {
                return Err(Error::internal("artifact_bytes has other columns"));
            };
            let digest: Digest = digest.parse().map_err(Error::internal)?;
            let (key, size) = (Key { kind, digest, generation }, size.unsigned_abs());
            let mut pieces = match self.bytes.artifacts.read(&key, 0, size).await {
                Ok(pieces) => pieces,
                Err(error) => return Err(unreadable(&key, error)),
            };
            self.tape.begin(&format!("artifacts/{}/{}", key.kind, key.name()), size).await?;
            let mut hasher = Hasher::default();
            while let Some(piece) =
                pieces.try_next().await.map_err(|error| unreadable(&key, error))?
            {
                hasher.update(&piece);
                self.tape.write(&piece).await?;
            }
            if hasher.length() != size || hasher.finish() != digest {
                return Err(unreadable(&key, crate::blob::Error::Damaged(digest)));
            }
            self.totals.artifacts.add(size);
        }
        Ok(())
    }

    async fn transcripts(&mut self, table: &Table) -> Result<()> {
        let place = place(table, "blob");
        let mut written = HashSet::new();
        let mut rows = self.snapshot.rows(table, "");
        while let Some(row) = rows.try_next().await? {
            let Some(Cell::Text(blob)) = place.and_then(|at| row.get(at)) else {
                return Err(Error::internal("transcripts has other columns"));
            };
            let blob: Digest = blob.parse().map_err(Error::internal)?;
            if !written.insert(blob) {
                continue;
            }
            let bytes = self.bytes.transcripts.get(blob).await.map_err(Error::storage)?;
            self.tape.file(&format!("transcripts/{blob}"), &bytes).await?;
            self.totals.transcripts.add(bytes.len() as u64);
        }
        Ok(())
    }

    async fn rows(&mut self, table: &Table) -> Result<()> {
        let (mut tally, mut number, mut chunk) = (Tally::default(), 0, Vec::new());
        {
            let mut rows = pin!(self.snapshot.rows(table, only(&table.name)));
            while let Some(row) = rows.try_next().await? {
                let from = chunk.len();
                line::write(row, &mut chunk)?;
                tally.add(&chunk[from..]);
                if chunk.len() >= CHUNK {
                    number += 1;
                    self.tape.file(&name(table, number), &std::mem::take(&mut chunk)).await?;
                }
            }
        }
        if !chunk.is_empty() {
            self.tape.file(&name(table, number + 1), &chunk).await?;
        }
        self.done.rows.push((table.name.clone(), tally.rows));
        self.totals.tables.insert(table.name.clone(), tally.into());
        Ok(())
    }
}

fn name(table: &Table, number: u64) -> String {
    format!("rows/{}/{number:08}.ndjson", table.name)
}

fn place(table: &Table, column: &str) -> Option<usize> {
    table.columns.iter().position(|found| found.name == column)
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(Error::internal)
}

fn unreadable(key: &Key, error: crate::blob::Error) -> Error {
    let message = format!(
        "the bytes {} of artifacts of the type `{}` cannot be read; `baton artifact verify` says of which, delete those or put the bytes again",
        key.digest, key.kind
    );
    Error::new(Kind::FailedPrecondition, Reason::ArtifactDamaged, message).caused_by(error)
}
