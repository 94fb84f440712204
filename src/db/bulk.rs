//! Statements over many rows at once.
//!
//! On SQLite a statement is prepared for row counts that are powers of two, so that all of them
//! stay in the connection's cache. What is over has no values and counts as rows of NULL, which a
//! statement must leave out: one statement with some rows too many takes less time than the
//! several statements that would fit, each a trip to the connection's thread and back. Values are
//! anonymous (`?`): the driver asks for the name of each value it binds, and SQLite looks a
//! name up by going through all of them, so that numbered values (`$7`) would make a statement
//! over many rows cost the square of its values.

use std::sync::OnceLock;

/// Most rows in one statement: 64 rows of 40 columns stay far below SQLite's 32,766 variables.
const MOST: usize = 64;

const SIZES: usize = MOST.ilog2() as usize + 1;

/// Splits `rows` into slices that one statement takes.
pub fn chunks<T>(rows: &[T]) -> impl Iterator<Item = &[T]> {
    rows.chunks(MOST)
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
    head: &'static str,
    columns: &'static [Type],
    tail: &'static str,
}

impl Bulk {
    /// A statement over rows of these columns.
    pub const fn new(head: &'static str, columns: &'static [Type], tail: &'static str) -> Self {
        Self { texts: [const { OnceLock::new() }; SIZES], head, columns, tail }
    }

    /// Places for values in the text for that many rows.
    pub fn places(&self, rows: usize) -> usize {
        self.columns.len() * rows.next_power_of_two()
    }

    /// SQLite's text for at least `rows` rows, up to 64.
    pub fn text(&'static self, rows: usize) -> &'static str {
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
            for chunk in chunks(&rows) {
                let places = INSERT.text(chunk.len()).matches('?').count();
                assert_eq!(places, 3 * chunk.len().next_power_of_two());
            }
            assert_eq!(chunks(&rows).map(<[()]>::len).sum::<usize>(), n);
        }
    }

    #[test]
    fn a_text_has_a_place_for_each_value_row_by_row() {
        static INSERT: Bulk =
            Bulk::new("INSERT INTO t (a, b) ", &[Type::Int, Type::Text], " RETURNING a");
        assert_eq!(INSERT.text(2), "INSERT INTO t (a, b) VALUES (?, ?), (?, ?) RETURNING a");
    }
}
