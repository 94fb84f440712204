//! Streams and their groups.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Bound::{self, Excluded, Included, Unbounded},
};

use super::data::{Outcome, Reply, Text, arity, number};

/// Which entry of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id(u64, u64);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

impl Id {
    const MAX: Self = Self(u64::MAX, u64::MAX);

    /// Reads an id; one without a number stands for the first or the last of its millisecond.
    fn read(text: &[u8], missing: u64) -> Result<Self, Reply> {
        let wrong = || Reply::error("ERR Invalid stream ID specified as stream command argument");
        let text = std::str::from_utf8(text).map_err(|_| wrong())?;
        let (ms, seq) = match text.split_once('-') {
            Some((ms, seq)) => (ms.parse(), seq.parse()),
            None => (text.parse(), Ok(missing)),
        };
        Ok(Self(ms.map_err(|_| wrong())?, seq.map_err(|_| wrong())?))
    }

    fn reply(self) -> Reply {
        Reply::text(self.to_string())
    }
}

#[derive(Clone, Debug, Default)]
pub struct Stream {
    entries: BTreeMap<Id, Vec<Text>>,
    last: Id,
    groups: BTreeMap<Text, Group>,
}

#[derive(Clone, Debug, Default)]
struct Group {
    last: Id,
    pending: BTreeMap<Id, Pending>,
    /// When each was seen last.
    consumers: BTreeMap<Text, u64>,
}

/// A delivery that was not acknowledged.
#[derive(Clone, Debug)]
struct Pending {
    consumer: Text,
    since: u64,
    times: u64,
}

impl Stream {
    fn add(&mut self, now: u64, fields: Vec<Text>) -> Id {
        let id = if now > self.last.0 { Id(now, 0) } else { Id(self.last.0, self.last.1 + 1) };
        self.entries.insert(id, fields);
        self.last = id;
        id
    }

    fn entry(&self, id: Id) -> Reply {
        let fields = self.entries.get(&id).map_or(Reply::Nil, |fields| {
            Reply::Array(fields.iter().cloned().map(Reply::Bulk).collect())
        });
        Reply::Array(vec![id.reply(), fields])
    }

    fn after(&self, after: Id, most: usize) -> Vec<Id> {
        self.entries.range((Excluded(after), Unbounded)).map(|(id, _)| *id).take(most).collect()
    }
}

impl Group {
    fn of<'a>(&'a self, consumer: &'a Text) -> impl Iterator<Item = (&'a Id, &'a Pending)> {
        self.pending.iter().filter(move |(_, pending)| pending.consumer == *consumer)
    }
}

fn no_group() -> Reply {
    Reply::error("NOGROUP No such key or consumer group")
}

fn bound(text: &[u8], is_start: bool) -> Result<Bound<Id>, Reply> {
    Ok(match text {
        b"-" => Included(Id::default()),
        b"+" => Included(Id::MAX),
        [b'(', text @ ..] => Excluded(Id::read(text, if is_start { u64::MAX } else { 0 })?),
        text => Included(Id::read(text, if is_start { 0 } else { u64::MAX })?),
    })
}

/// The value after an option.
fn option<T: std::str::FromStr>(args: &[Text], name: &str) -> Result<Option<T>, Reply> {
    let at = args.iter().position(|arg| arg.eq_ignore_ascii_case(name.as_bytes()));
    at.and_then(|at| args.get(at + 1)).map(number).transpose()
}

/// What follows `STREAMS`: one key, one id.
fn read_from(args: &[Text]) -> Result<(&Text, &Text), Reply> {
    let at = args.iter().position(|arg| arg.eq_ignore_ascii_case(b"STREAMS"));
    match at.map(|at| &args[at + 1..]) {
        Some([key, id]) => Ok((key, id)),
        _ => Err(arity()),
    }
}

pub fn key_of_read(args: &[Text]) -> Result<Text, Reply> {
    read_from(args).map(|(key, _)| key.clone())
}

/// Reads at once, whether or not it would wait.
pub fn read<'a>(args: &[Text], find: impl FnOnce(&Text) -> Option<&'a mut Stream>) -> Outcome {
    let (key, after) = read_from(args)?;
    let most = option(args, "COUNT")?.unwrap_or(usize::MAX);
    let Some(stream) = find(key) else { return Ok(Reply::Nil) };
    let found = stream.after(Id::read(after, 0)?, most);
    if found.is_empty() {
        return Ok(Reply::Nil);
    }
    let entries = found.into_iter().map(|id| stream.entry(id)).collect();
    Ok(Reply::Array(vec![Reply::Array(vec![Reply::Bulk(key.clone()), Reply::Array(entries)])]))
}

pub fn read_group(stream: Option<&mut Stream>, args: &[Text], now: u64) -> Outcome {
    let [_group, group, consumer, ..] = args else { return Err(arity()) };
    let (key, after) = read_from(args)?;
    let most = option(args, "COUNT")?.unwrap_or(usize::MAX);
    let stream = stream.ok_or_else(no_group)?;
    let found = {
        let last = stream.groups.get(group).ok_or_else(no_group)?.last;
        stream.after(last, most)
    };
    let members = stream.groups.get_mut(group).ok_or_else(no_group)?;
    members.consumers.insert(consumer.clone(), now);
    let ids: Vec<Id> = if after == b">" {
        if found.is_empty() {
            return Ok(Reply::Nil);
        }
        for id in &found {
            let pending = Pending { consumer: consumer.clone(), since: now, times: 1 };
            members.pending.insert(*id, pending);
            members.last = *id;
        }
        found
    } else {
        let after = Id::read(after, 0)?;
        let own = members.of(consumer).map(|(id, _)| *id).filter(|id| *id > after);
        let own: Vec<Id> = own.take(most).collect();
        for id in &own {
            if let Some(pending) = members.pending.get_mut(id) {
                pending.since = now;
                pending.times += 1;
            }
        }
        own
    };
    let entries = ids.into_iter().map(|id| stream.entry(id)).collect();
    Ok(Reply::Array(vec![Reply::Array(vec![Reply::Bulk(key.clone()), Reply::Array(entries)])]))
}

/// Commands about groups and consumers.
pub fn manage(
    stream: Option<&mut Stream>,
    name: &str,
    what: &str,
    args: &[Text],
    now: u64,
) -> Outcome {
    let missing = || Reply::error("ERR no such key");
    let stream = stream.ok_or_else(missing)?;
    Ok(match (name, what, args) {
        ("XGROUP", "CREATE", [group, from, ..]) => {
            if stream.groups.contains_key(group) {
                return Err(Reply::error("BUSYGROUP Consumer Group name already exists"));
            }
            let last = if from == b"$" { stream.last } else { Id::read(from, 0)? };
            stream.groups.insert(group.clone(), Group { last, ..Group::default() });
            Reply::Status("OK")
        }
        ("XGROUP", "DESTROY", [group]) => Reply::flag(stream.groups.remove(group).is_some()),
        ("XGROUP", "DELCONSUMER", [group, consumer]) => {
            let group = stream.groups.get_mut(group).ok_or_else(no_group)?;
            let n_pending = group.of(consumer).count();
            group.pending.retain(|_, pending| pending.consumer != *consumer);
            group.consumers.remove(consumer);
            Reply::Int(n_pending as i64)
        }
        ("XINFO", "GROUPS", []) => Reply::Array(
            stream
                .groups
                .iter()
                .map(|(name, group)| {
                    Reply::Array(vec![
                        Reply::text("name"),
                        Reply::Bulk(name.clone()),
                        Reply::text("consumers"),
                        Reply::Int(group.consumers.len() as i64),
                        Reply::text("pending"),
                        Reply::Int(group.pending.len() as i64),
                        Reply::text("last-delivered-id"),
                        group.last.reply(),
                    ])
                })
                .collect(),
        ),
        ("XINFO", "CONSUMERS", [group]) => {
            let group = stream.groups.get(group).ok_or_else(no_group)?;
            let consumers = group.consumers.iter().map(|(name, seen)| {
                Reply::Array(vec![
                    Reply::text("name"),
                    Reply::Bulk(name.clone()),
                    Reply::text("pending"),
                    Reply::Int(group.of(name).count() as i64),
                    Reply::text("idle"),
                    Reply::Int(now.saturating_sub(*seen) as i64),
                ])
            });
            Reply::Array(consumers.collect())
        }
        _ => return Err(Reply::error(format!("ERR not imitated: {name} {what}"))),
    })
}

/// Commands on one stream.
pub fn run(stream: Option<&mut Stream>, name: &str, args: &[Text], now: u64) -> Outcome {
    let n = args.len();
    match (name, stream) {
        ("XADD", Some(stream)) => add(stream, args, now),
        ("XLEN", stream) => Ok(Reply::Int(stream.map_or(0, |stream| stream.entries.len()) as i64)),
        ("XDEL", stream) => {
            let Some(stream) = stream else { return Ok(Reply::Int(0)) };
            let mut gone = 0;
            for id in args {
                gone += i64::from(stream.entries.remove(&Id::read(id, 0)?).is_some());
            }
            Ok(Reply::Int(gone))
        }
        ("XRANGE" | "XREVRANGE", stream) if n >= 2 => {
            let Some(stream) = stream else { return Ok(Reply::Array(Vec::new())) };
            let back = name == "XREVRANGE";
            let (from, to) = if back { (&args[1], &args[0]) } else { (&args[0], &args[1]) };
            let (from, to) = (bound(from, true)?, bound(to, false)?);
            let most = option(args, "COUNT")?.unwrap_or(usize::MAX);
            let within = stream.entries.keys().copied();
            let mut found: Vec<Id> = within
                .filter(|id| match from {
                    Included(from) => *id >= from,
                    Excluded(from) => *id > from,
                    Unbounded => true,
                })
                .filter(|id| match to {
                    Included(to) => *id <= to,
                    Excluded(to) => *id < to,
                    Unbounded => true,
                })
                .collect();
            if back {
                found.reverse();
            }
            found.truncate(most);
            Ok(Reply::Array(found.into_iter().map(|id| stream.entry(id)).collect()))
        }
        ("XACK", stream) => {
            let (group, ids) = args.split_first().ok_or_else(arity)?;
            let group = stream.and_then(|stream| stream.groups.get_mut(group));
            let Some(group) = group else { return Ok(Reply::Int(0)) };
            let mut n_acked = 0;
            for id in ids {
                n_acked += i64::from(group.pending.remove(&Id::read(id, 0)?).is_some());
            }
            Ok(Reply::Int(n_acked))
        }
        ("XPENDING", stream) => pending(stream, args, now),
        ("XCLAIM", stream) => claim(stream, args, now),
        ("XAUTOCLAIM", stream) => autoclaim(stream, args, now),
        _ => Err(Reply::error(format!("ERR not imitated: '{name}'"))),
    }
}

fn add(stream: &mut Stream, args: &[Text], now: u64) -> Outcome {
    let at = args.iter().position(|arg| arg == b"*").ok_or_else(arity)?;
    let fields = args[at + 1..].to_vec();
    if fields.is_empty() || !fields.len().is_multiple_of(2) {
        return Err(arity());
    }
    let id = stream.add(now, fields);
    match &args[..at] {
        [] => {}
        // Cut by whole nodes of 100 entries, as where it is `~`.
        [how, about, most] if how == b"MAXLEN" && about == b"~" => {
            let most: usize = number(most)?;
            let over = stream.entries.len().saturating_sub(most) / 100 * 100;
            for _ in 0..over {
                stream.entries.pop_first();
            }
        }
        [how, about, oldest] if how == b"MINID" && about == b"~" => {
            let oldest = Id::read(oldest, 0)?;
            let over = stream.entries.range(..oldest).count() / 100 * 100;
            for _ in 0..over {
                stream.entries.pop_first();
            }
        }
        _ => return Err(Reply::error("ERR not imitated: these options of XADD")),
    }
    Ok(id.reply())
}

fn pending(stream: Option<&mut Stream>, args: &[Text], now: u64) -> Outcome {
    let (group, args) = args.split_first().ok_or_else(arity)?;
    let group = stream.and_then(|stream| stream.groups.get(group)).ok_or_else(no_group)?;
    if args.is_empty() {
        let (Some((first, _)), Some((last, _))) =
            (group.pending.first_key_value(), group.pending.last_key_value())
        else {
            return Ok(Reply::Array(vec![Reply::Int(0), Reply::Nil, Reply::Nil, Reply::Nil]));
        };
        let consumers = group.consumers.keys().filter_map(|name| {
            let n_pending = group.of(name).count();
            let own = vec![Reply::Bulk(name.clone()), Reply::text(n_pending.to_string())];
            (n_pending > 0).then_some(Reply::Array(own))
        });
        let total = Reply::Int(group.pending.len() as i64);
        let consumers = Reply::Array(consumers.collect());
        return Ok(Reply::Array(vec![total, first.reply(), last.reply(), consumers]));
    }
    let idle: u64 = option(args, "IDLE")?.unwrap_or(0);
    let args = if args[0].eq_ignore_ascii_case(b"IDLE") { &args[2..] } else { args };
    let [from, to, most, consumer @ ..] = args else { return Err(arity()) };
    let (range, most) = ((bound(from, true)?, bound(to, false)?), number::<usize>(most)?);
    let found = group.pending.range(range).filter(|(_, pending)| {
        now.saturating_sub(pending.since) >= idle
            && consumer.first().is_none_or(|consumer| pending.consumer == *consumer)
    });
    let found = found.take(most).map(|(id, pending)| {
        Reply::Array(vec![
            id.reply(),
            Reply::Bulk(pending.consumer.clone()),
            Reply::Int(now.saturating_sub(pending.since) as i64),
            Reply::Int(pending.times as i64),
        ])
    });
    Ok(Reply::Array(found.collect()))
}

/// Of one entry, with `IDLE` and `JUSTID`, as the scripts use it.
fn claim(stream: Option<&mut Stream>, args: &[Text], now: u64) -> Outcome {
    let [group, consumer, min_idle, id, ..] = args else { return Err(arity()) };
    let (min_idle, id): (u64, Id) = (number(min_idle)?, Id::read(id, 0)?);
    let idle: u64 = option(args, "IDLE")?.unwrap_or(0);
    let stream = stream.ok_or_else(no_group)?;
    let is_there = stream.entries.contains_key(&id);
    let group = stream.groups.get_mut(group).ok_or_else(no_group)?;
    group.consumers.insert(consumer.clone(), now);
    let old = group.pending.get_mut(&id);
    let Some(old) = old.filter(|old| now.saturating_sub(old.since) >= min_idle) else {
        return Ok(Reply::Array(Vec::new()));
    };
    if !is_there {
        group.pending.remove(&id);
        return Ok(Reply::Array(Vec::new()));
    }
    old.consumer.clone_from(consumer);
    old.since = now.saturating_sub(idle);
    Ok(Reply::Array(vec![id.reply()]))
}

fn autoclaim(stream: Option<&mut Stream>, args: &[Text], now: u64) -> Outcome {
    let [group, consumer, min_idle, from, ..] = args else { return Err(arity()) };
    let min_idle: u64 = number(min_idle)?;
    let most: usize = option(args, "COUNT")?.unwrap_or(100);
    let stream = stream.ok_or_else(no_group)?;
    let members = stream.groups.get_mut(group).ok_or_else(no_group)?;
    members.consumers.insert(consumer.clone(), now);
    let ids: Vec<Id> = members.pending.range(Id::read(from, 0)?..).map(|(id, _)| *id).collect();
    let (mut claimed, mut gone, mut next) = (Vec::new(), Vec::new(), Id::default());
    for (looked_at, id) in ids.into_iter().enumerate() {
        if claimed.len() == most || looked_at == most * 10 {
            next = id;
            break;
        }
        if !stream.entries.contains_key(&id) {
            members.pending.remove(&id);
            gone.push(id.reply());
            continue;
        }
        let Some(pending) = members.pending.get_mut(&id) else { continue };
        if now.saturating_sub(pending.since) < min_idle {
            continue;
        }
        pending.consumer.clone_from(consumer);
        pending.since = now;
        pending.times += 1;
        claimed.push(id);
    }
    let claimed = claimed.into_iter().map(|id| stream.entry(id)).collect();
    Ok(Reply::Array(vec![next.reply(), Reply::Array(claimed), Reply::Array(gone)]))
}
