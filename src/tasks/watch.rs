//! `WatchTasks`: the timeline entries of a whole namespace as they are committed.
//!
//! A watcher is a position and reads rows when the bell rings, so it costs nothing while nothing
//! happens, misses nothing, and delays nobody.

use std::{collections::VecDeque, time::Duration};

use futures_util::{Stream, stream};

use super::{history::tag, ledger::Parts};
use crate::{
    error::Result,
    events::store::{self as events, Event, Filter, Place},
    id::Namespace,
    pb::Frame,
    twin::{self, Variant},
};

/// Longest pause between the looks of a watcher that nobody rang for.
const LOOK: Duration = Duration::from_secs(5);
/// The same, where other servers add entries and may have no way to say so.
const LOOK_AT_OTHERS: Duration = Duration::from_secs(1);
/// Entries read at once.
const PAGE: u32 = 500;

struct Watcher {
    parts: Parts,
    namespace: Namespace,
    filter: Filter,
    bell: tokio::sync::watch::Receiver<u64>,
    place: Place,
    ready: VecDeque<Event>,
}

/// Entries that are committed from now on.
pub async fn follow(
    parts: &Parts,
    namespace: Namespace,
    filter: Filter,
) -> Result<impl Stream<Item = Result<Frame>> + Send + use<>> {
    let bell = parts.tail.follow();
    let place = parts.db.read(|tx| Box::pin(events::end(tx))).await?;
    let parts = parts.clone();
    let watcher = Watcher { parts, namespace, filter, bell, place, ready: VecDeque::new() };
    Ok(stream::try_unfold(watcher, |mut watcher| async move {
        let event = watcher.next().await?;
        let twin = twin::wanted().then(|| watcher.parts.tail.twin(event.position));
        let bytes = tag(event.task, &event.frame);
        Ok(Some((Frame::with_twin(bytes, twin, Variant::Tagged), watcher)))
    }))
}

impl Watcher {
    async fn next(&mut self) -> Result<Event> {
        let look = if self.parts.standing.id().is_some() { LOOK_AT_OTHERS } else { LOOK };
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
                () = self.parts.clock.sleep(look) => {}
            }
        }
    }

    /// Reads a page; whether there was anything.
    async fn read(&mut self) -> Result<bool> {
        let (namespace, filter, place) =
            (self.namespace.clone(), self.filter.clone(), self.place.clone());
        let read = self.parts.db.read(move |tx| {
            Box::pin(async move { events::after(tx, &namespace, place, &filter, PAGE).await })
        });
        let (page, place) = read.await?;
        // Behind the snapshot of a page that was full there may be more already.
        let more = matches!(self.place, Place::Snapshot { reading: Some(_), .. });
        self.place = place;
        self.ready.extend(page);
        Ok(more || !self.ready.is_empty())
    }
}
