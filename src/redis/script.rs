//! Scripts: everything that changes several keys is one of them, so that it happens whole or not
//! at all. Their texts lie in `lua/`.

use bytes::Bytes;
use fred::{prelude::Value, types::scripts};

use super::{Error, Redis, Result, wire::Call};

/// A script, and how it may be sent again.
pub(super) struct Script {
    name: &'static str,
    compiled: scripts::Script,
    again: Again,
}

/// Whether a script may be sent again when the connection broke before the answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Again {
    /// A second run changes nothing.
    Harmless,
    /// A second run would deliver twice; the caller asks what became of the first.
    Never,
}

macro_rules! scripts {
    ($($again:ident: $($name:ident)*;)*) => {
        /// All scripts.
        pub(super) struct Scripts {
            $($(pub(super) $name: Script,)*)*
        }

        impl Scripts {
            pub(super) fn new() -> Self {
                Self {
                    $($($name: Script {
                        name: stringify!($name),
                        compiled: scripts::Script::from_lua(concat!(
                            include_str!("lua/common.lua"),
                            include_str!(concat!("lua/", stringify!($name), ".lua")),
                        )),
                        again: Again::$again,
                    },)*)*
                }
            }
        }
    };
}

scripts! {
    Harmless: ack add bury delay depths era give ids known lanes leave move_due note notes position
        recount remove reserve stats tidy;
    Never: claim own pull;
}

/// Arguments of a script.
#[derive(Default)]
pub(super) struct Args(Vec<Value>);

impl Args {
    pub(super) fn text(mut self, text: &str) -> Self {
        self.0.push(Value::String(text.into()));
        self
    }

    pub(super) fn number(self, number: u64) -> Self {
        let mut buffer = itoa::Buffer::new();
        self.text(buffer.format(number))
    }

    pub(super) fn bytes(mut self, bytes: Bytes) -> Self {
        self.0.push(Value::Bytes(bytes));
        self
    }

    pub(super) fn texts<'a>(mut self, texts: impl IntoIterator<Item = &'a str>) -> Self {
        self.0.extend(texts.into_iter().map(|text| Value::String(text.into())));
        self
    }
}

impl Redis {
    /// Runs a script.
    pub(super) async fn run(&self, script: &Script, Args(args): Args) -> Result<Reply> {
        let inner = &self.0;
        let mut whole = Vec::with_capacity(args.len() + 3);
        whole.push(Value::String(script.compiled.sha1().clone()));
        whole.push(Value::Integer(1));
        whole.push(Value::String(inner.settings.prefix.as_str().into()));
        whole.extend(args);
        let call = Call { again: script.again == Again::Harmless, ..Call::new("EVALSHA", whole) };
        let mut outcome = inner.line.call(call.clone()).await;
        if outcome.as_ref().is_err_and(|error| error.details().starts_with("NOSCRIPT")) {
            let text = script.compiled.lua().cloned().unwrap_or_default();
            let load = vec![Value::from_static_str("LOAD"), Value::String(text)];
            let loaded = inner.line.call(Call::new("SCRIPT", load)).await;
            loaded.map_err(Error::command(script.name))?;
            outcome = inner.line.call(call).await;
        }
        let value = outcome.map_err(Error::command(script.name))?;
        let values = match value {
            Value::Array(values) => values,
            Value::Null => Vec::new(),
            other => vec![other],
        };
        Ok(Reply { script: script.name, values: values.into_iter() })
    }
}

/// What a script answered, value by value.
pub(super) struct Reply {
    script: &'static str,
    values: std::vec::IntoIter<Value>,
}

impl Reply {
    pub(super) fn is_empty(&self) -> bool {
        self.values.len() == 0
    }

    pub(super) fn number(&mut self) -> Result<i64> {
        let value = self.values.next();
        value.as_ref().and_then(Value::as_i64).ok_or_else(|| self.unexpected())
    }

    pub(super) fn text(&mut self) -> Result<String> {
        self.values.next().and_then(Value::into_string).ok_or_else(|| self.unexpected())
    }

    pub(super) fn bytes(&mut self) -> Result<Bytes> {
        self.values.next().and_then(Value::into_bytes).ok_or_else(|| self.unexpected())
    }

    pub(super) fn optional_bytes(&mut self) -> Result<Option<Bytes>> {
        match self.values.next() {
            None => Err(self.unexpected()),
            Some(Value::Null) => Ok(None),
            Some(value) => value.into_bytes().map(Some).ok_or_else(|| self.unexpected()),
        }
    }

    pub(super) fn unexpected(&self) -> Error {
        Error::Reply { command: self.script }
    }
}
