//! Attempts that come and go between servers: a runner comes back here with what it held on
//! another one, its attempts were ended or taken over elsewhere, or this server lost touch with
//! the database and lets go of what others will take.

use std::{collections::HashSet, time::Duration};

use super::{
    Registry,
    ends::Left,
    model::{Fence, Hello},
    session::Attached,
};
use crate::{
    error::{Error, Kind, Reason, Result},
    faults::{self, Fault},
    id::Namespace,
    instances::Phase,
    queue::Revocation,
    tasks::{ledger::Claim, model::State},
};

impl Registry {
    /// Takes over attempts that a Hello names and that are not here, from whichever server had
    /// them. What may not be taken over gets its verdict later.
    ///
    /// # Errors
    /// When this server may not hold runners now, or storage does not answer: the runner must try
    /// again, here or elsewhere, before anything is decided.
    pub(super) async fn take_over(&self, namespace: &Namespace, hello: &Hello) -> Result<()> {
        if self.ports().standing.phase() != Phase::Good {
            return Err(cut_off());
        }
        let Some(resume) = &self.ports().resume else { return Ok(()) };
        let serves = (namespace.as_str() != Namespace::DEFAULT).then(|| namespace.clone());
        let claims: Vec<Claim> = {
            let state = self.lock();
            let unknown = hello.inventory.iter().filter(|held| {
                state.leases.find(held.fence).is_none() && !state.leases.was_revoked(held.fence)
            });
            let claim = |fence: Fence| Claim {
                task: fence.task,
                attempt: fence.attempt,
                runner: hello.profile.runner.clone(),
                serves: serves.clone(),
            };
            unknown.map(|held| claim(held.fence)).collect()
        };
        if claims.is_empty() {
            return Ok(());
        }
        let n_claims = claims.len();
        let tasks = resume(claims).await?;
        tracing::info!(
            runner.id = %hello.profile.runner,
            n_claims,
            n_tasks = tasks.len(),
            "attempts came over from another server"
        );
        self.adopt(tasks);
        Ok(())
    }

    /// Whether the attempt runs, and another server holds its runner as far as the store knows.
    pub(super) async fn is_elsewhere(&self, fence: Fence) -> Result<bool> {
        if self.ports().resume.is_none() {
            return Ok(false);
        }
        match (self.ports().get)(fence.task).await {
            Ok(task) => Ok(task.state == State::Running && task.attempt == fence.attempt),
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Attempts whose leases are here.
    pub fn held(&self) -> Vec<Fence> {
        self.lock().leases.iter().map(|lease| lease.fence).collect()
    }

    /// Forgets a lease whose attempt another server has ended or taken over, and tells the runner
    /// if it is here.
    pub fn revoke_elsewhere(&self, revocation: Revocation) {
        if faults::planted(Fault::CancelOnlyHere) {
            return;
        }
        let fence = Fence { task: revocation.task, attempt: revocation.attempt };
        let log = self.lock().leases.find(fence).map(|lease| lease.log.clone());
        self.revoke(revocation);
        if let Some(log) = log {
            log.let_go(fence.attempt);
        }
    }

    /// Does what the standing among the servers asks for.
    pub(super) fn sweep_standing(&self) {
        match self.ports().standing.phase() {
            Phase::Good => {}
            Phase::Cut => self.send_away(),
            Phase::Over => self.let_go(),
        }
    }

    /// Has every runner connect again, which brings it to another server.
    fn send_away(&self) {
        let mono = self.mono();
        let mut state = self.lock();
        let connected = state.sessions.values_mut().filter(|session| session.is_connected());
        for session in connected {
            for link in session.attached.link().into_iter().chain(&session.output.link) {
                link.end(Some(cut_off()));
            }
            session.attached = Attached::No(mono);
            self.publish_credits(session);
        }
    }

    /// Forgets all sessions and leases without a word to the store: others hold them, or will.
    fn let_go(&self) {
        let mut state = self.lock();
        let keys: Vec<_> = state.sessions.keys().copied().collect();
        for key in keys {
            self.drop_session(&mut state, key, Left::Cut);
        }
        let fences: HashSet<_> = state.leases.iter().map(|lease| lease.fence).collect();
        for fence in fences {
            if let Some(lease) = state.release(fence) {
                lease.log.let_go(fence.attempt);
            }
        }
    }
}

/// The answer to what is said of an attempt whose runner is not connected here.
pub(super) fn held_elsewhere(fence: Fence) -> Error {
    let message = format!("another server holds attempt {fence}; say Hello here, then send again");
    Error::new(Kind::Unavailable, Reason::NotServing, message).retry_after(Duration::from_secs(1))
}

/// The answer of a server that cannot reach the database.
pub(super) fn cut_off() -> Error {
    let message = "this server lost touch with the database; connect to another, or again";
    Error::new(Kind::Unavailable, Reason::NotServing, message).retry_after(Duration::from_secs(1))
}
