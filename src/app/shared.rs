//! What servers on one database share in Redis, where one is configured.

use super::{Outside, among::Told};
#[cfg(feature = "redis")]
use crate::{
    backlog::{Backlog, Settings},
    instances::hints::Outgoing,
};
use crate::{
    clock::Clock,
    config::{self, Config},
    db::Db,
    grpc::health::Health,
    id::{Entropy, InstanceId},
    queue::{Limits, Queue},
    runners::Registry,
    supervisor::Supervisor,
    tasks::ledger::Parts,
    telemetry::Metrics,
};

/// The service name under which health checks ask for it.
#[cfg(feature = "redis")]
const PART: &str = "redis";

/// The connection.
#[cfg(feature = "redis")]
pub(super) struct Connection {
    redis: crate::redis::Redis,
    bells: crate::redis::Bells,
}

/// The connection, and the queue that goes through it.
#[cfg(feature = "redis")]
pub(super) struct Shared {
    connection: Connection,
    backlog: Backlog,
}

/// Nothing is shared by a program without it.
#[cfg(not(feature = "redis"))]
pub(super) enum Connection {}

/// Nothing is shared by a program without it.
#[cfg(not(feature = "redis"))]
pub(super) enum Shared {}

/// Connects to what `redis.url` names, if it names something. What cannot be used is an error: a
/// server that is to share its queue never has one of its own instead.
pub(super) async fn connect(
    config: &Config,
    outside: &Outside,
    times: (&Clock, &Entropy),
    supervisor: &Supervisor,
) -> anyhow::Result<Option<Connection>> {
    if config.redis.url.expose().is_empty() {
        return Ok(None);
    }
    open(&config.redis, outside, times, supervisor).await.map(Some)
}

/// Version and eviction policy of what `redis.url` names, if it names something.
pub async fn look_at_redis(
    config: &Config,
    clock: &Clock,
) -> anyhow::Result<Option<(String, Option<String>)>> {
    let supervisor = Supervisor::new();
    let (outside, times) = (Outside::default(), (clock, &Entropy::system()));
    let connection = connect(config, &outside, times, &supervisor).await?;
    #[cfg(feature = "redis")]
    let found = connection.map(|connection| {
        let server = connection.redis.server();
        (server.version, server.evicts)
    });
    #[cfg(not(feature = "redis"))]
    let found = connection.map(|never| match never {});
    Ok(found)
}

#[cfg(feature = "redis")]
async fn open(
    config: &config::Redis,
    outside: &Outside,
    (clock, entropy): (&Clock, &Entropy),
    supervisor: &Supervisor,
) -> anyhow::Result<Connection> {
    use crate::redis::Redis;
    use anyhow::Context as _;
    let settings = crate::redis::Settings {
        url: config.url.expose().to_owned(),
        prefix: config.prefix.clone(),
        connect_timeout: config.connect_timeout,
        command_timeout: config.command_timeout,
        trust: crate::tls::Trust {
            ca: Some(&config.ca).filter(|path| !path.is_empty()).map(Into::into),
            ..Default::default()
        },
    };
    let opened = async {
        let (clock, entropy) = (clock.clone(), entropy.clone());
        let redis = match outside.redis.clone() {
            Some(wire) => Redis::connect_over(wire, settings, clock, entropy, supervisor).await?,
            None => Redis::connect(settings, clock, entropy, supervisor).await?,
        };
        let bells = redis.bells().await?;
        Ok::<_, crate::redis::Error>(Connection { redis, bells })
    };
    opened.await.context("redis.url")
}

#[cfg(not(feature = "redis"))]
async fn open(
    _: &config::Redis,
    _: &Outside,
    _: (&Clock, &Entropy),
    _: &Supervisor,
) -> anyhow::Result<Connection> {
    anyhow::bail!("redis.url: needs a program that was built with the feature `redis`")
}

#[cfg(feature = "redis")]
impl Connection {
    /// The queue of this server, which it shares with others.
    pub(super) fn queue(
        self,
        config: &config::Queue,
        limits: Limits,
        db: &Db,
        clock: &Clock,
        entropy: &Entropy,
    ) -> (Queue, Shared) {
        let settings = Settings {
            limits,
            ack_timeout: config.ack_timeout,
            dead_letter_ttl: config.dead_letter_ttl,
        };
        let name = format!("{:016x}", entropy.u64());
        let (queue, backlog) =
            Backlog::open(&self.redis, db.clone(), clock.clone(), &name, settings);
        tracing::info!(address = self.redis.address(), "queues are shared in Redis");
        (queue, Shared { connection: self, backlog })
    }
}

#[cfg(not(feature = "redis"))]
impl Connection {
    /// Never, in a program without it.
    pub(super) fn queue(
        self,
        _: &config::Queue,
        _: Limits,
        _: &Db,
        _: &Clock,
        _: &Entropy,
    ) -> (Queue, Shared) {
        match self {}
    }
}

#[cfg(feature = "redis")]
impl Shared {
    /// Carries what servers tell each other, and tokens to where they are read.
    pub(super) async fn carry(
        &self,
        told: Told,
        me: InstanceId,
        parts: &Parts,
        registry: &Registry,
        supervisor: &Supervisor,
    ) -> anyhow::Result<()> {
        let Connection { redis, bells } = &self.connection;
        let Outgoing { hints, asked } = told.outgoing;
        let (relay, clock) = (parts.relay.clone(), parts.clock.clone());
        let export =
            crate::crossing::Export::new(relay, clock, parts.hints.clone(), redis.clone(), asked);
        supervisor.spawn_loop("export", export.run());
        let carrier = crate::crossing::Carrier {
            redis: redis.clone(),
            bells: bells.clone(),
            me,
            hints: parts.hints.clone(),
            inlet: told.follow,
            registry: registry.clone(),
            tail: parts.tail.clone(),
        };
        carrier.start(hints, supervisor).await
    }

    /// Starts what goes through Redis, and says how it is.
    pub(super) fn start(&self, health: Health, metrics: Metrics, supervisor: &Supervisor) {
        self.backlog.start(&self.connection.bells, supervisor);
        let mut changes = self.connection.redis.health();
        supervisor.spawn_loop("redis", async move {
            loop {
                let up = changes.borrow_and_update().is_up();
                metrics.redis_healthy.set(up.into());
                // Anybody may ask: no names of hosts.
                let amiss = "the shared queue does not answer, tasks start from the database";
                health.set_part(PART, (!up).then(|| amiss.to_owned())).await;
                changes.wait_for(|health| health.is_up() != up).await?;
            }
        });
    }
}

#[cfg(not(feature = "redis"))]
impl Shared {
    /// Never, in a program without it.
    pub(super) async fn carry(
        &self,
        _: Told,
        _: InstanceId,
        _: &Parts,
        _: &Registry,
        _: &Supervisor,
    ) -> anyhow::Result<()> {
        match *self {}
    }

    /// Never, in a program without it.
    pub(super) fn start(&self, _: Health, _: Metrics, _: &Supervisor) {
        match *self {}
    }
}
