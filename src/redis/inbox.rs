//! Frames on their way from one server to another: each server has an inbox, a stream that it
//! alone reads and anybody may write to.
//!
//! A server that has a reader for something that is made elsewhere asks for it from an index on
//! (through [`Bells`](super::Bells)), and is sent [`Parcel`]s until it asks no more. A parcel says which indices
//! it covers, so that the reader notices by itself what is missing ([`Reading`]) and asks again
//! from there. The stream forgets what is old or too much; it is a wire, and what was lost on it
//! is read from storage.
//!
//! One inbox per server and not one stream per topic: however many topics a server follows, it
//! waits for one key, wakes up once for all that has come, and two readers may begin at different
//! indices.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fred::prelude::Value;
use tokio::sync::watch;

use super::{
    Error, Redis, Result,
    wire::{Call, Line, Purpose},
};

/// Entries that an inbox keeps for a reader that is behind. Streams are cut by whole nodes of 100
/// entries, so some more.
const MAX_ENTRIES: u64 = 8192;

/// How long an inbox lasts that nobody writes to.
const KEEP: Duration = Duration::from_mins(1);

/// How long one read waits.
const WAIT: Duration = Duration::from_secs(1);

/// Entries in one read.
const READ: u64 = 512;

/// Pause after a failed read.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Frames of one topic, as they travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// Whose they are.
    pub topic: String,
    /// First index covered: one more than the last of the parcel before, whether or not there is
    /// a frame with it.
    pub first: u64,
    /// Last index covered.
    pub last: u64,
    /// All frames with these indices, as the two sides agree to encode them.
    pub frames: Bytes,
}

/// What comes into an inbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mail {
    /// Parcels, in the order in which they were sent.
    Parcels(Vec<Parcel>),
    /// The stream was lost, or Redis was away: whoever waits for something asks again.
    Lost,
}

/// A server's inbox, for its one reader.
pub struct Inbox {
    redis: Redis,
    line: Arc<dyn Line>,
    key: String,
    /// Entry that was read last.
    after: String,
    losses: watch::Receiver<u64>,
    /// A read failed, and the next that succeeds is preceded by [`Mail::Lost`].
    broken: bool,
}

impl Redis {
    /// Opens the inbox of this name, on a connection of its own. Only what is sent afterwards and
    /// what is still there is read; the name is used by one process at a time.
    pub async fn inbox(&self, name: &str) -> Result<Inbox> {
        let line = self.dedicated(Purpose::Commands).await?;
        Ok(Inbox {
            redis: self.clone(),
            line,
            key: self.key(&format!("f:{name}")),
            after: "0-0".into(),
            losses: self.losses(),
            broken: false,
        })
    }

    /// Sends parcels to an inbox, in this order, as one entry. After an error they may have
    /// arrived, even twice.
    pub async fn send(&self, inbox: &str, parcels: &[Parcel]) -> Result<()> {
        if parcels.is_empty() {
            return Ok(());
        }
        let key = self.key(&format!("f:{inbox}"));
        let key = Value::from(key);
        let mut entry =
            vec![key.clone(), "MAXLEN".into(), "~".into(), (MAX_ENTRIES as i64).into(), "*".into()];
        entry.reserve(parcels.len() * 8);
        for parcel in parcels {
            entry.extend(["t".into(), parcel.topic.as_str().into()]);
            entry.extend(["f".into(), parcel.first.to_string().into()]);
            entry.extend(["l".into(), parcel.last.to_string().into()]);
            entry.extend(["d".into(), parcel.frames.clone().into()]);
        }
        let keep = vec![key, (KEEP.as_millis() as i64).into()];
        let line = &self.0.line;
        // Both are on their way before the first answer.
        let (added, kept) = tokio::join!(
            line.call(Call::new("XADD", entry)),
            line.call(Call::new("PEXPIRE", keep))
        );
        added.and(kept).map(drop).map_err(Error::command("xadd"))
    }
}

impl Inbox {
    /// Waits for what comes next. Never fails: while Redis is away it waits, and says
    /// [`Mail::Lost`] afterwards. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Mail {
        loop {
            if self.losses.has_changed().unwrap_or(false) {
                self.losses.mark_unchanged();
                // Other data may count from the beginning.
                "0-0".clone_into(&mut self.after);
                self.broken = false;
                return Mail::Lost;
            }
            match self.read().await {
                Ok(parcels) => {
                    if self.broken {
                        self.broken = false;
                        return Mail::Lost;
                    }
                    if let Some((after, parcels)) = parcels {
                        self.after = after;
                        return Mail::Parcels(parcels);
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "an inbox cannot be read; trying again");
                    self.broken = true;
                    if matches!(error, Error::Command { .. }) {
                        self.redis.0.clock.sleep(AGAIN_AFTER).await;
                    }
                }
            }
        }
    }

    async fn read(&self) -> Result<Option<(String, Vec<Parcel>)>> {
        let bound = WAIT + self.redis.0.settings.command_timeout;
        let mut args = vec![
            "COUNT".into(),
            (READ as i64).into(),
            "BLOCK".into(),
            (WAIT.as_millis() as i64).into(),
        ];
        args.extend(["STREAMS".into(), self.key.as_str().into(), self.after.as_str().into()]);
        let call = Call { again: false, waits: Some(bound), ..Call::new("XREAD", args) };
        let reply = match self.line.call(call).await {
            Ok(reply) => reply,
            Err(error) => {
                if *error.kind() == fred::error::ErrorKind::Timeout {
                    // What is behind a read without an answer waits for it.
                    self.line.reconnect().await;
                }
                return Err(Error::command("xread")(error));
            }
        };
        if reply.is_null() {
            return Ok(None);
        }
        parcels(reply).map(Some).ok_or(Error::Reply { command: "xread" })
    }
}

/// Reads `[[key, [[entry, [field, value, …]], …]]]`: the last entry, and all parcels.
fn parcels(reply: Value) -> Option<(String, Vec<Parcel>)> {
    let mut streams = reply.into_array();
    let mut stream = streams.pop()?.into_array();
    let entries = stream.pop()?.into_array();
    let (mut after, mut parcels) = (None, Vec::with_capacity(entries.len()));
    for entry in entries {
        let mut entry = entry.into_array();
        let fields = entry.pop()?.into_array();
        after = Some(entry.pop()?.into_string()?);
        let mut values = fields.into_iter();
        while let Some(_label) = values.next() {
            // Labels are for people; the order is fixed.
            let topic = values.next()?.into_string()?;
            let first = values.nth(1)?.as_u64()?;
            let last = values.nth(1)?.as_u64()?;
            let frames = values.nth(1)?.into_bytes()?;
            parcels.push(Parcel { topic, first, last, frames });
        }
    }
    after.map(|after| (after, parcels))
}

/// How far the frames of one topic were read, and what a parcel adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    next: u64,
}

/// What to do with a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Take its frames from this index on; those below are known.
    From(u64),
    /// Nothing in it is new.
    Known,
    /// What is between is missing, this index first: ask again from there.
    Missing(u64),
}

impl Reading {
    /// A reader that wants everything from this index on.
    pub fn from(next: u64) -> Self {
        Self { next }
    }

    /// The index that is wanted next.
    pub fn next(self) -> u64 {
        self.next
    }

    /// Whether a parcel continues what was read; if so it counts as read.
    pub fn fit(&mut self, parcel: &Parcel) -> Fit {
        if parcel.first > self.next {
            return Fit::Missing(self.next);
        }
        if parcel.last < self.next {
            return Fit::Known;
        }
        let from = self.next;
        self.next = parcel.last + 1;
        Fit::From(from)
    }
}
