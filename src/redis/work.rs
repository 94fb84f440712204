//! The side of the queues that fills and looks after them. What is delivered is [`Consumer`]'s.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;

use super::{
    Bells, Consumer, Lane, LaneInfo, Listener, Redis, Result,
    script::{Args, Reply},
};

/// Items in one run of a script: so many take Redis a few milliseconds, in which nobody else is
/// served.
const CHUNK: usize = 256;

/// The channel that names a lane when it gets work.
const BELL: &str = "bell";

/// The queues; clones share them.
#[derive(Clone)]
pub struct Work(Redis);

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Where it waits.
    pub lane: Lane,
    /// What the lane is, for consumers; kept when the lane is new.
    pub info: Bytes,
    /// Its id, unique under the prefix.
    pub id: String,
    /// Which attempt at it this is. A later one replaces an earlier one.
    pub attempt: u32,
    /// What consumers need to know of it; they decide by the truth, so a few bytes.
    pub data: Bytes,
}

/// Room asked for.
#[derive(Clone, Debug)]
pub struct Promise<'a> {
    /// Whose account: that of this lane.
    pub lane: &'a Lane,
    /// What will be added.
    pub id: &'a str,
    /// Most items of the account.
    pub limit: u64,
    /// Most items of all accounts of the group.
    pub group_limit: u64,
    /// Where there is no room, the item that waits longest in the lowest band leaves, if its band
    /// is not above this one.
    pub evict: Option<u8>,
}

/// Whether there was room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// It is promised.
    Promised {
        /// The item that was taken out to make it.
        evicted: Option<String>,
    },
    /// The account has this many items.
    AccountFull(u64),
    /// The accounts of the group have this many.
    GroupFull(u64),
}

/// One lane, counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneStats {
    /// Entries, those delivered and not acknowledged included.
    pub entries: u64,
    /// How many of them are with consumers.
    pub delivered: u64,
    /// How long the oldest has been here, by the server's clock.
    pub oldest: Option<Duration>,
    /// The data of the item that the next pull would get, if there is one.
    pub next: Option<Bytes>,
    /// The data of the item that was added last.
    pub last: Option<Bytes>,
}

/// Where an item is in its lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The lane.
    pub lane: Lane,
    /// Entries before it; the number asked for when there are more.
    pub before: u64,
}

/// What a run of the mover did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Items that were due.
    pub items: u64,
    /// Promises that lapsed: nothing was added in time.
    pub lapsed: u64,
    /// When the next item is due.
    pub next: Option<Duration>,
}

impl Work {
    pub(super) fn new(redis: Redis) -> Self {
        Self(redis)
    }

    /// A consumer by this name, which nobody else uses at the same time.
    pub fn consumer(&self, name: &str) -> Consumer {
        Consumer::new(self.0.clone(), name)
    }

    /// Rings when a lane gets work, with the lane's name.
    pub async fn bell(&self, bells: &Bells) -> Result<Listener> {
        bells.listen_key(self.0.key(BELL)).await
    }

    /// Adds items that may be done now; those known with this attempt or a later one stay as they
    /// are, except that one that was delayed is due. Returns how many were added.
    pub async fn add(&self, items: &[Item]) -> Result<u64> {
        let mut added = 0;
        for chunk in items.chunks(CHUNK) {
            let (mut args, indices) = lanes_first(chunk);
            for (item, index) in chunk.iter().zip(indices) {
                args = args.number(index).text(&item.id).number(item.attempt.into());
                args = args.bytes(item.data.clone());
            }
            added += count(self.0.run(&self.0.0.scripts.add, args).await?)?;
        }
        Ok(added)
    }

    /// Keeps items until so much time has passed by the server's clock. An item known with this
    /// attempt or a later one stays as it is. Returns how many are kept.
    pub async fn delay(&self, items: &[(Item, Duration)]) -> Result<u64> {
        let mut kept = 0;
        for chunk in items.chunks(CHUNK) {
            let (mut args, indices) = lanes_first(chunk.iter().map(|(item, _)| item));
            for ((item, after), index) in chunk.iter().zip(indices) {
                args = args.number(index).text(&item.id).number(item.attempt.into());
                args = args.bytes(item.data.clone()).number(millis(*after));
            }
            kept += count(self.0.run(&self.0.0.scripts.delay, args).await?)?;
        }
        Ok(kept)
    }

    /// Moves up to `most` delayed items that are due to their lanes, and lets as many lapsed
    /// promises go. Any server may do it at any time.
    pub async fn move_due(&self, most: u32) -> Result<Moved> {
        let args = Args::default().number(most.into());
        let mut reply = self.0.run(&self.0.0.scripts.move_due, args).await?;
        let (moved, lapsed, next) = (reply.number()?, reply.number()?, reply.number()?);
        Ok(Moved {
            items: moved.max(0) as u64,
            lapsed: lapsed.max(0) as u64,
            next: u64::try_from(next).ok().map(Duration::from_millis),
        })
    }

    /// Promises room for items before they are added; whoever is not promised any learns the depth
    /// that was in the way. A promise lapses after `keep` unless the item is added before; an item
    /// that is known already has its room.
    pub async fn reserve(&self, promises: &[Promise<'_>], keep: Duration) -> Result<Vec<Room>> {
        let mut rooms = Vec::with_capacity(promises.len());
        for chunk in promises.chunks(CHUNK) {
            let mut args = Args::default().number(millis(keep));
            for promise in chunk {
                args = args.text(promise.lane.as_str()).text(promise.id).number(promise.limit);
                args = args.number(promise.group_limit);
                args = match promise.evict {
                    Some(band) => args.number(band.into()),
                    None => args.text("-1"),
                };
            }
            let mut reply = self.0.run(&self.0.0.scripts.reserve, args).await?;
            for _ in chunk {
                let (outcome, depth) = (reply.number()?, reply.number()?.max(0) as u64);
                let evicted = reply.optional_bytes()?;
                let evicted = evicted.map(|id| String::from_utf8(id.into()));
                rooms.push(match outcome {
                    1 => Room::Promised {
                        evicted: evicted.transpose().map_err(|_| reply.unexpected())?,
                    },
                    0 => Room::AccountFull(depth),
                    -1 => Room::GroupFull(depth),
                    _ => return Err(reply.unexpected()),
                });
            }
        }
        Ok(rooms)
    }

    /// Lets promises go whose items will not be added; an item that was added stays. Returns how
    /// many went.
    pub async fn release(&self, ids: &[&str]) -> Result<u64> {
        self.take_out("promised", ids).await
    }

    /// Takes items out, wherever they are. Returns how many were there.
    pub async fn remove(&self, ids: &[&str]) -> Result<u64> {
        self.take_out("all", ids).await
    }

    async fn take_out(&self, which: &str, ids: &[&str]) -> Result<u64> {
        let mut removed = 0;
        for chunk in ids.chunks(CHUNK) {
            let args = Args::default().text(which).texts(chunk.iter().copied());
            removed += count(self.0.run(&self.0.0.scripts.remove, args).await?)?;
        }
        Ok(removed)
    }

    /// For each id the attempt that waits or is delivered, `None` where there is none. It looks at
    /// the entries themselves, so it is what whoever keeps the truth compares with.
    pub async fn known(&self, ids: &[&str]) -> Result<Vec<Option<u32>>> {
        let mut attempts = Vec::with_capacity(ids.len());
        for chunk in ids.chunks(CHUNK) {
            let args = Args::default().texts(chunk.iter().copied());
            let mut reply = self.0.run(&self.0.0.scripts.known, args).await?;
            for _ in chunk {
                attempts.push(u32::try_from(reply.number()?).ok());
            }
        }
        Ok(attempts)
    }

    /// Known ids in parts of about `most`, for whoever looks for those that should be gone: begin
    /// with cursor `0`, and go on with the returned one until it is `0` again. An id that is there
    /// all the while is returned at least once.
    pub async fn ids(&self, cursor: &str, most: u32) -> Result<(String, Vec<String>)> {
        let args = Args::default().text(cursor).number(most.into());
        let mut reply = self.0.run(&self.0.0.scripts.ids, args).await?;
        let next = reply.text()?;
        let mut ids = Vec::new();
        while !reply.is_empty() {
            ids.push(reply.text()?);
        }
        Ok((next, ids))
    }

    /// Lists items as dead, for operators and other programs, and takes them out. The list forgets
    /// what is older than `keep`.
    pub async fn bury(&self, items: &[(&str, Bytes)], keep: Duration) -> Result<()> {
        for chunk in items.chunks(CHUNK) {
            let mut args = Args::default().number(millis(keep));
            for (id, reason) in chunk {
                args = args.text(id).bytes(reason.clone());
            }
            self.0.run(&self.0.0.scripts.bury, args).await?;
        }
        Ok(())
    }

    /// The lanes that exist.
    pub async fn lanes(&self) -> Result<Vec<LaneInfo>> {
        let mut reply = self.0.run(&self.0.0.scripts.lanes, Args::default()).await?;
        let mut lanes = Vec::new();
        while !reply.is_empty() {
            let (name, info) = (reply.text()?, reply.bytes()?);
            let lane = Lane::parse(&name).ok_or_else(|| reply.unexpected())?;
            lanes.push(LaneInfo { lane, info });
        }
        Ok(lanes)
    }

    /// Counts lanes, in their order.
    pub async fn stats(&self, lanes: &[Lane]) -> Result<Vec<LaneStats>> {
        let mut stats = Vec::with_capacity(lanes.len());
        for chunk in lanes.chunks(CHUNK) {
            let args = Args::default().texts(chunk.iter().map(Lane::as_str));
            let mut reply = self.0.run(&self.0.0.scripts.stats, args).await?;
            let now = reply.number()?;
            for _ in chunk {
                let (entries, delivered) = (reply.number()?, reply.number()?);
                let oldest = u64::try_from(reply.number()?).ok();
                let age = oldest.map(|at| Duration::from_millis((now as u64).saturating_sub(at)));
                stats.push(LaneStats {
                    entries: entries.max(0) as u64,
                    delivered: delivered.max(0) as u64,
                    oldest: age,
                    next: reply.optional_bytes()?,
                    last: reply.optional_bytes()?,
                });
            }
        }
        Ok(stats)
    }

    /// The items of each account: waiting, delayed, delivered, and promised.
    pub async fn depths(&self) -> Result<HashMap<String, u64>> {
        let mut reply = self.0.run(&self.0.0.scripts.depths, Args::default()).await?;
        let mut depths = HashMap::new();
        while !reply.is_empty() {
            let (account, depth) = (reply.text()?, reply.number()?);
            depths.insert(account, depth.max(0) as u64);
        }
        Ok(depths)
    }

    /// Counts the depths anew if they do not add up, as after an eviction or a deletion by hand of
    /// one key. Returns whether that was so. Cheap when it was not; whoever looks after the queues
    /// calls it now and then.
    pub async fn recount(&self) -> Result<bool> {
        Ok(count(self.0.run(&self.0.0.scripts.recount, Args::default()).await?)? == 1)
    }

    /// Where an item is in its lane; `None` when it is in none. Costs Redis up to `most` steps.
    pub async fn position(&self, id: &str, most: u32) -> Result<Option<Position>> {
        let args = Args::default().text(id).number(most.into());
        let mut reply = self.0.run(&self.0.0.scripts.position, args).await?;
        if reply.is_empty() {
            return Ok(None);
        }
        let (name, before) = (reply.text()?, reply.number()?);
        let lane = Lane::parse(&name).ok_or_else(|| reply.unexpected())?;
        Ok(Some(Position { lane, before: before.max(0) as u64 }))
    }

    /// Ends consumers and lanes that hold nothing and were not used for so long. Lanes that are
    /// used again come back by themselves. Returns how many lanes went.
    pub async fn tidy(&self, consumers: Duration, lanes: Duration) -> Result<u64> {
        let names = self.lanes().await?;
        let mut gone = 0;
        for chunk in names.chunks(CHUNK) {
            let args = Args::default().number(millis(consumers)).number(millis(lanes));
            let args = args.texts(chunk.iter().map(|info| info.lane.as_str()));
            gone += count(self.0.run(&self.0.0.scripts.tidy, args).await?)?;
        }
        Ok(gone)
    }
}

/// Begins the arguments with the lanes of these items, each once; the items name them by number.
fn lanes_first<'a>(items: impl IntoIterator<Item = &'a Item>) -> (Args, Vec<u64>) {
    let mut numbers: HashMap<&Lane, u64> = HashMap::new();
    let mut lanes = Vec::new();
    let mut indices = Vec::new();
    for item in items {
        let number = *numbers.entry(&item.lane).or_insert_with(|| {
            lanes.push((&item.lane, &item.info));
            lanes.len() as u64
        });
        indices.push(number);
    }
    let mut args = Args::default().number(lanes.len() as u64);
    for (lane, info) in lanes {
        args = args.text(lane.as_str()).bytes(info.clone());
    }
    (args, indices)
}

fn count(mut reply: Reply) -> Result<u64> {
    Ok(reply.number()?.max(0) as u64)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
