//! Statements over many rows at once.
//!
//! On SQLite a statement is prepared for row counts that are powers of two, so that all of them
//! stay in the connection's cache. What is over has no values and counts as rows of NULL, which a
//! statement must leave out: one statement with some rows too many takes less time than the
//! several statements that would fit, each a trip to the connection's thread and back. Values are
//! anonymous (`?`): the driver asks for the name of each value it binds, and SQLite looks a
//! name up by going through all of them, so that numbered values (`$7`) would make a statement
//! over many rows cost the square of its values.
//!
//! On Postgres a statement has one text for any number of rows: each column is an array. Statements
//! that write and do not look at each other's rows are parts of one ([`Bulk::together`]).

use std::{fmt::Write as _, sync::OnceLock};

use super::Engine;

/// Most rows in one statement: 64 rows of 40 columns stay far below SQLite's 32,766 variables.
const MOST: usize = 64;

const SIZES: usize = MOST.ilog2() as usize + 1;

/// Most rows in one statement on Postgres, so that no array grows without a bound.
const MOST_POSTGRES: usize = 1024;

/// Splits `rows` into slices that one statement takes.
pub(super) fn chunks<T>(engine: Engine, rows: &[T]) -> impl Iterator<Item = &[T]> {
    rows.chunks(match engine {
        Engine::Sqlite => MOST,
        Engine::Postgres => MOST_POSTGRES,
    })
}

/// What the values of a column are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// INTEGER; BIGINT.
    Int,
    /// TEXT.
    Text,
    /// BLOB; BYTEA.
    Bytes,
    /// A task's id: TEXT; UUID.
    Id,
    /// A JSON document: TEXT; JSONB.
    Json,
}

/// A statement text with a place for a query that yields the rows: `head`, that query, then
/// `tail`. Rows whose first value is NULL must have no effect.
pub struct Bulk {
    texts: [OnceLock<String>; SIZES],
    postgres: OnceLock<String>,
    head: &'static str,
    columns: &'static [Type],
    tail: &'static str,
    /// What comes last where rows can be held; one writer at a time needs not hold any.
    hold: &'static str,
    #[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "of a server's database"))]
    together: bool,
}

impl Bulk {
    /// A statement over rows of these columns.
    pub const fn new(head: &'static str, columns: &'static [Type], tail: &'static str) -> Self {
        Self::made(head, columns, tail, "", false)
    }

    /// The same, which writes rows that no other statement of the kind next to it in its script
    /// reads or writes: a server may run them as one, each as if it were the first.
    pub const fn together(
        head: &'static str,
        columns: &'static [Type],
        tail: &'static str,
    ) -> Self {
        Self::made(head, columns, tail, "", true)
    }

    /// The same, which holds what it finds until its transaction ends.
    pub const fn holding(
        head: &'static str,
        columns: &'static [Type],
        tail: &'static str,
        hold: &'static str,
    ) -> Self {
        Self::made(head, columns, tail, hold, false)
    }

    const fn made(
        head: &'static str,
        columns: &'static [Type],
        tail: &'static str,
        hold: &'static str,
        together: bool,
    ) -> Self {
        let texts = [const { OnceLock::new() }; SIZES];
        Self { texts, postgres: OnceLock::new(), head, columns, tail, hold, together }
    }

    /// Whether it may be run with others as one.
    #[cfg(feature = "postgres")]
    pub(super) fn goes_together(&self) -> bool {
        self.together
    }

    /// Its columns.
    pub(super) fn columns(&self) -> &'static [Type] {
        self.columns
    }

    /// Places for values in the text for that many rows.
    pub(super) fn places(&self, engine: Engine, rows: usize) -> usize {
        match engine {
            Engine::Sqlite => self.columns.len() * rows.next_power_of_two(),
            Engine::Postgres => self.columns.len() * rows,
        }
    }

    /// The text for at least `rows` rows.
    pub fn text(&'static self, engine: Engine, rows: usize) -> &'static str {
        match engine {
            Engine::Sqlite => self.sqlite_text(rows),
            Engine::Postgres => self.postgres.get_or_init(|| self.postgres_text(1)),
        }
    }

    /// The text for Postgres whose first value has that number.
    fn postgres_text(&self, first: usize) -> String {
        let mut text = format!("{}SELECT * FROM unnest(", self.head);
        for (at, column) in self.columns.iter().enumerate() {
            let arrays = match column {
                Type::Int => "bigint[]",
                Type::Text => "text[]",
                Type::Bytes => "bytea[]",
                Type::Id => "uuid[]",
                Type::Json => "text[]::jsonb[]",
            };
            let comma = if at == 0 { "" } else { ", " };
            // Writing to a string cannot fail.
            let _ = write!(text, "{comma}${}::{arrays}", first + at);
        }
        text.push(')');
        text.push_str(self.tail);
        text.push_str(self.hold);
        text
    }

    /// One statement for Postgres that does what these do and answers with how many rows each
    /// changed; their values follow each other.
    #[cfg(feature = "postgres")]
    pub(super) fn postgres_texts<'b>(bulks: impl Iterator<Item = &'b Self>) -> String {
        let (mut parts, mut counts) = (String::from("WITH "), String::from("SELECT ARRAY["));
        let mut first = 1;
        for (at, bulk) in bulks.enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            let part = bulk.postgres_text(first);
            // Writing to a string cannot fail.
            let _ = write!(parts, "{comma}part{at} AS ({part} RETURNING 1)");
            let _ = write!(counts, "{comma}(SELECT count(*) FROM part{at})");
            first += bulk.columns.len();
        }
        format!("{parts} {counts}]")
    }

    fn sqlite_text(&'static self, rows: usize) -> &'static str {
        let rows = rows.next_power_of_two();
        self.texts[rows.ilog2() as usize].get_or_init(|| {
            let mut text = String::from(self.head);
            text.push_str("VALUES ");
            for row in 0..rows {
                text.push_str(if row == 0 { "(" } else { ", (" });
                for column in 0..self.columns.len() {
                    text.push_str(if column == 0 { "?" } else { ", ?" });
                }
                text.push(')');
            }
            text.push_str(self.tail);
            text
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_rows_has_a_text_with_room_for_them() {
        static INSERT: Bulk = Bulk::new("", &[Type::Int; 3], "");
        for n in [1, 2, 3, 33, 63, 64, 65, 200] {
            let rows = vec![(); n];
            let engine = Engine::Sqlite;
            for chunk in chunks(engine, &rows) {
                let places = INSERT.text(engine, chunk.len()).matches('?').count();
                assert_eq!(places, 3 * chunk.len().next_power_of_two());
                assert_eq!(places, INSERT.places(engine, chunk.len()));
            }
            assert_eq!(chunks(engine, &rows).map(<[()]>::len).sum::<usize>(), n);
        }
    }

    #[test]
    fn a_text_has_a_place_for_each_value_row_by_row() {
        static INSERT: Bulk =
            Bulk::new("INSERT INTO t (a, b) ", &[Type::Int, Type::Json], " RETURNING a");
        assert_eq!(
            INSERT.text(Engine::Sqlite, 2),
            "INSERT INTO t (a, b) VALUES (?, ?), (?, ?) RETURNING a"
        );
        assert_eq!(
            INSERT.text(Engine::Postgres, 2),
            "INSERT INTO t (a, b) SELECT * FROM unnest($1::bigint[], $2::text[]::jsonb[]) \
             RETURNING a"
        );
    }

    #[cfg(feature = "postgres")]
    #[test]
    fn parts_of_one_statement_number_their_values_on() {
        static ONE: Bulk = Bulk::together("INSERT INTO a ", &[Type::Int, Type::Text], "");
        static TWO: Bulk = Bulk::together("INSERT INTO b ", &[Type::Id], "");
        assert_eq!(
            Bulk::postgres_texts([&ONE, &TWO].into_iter()),
            "WITH part0 AS (INSERT INTO a SELECT * FROM unnest($1::bigint[], $2::text[]) RETURNING 1), \
             part1 AS (INSERT INTO b SELECT * FROM unnest($3::uuid[]) RETURNING 1) \
             SELECT ARRAY[(SELECT count(*) FROM part0), (SELECT count(*) FROM part1)]"
        );
    }
}
