//! What an instance knows of itself: whether it may go on, and which locks it holds. Plain
//! memory; the heartbeat keeps it up to date.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;

use super::store;
use crate::{
    clock::{Clock, Mono},
    db::Tx,
    error::Result,
    id::InstanceId,
};

/// Whether an instance may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It may hand out work and hold runners.
    Good,
    /// It has not reached the database for a while: it hands out nothing and sends its runners
    /// elsewhere.
    Cut,
    /// Others may have taken what it held.
    Over,
}

/// What one instance at a time does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lock {
    /// Losing attempts whose instance is dead.
    Orphans,
    /// Deadlines and start timeouts that no instance watches.
    Limits,
    /// Deleting what is old.
    Housekeeping,
    /// Collecting artifacts that nothing refers to.
    Artifacts,
    /// Moving transcripts of ended tasks to a bucket.
    Archive,
}

impl Lock {
    /// All of them, in the order in which they are taken.
    pub const ALL: [Self; 5] =
        [Self::Orphans, Self::Limits, Self::Housekeeping, Self::Artifacts, Self::Archive];

    /// Its name in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::Orphans => "orphans",
            Self::Limits => "limits",
            Self::Housekeeping => "housekeeping",
            Self::Artifacts => "artifacts",
            Self::Archive => "archive",
        }
    }
}

/// The right to write in the name of a lock.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mandate(pub(super) Option<Held>);

/// A lock as it was taken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Held {
    pub(super) lock: Lock,
    pub(super) holder: InstanceId,
    pub(super) epoch: i64,
}

impl Mandate {
    /// An operator's own, which no lock stands behind.
    pub fn of_operator() -> Self {
        Self(None)
    }

    /// Holds the lock until the end of the transaction.
    ///
    /// # Errors
    /// `CONFLICT` when another instance has it by now.
    pub async fn check(&self, tx: &mut Tx) -> Result<()> {
        match &self.0 {
            None => Ok(()),
            Some(held) => store::check(tx, held).await,
        }
    }
}

/// An instance among others; clones share it.
#[derive(Clone)]
pub struct Standing(Arc<Inner>);

struct Inner {
    clock: Clock,
    /// `None` for a server alone.
    among: Option<Among>,
}

struct Among {
    id: InstanceId,
    ttl: Duration,
    state: Mutex<State>,
}

struct State {
    /// Just before the latest heartbeat that was written was sent.
    sent: Option<Mono>,
    /// Since when no heartbeat came too late.
    good_since: Mono,
    /// Other instances that were there at the latest heartbeat.
    n_others: u64,
    /// Locks with their epochs, and until when they are held.
    locks: BTreeMap<Lock, (i64, Mono)>,
}

impl std::fmt::Debug for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Standing").field(&self.id()).finish()
    }
}

impl Standing {
    /// A server alone on its database.
    pub fn alone(clock: Clock) -> Self {
        Self(Arc::new(Inner { clock, among: None }))
    }

    /// An instance that has not been heard of yet; leases last for `ttl`.
    pub fn among(id: InstanceId, ttl: Duration, clock: Clock) -> Self {
        let state =
            State { sent: None, good_since: clock.mono(), n_others: 0, locks: BTreeMap::new() };
        let among = Some(Among { id, ttl, state: Mutex::new(state) });
        Self(Arc::new(Inner { clock, among }))
    }

    /// Its id; `None` for a server alone.
    pub fn id(&self) -> Option<InstanceId> {
        self.0.among.as_ref().map(|among| among.id)
    }

    /// Whether it may go on.
    pub fn phase(&self) -> Phase {
        let Some(among) = &self.0.among else { return Phase::Good };
        let silent = self.silent();
        if silent < among.ttl / 2 {
            Phase::Good
        } else if silent < among.ttl {
            Phase::Cut
        } else {
            Phase::Over
        }
    }

    /// The time since its latest heartbeat that was written was sent; zero for a server alone.
    pub fn silent(&self) -> Duration {
        let Some(among) = &self.0.among else { return Duration::ZERO };
        let sent = among.state.lock().sent;
        sent.map_or(Duration::MAX, |sent| self.0.clock.mono().since(sent))
    }

    /// How long it has been good without a break; the whole time for a server alone.
    pub fn good_for(&self) -> Duration {
        let Some(among) = &self.0.among else { return Duration::MAX };
        if self.phase() != Phase::Good {
            return Duration::ZERO;
        }
        self.0.clock.mono().since(among.state.lock().good_since)
    }

    /// How many other instances there were a moment ago.
    pub fn n_others(&self) -> u64 {
        self.0.among.as_ref().map_or(0, |among| among.state.lock().n_others)
    }

    /// Leases last so long; zero for a server alone.
    pub fn ttl(&self) -> Duration {
        self.0.among.as_ref().map_or(Duration::ZERO, |among| among.ttl)
    }

    /// Between two heartbeats.
    pub fn interval(&self) -> Duration {
        self.ttl() / 5
    }

    /// The database's word on an instance after which others take what it held.
    pub fn dead_after(&self) -> Duration {
        self.ttl() + Duration::from_secs(1)
    }

    /// A lock lasts so long unless it is taken again.
    pub(super) fn lock_ttl(&self) -> Duration {
        self.ttl() * 3 / 5
    }

    /// One of the things that one instance does.
    pub fn duty(&self, lock: Lock) -> Duty {
        Duty { standing: self.clone(), lock }
    }

    /// These locks were taken, by what was sent at `sent`.
    pub(super) fn took(&self, sent: Mono, locks: &[(Lock, i64)]) {
        let Some(among) = &self.0.among else { return };
        let until = sent + self.lock_ttl();
        let locks = locks.iter().map(|(lock, epoch)| (*lock, (*epoch, until)));
        among.state.lock().locks = locks.collect();
    }

    /// A heartbeat that was sent at `sent` was written.
    pub(super) fn renewed(&self, sent: Mono, n_others: u64) {
        let Some(among) = &self.0.among else { return };
        let late = self.phase() != Phase::Good;
        let mut state = among.state.lock();
        if late {
            state.good_since = sent;
        }
        state.sent = Some(sent);
        state.n_others = n_others;
    }

    fn mandate(&self, lock: Lock) -> Option<Mandate> {
        let Some(among) = &self.0.among else { return Some(Mandate(None)) };
        let (epoch, until) = *among.state.lock().locks.get(&lock)?;
        let held = Held { lock, holder: among.id, epoch };
        (self.0.clock.mono() < until).then_some(Mandate(Some(held)))
    }
}

/// One of the things that one instance does; clones share it.
#[derive(Clone, Debug)]
pub struct Duty {
    standing: Standing,
    lock: Lock,
}

impl Duty {
    /// The right to do it now; `None` while another instance has it.
    pub fn mandate(&self) -> Option<Mandate> {
        self.standing.mandate(self.lock)
    }
}
