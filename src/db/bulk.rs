//! Statements over many rows at once.
//!
//! A statement is prepared for row counts that are powers of two, so that any number of rows
//! takes few statements and all of them stay in the connection's cache. Their values are
//! anonymous (`?`): the driver asks for the name of each value it binds, and SQLite looks a
//! name up by going through all of them, so that numbered values (`$7`) would make a statement
//! over many rows cost the square of its values.

use std::sync::OnceLock;

/// Most rows in one statement: 64 rows of 40 columns stay far below SQLite's 32,766 variables.
const MOST: usize = 64;

const SIZES: usize = MOST.ilog2() as usize + 1;

/// Splits `rows` into slices whose lengths are powers of two.
pub fn chunks<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        if rows.is_empty() {
            return None;
        }
        let size = MOST.min(1 << rows.len().ilog2());
        let (chunk, rest) = rows.split_at(size);
        rows = rest;
        Some(chunk)
    })
}

/// A statement text with a place for rows: `head`, then `(?, ..), (..)`, then `tail`.
pub struct Bulk {
    texts: [OnceLock<String>; SIZES],
    head: &'static str,
    columns: usize,
    tail: &'static str,
}

impl Bulk {
    /// A statement of `columns` values a row.
    pub const fn new(head: &'static str, columns: usize, tail: &'static str) -> Self {
        Self { texts: [const { OnceLock::new() }; SIZES], head, columns, tail }
    }

    /// The text for `rows` rows, a power of two up to 64.
    pub fn text(&'static self, rows: usize) -> &'static str {
        self.texts[rows.ilog2() as usize].get_or_init(|| {
            let mut text = String::from(self.head);
            for row in 0..rows {
                text.push_str(if row == 0 { "(" } else { ", (" });
                for column in 0..self.columns {
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
    fn any_number_of_rows_is_split_into_powers_of_two_in_order() {
        for n in [0, 1, 2, 3, 63, 64, 65, 200] {
            let rows: Vec<usize> = (0..n).collect();
            let split: Vec<&[usize]> = chunks(&rows).collect();
            assert!(split.iter().all(|chunk| chunk.len().is_power_of_two() && chunk.len() <= MOST));
            assert_eq!(split.concat(), rows);
        }
    }

    #[test]
    fn a_text_has_a_place_for_each_value_row_by_row() {
        static INSERT: Bulk = Bulk::new("INSERT INTO t (a, b) VALUES ", 2, " RETURNING a");
        assert_eq!(INSERT.text(2), "INSERT INTO t (a, b) VALUES (?, ?), (?, ?) RETURNING a");
    }
}
