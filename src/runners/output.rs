//! Events of attempts: into the relay at once, their acknowledgements when they are on stable
//! storage. Whoever reads a runner's Output waits for neither.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::sync::{Notify, oneshot};

use super::{
    Ports, Registry,
    control::{find, held, present},
    convert, elsewhere,
    ends::{End, mark},
    events,
    leases::Ending,
    model::{Announcement, Batch, Fence, Trouble},
    registry::State,
    session::{Link, overloaded, superseded},
};
use crate::{
    clock::Micros,
    error::{Error, Kind, Reason, Result},
    id::Namespace,
    pb,
    queue::SupplyKey,
    relay::{Log, Refused},
};

/// A resend is asked for at most this often: what is under way behind a gap asks for nothing.
const RESEND_INTERVAL: Duration = Duration::from_millis(250);

/// Wait before a Finish is asked for again, since storage could not tell what became of it.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Where a batch goes.
enum Way {
    /// Into the log, at once.
    Log(Arc<Log>, Micros),
    /// Behind what waits already.
    Backlog,
    /// Nowhere: its end is on its way already.
    Ignore,
    /// Nowhere: the session holds no such lease.
    Unknown,
}

/// What the log did not take.
enum Left {
    /// Nothing.
    Nothing,
    /// Events from this one on, until there is room.
    From(usize),
    /// This one is malformed.
    Invalid(String),
    /// All: earlier ones are missing.
    Missing(u64),
    /// All: the attempt has ended.
    Ended,
}

impl Registry {
    /// Joins an Output stream to its session.
    pub(super) fn attach_output(
        &self,
        namespace: &Namespace,
        session_id: &str,
        link: Link,
    ) -> Result<(SupplyKey, Arc<Notify>)> {
        let mut state = self.lock();
        let key = find(&state, namespace, session_id)?;
        let State { sessions, leases, .. } = &mut *state;
        let session = sessions.get_mut(&key).ok_or_else(superseded)?;
        session.attach_output(link);
        for task in &session.held {
            if let Some(lease) = leases.of_task_mut(*task) {
                lease.announced = 0;
            }
        }
        Ok((key, session.output.bell.clone()))
    }

    /// The Output stream broke.
    pub(super) fn detach_output(&self, key: SupplyKey, link: &Link) {
        link.end(None);
        let mut state = self.lock();
        if let Ok(session) = present(&mut state, key)
            && session.output.link.as_ref().is_some_and(|present| present.is(link))
        {
            session.output.link = None;
        }
    }

    /// Takes one message of an Output stream. After an error the stream is over.
    pub(super) fn take(
        &self,
        key: SupplyKey,
        link: &Link,
        seq: u64,
        batches: Vec<Batch>,
        credits: Option<Announcement>,
    ) -> Result<()> {
        let ways = self.ways(key, link, seq, &batches, credits)?;
        let mut rest = Vec::new();
        for (batch, way) in batches.into_iter().zip(ways) {
            let left = match &way {
                Way::Log(log, start) => append(self.ports(), log, *start, &batch),
                Way::Backlog => Left::From(0),
                Way::Ignore | Way::Unknown => Left::Ended,
            };
            let done = matches!((&left, &batch.finish), (Left::Nothing, None));
            if !done && !matches!(way, Way::Ignore) {
                rest.push((batch, way, left));
            }
        }
        if !rest.is_empty() {
            let mut state = self.lock();
            for (batch, way, left) in rest {
                self.take_rest(&mut state, key, batch, &way, left);
            }
        }
        Ok(())
    }

    fn ways(
        &self,
        key: SupplyKey,
        link: &Link,
        seq: u64,
        batches: &[Batch],
        credits: Option<Announcement>,
    ) -> Result<Vec<Way>> {
        let mut state = self.lock();
        let session = present(&mut state, key)?;
        if !session.output.link.as_ref().is_some_and(|present| present.is(link)) {
            return Err(superseded());
        }
        if seq != session.output.read_seq + 1 {
            let expected = session.output.read_seq + 1;
            return Err(Error::invalid("seq", format!("must be {expected}, one more than before")));
        }
        session.output.read_seq = seq;
        if session.output.is_overfull() {
            return Err(overloaded("acknowledgements are not read"));
        }
        if let Some(credits) = credits
            && session.announce(credits)
        {
            self.publish_credits(session);
        }
        let ways = batches.iter().map(|batch| match held(&mut state, key, batch.fence) {
            None => Way::Unknown,
            Some(lease) => {
                lease.accepted = true;
                match lease.ending {
                    Some(Ending::Finish) => Way::Ignore,
                    _ if lease.finish.is_some() => Way::Ignore,
                    None if lease.backlog.is_empty() => {
                        Way::Log(lease.log.clone(), lease.start_time)
                    }
                    _ => Way::Backlog,
                }
            }
        });
        Ok(ways.collect())
    }

    fn take_rest(&self, state: &mut State, key: SupplyKey, batch: Batch, way: &Way, left: Left) {
        let fence = batch.fence;
        let end_index = batch.first_index + batch.events.len() as u64;
        if matches!(way, Way::Unknown) {
            self.stray(state, key, batch);
            return;
        }
        let mono = self.mono();
        let max_backlog = 2 * self.limits().max_unacked_bytes;
        let Some(lease) = held(state, key, fence) else {
            // It ended just now, and the runner is told why.
            return;
        };
        let missing = match left {
            Left::Nothing => None,
            Left::From(n) => {
                let first_index = batch.first_index + n as u64;
                match lease.backlog.push(first_index, batch.events.into_iter().skip(n)) {
                    Err(expected) => Some(expected),
                    Ok(()) if lease.backlog.bytes() > max_backlog => {
                        lease.backlog.clear();
                        lease.log.next_index(fence.attempt)
                    }
                    Ok(()) => None,
                }
            }
            Left::Missing(expected) => Some(expected),
            Left::Invalid(what) => {
                self.spawn_end(state, fence, End::Invalid(what));
                return;
            }
            Left::Ended => {
                if let Ok(session) = present(state, key) {
                    session.output.trouble(fence, Trouble::LeaseLost);
                    session.output.bell.notify_one();
                }
                return;
            }
        };
        if let Some(resend_from) = missing {
            // One hole is asked about once in a while, another one at once.
            if lease.resend_asked_from != resend_from || lease.resend_asked_until <= mono {
                lease.resend_asked_from = resend_from;
                lease.resend_asked_until = mono + RESEND_INTERVAL;
                if let Ok(session) = present(state, key) {
                    session.output.trouble(fence, Trouble::Missing { resend_from });
                    session.output.bell.notify_one();
                }
            }
            return;
        }
        if let Some(finish) = batch.finish {
            let (outcome, usage) = events::outcome(finish);
            lease.finish = Some((end_index, outcome, usage));
        }
        self.pump(state, fence);
    }

    /// Events of an attempt that the session does not hold: a Finish that was stored and is sent
    /// again is acknowledged, anything else has lost its lease.
    fn stray(&self, state: &mut State, key: SupplyKey, batch: Batch) {
        let fence = batch.fence;
        let Ok(session) = present(state, key) else { return };
        if session.has_finished(fence) {
            session.output.finished(fence);
        } else if let Some(finish) = batch.finish {
            let registry = self.clone();
            self.supervisor().spawn("finish_check", async move {
                let ended = registry.has_ended_so(fence, &events::outcome(finish).0).await;
                if ended.is_err() {
                    registry.clock().sleep(RETRY_AFTER).await;
                }
                let mut state = registry.lock();
                let Ok(session) = present(&mut state, key) else { return };
                match ended {
                    Ok(true) => {
                        session.finished(fence);
                        session.output.finished(fence);
                    }
                    Ok(false) => session.output.trouble(fence, Trouble::LeaseLost),
                    Err(_) => session.output.trouble(fence, Trouble::Missing { resend_from: 1 }),
                }
                session.output.bell.notify_one();
            });
            return;
        } else {
            session.output.trouble(fence, Trouble::LeaseLost);
        }
        session.output.bell.notify_one();
    }

    /// Moves what waits into the log, and tells the store of the end once nothing waits.
    pub(super) fn pump(&self, state: &mut State, fence: Fence) {
        let Some(lease) = state.leases.find_mut(fence) else { return };
        if !lease.backlog.is_empty() {
            let (first_index, waiting) = lease.backlog.waiting();
            let (start, attempt) = (lease.start_time, fence.attempt);
            let fault = self.ports().faults(fence);
            let n_sound = waiting.iter().take_while(|event| fault(event).is_none()).count();
            let fault = waiting.get(n_sound).and_then(&fault);
            let put = |at: usize, sequence, token, buf: &mut BytesMut| {
                events::put(buf, &waiting[at], start, attempt, sequence, token)
            };
            match lease.log.append(attempt, first_index, n_sound, put) {
                Ok(appended) => {
                    lease.backlog.taken(appended.accepted);
                    if let Some(what) = fault.filter(|_| appended.accepted == n_sound) {
                        self.spawn_end(state, fence, End::Invalid(what));
                        return;
                    }
                }
                // The end that froze it is decided soon; then it thaws or the lease is gone.
                Err(Refused::Frozen) => return,
                Err(Refused::WrongAttempt | Refused::Missing { .. }) => {
                    Self::resend(state, fence);
                    return;
                }
            }
        }
        if !lease.backlog.is_empty() || lease.ending.is_some() {
            return;
        }
        let Some((end_index, outcome, usage)) = lease.finish.take() else { return };
        match lease.log.next_index(fence.attempt) {
            Some(next) if next >= end_index => {
                self.spawn_end(state, fence, End::Finish(outcome, usage));
            }
            _ => Self::resend(state, fence),
        }
    }

    /// Drops what waits of an attempt and asks for it again.
    fn resend(state: &mut State, fence: Fence) {
        let Some(lease) = state.leases.find_mut(fence) else { return };
        lease.backlog.clear();
        lease.finish = None;
        let next = lease.log.next_index(fence.attempt);
        let trouble =
            next.map_or(Trouble::LeaseLost, |resend_from| Trouble::Missing { resend_from });
        if let Some(session) = state.holder_of(fence) {
            session.output.trouble(fence, trouble);
            session.output.bell.notify_one();
        }
    }

    /// What is to be told on the Output stream now; `None` for nothing.
    pub(super) fn acks(&self, key: SupplyKey, link: &Link) -> Result<Option<pb::OutputResponse>> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let session = present(state, key)?;
        if !session.output.link.as_ref().is_some_and(|present| present.is(link)) {
            return Err(superseded());
        }
        let mut waiting = Vec::new();
        let State { sessions, leases, .. } = state;
        let session = sessions.get_mut(&key).ok_or_else(superseded)?;
        for task in &session.held {
            let Some(lease) = leases.of_task_mut(*task) else { continue };
            let durable = lease.log.durable_index(lease.fence.attempt).unwrap_or(0);
            if durable > lease.announced {
                lease.announced = durable;
                session.output.durable(lease.fence, durable);
            }
            if !lease.backlog.is_empty() || lease.finish.is_some() {
                waiting.push(lease.fence);
            }
        }
        for fence in waiting {
            self.pump(state, fence);
        }
        let session = present(state, key)?;
        if session.output.is_empty() {
            return Ok(None);
        }
        let leases = session.output.take().iter().map(convert::lease_ack).collect();
        Ok(Some(pb::OutputResponse { ack: session.output.read_seq, leases }))
    }

    /// Takes events of one attempt by a call of their own; completes when they, and the end, are
    /// on stable storage. Returns the highest index that is, and whether the attempt has ended.
    pub(super) async fn report(&self, batch: Batch) -> Result<(u64, bool)> {
        let fence = batch.fence;
        if let Some(what) = batch.events.iter().find_map(self.ports().faults(fence)) {
            return Err(Error::invalid("events", what));
        }
        let last = batch.first_index + batch.events.len() as u64 - 1;
        let found = {
            let mut state = self.lock();
            state.leases.find_mut(fence).map(|lease| {
                lease.accepted = true;
                (lease.log.clone(), lease.start_time)
            })
        };
        let Some((log, start)) = found else { return self.reported_before(batch).await };
        let stop = self.supervisor().token();
        let appended = tokio::select! {
            appended = self.append_all(&log, start, &batch) => appended,
            () = stop.cancelled() => return Err(stopping()),
        };
        match appended {
            Err(error) if error.reason() == Reason::LeaseLost => {
                return self.reported_before(batch).await;
            }
            appended => appended?,
        }
        let Some((outcome, usage)) = batch.finish.map(events::outcome) else {
            let durable = log.durable(fence.attempt, last);
            tokio::select! {
                durable = durable => durable.map_err(|_| convert::lease_lost(fence))?,
                () = stop.cancelled() => return Err(stopping()),
            };
            return Ok((log.durable_index(fence.attempt).unwrap_or(last).max(last), false));
        };
        let end = End::Finish(outcome, usage);
        if !mark(&mut self.lock(), fence, &end) {
            // An end is under way: perhaps this one, sent before.
            let message = "the attempt is ending; send this again";
            return Err(Error::new(Kind::Unavailable, Reason::Conflict, message)
                .retry_after(Duration::from_millis(200)));
        }
        // On its own, since the caller may hang up: an end that has begun is seen through.
        let (done, answer) = oneshot::channel();
        let registry = self.clone();
        self.supervisor().spawn("attempt_end", async move {
            // Nobody listens when the caller has hung up.
            let _ = done.send(registry.tell_store(fence, end).await);
        });
        answer.await.map_err(|_| stopping())??;
        Ok((last, true))
    }

    /// The answer to a report on an attempt without a lease: fine if it was stored already.
    async fn reported_before(&self, batch: Batch) -> Result<(u64, bool)> {
        let fence = batch.fence;
        let last = batch.first_index + batch.events.len() as u64 - 1;
        match batch.finish.map(events::outcome) {
            Some((outcome, _)) if self.has_ended_so(fence, &outcome).await? => Ok((last, true)),
            // The runner says Hello here first, which brings the attempt along.
            _ if self.is_elsewhere(fence).await? => Err(elsewhere::held_elsewhere(fence)),
            _ => Err(convert::lease_lost(fence)),
        }
    }

    async fn append_all(&self, log: &Arc<Log>, start: Micros, batch: &Batch) -> Result<()> {
        let attempt = batch.fence.attempt;
        // A Finish without events ends exactly what came before it.
        if batch.events.is_empty() {
            let next = log.next_index(attempt).ok_or_else(|| convert::lease_lost(batch.fence))?;
            if batch.first_index > next {
                let missing = Trouble::Missing { resend_from: next };
                return Err(convert::error(batch.fence, &missing));
            }
        }
        let mut from = 0;
        while from < batch.events.len() {
            let rest = &batch.events[from..];
            let first_index = batch.first_index + from as u64;
            let put = |at: usize, sequence, token, buf: &mut BytesMut| {
                events::put(buf, &rest[at], start, attempt, sequence, token)
            };
            match log.append(attempt, first_index, rest.len(), put) {
                Ok(appended) => from += appended.accepted,
                Err(Refused::Frozen) => {}
                Err(Refused::WrongAttempt) => return Err(convert::lease_lost(batch.fence)),
                Err(Refused::Missing { expected_index }) => {
                    let missing = Trouble::Missing { resend_from: expected_index };
                    return Err(convert::error(batch.fence, &missing));
                }
            }
            if from < batch.events.len() {
                log.room(attempt).await.map_err(|_| convert::lease_lost(batch.fence))?;
            }
        }
        Ok(())
    }
}

/// Appends what is sound of a batch.
fn append(ports: &Ports, log: &Arc<Log>, start: Micros, batch: &Batch) -> Left {
    let (list, attempt, fault) = (&batch.events, batch.fence.attempt, ports.faults(batch.fence));
    if list.is_empty() {
        return match log.next_index(attempt) {
            None => Left::Ended,
            // A Finish ends exactly what came before it.
            Some(next) if batch.first_index > next => Left::Missing(next),
            Some(_) => Left::Nothing,
        };
    }
    let n_sound = list.iter().take_while(|event| fault(event).is_none()).count();
    let put = |at: usize, sequence, token, buf: &mut BytesMut| {
        events::put(buf, &list[at], start, attempt, sequence, token)
    };
    match log.append(attempt, batch.first_index, n_sound, put) {
        Ok(appended) if appended.accepted < n_sound => Left::From(appended.accepted),
        Ok(_) => match list.get(n_sound).and_then(fault) {
            Some(what) => {
                Left::Invalid(format!("event {}: {what}", batch.first_index + n_sound as u64))
            }
            None => Left::Nothing,
        },
        Err(Refused::Frozen) => Left::From(0),
        Err(Refused::Missing { expected_index }) => Left::Missing(expected_index),
        Err(Refused::WrongAttempt) => Left::Ended,
    }
}

fn stopping() -> Error {
    Error::new(Kind::Unavailable, Reason::NotServing, "the server is shutting down")
        .retry_after(Duration::from_secs(1))
}
