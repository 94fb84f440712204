//! Values that go into statements, for either engine.

use bytes::Bytes;
use sqlx::{Arguments as _, sqlite::SqliteArguments};
use uuid::Uuid;

#[cfg(feature = "postgres")]
use super::postgres::value::Columns;
use super::{Engine, Type};
use crate::{
    clock::Micros,
    error::{Error, Result},
    id::{ArtifactId, InstanceId, Namespace, TaskId, UploadId},
};

/// One value. Each NULL has a type, which Postgres wants to know.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// INTEGER; BIGINT.
    Int(Option<i64>),
    /// INTEGER of 0 or 1; BOOLEAN.
    Bool(bool),
    /// TEXT.
    Text(Option<String>),
    /// BLOB; BYTEA.
    Bytes(Option<Vec<u8>>),
    /// TEXT in the usual form; UUID.
    Id(Option<Uuid>),
    /// A JSON document: TEXT; JSONB.
    Json(Option<String>),
    /// Ids to look among: a JSON list for `json_each`; an array for `ANY`.
    Ids(Vec<Uuid>),
    /// Texts to look among, likewise; NULL for no list.
    Texts(Option<Vec<String>>),
}

/// What can be a value.
pub trait Bind {
    /// The value.
    fn value(self) -> Value;
    /// NULL of its type.
    fn null() -> Value;
}

macro_rules! bind {
    ($($type:ty => $variant:ident, |$this:ident| $value:expr;)*) => {$(
        impl Bind for $type {
            fn value(self) -> Value {
                let $this = self;
                Value::$variant(Some($value))
            }
            fn null() -> Value {
                Value::$variant(None)
            }
        }
    )*};
}

bind! {
    i64 => Int, |this| this;
    i32 => Int, |this| this.into();
    u32 => Int, |this| this.into();
    Micros => Int, |this| this.0;
    String => Text, |this| this;
    &String => Text, |this| this.clone();
    &str => Text, |this| this.to_owned();
    &Namespace => Text, |this| this.as_str().to_owned();
    Vec<u8> => Bytes, |this| this;
    &Bytes => Bytes, |this| this.to_vec();
    &[u8] => Bytes, |this| this.to_vec();
    TaskId => Id, |this| this.0;
    ArtifactId => Id, |this| this.0;
    UploadId => Id, |this| this.0;
    InstanceId => Id, |this| this.0;
    Json => Json, |this| this.0;
}

impl<T: Bind> Bind for Option<T> {
    fn value(self) -> Value {
        self.map_or_else(T::null, T::value)
    }
    fn null() -> Value {
        T::null()
    }
}

impl Bind for bool {
    fn value(self) -> Value {
        Value::Bool(self)
    }
    fn null() -> Value {
        Value::Bool(false)
    }
}

impl Bind for &[TaskId] {
    fn value(self) -> Value {
        Value::Ids(self.iter().map(|id| id.0).collect())
    }
    fn null() -> Value {
        Value::Ids(Vec::new())
    }
}

impl Bind for Vec<String> {
    fn value(self) -> Value {
        Value::Texts(Some(self))
    }
    fn null() -> Value {
        Value::Texts(None)
    }
}

/// A JSON document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Json(pub String);

impl Json {
    /// The document of a value.
    pub fn of(value: &impl serde::Serialize) -> Result<Self> {
        serde_json::to_string(value).map(Self).map_err(Error::internal)
    }
}

/// Values of the statements of a script, in the order of their places.
pub struct Values {
    to: Arguments,
    count: usize,
    error: Option<Error>,
}

/// What the driver takes.
pub(super) enum Arguments {
    Sqlite(SqliteArguments),
    #[cfg(feature = "postgres")]
    Postgres(Columns),
}

impl Values {
    /// None yet, for statements over rows of these columns.
    #[cfg_attr(
        not(feature = "postgres"),
        expect(unused_variables, reason = "columns are of one engine")
    )]
    pub(super) fn new(engine: Engine, columns: &[Type]) -> Self {
        let to = match engine {
            #[cfg(feature = "postgres")]
            Engine::Postgres => Arguments::Postgres(Columns::new(columns)),
            // All statements of a message have their values in one list.
            _ => Arguments::Sqlite(SqliteArguments::default()),
        };
        Self { to, count: 0, error: None }
    }

    /// Adds the next value.
    pub fn bind(&mut self, value: impl Bind) -> &mut Self {
        let done = match &mut self.to {
            Arguments::Sqlite(to) => add_to_sqlite(to, value.value()),
            #[cfg(feature = "postgres")]
            Arguments::Postgres(to) => to.add(value.value()),
        };
        self.count += 1;
        if let Err(error) = done {
            self.error.get_or_insert(error);
        }
        self
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// What the driver takes, unless a value was refused.
    pub(super) fn finish(self) -> Result<Arguments> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.to),
        }
    }
}

/// Adds a value for SQLite.
pub(super) fn add_to_sqlite(to: &mut SqliteArguments, value: Value) -> Result<()> {
    match value {
        Value::Int(value) => to.add(value),
        Value::Bool(value) => to.add(value),
        Value::Text(value) | Value::Json(value) => to.add(value),
        Value::Bytes(value) => to.add(value),
        Value::Id(value) => to.add(value.map(|id| id.as_hyphenated().to_string())),
        Value::Ids(ids) => to.add(Json::of(&ids)?.0),
        Value::Texts(texts) => {
            to.add(texts.map(|texts| Json::of(&texts)).transpose()?.map(|list| list.0))
        }
    }
    .map_err(Error::internal)
}
