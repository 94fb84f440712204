//! Statements: a text, its values, its rows.

use std::ops::ControlFlow;

use futures_util::TryStreamExt as _;

use super::{
    Bulk, Tx,
    row::{FromRow, Row},
    value::{Arguments, Bind, Values},
};
use crate::error::{Error, Result};

/// The text of a statement with numbered places (`$1`); the same for both engines where their
/// languages allow it.
#[derive(Clone, Copy, Debug)]
pub struct Sql {
    sqlite: &'static str,
}

impl Sql {
    /// A text that both engines understand.
    pub const fn new(text: &'static str) -> Self {
        Self { sqlite: text }
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
    tx: &'t mut Tx,
    sql: Sql,
    values: Values,
}

impl Tx {
    /// A statement to run here.
    pub fn query(&mut self, sql: Sql) -> Query<'_> {
        let values = Values::new(self.engine());
        Query { tx: self, sql, values }
    }
}

impl Query<'_> {
    /// Adds the next value.
    #[must_use]
    pub fn bind(mut self, value: impl Bind) -> Self {
        self.values.bind(value);
        self
    }

    /// Runs it; returns how many rows it changed.
    pub async fn run(self) -> Result<u64> {
        match (self.tx, self.values.finish()?) {
            (Tx::Sqlite(conn), Arguments::Sqlite(values)) => {
                let done = sqlx::query_with(self.sql.sqlite, values).execute(conn).await?;
                Ok(done.rows_affected())
            }
        }
    }

    /// Its rows.
    pub async fn all<T: FromRow>(self) -> Result<Vec<T>> {
        let rows = match (self.tx, self.values.finish()?) {
            (Tx::Sqlite(conn), Arguments::Sqlite(values)) => {
                sqlx::query_with(self.sql.sqlite, values).fetch_all(conn).await?
            }
        };
        rows.into_iter().map(|row| T::from_row(&Row::Sqlite(row))).collect()
    }

    /// Its first row, if there is one.
    pub async fn first<T: FromRow>(self) -> Result<Option<T>> {
        let row = match (self.tx, self.values.finish()?) {
            (Tx::Sqlite(conn), Arguments::Sqlite(values)) => {
                sqlx::query_with(self.sql.sqlite, values).fetch_optional(conn).await?
            }
        };
        row.map(|row| T::from_row(&Row::Sqlite(row))).transpose()
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
        match (self.tx, self.values.finish()?) {
            (Tx::Sqlite(conn), Arguments::Sqlite(values)) => {
                let mut rows = sqlx::query_with(self.sql.sqlite, values).fetch(conn);
                while let Some(row) = rows.try_next().await? {
                    if take(T::from_row(&Row::Sqlite(row))?).is_break() {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }
}
