//! Whole tables of Postgres.

use std::fmt::Write as _;

use sqlx::{AssertSqlSafe, PgConnection, Row as _, ValueRef as _, postgres::PgRow};

use super::{
    options,
    value::{Columns, read_text},
};
use crate::{
    db::{
        Type, Value,
        transfer::{Cell, Kind, Table, quoted, refused},
    },
    error::{Error, Result},
};

/// A connection without the limits of those of a server: what is done on it takes its time.
pub(in crate::db) async fn connect(url: &str) -> Result<PgConnection> {
    super::connect(&options(url)?).await
}

/// Columns of the tables, as (table, column, type, whether it may be left out), those that others
/// refer to first.
pub(in crate::db) async fn columns(
    conn: &mut PgConnection,
) -> Result<Vec<(String, String, String, bool)>> {
    Ok(sqlx::query_as(
        "SELECT c.relname::text, a.attname::text, format_type(a.atttypid, NULL),
                NOT a.attnotnull OR a.atthasdef
         FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
         WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
         AND a.attnum > 0 AND NOT a.attisdropped AND left(c.relname::text, 6) <> '_sqlx_'
         ORDER BY c.oid, a.attnum",
    )
    .fetch_all(conn)
    .await?)
}

/// The cells of a row whose columns are of these kinds.
pub(in crate::db) fn read(row: &PgRow, kinds: &[Kind]) -> Result<Vec<Cell>> {
    let cell = |(at, kind): (usize, &Kind)| {
        if row.try_get_raw(at).map_err(Error::internal)?.is_null() {
            return Ok(Cell::Null);
        }
        match kind {
            Kind::Int => read_int(row, at).map(Cell::Int),
            Kind::Bool => row.try_get(at).map(|value: bool| Cell::Int(value.into())),
            Kind::Bytes => row.try_get(at).map(Cell::Bytes),
            Kind::Id => {
                row.try_get(at).map(|id: uuid::Uuid| Cell::Text(id.as_hyphenated().to_string()))
            }
            Kind::Text | Kind::Json => {
                let text = read_text(row, at)?.unwrap_or_default();
                return Ok(Cell::Text(text.into_owned()));
            }
        }
        .map_err(Error::internal)
    };
    kinds.iter().enumerate().map(cell).collect()
}

fn read_int(row: &PgRow, at: usize) -> Result<i64, sqlx::Error> {
    let narrow = row.try_get::<i32, _>(at).map(i64::from);
    row.try_get(at).or(narrow).or_else(|_| row.try_get::<i16, _>(at).map(i64::from))
}

/// Adds rows, with one statement.
pub(in crate::db) async fn insert(
    conn: &mut PgConnection,
    table: &Table,
    rows: Vec<Vec<Cell>>,
) -> Result<()> {
    let types: Vec<_> = table.columns.iter().map(|column| array_of(column.kind)).collect();
    let mut columns = Columns::new(&types);
    for row in rows {
        for (column, cell) in table.columns.iter().zip(row) {
            let value = value(column.kind, cell).ok_or_else(|| {
                Error::internal(format!("{}.{} is not {:?}", table.name, column.name, column.kind))
            })?;
            columns.add(value)?;
        }
    }
    let (mut names, mut picked) = (String::new(), String::new());
    let (mut arrays, mut aliases) = (String::new(), String::new());
    for (at, column) in table.columns.iter().enumerate() {
        let comma = if at == 0 { "" } else { ", " };
        let array = match column.kind {
            Kind::Int | Kind::Bool => "bigint[]",
            Kind::Text => "text[]",
            Kind::Bytes => "bytea[]",
            Kind::Id => "uuid[]",
            Kind::Json => "text[]::jsonb[]",
        };
        let test = if column.kind == Kind::Bool { " <> 0" } else { "" };
        // Writing to a string cannot fail.
        let _ = write!(names, "{comma}{}", quoted(&column.name));
        let _ = write!(picked, "{comma}c{at}{test}");
        let _ = write!(arrays, "{comma}${}::{array}", at + 1);
        let _ = write!(aliases, "{comma}c{at}");
    }
    let text = format!(
        "INSERT INTO {} ({names}) SELECT {picked} FROM unnest({arrays}) AS u({aliases})",
        quoted(&table.name)
    );
    let mut values = sqlx::postgres::PgArguments::default();
    columns.add_to(&mut values)?;
    let insert = sqlx::query_with(AssertSqlSafe(text), values);
    insert.execute(conn).await.map_err(|error| refused(table, error))?;
    Ok(())
}

fn array_of(kind: Kind) -> Type {
    match kind {
        Kind::Int | Kind::Bool => Type::Int,
        Kind::Text => Type::Text,
        Kind::Bytes => Type::Bytes,
        Kind::Id => Type::Id,
        Kind::Json => Type::Json,
    }
}

fn value(kind: Kind, cell: Cell) -> Option<Value> {
    Some(match (kind, cell) {
        (Kind::Int | Kind::Bool, Cell::Int(value)) => Value::Int(Some(value)),
        (Kind::Int | Kind::Bool, Cell::Null) => Value::Int(None),
        (Kind::Text, Cell::Text(text)) => Value::Text(Some(text)),
        (Kind::Text, Cell::Null) => Value::Text(None),
        (Kind::Json, Cell::Text(text)) => Value::Json(Some(text)),
        (Kind::Json, Cell::Null) => Value::Json(None),
        (Kind::Bytes, Cell::Bytes(bytes)) => Value::Bytes(Some(bytes)),
        (Kind::Bytes, Cell::Null) => Value::Bytes(None),
        (Kind::Id, Cell::Text(text)) => Value::Id(Some(text.parse().ok()?)),
        (Kind::Id, Cell::Null) => Value::Id(None),
        _ => return None,
    })
}

/// Has the columns that number rows by themselves go on after the largest number.
pub(in crate::db) async fn count_on(conn: &mut PgConnection, tables: &[Table]) -> Result<()> {
    for table in tables {
        for column in table.columns.iter().filter(|column| column.kind == Kind::Int) {
            let sequence: Option<String> =
                sqlx::query_scalar("SELECT pg_get_serial_sequence($1, $2)")
                    .bind(quoted(&table.name))
                    .bind(&column.name)
                    .fetch_one(&mut *conn)
                    .await?;
            let Some(sequence) = sequence else { continue };
            let text = format!(
                "SELECT setval($1::regclass, COALESCE(MAX({}), 0) + 1, false) FROM {}",
                quoted(&column.name),
                quoted(&table.name)
            );
            sqlx::query(AssertSqlSafe(text)).bind(sequence).execute(&mut *conn).await?;
        }
    }
    Ok(())
}
