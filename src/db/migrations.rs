//! What a database has of the migrations that this binary knows, on either engine.
//!
//! A schema without a version record, made by hand or by a tool before there were migrations, is
//! adopted: migrations count as applied, from the first on, as far as it has the columns that they
//! make.

use sqlx::migrate::{Migrate, MigrateError, Migrator};

use crate::error::{Error, Kind, Reason, Result};

/// Migrations known and applied.
#[derive(Debug, Clone)]
pub(super) struct Migrations {
    /// Those of this binary, as (version, name).
    pub(super) known: Vec<(i64, String)>,
    /// Versions applied.
    pub(super) applied: Vec<i64>,
    /// There are tables and no record of a version: which they have.
    pub(super) legacy: Option<i64>,
}

/// What a database has; `columns` are those of its tables, as `table.column`.
pub(super) async fn look(
    migrator: &Migrator,
    conn: &mut impl Migrate,
    versioned: bool,
    columns: &[String],
) -> Result<Migrations> {
    let known = migrator.iter().map(|m| (m.version, m.description.to_string())).collect();
    let mut found = Migrations { known, applied: Vec::new(), legacy: None };
    if versioned {
        let applied = conn.list_applied_migrations(&migrator.table_name).await.map_err(refused)?;
        found.applied = applied.into_iter().map(|migration| migration.version).collect();
    } else if columns.iter().any(|column| column.starts_with("tasks.")) {
        let migrations = migrator.iter().map(|m| (m.version, m.sql.as_str()));
        found.legacy = Some(version_of(migrations, columns)?);
    }
    Ok(found)
}

/// Applies what is pending.
pub(super) async fn apply(
    migrator: &Migrator,
    conn: &mut impl Migrate,
    found: &Migrations,
) -> Result<()> {
    if let Some(version) = found.legacy {
        migrator.run_direct(Some(version), conn, true).await.map_err(refused)?;
        tracing::info!(version, "the schema had no version record; it was taken for what it has");
    }
    migrator.run_direct(None, conn, false).await.map_err(refused)
}

/// The last of the migrations, from the first on, that made these columns. Refused are a schema that
/// lacks the first, and one that has a part of another.
fn version_of<'m>(
    migrations: impl Iterator<Item = (i64, &'m str)>,
    columns: &[String],
) -> Result<i64> {
    let mut version = 0;
    for (next, text) in migrations {
        let made = made(text);
        let n_made = made.len();
        let missing: Vec<_> = made.into_iter().filter(|column| !columns.contains(column)).collect();
        if !missing.is_empty() && (version == 0 || missing.len() < n_made) {
            return Err(lacks(&missing));
        }
        // One that makes no columns cannot be seen; what is after it is refused if it is there.
        if n_made == 0 || !missing.is_empty() {
            break;
        }
        version = next;
    }
    Ok(version)
}

fn lacks(missing: &[String]) -> Error {
    Error::new(
        Kind::FailedPrecondition,
        Reason::StateConflict,
        format!(
            "the database has tables without a version record, and they are not baton's: {} \
             missing; name an empty database, or add what is missing",
            missing.join(", ")
        ),
    )
}

/// The columns, as `table.column`, that a migration's `CREATE TABLE`s and `ADD COLUMN`s make, a line
/// each.
fn made(migration: &str) -> Vec<String> {
    let mut table = None;
    let mut made = Vec::new();
    for line in migration.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("CREATE TABLE ") {
            table = name.split([' ', '(']).next();
        } else if let Some(rest) = line.strip_prefix("ALTER TABLE ") {
            let mut words = rest.split_whitespace();
            if let (Some(table), Some("ADD"), Some("COLUMN"), Some(column)) =
                (words.next(), words.next(), words.next(), words.next())
            {
                made.push(format!("{table}.{column}"));
            }
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
             CREATE INDEX i ON a (id);\n-- comment\nCREATE TABLE b (\n  x TEXT\n);\n\
             ALTER TABLE a ADD COLUMN y TEXT;",
        );
        assert_eq!(made, ["a.id", "a.offset", "b.x", "a.y"]);
    }

    #[test]
    fn a_schema_without_a_record_has_the_migrations_whose_columns_it_has() {
        let migrations = [
            (1, "CREATE TABLE a (\n  id TEXT,\n  x TEXT\n);"),
            (2, "CREATE TABLE b (\n  id TEXT,\n  y TEXT\n);"),
            (3, "ALTER TABLE a ADD COLUMN z TEXT;"),
        ];
        let version = |columns: &[&str]| {
            let columns: Vec<_> = columns.iter().map(ToString::to_string).collect();
            version_of(migrations.into_iter(), &columns)
        };
        assert_eq!(version(&["a.id", "a.x"]).unwrap(), 1);
        assert_eq!(version(&["a.id", "a.x", "b.id", "b.y", "other.id"]).unwrap(), 2);
        assert_eq!(version(&["a.id", "a.x", "b.id", "b.y", "a.z"]).unwrap(), 3);
        for (lacking, named) in [(&["a.id"][..], "a.x missing"), (&["a.id", "a.x", "b.y"], "b.id")]
        {
            let error = version(lacking).unwrap_err();
            assert!(error.message().contains(named), "{lacking:?}: {}", error.message());
        }
    }
}
