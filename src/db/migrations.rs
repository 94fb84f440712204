//! What a database has of the migrations that this binary knows, on either engine.
//!
//! A schema without a version record, made by hand or by a tool before there were migrations, is
//! adopted: if its tables have the columns of the first migration, that counts as applied.

use sqlx::migrate::{Migrate, MigrateError, Migrator};

use crate::error::{Error, Kind, Reason, Result};

/// Migrations known and applied.
#[derive(Debug, Clone)]
pub(super) struct Migrations {
    /// Those of this binary, as (version, name).
    pub(super) known: Vec<(i64, String)>,
    /// Versions applied.
    pub(super) applied: Vec<i64>,
    /// There are tables and no record of a version.
    pub(super) legacy: bool,
}

/// What a database has; `columns` are those of its tables, as `table.column`.
pub(super) async fn look(
    migrator: &Migrator,
    conn: &mut impl Migrate,
    versioned: bool,
    columns: &[String],
) -> Result<Migrations> {
    let known = migrator.iter().map(|m| (m.version, m.description.to_string())).collect();
    let mut found = Migrations { known, applied: Vec::new(), legacy: false };
    if versioned {
        let applied = conn.list_applied_migrations(&migrator.table_name).await.map_err(refused)?;
        found.applied = applied.into_iter().map(|migration| migration.version).collect();
    } else if columns.iter().any(|column| column.starts_with("tasks.")) {
        let first = migrator.iter().next().map(|first| first.sql.as_str()).unwrap_or_default();
        require_columns(first, columns)?;
        found.legacy = true;
    }
    Ok(found)
}

/// Applies what is pending.
pub(super) async fn apply(
    migrator: &Migrator,
    conn: &mut impl Migrate,
    found: &Migrations,
) -> Result<()> {
    if found.legacy {
        migrator.run_direct(Some(1), conn, true).await.map_err(refused)?;
        tracing::info!("the schema had no version record; it was taken for version 1");
    }
    migrator.run_direct(None, conn, false).await.map_err(refused)
}

/// Refuses a schema that lacks columns of the tables that a migration makes.
fn require_columns(migration: &str, columns: &[String]) -> Result<()> {
    let missing: Vec<_> =
        made(migration).into_iter().filter(|column| !columns.contains(column)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        Kind::FailedPrecondition,
        Reason::StateConflict,
        format!(
            "the database has tables without a version record, and they are not baton's: {} \
             missing; name an empty database, or add what is missing",
            missing.join(", ")
        ),
    ))
}

/// The columns, as `table.column`, that a migration's `CREATE TABLE`s make, a line each.
fn made(migration: &str) -> Vec<String> {
    let mut table = None;
    let mut made = Vec::new();
    for line in migration.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("CREATE TABLE ") {
            table = name.split([' ', '(']).next();
        } else if line.starts_with(')') {
            table = None;
        } else if let Some(table) = table {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap_or_default().trim_matches('"');
            let is_column =
                !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            if is_column {
                made.push(format!("{table}.{name}"));
            }
        }
    }
    made
}

fn refused(error: MigrateError) -> Error {
    match error {
        MigrateError::VersionMissing(version) => Error::new(
            Kind::FailedPrecondition,
            Reason::StateConflict,
            format!(
                "the database has migration {version}, which this binary does not know; \
                 run the newer binary that made it, or restore a backup"
            ),
        ),
        MigrateError::VersionMismatch(version) => Error::new(
            Kind::FailedPrecondition,
            Reason::StateConflict,
            format!("migration {version} of the database differs from this binary's"),
        ),
        other => Error::storage(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_of_a_migration_are_found() {
        let made = made(
            "CREATE TABLE a (\n  id TEXT, -- x\n  \"offset\" INTEGER,\n  PRIMARY KEY (id)\n) STRICT;\n\
             CREATE INDEX i ON a (id);\n-- comment\nCREATE TABLE b (\n  x TEXT\n);",
        );
        assert_eq!(made, ["a.id", "a.offset", "b.x"]);
    }

    #[test]
    fn a_schema_that_lacks_a_column_is_refused_by_name() {
        let error = require_columns("CREATE TABLE a (\n  id TEXT\n);", &["tasks.id".into()]);
        assert!(error.unwrap_err().message().contains("a.id missing"));
    }
}
