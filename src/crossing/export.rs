//! Sends the frames of tasks that run here to the servers that have readers of them: all that is
//! ready, in one message for each server, at most every few milliseconds.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{
    FutureExt as _, StreamExt as _, future::BoxFuture, future::join_all, stream::FuturesUnordered,
};
use tokio::sync::mpsc;

use crate::{
    clock::Clock,
    id::{InstanceId, TaskId},
    instances::hints::{ASK_EVERY, Asked, Hint, Hints, To},
    redis::{Parcel, Redis},
    relay::{Next, Relay, Subscriber, put_frame},
};

/// Least time between two messages: what comes meanwhile goes together.
const PACE: Duration = Duration::from_millis(3);
/// Parcels in one round.
const ROUND: usize = 512;

/// Whose frames go where.
type Key = (TaskId, InstanceId);

/// A reader for another server, with what it found; `None` when nothing came for a while.
type Found = (Key, u64, Subscriber, Option<Next>);

/// Sends frames to other servers.
pub struct Export {
    relay: Relay,
    clock: Clock,
    hints: Hints,
    redis: Redis,
    asked: mpsc::Receiver<Asked>,
    active: HashSet<Key>,
    readers: FuturesUnordered<BoxFuture<'static, Found>>,
}

impl Export {
    /// An exporter of these logs.
    pub fn new(
        relay: Relay,
        clock: Clock,
        hints: Hints,
        redis: Redis,
        asked: mpsc::Receiver<Asked>,
    ) -> Self {
        let (active, readers) = (HashSet::new(), FuturesUnordered::new());
        Self { relay, clock, hints, redis, asked, active, readers }
    }

    /// Sends for ever.
    pub async fn run(mut self) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                asked = self.asked.recv() => match asked {
                    Some(asked) => self.begin(asked),
                    None => return Ok(()),
                },
                Some(found) = self.readers.next(), if !self.readers.is_empty() => {
                    self.round(found).await;
                    self.clock.sleep(PACE).await;
                }
            }
        }
    }

    fn begin(&mut self, asked: Asked) {
        let Asked { task, by, after } = asked;
        let key = (task, by);
        if self.active.contains(&key) {
            return;
        }
        // What does not run here has nothing to send; whoever holds it was asked too, or will be.
        let Some(log) = self.relay.find(task).filter(|log| log.is_live()) else { return };
        let after = after.or_else(|| log.head()).unwrap_or(0);
        self.active.insert(key);
        self.read(key, log.subscribe(after));
    }

    fn read(&self, key: Key, mut reader: Subscriber) {
        let clock = self.clock.clone();
        let from = reader.cursor();
        self.readers.push(Box::pin(async move {
            let next = tokio::select! {
                next = reader.next() => Some(next),
                () = clock.sleep(ASK_EVERY) => None,
            };
            (key, from, reader, next)
        }));
    }

    /// Sends what is ready.
    async fn round(&mut self, first: Found) {
        let mut parcels: HashMap<InstanceId, Vec<Parcel>> = HashMap::new();
        let mut next = Some(first);
        let mut left = ROUND;
        while let Some(found) = next {
            self.take(found, &mut parcels);
            left -= 1;
            next = if left == 0 { None } else { self.readers.next().now_or_never().flatten() };
        }
        let redis = &self.redis.clone();
        let sends = parcels.iter().map(|(to, parcels)| send(redis, *to, parcels));
        join_all(sends).await;
    }

    fn take(&mut self, found: Found, parcels: &mut HashMap<InstanceId, Vec<Parcel>>) {
        let (key, from, mut reader, next) = found;
        let (task, to) = key;
        if !self.hints.is_followed(task, to) {
            self.active.remove(&key);
            return;
        }
        match next {
            Some(Next::Frames(frames)) => {
                let (first, last) = (from + 1, reader.cursor());
                let topic = task.to_string();
                let frames = encoded(&frames);
                parcels.entry(to).or_default().push(Parcel { topic, first, last, frames });
            }
            // What is not in memory any more is in storage, where the other side looks.
            Some(Next::Behind) => reader.seek(reader.log().head().unwrap_or(0)),
            Some(Next::Stirred) | None if reader.log().is_live() => {}
            Some(Next::Stirred | Next::End) | None => {
                self.active.remove(&key);
                self.hints.tell(To::One(to), Hint::Moved { tasks: vec![task] });
                return;
            }
        }
        self.read(key, reader);
    }
}

async fn send(redis: &Redis, to: InstanceId, parcels: &[Parcel]) {
    // What is lost the other side finds in storage.
    if let Err(error) = redis.send(&inbox(to), parcels).await {
        tracing::debug!(%error, "frames for another server were not sent");
    }
}

/// The name of a server's inbox.
pub(super) fn inbox(of: InstanceId) -> String {
    of.to_string()
}

fn encoded(frames: &[(u64, Bytes)]) -> Bytes {
    let size = frames.iter().map(|(_, frame)| frame.len() + 5).sum();
    let mut buf = BytesMut::with_capacity(size);
    for (_, frame) in frames {
        put_frame(&mut buf, frame);
    }
    buf.freeze()
}
