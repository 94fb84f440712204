//! Values to Postgres and back.
//!
//! JSONB cannot hold U+0000. A document with that in it is kept as a JSON string, its text in
//! base64: the documents of rows are objects, so that a string can be nothing else.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sqlx::{
    Arguments as _, Row as _, TypeInfo as _, ValueRef as _,
    postgres::{PgArguments, PgRow},
};
use uuid::Uuid;

use crate::{
    db::{Type, Value},
    error::{Error, Result},
};

/// Adds a value of a single statement.
pub(in crate::db) fn add_to_postgres(to: &mut PgArguments, value: Value) -> Result<()> {
    match value {
        Value::Int(value) => to.add(value),
        Value::Bool(value) => to.add(value),
        Value::Text(value) | Value::Json(value) => to.add(value.map(plain).transpose()?),
        Value::Bytes(value) => to.add(value),
        Value::Id(value) => to.add(value),
        Value::Ids(ids) => to.add(ids),
        Value::Texts(texts) => to.add(texts),
    }
    .map_err(Error::internal)
}

/// Rows by column: each becomes an array.
pub(in crate::db) struct Columns {
    columns: Vec<Column>,
    /// Of the next value.
    at: usize,
}

enum Column {
    Int(Vec<Option<i64>>),
    Text(Vec<Option<String>>),
    Bytes(Vec<Option<Vec<u8>>>),
    Id(Vec<Option<Uuid>>),
    Json(Vec<Option<String>>),
}

impl Columns {
    pub(in crate::db) fn new(types: &[Type]) -> Self {
        let column = |kind: &Type| match kind {
            Type::Int => Column::Int(Vec::new()),
            Type::Text => Column::Text(Vec::new()),
            Type::Bytes => Column::Bytes(Vec::new()),
            Type::Id => Column::Id(Vec::new()),
            Type::Json => Column::Json(Vec::new()),
        };
        Self { columns: types.iter().map(column).collect(), at: 0 }
    }

    /// Adds the next value of the row.
    pub(in crate::db) fn add(&mut self, value: Value) -> Result<()> {
        let at = self.at;
        self.at = (at + 1) % self.columns.len();
        match (&mut self.columns[at], value) {
            (Column::Int(cells), Value::Int(value)) => cells.push(value),
            (Column::Text(cells), Value::Text(value)) => {
                cells.push(value.map(plain).transpose()?);
            }
            (Column::Bytes(cells), Value::Bytes(value)) => cells.push(value),
            (Column::Id(cells), Value::Id(value)) => cells.push(value),
            (Column::Json(cells), Value::Json(value)) => cells.push(value.map(document)),
            (_, value) => {
                return Err(Error::internal(format!("column {at} does not take {value:?}")));
            }
        }
        Ok(())
    }

    /// Adds an array for each column to what the driver takes.
    pub(in crate::db) fn add_to(self, to: &mut PgArguments) -> Result<()> {
        for column in self.columns {
            match column {
                Column::Int(cells) => to.add(cells),
                Column::Text(cells) | Column::Json(cells) => to.add(cells),
                Column::Bytes(cells) => to.add(cells),
                Column::Id(cells) => to.add(cells),
            }
            .map_err(Error::internal)?;
        }
        Ok(())
    }
}

/// A text, which the server takes without U+0000 only.
fn plain(text: String) -> Result<String> {
    if text.contains('\0') {
        return Err(Error::invalid("text", "holds the character U+0000, which cannot be stored"));
    }
    Ok(text)
}

/// A document as JSONB takes it.
fn document(text: String) -> String {
    if text.contains("\\u0000") { format!("\"{}\"", STANDARD.encode(text)) } else { text }
}

/// A text or a document.
pub(in crate::db) fn read_text(row: &PgRow, index: usize) -> Result<Option<Cow<'_, str>>> {
    let value = row.try_get_raw(index).map_err(Error::internal)?;
    if value.is_null() {
        return Ok(None);
    }
    let is_json = value.type_info().name() == "JSONB";
    let bytes = value.as_bytes().map_err(Error::internal)?;
    if !is_json {
        return std::str::from_utf8(bytes).map(|text| Some(text.into())).map_err(Error::internal);
    }
    // The first byte is the version of the format.
    let (version, text) = bytes.split_at_checked(1).unwrap_or_default();
    if version != [1] {
        return Err(Error::internal(format!("column {index}: JSONB of version {version:?}")));
    }
    let text = std::str::from_utf8(text).map_err(Error::internal)?;
    match text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
        Some(encoded) => {
            let bytes = STANDARD.decode(encoded).map_err(Error::internal)?;
            String::from_utf8(bytes).map(|text| Some(text.into())).map_err(Error::internal)
        }
        None => Ok(Some(text.into())),
    }
}

/// An id.
pub(in crate::db) fn read_id(row: &PgRow, index: usize) -> Result<Option<Uuid>> {
    row.try_get(index).map_err(Error::internal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_of_another_type_than_its_column_is_refused() {
        let mut columns = Columns::new(&[Type::Int, Type::Text]);
        columns.add(Value::Int(Some(1))).unwrap();
        columns.add(Value::Text(None)).unwrap();
        assert!(columns.add(Value::Text(Some("x".into()))).is_err());
    }

    #[test]
    fn a_text_with_a_nul_is_refused_and_a_document_is_wrapped() {
        assert!(plain("a\0b".into()).is_err());
        assert_eq!(document(r#"{"a":"b"}"#.into()), r#"{"a":"b"}"#);
        assert!(document(r#"{"a":"\u0000"}"#.into()).starts_with("\"ey"));
    }
}
