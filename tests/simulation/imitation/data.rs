//! Keys and what they hold, and the commands on all kinds but streams.

use std::collections::{BTreeMap, BTreeSet};

use super::streams::Stream;

/// Text of any bytes, as everything is in Redis.
pub type Text = Vec<u8>;

/// An answer, before it goes to a client or to a script.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Nil,
    Int(i64),
    Status(&'static str),
    Bulk(Text),
    Array(Vec<Reply>),
    Error(String),
}

impl Reply {
    pub fn text(text: impl Into<Text>) -> Self {
        Self::Bulk(text.into())
    }

    pub fn error(text: impl Into<String>) -> Self {
        Self::Error(text.into())
    }

    pub fn optional(text: Option<Text>) -> Self {
        text.map_or(Self::Nil, Self::Bulk)
    }

    /// The first line of what goes over a connection.
    pub fn line(&self) -> String {
        match self {
            Self::Nil => "$-1".into(),
            Self::Int(number) => format!(":{number}"),
            Self::Status(text) => format!("+{text}"),
            Self::Bulk(text) => format!("${}", text.len()),
            Self::Array(replies) => format!("*{}", replies.len()),
            Self::Error(text) => format!("-{text}"),
        }
    }

    pub fn flag(truth: bool) -> Self {
        Self::Int(truth.into())
    }
}

/// What a command comes to: an `Err` is an answer like any other.
pub type Outcome = Result<Reply, Reply>;

/// In so many parts a hash is read that has more fields than are read at once.
const HEAPS: u64 = 4;
const SMALL: usize = 512;

/// What a key holds.
#[derive(Clone, Debug)]
pub enum Held {
    Text(Text),
    Hash(BTreeMap<Text, Text>),
    /// Members with their scores; so few that sorting them each time is fine.
    Sorted(BTreeMap<Text, f64>),
    Set(BTreeSet<Text>),
    Stream(Stream),
}

/// All that a server has in memory.
#[derive(Clone, Debug, Default)]
pub struct Data {
    keys: BTreeMap<Text, Held>,
    /// When keys vanish, in milliseconds.
    expiries: BTreeMap<Text, u64>,
    /// Messages that commands have published, for whoever carries them.
    pub published: Vec<(Text, Text)>,
    /// How many listen to each channel.
    pub listeners: BTreeMap<Text, usize>,
}

/// Finds what a key holds, where it is of this kind or missing.
macro_rules! held {
    ($data:ident, $key:expr, $kind:ident) => {
        match $data.keys.get_mut($key) {
            None => None,
            Some(Held::$kind(held)) => Some(held),
            Some(_) => return Err(wrong_type()),
        }
    };
}

/// The same, and makes it.
macro_rules! made {
    ($data:ident, $key:expr, $kind:ident) => {
        match $data.keys.entry($key.clone()).or_insert_with(|| Held::$kind(Default::default())) {
            Held::$kind(held) => held,
            _ => return Err(wrong_type()),
        }
    };
}

impl Data {
    pub fn empty(&mut self) {
        self.keys.clear();
        self.expiries.clear();
    }

    /// Runs a command at a time in microseconds.
    pub fn run(&mut self, command: &[Text], now: i64) -> Reply {
        let ms = u64::try_from(now / 1000).unwrap_or(0);
        let late: Vec<Text> =
            self.expiries.iter().filter(|(_, at)| **at <= ms).map(|(key, _)| key.clone()).collect();
        for key in late {
            self.remove(&key);
        }
        let Some((name, args)) = command.split_first() else {
            return Reply::error("ERR no command");
        };
        let name = String::from_utf8_lossy(name).to_uppercase();
        let outcome = match name.as_str() {
            "TIME" => Ok(Reply::Array(vec![
                Reply::text((now / 1_000_000).to_string()),
                Reply::text((now % 1_000_000).to_string()),
            ])),
            "PING" => Ok(Reply::Status("PONG")),
            "PUBLISH" => self.publish(args),
            name if name.starts_with('X') => self.run_on_stream(name, args, ms),
            _ => self.run_on_key(&name, args, ms),
        };
        // What holds nothing is not there; streams stay.
        if let Some(key) = args.first()
            && self.keys.get(key).is_some_and(is_empty)
        {
            self.remove(key);
        }
        outcome.unwrap_or_else(|error| error)
    }

    fn run_on_stream(&mut self, name: &str, args: &[Text], now: u64) -> Outcome {
        use super::streams as on;
        match name {
            "XREAD" => on::read(args, |key| match self.keys.get_mut(key) {
                Some(Held::Stream(stream)) => Some(stream),
                _ => None,
            }),
            "XREADGROUP" => {
                let key = on::key_of_read(args)?;
                on::read_group(held!(self, &key, Stream), args, now)
            }
            "XGROUP" | "XINFO" => {
                let (what, key) = (args.first().ok_or_else(arity)?, args.get(1).ok_or_else(arity)?);
                let makes = args.iter().any(|arg| arg.eq_ignore_ascii_case(b"MKSTREAM"));
                let stream =
                    if makes { Some(made!(self, key, Stream)) } else { held!(self, key, Stream) };
                let what = String::from_utf8_lossy(what).to_uppercase();
                on::manage(stream, name, &what, &args[2..], now)
            }
            _ => {
                let (key, args) = args.split_first().ok_or_else(arity)?;
                let stream = if name == "XADD" {
                    Some(made!(self, key, Stream))
                } else {
                    held!(self, key, Stream)
                };
                on::run(stream, name, args, now)
            }
        }
    }

    fn run_on_key(&mut self, name: &str, args: &[Text], now: u64) -> Outcome {
        if matches!(name, "DEL" | "EXISTS") {
            let there = args.iter().filter(|key| self.keys.contains_key(*key)).count();
            if name == "DEL" {
                for key in args {
                    self.remove(key);
                }
            }
            return Ok(Reply::Int(there as i64));
        }
        let (key, args) = args.split_first().ok_or_else(arity)?;
        let n = args.len();
        Ok(match (name, args) {
            ("GET", []) => Reply::optional(held!(self, key, Text).cloned()),
            ("SET", [value, options @ ..]) => {
                let only_new = options.iter().any(|option| option.eq_ignore_ascii_case(b"NX"));
                if only_new && self.keys.contains_key(key) {
                    return Ok(Reply::Nil);
                }
                self.keys.insert(key.clone(), Held::Text(value.clone()));
                self.expiries.remove(key);
                if let [.., option, after] = options
                    && option.eq_ignore_ascii_case(b"PX")
                {
                    self.expiries.insert(key.clone(), now + number::<u64>(after)?);
                }
                Reply::Status("OK")
            }
            ("PEXPIRE", [after]) => {
                let there = self.keys.contains_key(key);
                if there {
                    self.expiries.insert(key.clone(), now + number::<u64>(after)?);
                }
                Reply::flag(there)
            }
            ("PTTL", []) => match (self.keys.contains_key(key), self.expiries.get(key)) {
                (false, _) => Reply::Int(-2),
                (true, None) => Reply::Int(-1),
                (true, Some(at)) => Reply::Int((at - now) as i64),
            },
            ("HGET", [field]) => {
                Reply::optional(held!(self, key, Hash).and_then(|hash| hash.get(field).cloned()))
            }
            ("HSET", pairs) if n >= 2 && n.is_multiple_of(2) => {
                let hash = made!(self, key, Hash);
                let new = pairs
                    .chunks(2)
                    .filter(|pair| hash.insert(pair[0].clone(), pair[1].clone()).is_none());
                Reply::Int(new.count() as i64)
            }
            ("HDEL", fields) => {
                let hash = held!(self, key, Hash);
                let gone = |hash: &mut BTreeMap<Text, Text>| {
                    fields.iter().filter(|field| hash.remove(*field).is_some()).count()
                };
                Reply::Int(hash.map_or(0, gone) as i64)
            }
            ("HINCRBY", [field, by]) => {
                let hash = made!(self, key, Hash);
                let was = hash.get(field).map_or(Ok(0), number::<i64>)?;
                let sum = was + number::<i64>(by)?;
                hash.insert(field.clone(), sum.to_string().into());
                Reply::Int(sum)
            }
            ("HLEN", []) => Reply::Int(held!(self, key, Hash).map_or(0, |hash| hash.len()) as i64),
            ("HGETALL" | "HVALS", []) => {
                let (both, mut all) = (name == "HGETALL", Vec::new());
                for (field, value) in held!(self, key, Hash).into_iter().flatten() {
                    all.extend(both.then(|| Reply::Bulk(field.clone())));
                    all.push(Reply::Bulk(value.clone()));
                }
                Reply::Array(all)
            }
            // A small one at once, else a cursor is the next of some heaps.
            ("HSCAN", [cursor, ..]) => {
                let (hash, at) = (held!(self, key, Hash), number::<u64>(cursor)?);
                let is_small = hash.as_ref().is_none_or(|hash| hash.len() <= SMALL);
                let next = if is_small || at + 1 == HEAPS { 0 } else { at + 1 };
                let hash = hash.into_iter().flatten();
                let heap = hash.filter(|(field, _)| is_small || heap_of(field) == at);
                let found = heap.flat_map(|(field, value)| [field.clone(), value.clone()]);
                let found = Reply::Array(found.map(Reply::Bulk).collect());
                Reply::Array(vec![Reply::text(next.to_string()), found])
            }
            ("SADD", members) => {
                let set = made!(self, key, Set);
                let new = members.iter().filter(|member| set.insert((*member).clone()));
                Reply::Int(new.count() as i64)
            }
            ("SREM", members) => {
                let set = held!(self, key, Set);
                let gone = |set: &mut BTreeSet<Text>| {
                    members.iter().filter(|member| set.remove(*member)).count()
                };
                Reply::Int(set.map_or(0, gone) as i64)
            }
            ("SISMEMBER", [member]) => {
                Reply::flag(held!(self, key, Set).is_some_and(|set| set.contains(member)))
            }
            (name, args) if name.starts_with('Z') => return self.run_on_sorted(name, key, args),
            _ => {
                return Err(Reply::error(format!("ERR not imitated: '{name}' with {n} arguments")));
            }
        })
    }

    fn run_on_sorted(&mut self, name: &str, key: &Text, args: &[Text]) -> Outcome {
        Ok(match (name, args) {
            ("ZADD", [options @ .., score, member]) => {
                let only_greater = match options {
                    [] => false,
                    [option] if option.eq_ignore_ascii_case(b"GT") => true,
                    _ => return Err(Reply::error("ERR not imitated: these options of ZADD")),
                };
                let (sorted, score) = (made!(self, key, Sorted), number::<f64>(score)?);
                let was = sorted.get(member).copied();
                if was.is_none_or(|was| !only_greater || score > was) {
                    sorted.insert(member.clone(), score);
                }
                Reply::flag(was.is_none())
            }
            ("ZREM", members) => {
                let sorted = held!(self, key, Sorted);
                let gone = |sorted: &mut BTreeMap<Text, f64>| {
                    members.iter().filter(|member| sorted.remove(*member).is_some()).count()
                };
                Reply::Int(sorted.map_or(0, gone) as i64)
            }
            ("ZSCORE", [member]) => {
                let score = held!(self, key, Sorted).and_then(|sorted| sorted.get(member).copied());
                Reply::optional(score.map(|score| score.to_string().into()))
            }
            ("ZRANGE", [from, to, options @ ..]) => {
                let all = in_order(held!(self, key, Sorted));
                let len = all.len() as i64;
                let at = |text: &Text| {
                    let at = number::<i64>(text)?;
                    Ok::<_, Reply>(if at < 0 { len + at } else { at })
                };
                let (from, to) = (at(from)?.max(0), at(to)?.min(len - 1));
                let with_scores = options.iter().any(|o| o.eq_ignore_ascii_case(b"WITHSCORES"));
                let mut found = Vec::new();
                for at in from..=to {
                    let (member, score) = &all[at as usize];
                    found.push(Reply::Bulk(member.clone()));
                    found.extend(with_scores.then(|| Reply::text(score.to_string())));
                }
                Reply::Array(found)
            }
            ("ZRANGEBYSCORE", [from, to, options @ ..]) if from == b"-inf" => {
                let to = number::<f64>(to)?;
                let most = match options {
                    [] => usize::MAX,
                    [limit, skip, most] if limit == b"LIMIT" && skip == b"0" => number(most)?,
                    _ => return Err(Reply::error("ERR not imitated: these options")),
                };
                let all = in_order(held!(self, key, Sorted)).into_iter();
                let found = all.filter(|(_, score)| *score <= to).take(most);
                Reply::Array(found.map(|(member, _)| Reply::Bulk(member)).collect())
            }
            _ => return Err(Reply::error(format!("ERR not imitated: '{name}'"))),
        })
    }

    fn publish(&mut self, args: &[Text]) -> Outcome {
        let [channel, message] = args else { return Err(arity()) };
        self.published.push((channel.clone(), message.clone()));
        Ok(Reply::Int(self.listeners.get(channel).copied().unwrap_or(0) as i64))
    }

    fn remove(&mut self, key: &Text) {
        self.keys.remove(key);
        self.expiries.remove(key);
    }
}

fn heap_of(field: &Text) -> u64 {
    field.iter().fold(7, |sum, byte| sum * 31 % 65_521 + u64::from(*byte)) % HEAPS
}

fn in_order(sorted: Option<&mut BTreeMap<Text, f64>>) -> Vec<(Text, f64)> {
    let mut all: Vec<_> =
        sorted.into_iter().flatten().map(|(member, score)| (member.clone(), *score)).collect();
    all.sort_by(|(a, x), (b, y)| x.total_cmp(y).then_with(|| a.cmp(b)));
    all
}

fn is_empty(held: &Held) -> bool {
    match held {
        Held::Hash(hash) => hash.is_empty(),
        Held::Sorted(sorted) => sorted.is_empty(),
        Held::Set(set) => set.is_empty(),
        Held::Text(_) | Held::Stream(_) => false,
    }
}

/// Reads a number.
pub fn number<T: std::str::FromStr>(text: &Text) -> Result<T, Reply> {
    let found = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    found.ok_or_else(|| Reply::error("ERR value is not an integer or out of range"))
}

pub fn arity() -> Reply {
    Reply::error("ERR wrong number of arguments")
}

fn wrong_type() -> Reply {
    Reply::error("WRONGTYPE Operation against a key holding the wrong kind of value")
}
