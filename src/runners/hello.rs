//! How a runner arrives: a session is found or made, and each attempt that it holds gets a
//! verdict.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    Registry, convert,
    ends::{End, Left},
    leases::Ending,
    model::{Fence, Held, Hello, Verdict, Welcome},
    protocol::{feature, negotiate},
    registry::State,
    session::{Attached, Session, taken_over},
};
use crate::{
    error::Result,
    id::{Namespace, TaskId},
    queue::SupplyKey,
};

impl Registry {
    /// Takes a Hello: `attached` is the only connection of the session from now on.
    pub(super) fn hello(
        &self,
        namespace: &Namespace,
        hello: Hello,
        attached: Attached,
    ) -> Result<(SupplyKey, Welcome)> {
        let (min, max) = hello.versions;
        let version = negotiate(min, max).ok_or_else(convert::version_mismatch)?;
        let mut state = self.lock();
        let state = &mut *state;

        let known = hello.session.as_deref().and_then(|id| state.by_id.get(id)).copied();
        let known = known.filter(|key| {
            state.sessions.get(key).is_some_and(|session| {
                session.namespace == *namespace
                    && session.profile.runner == hello.profile.runner
                    && session.profile.instance == hello.profile.instance
            })
        });
        let (key, resumed) = if let Some(key) = known {
            (key, true)
        } else {
            Self::check_name(state, namespace, &hello)?;
            (self.new_session(state, namespace, &hello), false)
        };

        let (now, mono) = self.times();
        let Some(session) = state.sessions.get_mut(&key) else {
            // It was found or made under this lock.
            return Err(crate::error::Error::internal("the session is gone"));
        };
        session.hear(now, mono);
        session.outbox.ack(if resumed { hello.ack } else { 0 });
        session.n_reconnects += u32::from(resumed);
        let changed = session.profile.models != hello.profile.models;
        session.profile = Arc::new(hello.profile);
        session.leave = hello.leave;
        session.attach(attached);
        if let Some(credits) = hello.credits {
            session.announce(credits);
        }
        if changed {
            self.queue().runner_up(session.supply());
        }
        let (id, last_seq) = (session.id.clone(), session.inbox.last());
        let features = used(&session.profile.features);
        let acked_seq = session.outbox.acked_seq();

        let verdicts = self.judge(state, key, &hello.inventory, acked_seq);
        if let Some(session) = state.sessions.get(&key) {
            self.publish_credits(session);
            tracing::info!(
                runner.id = %session.profile.runner,
                namespace = %session.namespace,
                resumed,
                held = hello.inventory.len(),
                kept = verdicts.iter().filter(|verdict| verdict.resume_from.is_some()).count(),
                "runner connected"
            );
        }
        Ok((key, Welcome { version, session: id, resumed, verdicts, last_seq, features }))
    }

    /// Fails when a process comes back whose name another one took over meanwhile: of two, the
    /// newer serves, and they do not take the name from each other for ever.
    fn check_name(state: &State, namespace: &Namespace, hello: &Hello) -> Result<()> {
        let name = (namespace.clone(), hello.profile.runner.clone());
        let present = state.by_runner.get(&name).and_then(|key| state.sessions.get(key));
        match present {
            Some(present)
                if hello.session.is_some()
                    && present.is_connected()
                    && present.profile.instance != hello.profile.instance =>
            {
                Err(taken_over(&hello.profile.runner))
            }
            _ => Ok(()),
        }
    }

    /// Makes a session, which replaces another one of the same runner.
    fn new_session(&self, state: &mut State, namespace: &Namespace, hello: &Hello) -> SupplyKey {
        let name = (namespace.clone(), hello.profile.runner.clone());
        if let Some(before) = state.by_runner.get(&name).copied() {
            let same_process = state
                .sessions
                .get(&before)
                .is_some_and(|session| session.profile.instance == hello.profile.instance);
            let left = if same_process { Left::Replaced } else { Left::TakenOver };
            self.drop_session(state, before, left);
        }
        let key = state.next_key();
        let id: Arc<str> =
            format!("{:016x}{:016x}", self.entropy().u64(), self.entropy().u64()).into();
        let profile = hello.profile.clone();
        let session = Session::new(key, id.clone(), namespace.clone(), profile, self.times());
        self.queue().runner_up(session.supply());
        state.sessions.insert(key, session);
        state.by_id.insert(id, key);
        state.by_runner.insert(name, key);
        key
    }

    /// Says of each attempt that a runner holds whether it goes on, and ends those that it
    /// should hold and does not. The inventory was made when the runner had seen what was
    /// assigned up to `as_of_seq`.
    pub(super) fn judge(
        &self,
        state: &mut State,
        key: SupplyKey,
        inventory: &[Held],
        as_of_seq: u64,
    ) -> Vec<Verdict> {
        let mut kept = BTreeSet::new();
        let mut verdicts = Vec::with_capacity(inventory.len());
        for held in inventory {
            let resume_from = Self::verdict(state, key, held);
            if resume_from.is_some() {
                kept.insert(held.fence.task);
            }
            verdicts.push(Verdict { fence: held.fence, resume_from });
        }
        for fence in Self::missing(state, key, &kept, as_of_seq) {
            let why = "its runner does not hold it any more";
            let reached = state
                .leases
                .find(fence)
                .is_some_and(|lease| lease.accepted || lease.holder == Some(key));
            // What was under way to an earlier session never began.
            let end = if reached { End::Lose(why.into()) } else { End::HandBack(why.into()) };
            self.spawn_end(state, fence, end);
        }
        verdicts
    }

    /// Leases that the runner must hold and does not: of the session, and of the same runner's
    /// earlier ones.
    fn missing(
        state: &State,
        key: SupplyKey,
        kept: &BTreeSet<TaskId>,
        as_of_seq: u64,
    ) -> Vec<Fence> {
        let Some(session) = state.sessions.get(&key) else { return Vec::new() };
        let own = session.held.iter().filter_map(|task| state.leases.of_task(*task));
        // What was under way to it is no loss.
        let own = own.filter(|lease| lease.assign_seq <= as_of_seq);
        let orphans = state.leases.orphans().filter(|lease| {
            lease.runner == session.profile.runner
                && Self::serves(&session.namespace, &lease.namespace)
        });
        own.chain(orphans)
            .filter(|lease| lease.ending.is_none() && !kept.contains(&lease.fence.task))
            .map(|lease| lease.fence)
            .collect()
    }

    fn verdict(state: &mut State, key: SupplyKey, held: &Held) -> Option<u64> {
        let State { sessions, leases, .. } = state;
        let session = sessions.get_mut(&key)?;
        let lease = leases.find_mut(held.fence)?;
        match lease.holder {
            Some(holder) if holder == key => {}
            Some(_) => return None,
            None => {
                let same_runner = lease.runner == session.profile.runner;
                if !same_runner || !Self::serves(&session.namespace, &lease.namespace) {
                    return None;
                }
            }
        }
        if !matches!(lease.ending, None | Some(Ending::Finish)) {
            return None;
        }
        let attempt = held.fence.attempt;
        let next = lease.log.next_index(attempt)?;
        // Events that neither side has any more cannot be made up for.
        if held.last_index >= next && held.first_kept_index > next {
            return None;
        }
        let durable = lease.log.durable_index(attempt)?;
        if lease.holder.is_none() {
            lease.log.settle(attempt, held.last_index);
        }
        lease.log.watch(attempt, session.output.bell.clone());
        lease.accepted = true;
        lease.announced = 0;
        lease.backlog.clear();
        lease.finish = None;
        let until = lease.orphaned_until;
        session.hold(held.fence);
        leases.set_holder(held.fence.task, Some(key), until);
        Some(durable + 1)
    }
}

/// Features of a runner that this server uses.
fn used(features: &[String]) -> Vec<String> {
    features.iter().filter(|name| feature::ALL.contains(&name.as_str())).cloned().collect()
}
