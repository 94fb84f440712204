//! `WatchTasks`: the timeline entries of a whole namespace as they are committed.
//!
//! A watcher is a position and reads rows when the bell rings, so it costs nothing while nothing
//! happens, misses nothing, and delays nobody.

use std::{collections::VecDeque, time::Duration};

use futures_util::{Stream, stream};

use super::{history::tag, ledger::Parts};
use crate::{
    error::Result,
    events::store::{self as events, Event, Filter},
    id::Namespace,
    pb::Frame,
    twin::{self, Variant},
};

/// Longest pause between the looks of a watcher that nobody rang for.
const LOOK: Duration = Duration::from_secs(5);
/// Entries read at once.
const PAGE: u32 = 500;

struct Watcher {
    parts: Parts,
    namespace: Namespace,
    filter: Filter,
    bell: tokio::sync::watch::Receiver<u64>,
    position: i64,
    ready: VecDeque<Event>,
}

/// Entries that are committed from now on.
pub async fn follow(
    parts: &Parts,
    namespace: Namespace,
    filter: Filter,
) -> Result<impl Stream<Item = Result<Frame>> + Send + use<>> {
    let bell = parts.tail.follow();
    let position = parts.db.read(|tx| Box::pin(events::newest(tx))).await?;
    let parts = parts.clone();
    let watcher = Watcher { parts, namespace, filter, bell, position, ready: VecDeque::new() };
    Ok(stream::try_unfold(watcher, |mut watcher| async move {
        let event = watcher.next().await?;
        let twin = twin::wanted().then(|| watcher.parts.tail.twin(event.position));
        let bytes = tag(event.task, &event.frame);
        Ok(Some((Frame::with_twin(bytes, twin, Variant::Tagged), watcher)))
    }))
}

impl Watcher {
    async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            self.bell.mark_unchanged();
            if self.read().await? {
                continue;
            }
            tokio::select! {
                // The ledger lives as long as the server.
                _ = self.bell.changed() => {}
                () = self.parts.clock.sleep(LOOK) => {}
            }
        }
    }

    /// Reads a page; whether there was anything.
    async fn read(&mut self) -> Result<bool> {
        let (namespace, filter, after) =
            (self.namespace.clone(), self.filter.clone(), self.position);
        let read = self.parts.db.read(move |tx| {
            Box::pin(async move {
                // Positions up to here are committed: there is one writer.
                let newest = events::newest(tx).await?;
                let page = events::after(tx, &namespace, after, &filter, PAGE).await?;
                Ok((newest, page))
            })
        });
        let (newest, page) = read.await?;
        let last = page.last().map(|event| event.position);
        self.position = match last {
            Some(last) if page.len() == PAGE as usize => last,
            last => last.unwrap_or(after).max(newest),
        };
        self.ready.extend(page);
        Ok(!self.ready.is_empty())
    }
}
