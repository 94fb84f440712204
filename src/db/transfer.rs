//! Whole tables, whatever they are: read from a snapshot, and written in one transaction, so that
//! an installation can move from one engine to the other.
//!
//! Tables and columns are found in the database itself: one that a later migration adds travels
//! without being named here. What a column holds is its [`Kind`]; a column of another type is the
//! engine's own, and is left to its default.

use std::fmt::Write as _;

use futures_util::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use sha2::{Digest as _, Sha256};
use sqlx::{
    AssertSqlSafe, Connection as _, Row as _, SqliteConnection, TypeInfo as _, ValueRef as _,
    sqlite::SqliteRow,
};

#[cfg(feature = "postgres")]
use super::postgres::transfer as postgres;
use super::{Engine, Location, Tx, sqlite};
use crate::error::{Error, Kind as ErrorKind, Reason, Result};

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number.
    Int,
    /// Yes or no; as a cell, 1 or 0.
    Bool,
    /// Text.
    Text,
    /// Bytes.
    Bytes,
    /// A UUID; as a cell, text.
    Id,
    /// A JSON document; as a cell, text.
    Json,
}

/// A column that travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: Kind,
    /// Whether a row may come without it.
    pub optional: bool,
}

/// A table, with the columns that travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// In the order of the database.
    pub columns: Vec<Column>,
}

/// One value of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    /// NULL.
    Null,
    /// A number, or yes and no as 1 and 0.
    Int(i64),
    /// A text, a UUID or a JSON document.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
}

/// Number and digest of rows, in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many.
    pub rows: u64,
    /// Sum of the rows' digests.
    pub digest: u128,
}

impl Tally {
    /// Adds a row, by its text.
    pub fn add(&mut self, row: &[u8]) {
        self.rows += 1;
        let digest: [u8; 32] = Sha256::digest(row).into();
        let (half, _) = digest.split_at(16);
        let half = half.iter().fold(0_u128, |sum, byte| (sum << 8) | u128::from(*byte));
        self.digest = self.digest.wrapping_add(half);
    }

    /// Adds a row as any database gives it back: of a document, what it says.
    pub fn add_cells<'c>(&mut self, cells: impl Iterator<Item = (Kind, &'c Cell)>) -> Result<()> {
        let mut row = Vec::new();
        for (kind, cell) in cells {
            match cell {
                Cell::Null => row.push(0),
                Cell::Int(value) => {
                    row.push(1);
                    row.extend(value.to_be_bytes());
                }
                Cell::Text(text) if kind == Kind::Json => put(&mut row, 2, &said(text)?),
                Cell::Text(text) => put(&mut row, 2, text.as_bytes()),
                Cell::Bytes(bytes) => put(&mut row, 3, bytes),
            }
        }
        self.add(&row);
        Ok(())
    }
}

fn put(row: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    row.push(tag);
    row.extend((bytes.len() as u64).to_be_bytes());
    row.extend(bytes);
}

/// A document in one form: engines differ in spaces, in the order of names and in how they write
/// numbers.
fn said(document: &str) -> Result<Vec<u8>> {
    fn add(value: &serde_json::Value, to: &mut Vec<u8>) {
        use serde_json::Value;
        match value {
            Value::Null => to.push(b'n'),
            Value::Bool(value) => to.push(if *value { b't' } else { b'f' }),
            Value::Number(number) => {
                let float = number.as_f64().unwrap_or(f64::NAN);
                let whole = (float.fract() == 0.0 && float.abs() < 9e18).then_some(float as i64);
                match number.as_i64().or(whole) {
                    Some(integer) => put(to, b'i', &integer.to_be_bytes()),
                    None => put(to, b'd', &float.to_bits().to_be_bytes()),
                }
            }
            Value::String(text) => put(to, b's', text.as_bytes()),
            Value::Array(values) => {
                to.push(b'[');
                for value in values {
                    add(value, to);
                }
                to.push(b']');
            }
            Value::Object(fields) => {
                to.push(b'{');
                let mut names: Vec<_> = fields.iter().collect();
                names.sort_unstable_by_key(|(name, _)| *name);
                for (name, value) in names {
                    put(to, b's', name.as_bytes());
                    add(value, to);
                }
                to.push(b'}');
            }
        }
    }
    let mut text = Vec::new();
    add(&serde_json::from_str(document).map_err(Error::internal)?, &mut text);
    Ok(text)
}

/// A database as it was at one moment.
pub struct Snapshot {
    tx: Tx,
    tables: Vec<Table>,
}

impl Snapshot {
    /// Takes it; a server may run.
    pub async fn take(at: &Location) -> Result<Self> {
        let mut tx = match at {
            Location::File(path) => Tx::Sqlite(sqlite::open_read_only(path).await?),
            #[cfg(feature = "postgres")]
            Location::Url(url) => Tx::Postgres(postgres::connect(url).await?),
            #[cfg(not(feature = "postgres"))]
            Location::Url(_) => return Err(super::admin::without_postgres()),
        };
        let begin = match tx {
            Tx::Sqlite(_) => "BEGIN",
            #[cfg(feature = "postgres")]
            Tx::Postgres(_) => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        };
        execute(&mut tx, begin).await?;
        // The first read is what fixes the moment.
        let tables = tables(&mut tx).await?;
        Ok(Self { tx, tables })
    }

    /// Its tables, those that others refer to first.
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Rows of a table, those only for which a condition holds.
    pub fn rows(&mut self, table: &Table, only: &str) -> BoxStream<'_, Result<Vec<Cell>>> {
        rows(&mut self.tx, table, only)
    }

    /// How many rows there are for which a condition holds.
    pub async fn count(&mut self, table: &Table, only: &str) -> Result<u64> {
        count(&mut self.tx, table, only).await
    }

    /// Lets it go.
    pub async fn close(self) {
        close(self.tx).await;
    }
}

/// A database that is written to, in one transaction that nobody else writes beside.
pub struct Target {
    tx: Tx,
    tables: Vec<Table>,
}

impl Target {
    /// Begins, when all who write have ended.
    pub async fn begin(at: &Location) -> Result<Self> {
        let mut tx = match at {
            Location::File(path) => Tx::Sqlite(sqlite::open_alone(path).await?),
            #[cfg(feature = "postgres")]
            Location::Url(url) => Tx::Postgres(postgres::connect(url).await?),
            #[cfg(not(feature = "postgres"))]
            Location::Url(_) => return Err(super::admin::without_postgres()),
        };
        match &tx {
            Tx::Sqlite(_) => execute(&mut tx, "BEGIN IMMEDIATE").await?,
            #[cfg(feature = "postgres")]
            Tx::Postgres(_) => execute(&mut tx, "BEGIN").await?,
        }
        let tables = tables(&mut tx).await?;
        #[cfg(feature = "postgres")]
        if let Tx::Postgres(_) = &tx
            && !tables.is_empty()
        {
            let names: Vec<_> = tables.iter().map(|table| quoted(&table.name)).collect();
            let lock = format!("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", names.join(", "));
            execute(&mut tx, &lock).await?;
        }
        Ok(Self { tx, tables })
    }

    /// Its tables, those that others refer to first.
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// How many rows there are.
    pub async fn count(&mut self, table: &Table) -> Result<u64> {
        count(&mut self.tx, table, "").await
    }

    /// Deletes all rows of a table.
    pub async fn clear(&mut self, table: &Table) -> Result<()> {
        execute(&mut self.tx, &format!("DELETE FROM {}", quoted(&table.name))).await
    }

    /// Adds rows, whose cells are those of the table's columns in their order.
    pub async fn insert(&mut self, table: &Table, rows: Vec<Vec<Cell>>) -> Result<()> {
        match &mut self.tx {
            Tx::Sqlite(conn) => insert(conn, table, rows).await,
            #[cfg(feature = "postgres")]
            Tx::Postgres(conn) => postgres::insert(conn, table, rows).await,
        }
    }

    /// What a table has now.
    pub async fn tally(&mut self, table: &Table) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut rows = rows(&mut self.tx, table, "");
        while let Some(cells) = rows.try_next().await? {
            tally.add_cells(table.columns.iter().map(|column| column.kind).zip(&cells))?;
        }
        Ok(tally)
    }

    /// Makes all of it last.
    pub async fn commit(mut self) -> Result<()> {
        #[cfg(feature = "postgres")]
        if let Tx::Postgres(conn) = &mut self.tx {
            postgres::count_on(conn, &self.tables).await?;
        }
        execute(&mut self.tx, "COMMIT").await?;
        close(self.tx).await;
        Ok(())
    }

    /// Undoes all of it.
    pub async fn undo(mut self) {
        // A connection that is closed undoes it as well.
        let _ = execute(&mut self.tx, "ROLLBACK").await;
        close(self.tx).await;
    }
}

/// A name as SQL has it.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

async fn execute(tx: &mut Tx, text: &str) -> Result<()> {
    let query = sqlx::raw_sql(AssertSqlSafe(text.to_owned()));
    match tx {
        Tx::Sqlite(conn) => query.execute(conn).await.map(drop)?,
        #[cfg(feature = "postgres")]
        Tx::Postgres(conn) => query.execute(conn).await.map(drop)?,
    }
    Ok(())
}

async fn close(tx: Tx) {
    // Nothing is under way that could be lost.
    match tx {
        Tx::Sqlite(conn) => drop(conn.close().await),
        #[cfg(feature = "postgres")]
        Tx::Postgres(conn) => drop(conn.close().await),
    }
}

async fn tables(tx: &mut Tx) -> Result<Vec<Table>> {
    let found: Vec<(String, String, String, bool)> = match tx {
        Tx::Sqlite(conn) => sqlx::query_as(
            "SELECT m.name, c.name, lower(c.type), c.\"notnull\" = 0 OR c.dflt_value IS NOT NULL
                 FROM sqlite_master m JOIN pragma_table_info(m.name) c
                 WHERE m.type = 'table' AND m.name NOT GLOB 'sqlite_*' AND m.name NOT GLOB '_sqlx_*'
                 ORDER BY m.rowid, c.cid",
        )
        .fetch_all(conn)
        .await?,
        #[cfg(feature = "postgres")]
        Tx::Postgres(conn) => postgres::columns(conn).await?,
    };
    let mut tables: Vec<Table> = Vec::new();
    for (table, name, kind, optional) in found {
        if tables.last().is_none_or(|last| last.name != table) {
            tables.push(Table { name: table.clone(), columns: Vec::new() });
        }
        let kind = match kind.as_str() {
            "integer" | "bigint" | "smallint" => Kind::Int,
            "boolean" => Kind::Bool,
            "text" => Kind::Text,
            "blob" | "bytea" => Kind::Bytes,
            "uuid" => Kind::Id,
            "jsonb" => Kind::Json,
            _ if optional => continue,
            other => {
                return Err(Error::internal(format!("{table}.{name} is of the type {other}")));
            }
        };
        if let Some(last) = tables.last_mut() {
            last.columns.push(Column { name, kind, optional });
        }
    }
    Ok(tables)
}

fn condition(only: &str) -> String {
    if only.is_empty() { String::new() } else { format!(" WHERE {only}") }
}

async fn count(tx: &mut Tx, table: &Table, only: &str) -> Result<u64> {
    let text = format!("SELECT COUNT(*) FROM {}{}", quoted(&table.name), condition(only));
    let query = sqlx::query_scalar(AssertSqlSafe(text.clone()));
    let n: i64 = match tx {
        Tx::Sqlite(conn) => query.fetch_one(conn).await?,
        #[cfg(feature = "postgres")]
        Tx::Postgres(conn) => sqlx::query_scalar(AssertSqlSafe(text)).fetch_one(conn).await?,
    };
    Ok(n.unsigned_abs())
}

fn rows<'t>(tx: &'t mut Tx, table: &Table, only: &str) -> BoxStream<'t, Result<Vec<Cell>>> {
    let mut text = "SELECT ".to_owned();
    for (at, column) in table.columns.iter().enumerate() {
        // Writing to a string cannot fail.
        let _ = write!(text, "{}{}", if at == 0 { "" } else { ", " }, quoted(&column.name));
    }
    let _ = write!(text, " FROM {}{}", quoted(&table.name), condition(only));
    let text = AssertSqlSafe(text);
    let n_columns = table.columns.len();
    match tx {
        Tx::Sqlite(conn) => {
            let rows = sqlx::query(text).fetch(conn);
            rows.map(move |row| read(&row?, n_columns)).boxed()
        }
        #[cfg(feature = "postgres")]
        Tx::Postgres(conn) => {
            let kinds: Vec<_> = table.columns.iter().map(|column| column.kind).collect();
            let rows = sqlx::query(text).fetch(conn);
            rows.map(move |row| postgres::read(&row?, &kinds)).boxed()
        }
    }
}

fn read(row: &SqliteRow, n_columns: usize) -> Result<Vec<Cell>> {
    let cell = |at: usize| {
        let value = row.try_get_raw(at).map_err(Error::internal)?;
        if value.is_null() {
            return Ok(Cell::Null);
        }
        let kind = value.type_info().name().to_owned();
        match kind.as_str() {
            "INTEGER" => row.try_get(at).map(Cell::Int),
            "TEXT" => row.try_get(at).map(Cell::Text),
            "BLOB" => row.try_get(at).map(Cell::Bytes),
            other => return Err(Error::internal(format!("column {at} holds {other}"))),
        }
        .map_err(Error::internal)
    };
    (0..n_columns).map(cell).collect()
}

async fn insert(conn: &mut SqliteConnection, table: &Table, rows: Vec<Vec<Cell>>) -> Result<()> {
    let names: Vec<_> = table.columns.iter().map(|column| quoted(&column.name)).collect();
    let places = vec!["?"; names.len()].join(", ");
    let text =
        format!("INSERT INTO {} ({}) VALUES ({places})", quoted(&table.name), names.join(", "));
    for row in rows {
        let mut query = sqlx::query(AssertSqlSafe(text.clone()));
        for cell in row {
            query = match cell {
                Cell::Null => query.bind(None::<i64>),
                Cell::Int(value) => query.bind(value),
                Cell::Text(value) => query.bind(value),
                Cell::Bytes(value) => query.bind(value),
            };
        }
        query.execute(&mut *conn).await.map_err(|error| refused(table, error))?;
    }
    Ok(())
}

/// A row that a table does not take.
pub(super) fn refused(table: &Table, error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(error) => Error::new(
            ErrorKind::FailedPrecondition,
            Reason::StateConflict,
            format!("the table {} does not take a row: {error}", table.name),
        ),
        other => other.into(),
    }
}

/// The schema, as the last migration of this binary for an engine.
pub fn schema(engine: Engine) -> i64 {
    match engine {
        Engine::Sqlite => sqlite::last_migration(),
        #[cfg(feature = "postgres")]
        Engine::Postgres => super::postgres::migrate::last_migration(),
        #[cfg(not(feature = "postgres"))]
        Engine::Postgres => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(kind: Kind, cells: &[Cell]) -> Tally {
        let mut tally = Tally::default();
        for cell in cells {
            tally.add_cells([(kind, cell)].into_iter()).unwrap();
        }
        tally
    }

    #[test]
    fn documents_that_say_the_same_have_one_digest() {
        let of = |text: &str| tally(Kind::Json, &[Cell::Text(text.into())]);
        let one = of(r#"{"a": 1.0, "b": [1e2, "x", 0], "c": 1e22}"#);
        assert_eq!(one, of(r#"{"c":10000000000000000000000,"b":[100,"x",-0.0],"a":1}"#));
        for other in [r#"{"a":1}"#, r#"{"a":1,"b":["x",100,0],"c":1e22}"#, "[]", "null", "\"\""] {
            assert_ne!(one, of(other), "{other}");
        }
    }

    #[test]
    fn a_tally_knows_which_rows_and_not_their_order() {
        let (a, b) = (Cell::Text("a".into()), Cell::Text("b".into()));
        let both = tally(Kind::Text, &[a.clone(), b.clone()]);
        assert_eq!(both, tally(Kind::Text, &[b.clone(), a.clone()]));
        assert_ne!(both, tally(Kind::Text, &[a.clone(), a.clone()]));
        assert_ne!(tally(Kind::Text, &[a]), tally(Kind::Bytes, &[Cell::Bytes(b"a".to_vec())]));
    }
}
