//! Rows that come out of statements, from either engine.

use std::borrow::Cow;

use bytes::Bytes;
#[cfg(feature = "postgres")]
use sqlx::postgres::PgRow;
use sqlx::{Row as _, sqlite::SqliteRow};

#[cfg(feature = "postgres")]
use super::postgres::value::{read_id, read_text};
use crate::{
    clock::Micros,
    error::{Error, Result},
    id::{ArtifactId, InstanceId, Namespace, TaskId, UploadId},
};

/// A row; columns are numbered from 0.
pub enum Row {
    #[doc(hidden)]
    Sqlite(SqliteRow),
    #[cfg(feature = "postgres")]
    #[doc(hidden)]
    Postgres(PgRow),
}

impl Row {
    /// The value of a column.
    pub fn get<T: Column>(&self, index: usize) -> Result<T> {
        T::read(self, index)
    }

    /// A text or a JSON document, parsed.
    pub fn parse<T>(&self, index: usize) -> Result<T>
    where
        T: std::str::FromStr,
        T::Err: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.optional_parse(index)?.ok_or_else(|| null(index))
    }

    /// As [`parse`](Self::parse), unless it is NULL.
    pub fn optional_parse<T>(&self, index: usize) -> Result<Option<T>>
    where
        T: std::str::FromStr,
        T::Err: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Some(text) = self.text(index)? else { return Ok(None) };
        let value = text
            .parse()
            .map_err(|error: T::Err| Error::internal(format!("column {index}: {}", error.into())));
        value.map(Some)
    }

    /// A value out of a JSON document.
    pub fn json<T: serde::de::DeserializeOwned>(&self, index: usize) -> Result<T> {
        self.optional_json(index)?.ok_or_else(|| null(index))
    }

    /// A value out of a JSON document, unless it is NULL.
    pub fn optional_json<T: serde::de::DeserializeOwned>(&self, index: usize) -> Result<Option<T>> {
        let text = self.text(index)?;
        text.map(|text| serde_json::from_str(&text).map_err(Error::internal)).transpose()
    }

    fn text(&self, index: usize) -> Result<Option<Cow<'_, str>>> {
        match self {
            Self::Sqlite(row) => {
                let text: Option<&str> = row.try_get(index).map_err(Error::internal)?;
                Ok(text.map(Into::into))
            }
            #[cfg(feature = "postgres")]
            Self::Postgres(row) => read_text(row, index),
        }
    }

    fn int(&self, index: usize) -> Result<Option<i64>> {
        match self {
            Self::Sqlite(row) => row.try_get(index).map_err(Error::internal),
            #[cfg(feature = "postgres")]
            Self::Postgres(row) => row.try_get(index).map_err(Error::internal),
        }
    }
}

fn null(index: usize) -> Error {
    Error::internal(format!("column {index} is NULL"))
}

/// What a column can be read as.
pub trait Column: Sized {
    /// Reads it.
    fn read(row: &Row, index: usize) -> Result<Self> {
        Self::read_optional(row, index)?.ok_or_else(|| null(index))
    }
    /// Reads it, unless it is NULL.
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>>;
}

impl<T: Column> Column for Option<T> {
    fn read(row: &Row, index: usize) -> Result<Self> {
        T::read_optional(row, index)
    }
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        T::read_optional(row, index).map(Some)
    }
}

impl Column for i64 {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        row.int(index)
    }
}

impl Column for i32 {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        row.int(index)?.map(|value| value.try_into().map_err(Error::internal)).transpose()
    }
}

impl Column for u32 {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        row.int(index)?.map(|value| value.try_into().map_err(Error::internal)).transpose()
    }
}

impl Column for u64 {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        row.int(index)?.map(|value| value.try_into().map_err(Error::internal)).transpose()
    }
}

impl Column for Micros {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        Ok(row.int(index)?.map(Self))
    }
}

impl Column for bool {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        match row {
            Row::Sqlite(row) => row.try_get(index).map_err(Error::internal),
            #[cfg(feature = "postgres")]
            Row::Postgres(row) => row.try_get(index).map_err(Error::internal),
        }
    }
}

impl Column for String {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        Ok(row.text(index)?.map(Cow::into_owned))
    }
}

impl Column for Namespace {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        Ok(row.text(index)?.map(|text| Self::from(&*text)))
    }
}

impl Column for Vec<u8> {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        match row {
            Row::Sqlite(row) => row.try_get(index).map_err(Error::internal),
            #[cfg(feature = "postgres")]
            Row::Postgres(row) => row.try_get(index).map_err(Error::internal),
        }
    }
}

impl Column for Bytes {
    fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
        Ok(Vec::read_optional(row, index)?.map(Into::into))
    }
}

macro_rules! ids {
    ($($type:ident)*) => {$(
        impl Column for $type {
            fn read_optional(row: &Row, index: usize) -> Result<Option<Self>> {
                match row {
                    Row::Sqlite(_) => {
                        row.text(index)?.map(|id| id.parse().map_err(Error::internal)).transpose()
                    }
                    #[cfg(feature = "postgres")]
                    Row::Postgres(row) => Ok(read_id(row, index)?.map($type)),
                }
            }
        }
    )*};
}

ids!(TaskId ArtifactId UploadId InstanceId);

/// What a row can be read as.
pub trait FromRow: Sized {
    /// Reads it.
    fn from_row(row: &Row) -> Result<Self>;
}

macro_rules! tuples {
    ($(($($column:ident $index:tt),+))*) => {$(
        impl<$($column: Column),+> FromRow for ($($column,)+) {
            fn from_row(row: &Row) -> Result<Self> {
                Ok(($(row.get::<$column>($index)?,)+))
            }
        }
    )*};
}

tuples! {
    (A 0)
    (A 0, B 1)
    (A 0, B 1, C 2)
    (A 0, B 1, C 2, D 3)
    (A 0, B 1, C 2, D 3, E 4)
    (A 0, B 1, C 2, D 3, E 4, F 5)
}
