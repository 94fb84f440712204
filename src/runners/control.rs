//! Control messages of a connected runner, and what is written to it.

use super::{
    Registry, convert,
    ends::{End, Left},
    leases::{Ending, Lease},
    model::{Fence, FromRunner, Said, ToRunner},
    protocol::{HeldDigest, Received},
    registry::State,
    session::{Attached, Link, Session},
};
use crate::{
    error::{Error, Kind, Reason, Result},
    id::Namespace,
    pb,
    queue::SupplyKey,
};

/// Messages written in one go.
const MAX_WRITTEN: usize = 64;

impl Registry {
    /// Takes a control message that came by `link`. After an error the connection is over.
    pub(super) fn receive(&self, key: SupplyKey, link: &Link, message: FromRunner) -> Result<()> {
        let (now, mono) = self.times();
        let mut state = self.lock();
        let state = &mut *state;
        let session = present(state, key)?;
        session.check(link)?;
        session.outbox.ack(message.ack);
        match session.inbox.receive(message.seq) {
            Received::New | Received::Unnumbered => {}
            Received::Duplicate => return Ok(()),
            Received::Missing { expected } => {
                let message = format!("message {expected} is missing; send again from there");
                return Err(Error::new(Kind::Aborted, Reason::EventsMissing, message)
                    .with("expected_index", expected));
            }
        }
        match message.body {
            Said::Accept(fence) => {
                if let Some(lease) = held(state, key, fence) {
                    lease.accepted = true;
                }
            }
            Said::Refuse(fence, reason) => {
                if held(state, key, fence).is_some() {
                    self.spawn_end(state, fence, End::HandBack(reason));
                }
            }
            Said::Heartbeat { digest, load, gpus } => {
                session.hear(now, mono);
                session.measured(load, gpus);
                let expected = expected_digest(state, key);
                let session = present(state, key)?;
                if session.suspects(HeldDigest(digest), expected) {
                    session.ask_inventory();
                }
            }
            Said::Credits(credits) => {
                if session.announce(credits) {
                    self.publish_credits(session);
                }
            }
            Said::CommandAccepted(command) => session.commands.accepted(&command),
            Said::CommandProgress(command, progress) => {
                session.commands.progressed(&command, progress);
            }
            Said::CommandDone(command, refusal) => {
                self.command_done(session, &command, refusal);
            }
            Said::Offer(offer) => {
                if session.offer(offer) {
                    self.queue().runner_up(session.supply());
                }
                self.publish_credits(session);
            }
            Said::Stopped(fence, took) => self.stopped(session, fence, took),
            Said::Inventory(inventory) => {
                let as_of_seq = session.inventory_came();
                let verdicts = self.judge(state, key, &inventory, as_of_seq);
                present(state, key)?.say(ToRunner::Reconciliation(verdicts));
            }
            Said::Bye(reason) => {
                tracing::info!(runner.id = %session.profile.runner, reason, "runner left");
                self.drop_session(state, key, Left::InPeace("its runner left"));
            }
        }
        Ok(())
    }

    /// What is to be written to `link` now, at most [`MAX_WRITTEN`] messages.
    pub(super) fn unsent(&self, key: SupplyKey, link: &Link) -> Result<Vec<pb::ConnectResponse>> {
        let mut state = self.lock();
        let session = present(&mut state, key)?;
        session.check(link)?;
        let ack = session.inbox.last();
        let mut messages = Vec::new();
        while messages.len() < MAX_WRITTEN
            && let Some((seq, message)) = session.outbox.next_unsent()
        {
            let body = Some(convert::to_runner(message));
            messages.push(pb::ConnectResponse { seq, ack, body });
        }
        Ok(messages)
    }

    /// A message that is never resent, with the present ack.
    pub(super) fn unnumbered(
        &self,
        key: SupplyKey,
        body: pb::connect_response::Body,
    ) -> pb::ConnectResponse {
        let state = self.lock();
        let ack = state.sessions.get(&key).map_or(0, |session| session.inbox.last());
        pb::ConnectResponse { seq: 0, ack, body: Some(body) }
    }

    /// Rung when there may be something to write.
    pub(super) fn bell(&self, key: SupplyKey) -> Result<std::sync::Arc<tokio::sync::Notify>> {
        Ok(present(&mut self.lock(), key)?.bell.clone())
    }

    /// The connection broke; the session waits for another.
    pub(super) fn detach(&self, key: SupplyKey, link: &Link) {
        link.end(None);
        let mono = self.mono();
        let mut state = self.lock();
        let Ok(session) = present(&mut state, key) else { return };
        if session.check(link).is_err() {
            return;
        }
        tracing::info!(
            runner.id = %session.profile.runner,
            held = session.held.len(),
            "runner disconnected; its session waits"
        );
        session.attached = Attached::No(mono);
        self.publish_credits(session);
    }

    /// Whether an end that the runner sent is being stored.
    pub(super) fn is_storing(&self, key: SupplyKey) -> bool {
        let state = self.lock();
        let Some(session) = state.sessions.get(&key) else { return false };
        let mut held = session.held.iter().filter_map(|task| state.leases.of_task(*task));
        held.any(|lease| lease.ending == Some(Ending::Finish))
    }

    /// Fails unless runners of the namespace may report on the attempt.
    pub(super) fn check_reporter(&self, namespace: &Namespace, fence: Fence) -> Result<()> {
        let state = self.lock();
        match state.leases.find(fence) {
            Some(lease) if !Self::serves(namespace, &lease.namespace) => {
                Err(Error::not_found("task", fence.task))
            }
            Some(_) => Ok(()),
            None => Err(convert::lease_lost(fence)),
        }
    }

    /// Joins a call of Poll to its session.
    pub(super) fn attach_poll(
        &self,
        namespace: &Namespace,
        session_id: &str,
        link: &Link,
    ) -> Result<SupplyKey> {
        let mut state = self.lock();
        let key = find(&state, namespace, session_id)?;
        let session = present(&mut state, key)?;
        session.attach(Attached::Poll(link.clone()));
        self.publish_credits(session);
        Ok(key)
    }
}

/// The session of that id in a namespace.
pub(super) fn find(state: &State, namespace: &Namespace, session_id: &str) -> Result<SupplyKey> {
    let key = state.by_id.get(session_id).copied();
    key.filter(|key| state.sessions.get(key).is_some_and(|session| session.namespace == *namespace))
        .ok_or_else(|| Error::not_found("session", session_id))
}

/// The session, which may have ended meanwhile.
pub(super) fn present(state: &mut State, key: SupplyKey) -> Result<&mut Session> {
    state.sessions.get_mut(&key).ok_or_else(|| {
        Error::new(Kind::Aborted, Reason::Conflict, "the session has ended; open a new one")
    })
}

/// The lease, if the session holds it.
pub(super) fn held(state: &mut State, key: SupplyKey, fence: Fence) -> Option<&mut Lease> {
    state.leases.find_mut(fence).filter(|lease| lease.holder == Some(key))
}

/// Digest of the attempts that the runner is known to have.
fn expected_digest(state: &State, key: SupplyKey) -> HeldDigest {
    let Some(session) = state.sessions.get(&key) else { return HeldDigest::default() };
    let acked_seq = session.outbox.acked_seq();
    let held = session.held.iter().filter_map(|task| state.leases.of_task(*task));
    held.filter(|lease| lease.is_reached(acked_seq))
        .map(|lease| (lease.fence.task, lease.fence.attempt))
        .collect()
}
