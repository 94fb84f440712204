//! Leases against rows. It is the sweep behind the hints of other servers: leases whose attempts
//! were ended or taken over elsewhere are let go. And attempts that are this server's by their rows
//! and have no lease, since it had let go of all, get one: their runners come back, or they are
//! lost when it ends.

use std::{collections::HashSet, time::Duration};

use crate::{
    error::{Reason, Result},
    id::InstanceId,
    queue::Revocation,
    runners::{Registry, model::Fence},
    tasks::{
        ledger::Parts,
        model::State,
        reads::{self, Whereabouts},
        recovery,
    },
};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// Rows read at once.
const PAGE: usize = 1000;

/// Compares leases with rows.
pub struct Holdings {
    parts: Parts,
    registry: Registry,
    instance: InstanceId,
    /// Attempts that had no lease at the latest look: they may have been about to get one.
    strays: HashSet<Fence>,
    /// Leases that had no row at the latest look: the answer to an end that was told from here may
    /// have been on its way.
    suspects: HashSet<Fence>,
}

impl Holdings {
    /// A sweep over the leases of this instance.
    pub fn new(parts: Parts, registry: Registry, instance: InstanceId) -> Self {
        let (strays, suspects) = (HashSet::new(), HashSet::new());
        Self { parts, registry, instance, strays, suspects }
    }

    /// One look; returns how many leases were let go, and how many attempts got one.
    pub async fn run_once(&mut self) -> Result<(usize, usize)> {
        Ok((self.let_go().await?, self.adopt().await?))
    }

    async fn adopt(&mut self) -> Result<usize> {
        if !self.registry.may_assign() {
            return Ok(0);
        }
        let instance = self.instance;
        let read = self
            .parts
            .db
            .read(move |tx| Box::pin(async move { reads::held_by(tx, instance).await }));
        let rows = read.await?;
        let held: HashSet<_> = self.registry.held().into_iter().collect();
        let fences = rows.into_iter().map(|(task, attempt)| Fence { task, attempt });
        let strays: HashSet<_> = fences.filter(|fence| !held.contains(fence)).collect();
        let sure: Vec<_> = strays.intersection(&self.strays).map(|fence| fence.task).collect();
        self.strays = strays;
        if sure.is_empty() {
            return Ok(0);
        }
        let tasks = recovery::strays(&self.parts, sure).await?;
        let n_tasks = tasks.len();
        self.registry.adopt(tasks);
        Ok(n_tasks)
    }

    async fn let_go(&mut self) -> Result<usize> {
        let held = self.registry.held();
        let mut missing = Vec::new();
        for page in held.chunks(PAGE) {
            let ids: Vec<_> = page.iter().map(|fence| fence.task).collect();
            let read = self
                .parts
                .db
                .read(move |tx| Box::pin(async move { reads::whereabouts(tx, &ids).await }));
            let rows = read.await?;
            for fence in page {
                let row = rows.iter().find(|row| row.id == fence.task);
                if !row.is_some_and(|row| self.is_here(row, *fence)) {
                    missing.push((*fence, row.cloned()));
                }
            }
        }
        let mut n_let_go = 0;
        for (fence, row) in &missing {
            if self.suspects.contains(fence) {
                self.registry.revoke_elsewhere(revocation(*fence, row.as_ref()));
                n_let_go += 1;
            }
        }
        self.suspects = missing.into_iter().map(|(fence, _)| fence).collect();
        Ok(n_let_go)
    }

    fn is_here(&self, row: &Whereabouts, fence: Fence) -> bool {
        row.state == State::Running
            && row.attempt == fence.attempt
            && row.instance == Some(self.instance)
    }

    /// Looks for ever.
    pub async fn run(mut self) -> anyhow::Result<()> {
        loop {
            self.parts.clock.sleep(EVERY).await;
            match self.run_once().await {
                Ok((0, 0)) => {}
                Ok((n_let_go, n_adopted)) => {
                    tracing::info!(n_let_go, n_adopted, "leases did not agree with the rows");
                }
                Err(error) => tracing::debug!(%error, "leases not compared with the database"),
            }
        }
    }
}

/// What the runner is told of an attempt that is not its any more.
fn revocation(fence: Fence, row: Option<&Whereabouts>) -> Revocation {
    let Fence { task, attempt } = fence;
    let ended = row.filter(|row| row.attempt == attempt).map(|row| row.state);
    let (reason, detail) = match ended {
        Some(State::Cancelled) => (Reason::Cancelled, "the task was cancelled"),
        Some(State::Expired) => (Reason::DeadlineExceeded, "the deadline passed"),
        _ => (Reason::LeaseLost, "another server has the attempt, or ended it"),
    };
    Revocation { task, attempt, reason, detail: detail.to_owned() }
}
