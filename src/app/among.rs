//! What a server does as one of several on its database: it shows that it is there, ends what dead
//! ones left behind, lets go of what went elsewhere, and brings tokens across.

use std::net::SocketAddr;

use super::shared::Shared;
use crate::{
    clock::Clock,
    crossing::Follow,
    db::Db,
    dispatch::{Holdings, Orphans},
    error::Error,
    id::{Entropy, InstanceId},
    instances::{
        Heartbeat, Lock, Standing,
        hints::{Hints, Outgoing},
    },
    runners::{Registry, RunnerLimits},
    supervisor::Supervisor,
    tasks::{
        history::History,
        ledger::{Ledger, Parts},
    },
};

/// This server among others, or alone.
pub(super) struct Among {
    pub(super) standing: Standing,
    pub(super) hints: Hints,
    heartbeat: Heartbeat,
    outgoing: Option<Outgoing>,
}

/// What the server tells others, where there is a wire.
pub(super) struct Told {
    #[cfg_attr(not(feature = "redis"), expect(dead_code, reason = "there is no wire"))]
    pub(super) outgoing: Outgoing,
    #[cfg_attr(not(feature = "redis"), expect(dead_code, reason = "there is no wire"))]
    pub(super) follow: tokio::sync::mpsc::Sender<crate::crossing::Heard>,
}

impl Among {
    /// Joins the servers on a database, where others may be; what they tell each other goes over a
    /// wire if there is one.
    pub(super) async fn join(
        db: &Db,
        limits: &RunnerLimits,
        address: SocketAddr,
        (clock, entropy): (&Clock, &Entropy),
        supervisor: &Supervisor,
        wired: bool,
    ) -> Result<Self, Error> {
        let standing = if db.is_shared() {
            let id = InstanceId::new(clock.now(), entropy);
            Standing::among(id, limits.lease_ttl, clock.clone())
        } else {
            Standing::alone(clock.clone())
        };
        let heartbeat = Heartbeat {
            db: db.clone(),
            clock: clock.clone(),
            standing: standing.clone(),
            address: address.to_string(),
            leaving: supervisor.token(),
        };
        heartbeat.run_once().await?;
        let (hints, outgoing) = if wired {
            let (hints, outgoing) = Hints::new(clock.clone());
            (hints, Some(outgoing))
        } else {
            (Hints::default(), None)
        };
        Ok(Self { standing, hints, heartbeat, outgoing })
    }

    /// Starts the loops that this takes; none for a server alone.
    pub(super) async fn start(
        self,
        parts: &Parts,
        ledger: &Ledger,
        registry: &Registry,
        shared: Option<&Shared>,
        supervisor: &Supervisor,
    ) -> anyhow::Result<()> {
        let Self { standing, hints, heartbeat, outgoing } = self;
        let Some(id) = standing.id() else { return Ok(()) };
        supervisor.spawn_flushing_loop("heartbeat", heartbeat.run(supervisor.last_call()));
        let orphans = Orphans {
            db: parts.db.clone(),
            ledger: ledger.clone(),
            clock: parts.clock.clone(),
            standing: standing.clone(),
            orphans: standing.duty(Lock::Orphans),
            limits: standing.duty(Lock::Limits),
        };
        supervisor.spawn_loop("orphans", orphans.run());
        let holdings = Holdings::new(parts.clone(), registry.clone(), id);
        supervisor.spawn_loop("holdings", holdings.run());
        supervisor.spawn_loop("roster", registry.clone().run_roster());
        let history = History {
            db: parts.db.clone(),
            blobs: parts.blobs.clone(),
            relay: parts.relay.clone(),
            clock: parts.clock.clone(),
        };
        let follow = Follow::new(history, parts.tail.clone(), id, standing, hints);
        if let (Some(shared), Some(outgoing)) = (shared, outgoing) {
            let told = Told { outgoing, follow: follow.inlet() };
            shared.carry(told, id, parts, registry, supervisor).await?;
        }
        supervisor.spawn_loop("follow", follow.run());
        Ok(())
    }
}
