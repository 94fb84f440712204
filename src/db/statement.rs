//! Statements: a text, its values, its rows.

use std::ops::ControlFlow;

use futures_util::TryStreamExt as _;
#[cfg(feature = "postgres")]
use sqlx::{PgConnection, postgres::PgArguments};
use sqlx::{SqliteConnection, sqlite::SqliteArguments};

#[cfg(feature = "postgres")]
use super::postgres::value::add_to_postgres;
use super::{
    Bulk, Engine, Tx,
    row::{FromRow, Row},
    value::{Bind, add_to_sqlite},
};
use crate::error::{Error, Result};

/// The text of a statement with numbered places (`$1`); the same for both engines where their
/// languages allow it. Postgres takes the type of a place from where it is seen first: an
/// optional filter is `(model = $4 OR $4 IS NULL)`, in this order.
#[derive(Clone, Copy, Debug)]
pub struct Sql {
    /// For SQLite.
    pub sqlite: &'static str,
    /// For Postgres.
    pub postgres: &'static str,
}

impl Sql {
    /// A text that both engines understand.
    pub const fn new(text: &'static str) -> Self {
        Self { sqlite: text, postgres: text }
    }

    /// A text for each engine.
    pub const fn each(sqlite: &'static str, postgres: &'static str) -> Self {
        Self { sqlite, postgres }
    }
}

/// A statement of a store, for those who go through all of them.
#[derive(Clone, Copy)]
pub enum Statement {
    /// One with numbered places.
    Query(Sql),
    /// One over rows.
    Rows(&'static Bulk),
}

/// A statement and its values so far.
pub struct Query<'t> {
    run: Run<'t>,
    error: Option<Error>,
}

enum Run<'t> {
    Sqlite(&'t mut SqliteConnection, &'static str, SqliteArguments),
    #[cfg(feature = "postgres")]
    Postgres(&'t mut PgConnection, &'static str, PgArguments),
}

impl Tx {
    /// A statement to run here.
    pub fn query(&mut self, sql: Sql) -> Query<'_> {
        let run = match self {
            Self::Sqlite(conn) => Run::Sqlite(conn, sql.sqlite, SqliteArguments::default()),
            #[cfg(feature = "postgres")]
            Self::Postgres(conn) => Run::Postgres(conn, sql.postgres, PgArguments::default()),
        };
        Query { run, error: None }
    }
}

impl Tx {
    /// Which engine it is of.
    pub fn engine(&self) -> Engine {
        match self {
            Self::Sqlite(_) => Engine::Sqlite,
            #[cfg(feature = "postgres")]
            Self::Postgres(_) => Engine::Postgres,
        }
    }

    /// Has the engine look at a text without running it.
    pub(super) async fn prepare(&mut self, text: &'static str) -> Result<(), sqlx::Error> {
        use sqlx::{Executor as _, SqlSafeStr as _};
        match self {
            Self::Sqlite(conn) => conn.prepare(text.into_sql_str()).await.map(drop),
            #[cfg(feature = "postgres")]
            Self::Postgres(conn) => conn.prepare(text.into_sql_str()).await.map(drop),
        }
    }
}

impl<'t> Query<'t> {
    /// Adds the next value.
    #[must_use]
    pub fn bind(mut self, value: impl Bind) -> Self {
        let done = match &mut self.run {
            Run::Sqlite(_, _, to) => add_to_sqlite(to, value.value()),
            #[cfg(feature = "postgres")]
            Run::Postgres(_, _, to) => add_to_postgres(to, value.value()),
        };
        if let Err(error) = done {
            self.error.get_or_insert(error);
        }
        self
    }

    fn ready(self) -> Result<Run<'t>> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.run),
        }
    }

    /// Runs it; returns how many rows it changed.
    pub async fn run(self) -> Result<u64> {
        Ok(match self.ready()? {
            Run::Sqlite(conn, text, values) => {
                sqlx::query_with(text, values).execute(conn).await?.rows_affected()
            }
            #[cfg(feature = "postgres")]
            Run::Postgres(conn, text, values) => {
                sqlx::query_with(text, values).execute(conn).await?.rows_affected()
            }
        })
    }

    /// Its rows.
    pub async fn all<T: FromRow>(self) -> Result<Vec<T>> {
        match self.ready()? {
            Run::Sqlite(conn, text, values) => {
                let rows = sqlx::query_with(text, values).fetch_all(conn).await?;
                rows.into_iter().map(|row| T::from_row(&Row::Sqlite(row))).collect()
            }
            #[cfg(feature = "postgres")]
            Run::Postgres(conn, text, values) => {
                let rows = sqlx::query_with(text, values).fetch_all(conn).await?;
                rows.into_iter().map(|row| T::from_row(&Row::Postgres(row))).collect()
            }
        }
    }

    /// Its first row, if there is one.
    pub async fn first<T: FromRow>(self) -> Result<Option<T>> {
        match self.ready()? {
            Run::Sqlite(conn, text, values) => {
                let row = sqlx::query_with(text, values).fetch_optional(conn).await?;
                row.map(|row| T::from_row(&Row::Sqlite(row))).transpose()
            }
            #[cfg(feature = "postgres")]
            Run::Postgres(conn, text, values) => {
                let row = sqlx::query_with(text, values).fetch_optional(conn).await?;
                row.map(|row| T::from_row(&Row::Postgres(row))).transpose()
            }
        }
    }

    /// Its first row, which must be there.
    pub async fn one<T: FromRow>(self) -> Result<T> {
        self.first().await?.ok_or_else(|| Error::internal("a row is missing"))
    }

    /// Gives its rows to `take` as they come, until that breaks; returns whether it did.
    pub async fn each<T: FromRow>(
        self,
        mut take: impl FnMut(T) -> ControlFlow<()>,
    ) -> Result<bool> {
        match self.ready()? {
            Run::Sqlite(conn, text, values) => {
                let mut rows = sqlx::query_with(text, values).fetch(conn);
                while let Some(row) = rows.try_next().await? {
                    if take(T::from_row(&Row::Sqlite(row))?).is_break() {
                        return Ok(true);
                    }
                }
            }
            #[cfg(feature = "postgres")]
            Run::Postgres(conn, text, values) => {
                let mut rows = sqlx::query_with(text, values).fetch(conn);
                while let Some(row) = rows.try_next().await? {
                    if take(T::from_row(&Row::Postgres(row))?).is_break() {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }
}
