//! What may start here comes here: fetched from Redis as runners get free, or found in the
//! database while Redis does not answer.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{Backlog, Held, convert, untold, write::KEPT};
use crate::{
    clock::{Micros, Mono},
    error::Result,
    id::TaskId,
    queue::{Entry, Fetch, LaneSpec, LaneState},
    redis::{Bell, Bells, Delivery, Lane, LaneStats, Listener},
    tasks::queued,
};

/// Most fetched at once.
const ROUND: u32 = 256;

/// Rounds in a row before bells and lanes are looked at again.
const ROUNDS: usize = 8;

/// Longest pause without a look at what there is: bells are lost now and then.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Pause between looks at the database while Redis does not answer.
const POLL_EVERY: Duration = Duration::from_millis(250);

/// Tasks that could have started so long ago are looked at: until then they are left to the server
/// that accepted them, which has them in its own queue, so that few try to start the same.
const SETTLED: Duration = Duration::from_millis(500);

/// Rows read at once in such a look, and how often until some can start here.
const PAGE: u32 = 500;
const PAGES: usize = 8;

/// Pause after Redis refused something.
const REFUSED: Duration = Duration::from_millis(100);

/// Where tasks come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// From Redis, whose lanes were looked at then.
    Redis { looked: Option<Mono> },
    /// From the database, which was read up to there.
    Database { after: Option<TaskId> },
}

impl Backlog {
    /// Feeds this server's queue, until it drains.
    pub(super) async fn feed(
        self,
        bells: Bells,
        draining: CancellationToken,
    ) -> anyhow::Result<()> {
        let mut listener: Option<Listener> = None;
        let mut source = Source::Redis { looked: None };
        while !draining.is_cancelled() {
            if listener.is_none() {
                listener = self.0.work.bell(&bells).await.ok();
            }
            let pause = match source {
                Source::Redis { .. } => LOOK_EVERY,
                Source::Database { .. } => POLL_EVERY,
            };
            tokio::select! {
                biased;
                () = draining.cancelled() => break,
                bell = next(&mut listener) => self.heard(bell, &mut source),
                () = self.0.hungry.notified() => {}
                () = self.0.clock.sleep(pause) => {}
            }
            if let Err(error) = self.feed_once(&mut source).await {
                tracing::warn!(%error, "nothing was fetched");
                self.fell_behind();
                self.0.clock.sleep(REFUSED).await;
            }
        }
        // The process goes on until its streams have ended; this loop is not to end before.
        std::future::pending().await
    }

    fn heard(&self, bell: Option<Bell>, source: &mut Source) {
        let known = match bell {
            Some(Bell::Rang(lane)) => {
                std::str::from_utf8(&lane).is_ok_and(|lane| self.0.queue.far_rang(lane))
            }
            Some(Bell::Missed) | None => false,
        };
        if let Source::Redis { looked } = source
            && !known
        {
            *looked = None;
        }
    }

    async fn feed_once(&self, source: &mut Source) -> Result<()> {
        if !self.is_up() {
            return self.poll(source).await;
        }
        if let Source::Database { .. } = source {
            *source = Source::Redis { looked: None };
            self.hand_over().await?;
        }
        let now = self.0.clock.mono();
        if let Source::Redis { looked } = source
            && looked.is_none_or(|at| now.since(at) >= LOOK_EVERY)
        {
            self.look().await?;
            *looked = Some(now);
        }
        // What cannot be started is not to be taken from those who could.
        if !*self.0.db.healthy().borrow() {
            return Ok(());
        }
        self.fetch_all().await
    }

    /// Fetches until nothing more can start here. What others were faster to take is no reason to stop:
    /// the next lane may have something.
    pub(super) async fn fetch_all(&self) -> Result<()> {
        let mut n_came = 0;
        for _ in 0..ROUNDS {
            match self.fetch().await? {
                Some(n_tasks) => n_came += n_tasks,
                None => return Ok(()),
            }
        }
        // Where nothing comes, though there should be something, a look is due first.
        if n_came > 0 {
            self.0.hungry.notify_one();
        }
        Ok(())
    }

    /// Looks at which lanes there are, and what they hold.
    pub(super) async fn look(&self) -> Result<()> {
        let work = &self.0.work;
        let (found, depths) = tokio::try_join!(work.lanes(), work.depths()).map_err(untold)?;
        let mut lanes: HashMap<Arc<str>, (Lane, LaneSpec)> = HashMap::new();
        for info in found {
            let Some(spec) = convert::spec(&info) else {
                tracing::debug!(lane = %info.lane, "not understood; left to others");
                continue;
            };
            lanes.insert(spec.name.clone(), (info.lane, spec));
        }
        let specs = lanes.values().map(|(_, spec)| spec.clone()).collect();
        let names: Vec<Lane> = lanes.values().map(|(lane, _)| lane.clone()).collect();
        *self.0.lanes.lock() = lanes;
        self.0.queue.set_far_lanes(specs);
        let depths = depths.into_iter();
        let depths = depths.filter_map(|(account, n)| Some((convert::account_parts(&account)?, n)));
        let depths = depths.collect();
        self.0.queue.set_far_depths(&depths);
        self.0.shares.lock().renew(&depths, self.0.clock.mono());
        let stats = work.stats(&names).await.map_err(untold)?;
        self.note(&names, &stats);
        Ok(())
    }

    fn note(&self, lanes: &[Lane], stats: &[LaneStats]) {
        let now = self.0.clock.now();
        let states =
            lanes.iter().zip(stats).map(|(lane, stats)| (lane.as_str(), state(stats, now)));
        self.0.queue.set_far_states(states);
    }

    /// Fetches what can start; returns how many tasks came, `None` where none was asked for.
    pub(super) async fn fetch(&self) -> Result<Option<usize>> {
        let inner = &self.0;
        let plan = inner.queue.plan_fetch(ROUND);
        let wants: Vec<(Lane, usize)> = {
            let lanes = inner.lanes.lock();
            let lane =
                |fetch: &Fetch| Some((lanes.get(&fetch.lane)?.0.clone(), fetch.most as usize));
            plan.iter().filter_map(lane).collect()
        };
        if wants.is_empty() {
            return Ok(None);
        }
        let names: Vec<Lane> = wants.iter().map(|(lane, _)| lane.clone()).collect();
        let most = wants.iter().map(|(_, most)| most).sum();
        // On one connection, the count is that after the pull.
        let (pulled, stats) =
            tokio::join!(inner.consumer.pull_each(&wants, most), inner.work.stats(&names));
        let came = pulled.as_deref().unwrap_or_default();
        for fetch in &plan {
            let n_tasks = came.iter().filter(|delivery| delivery.lane.as_str() == &*fetch.lane);
            inner.queue.fetched(&fetch.lane, n_tasks.count() as u32);
        }
        if let Ok(stats) = stats {
            self.note(&names, &stats);
        }
        self.take(pulled.map_err(untold)?).await.map(Some)
    }

    /// Puts deliveries into this server's queue; returns how many tasks those are.
    pub(super) async fn take(&self, deliveries: Vec<Delivery>) -> Result<usize> {
        let since = self.0.clock.mono();
        let (mut entries, mut dropped): (Vec<Entry>, Vec<Delivery>) = Default::default();
        {
            let lanes = self.0.lanes.lock();
            let mut held = self.0.held.lock();
            for delivery in deliveries {
                let spec = lanes.get(delivery.lane.as_str()).map(|(_, spec)| spec);
                let Some(entry) = spec.and_then(|spec| convert::entry(&delivery, spec)) else {
                    tracing::warn!(id = delivery.id, lane = %delivery.lane, "not understood");
                    dropped.push(delivery);
                    continue;
                };
                let id = entry.id;
                entries.push(entry);
                let before = held.insert(id, Held { delivery, since });
                dropped.extend(before.map(|held| held.delivery));
            }
        }
        let n_tasks = entries.len();
        self.0.queue.push_all(entries);
        if !dropped.is_empty() {
            self.0.consumer.ack(&dropped).await.map_err(untold)?;
        }
        Ok(n_tasks)
    }

    /// Redis does not answer: tasks are found in the database, a window of them at a time.
    async fn poll(&self, source: &mut Source) -> Result<()> {
        let queue = &self.0.queue;
        if let Source::Redis { .. } = source {
            tracing::warn!("Redis does not answer; tasks are taken from the database meanwhile");
            *source = Source::Database { after: None };
        }
        let Source::Database { after: read_to } = source else { return Ok(()) };
        for _ in 0..PAGES {
            if queue.free() == 0 || queue.len() >= KEPT {
                return Ok(());
            }
            let (after, since) = (*read_to, self.0.clock.now() - SETTLED);
            let models = queue.startable_models();
            let read = self.0.db.read(move |tx| {
                Box::pin(async move {
                    let models = models.as_deref();
                    queued::startable_page(tx, after, since, models, PAGE).await
                })
            });
            let mut page = read.await?;
            // At the end it begins anew: what came meanwhile was accepted elsewhere.
            *read_to = page.last().map(|entry| entry.id);
            page.retain(|entry| !queue.contains(entry.id) && queue.is_served(entry));
            if !page.is_empty() || read_to.is_none() {
                queue.push_all(page);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Redis answers again: what waits here waits there from now on.
    async fn hand_over(&self) -> Result<()> {
        let held: Vec<Held> = self.0.held.lock().drain().map(|(_, held)| held).collect();
        let held: Vec<Delivery> = held.into_iter().map(|held| held.delivery).collect();
        let waiting = self.0.queue.take_all();
        tracing::info!(n_tasks = waiting.len(), "Redis answers; tasks are taken from there again");
        self.fell_behind();
        // Each is tried whatever becomes of the other: what is held and forgotten would be lost.
        let given = self.0.consumer.give_back(&held).await.map_err(untold);
        self.add(&waiting).await.and(given.map(drop))
    }
}

fn state(stats: &LaneStats, now: Micros) -> LaneState {
    LaneState {
        next: stats.next.as_ref().and_then(convert::create_time),
        last: stats.last.as_ref().and_then(convert::create_time),
        waiting: stats.entries.saturating_sub(stats.delivered),
        entries: stats.entries,
        oldest: stats.oldest.map(|age| now - age),
    }
}

/// The next bell; none ever when nothing is listened to.
async fn next(listener: &mut Option<Listener>) -> Option<Bell> {
    match listener {
        Some(listener) => listener.next().await,
        None => std::future::pending().await,
    }
}
