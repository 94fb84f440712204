//! Scripts, run by a real Lua of the version that Redis has.

use std::{cell::RefCell, collections::BTreeMap};

use fred::types::scripts::Script;
use mlua::{Function, Lua, MultiValue, Table, Value};
use parking_lot::Mutex;

use super::data::{Data, Reply, Text};

/// The scripts that a server knows, by name.
#[derive(Default)]
pub struct Scripts(BTreeMap<Text, Text>);

thread_local! {
    /// Lua keeps to its thread. Functions are kept by the names of their texts.
    static LUA: (Lua, RefCell<BTreeMap<Text, Function>>) = Default::default();
}

impl Scripts {
    pub fn forget(&mut self) {
        self.0.clear();
    }

    pub fn load(&mut self, text: &Text) -> Reply {
        let name = Script::from_lua(&*String::from_utf8_lossy(text)).sha1().to_string();
        self.0.insert(name.clone().into(), text.clone());
        Reply::text(name)
    }

    /// Runs `EVALSHA`, with its arguments.
    pub fn run(&self, args: &[Text], data: &Mutex<Data>, now: i64) -> Reply {
        let [name, n_keys, rest @ ..] = args else { return super::data::arity() };
        let Some(text) = self.0.get(name) else {
            return Reply::error("NOSCRIPT No matching script. Please use EVAL.");
        };
        let n_keys = super::data::number::<usize>(n_keys).unwrap_or(0).min(rest.len());
        LUA.with(|(lua, functions)| {
            let known = functions.borrow().get(name).cloned();
            let function = match known {
                Some(function) => function,
                None => lua.load(text.as_slice()).into_function()?,
            };
            functions.borrow_mut().insert(name.clone(), function.clone());
            call(lua, &function, rest.split_at(n_keys), data, now)
        })
        .unwrap_or_else(|error| Reply::error(format!("ERR {error}")))
    }
}

/// Calls a script at a time that stands still for it.
fn call(
    lua: &Lua,
    function: &Function,
    args: (&[Text], &[Text]),
    data: &Mutex<Data>,
    now: i64,
) -> mlua::Result<Reply> {
    for (name, values) in [("KEYS", args.0), ("ARGV", args.1)] {
        let values = values.iter().map(|value| lua.create_string(value));
        let values = values.collect::<mlua::Result<Vec<_>>>()?;
        lua.globals().set(name, values)?;
    }
    lua.scope(|scope| {
        let redis = lua.create_table()?;
        for (name, raises) in [("call", true), ("pcall", false)] {
            let call = scope.create_function(move |lua, args: MultiValue| {
                let command = args.iter().map(argument).collect::<mlua::Result<Vec<_>>>()?;
                let reply = data.lock().run(&command, now);
                match reply {
                    Reply::Error(error) if raises => Err(mlua::Error::runtime(error)),
                    reply => to_lua(lua, reply),
                }
            })?;
            redis.set(name, call)?;
        }
        lua.globals().set("redis", redis)?;
        from_lua(function.call(())?)
    })
}

/// An argument of a command, as Redis reads it.
fn argument(value: &Value) -> mlua::Result<Text> {
    match value {
        Value::String(text) => Ok(text.as_bytes().to_vec()),
        Value::Integer(number) => Ok(number.to_string().into()),
        Value::Number(number) if number.fract() == 0.0 => Ok(format!("{number:.0}").into()),
        Value::Number(number) => Ok(number.to_string().into()),
        _ => {
            Err(mlua::Error::runtime("Lua redis lib command arguments must be strings or integers"))
        }
    }
}

fn to_lua(lua: &Lua, reply: Reply) -> mlua::Result<Value> {
    Ok(match reply {
        Reply::Nil => Value::Boolean(false),
        Reply::Int(number) => Value::Number(number as f64),
        Reply::Bulk(text) => Value::String(lua.create_string(text)?),
        Reply::Status(text) => Value::Table(labelled(lua, "ok", text)?),
        Reply::Error(text) => Value::Table(labelled(lua, "err", &text)?),
        Reply::Array(replies) => {
            let replies = replies.into_iter().map(|reply| to_lua(lua, reply));
            Value::Table(lua.create_sequence_from(replies.collect::<mlua::Result<Vec<_>>>()?)?)
        }
    })
}

fn labelled(lua: &Lua, label: &str, text: &str) -> mlua::Result<Table> {
    let table = lua.create_table()?;
    table.set(label, text)?;
    Ok(table)
}

fn from_lua(value: Value) -> mlua::Result<Reply> {
    Ok(match value {
        Value::Boolean(true) => Reply::Int(1),
        Value::Integer(number) => Reply::Int(number),
        Value::Number(number) => Reply::Int(number as i64),
        Value::String(text) => Reply::Bulk(text.as_bytes().to_vec()),
        Value::Table(table) => {
            let mut replies = Vec::new();
            for at in 1.. {
                match table.raw_get::<Value>(at)? {
                    Value::Nil => break,
                    value => replies.push(from_lua(value)?),
                }
            }
            Reply::Array(replies)
        }
        _ => Reply::Nil,
    })
}
