//! The composition root: the only file that picks concrete parts, starts the loops, serves
//! and drains.

mod among;
mod place;
mod shared;
#[cfg(test)]
mod tests;

use std::{fs::File, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use tokio_util::sync::CancellationToken;

use among::Among;
pub use place::{
    artifact_store, bytes, bytes_beside, certificate, database, lock_data_dir, make_data_dir,
    retention,
};
pub use shared::look_at_redis;

use crate::{
    artifacts::{self, Artifacts},
    blob,
    clock::Clock,
    config::{self, Config},
    db::{self, Db},
    dispatch::{self, Dispatcher, Sweep},
    error::Error,
    events::Tail,
    facades,
    faults::{self, Fault},
    gateway::Gateway,
    grpc::{
        calls::{Calls, Parts, Services},
        health::{self, Health},
        layers::Edge,
        serve::{self, Listener},
    },
    id::Entropy,
    instances::{Lock, Standing},
    keys::{self, Keyring},
    moving,
    pb::server::{
        artifact_service_server::ArtifactServiceServer, key_service_server::KeyServiceServer,
        queue_service_server::QueueServiceServer, runner_service_server::RunnerServiceServer,
        task_service_server::TaskServiceServer,
    },
    queue::{self, Queue},
    queues,
    relay::{self, Relay},
    runners::{self, Registry, RunnerLimits, roster::Roster},
    supervisor::Supervisor,
    tasks::{self, archive::Archiver, ledger, recorder::Recorder},
    telemetry::{Metrics, StateLabel},
};

/// Attempt tokens outlive the execution timeout by this much, for a last report.
const TOKEN_MARGIN: Duration = Duration::from_mins(5);

/// Other programs that a server works with, where a simulation takes their place.
#[derive(Clone, Default)]
pub struct Outside {
    /// The database.
    pub database: Option<db::Simulated>,
    /// Redis, where `redis.url` names one.
    #[cfg(feature = "redis")]
    pub redis: Option<Arc<dyn crate::redis::wire::Wire>>,
}

/// A server that runs.
pub struct App {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Whether it speaks TLS there.
    pub is_tls: bool,
    /// Its loops and connections.
    pub supervisor: Supervisor,
    /// Its metrics.
    pub metrics: Metrics,
    /// Its credentials.
    pub keyring: Keyring,
    /// Its database.
    pub db: Db,
    /// Its place among the servers on that database.
    pub standing: Standing,
    /// The file with the first admin key, when this start made it.
    pub first_key: Option<PathBuf>,
    health: Health,
    clock: Clock,
    grace: Duration,
    threads_end: CancellationToken,
    _lock: File,
}

impl App {
    /// Starts a server on the configured address; port 0 picks a free one.
    pub async fn start(config: Config, clock: Clock, entropy: Entropy) -> anyhow::Result<Self> {
        let wanted = config.server.addr;
        let listener = place::bind(wanted)?;
        let addr = listener.local_addr()?;
        Self::start_on(listener, addr, config, (clock, entropy), Outside::default()).await
    }

    /// Starts a server on a listener that is open already.
    pub async fn start_on<L: Listener>(
        listener: L,
        addr: SocketAddr,
        config: Config,
        (clock, entropy): (Clock, Entropy),
        outside: Outside,
    ) -> anyhow::Result<Self> {
        config.validate()?;
        let tls = place::acceptor(&config.tls)?;
        let is_tls = tls.is_some();
        place::raise_descriptor_limit();
        let data_dir = &config.storage.data_dir;
        let lock = place::lock_data_dir(data_dir)?;
        let supervisor = Supervisor::new();
        let connection =
            shared::connect(&config, &outside, (&clock, &entropy), &supervisor).await?;
        let at = place::database(&config);
        let db = match outside.database {
            Some(simulated) => Db::open_simulated(simulated),
            None => Db::open_at(&at, config.database.connections, &entropy).await,
        };
        let db = db.with_context(|| format!("cannot open {at}"))?;
        db.set_headroom(config.storage.min_free);
        let metrics = Metrics::new();
        metrics.start_time_seconds.set(clock.now().0 as f64 / 1e6);

        let limits = runner_limits(&config.runners);
        let times = (&clock, &entropy);
        let wired = connection.is_some();
        let among = Among::join(&db, &limits, addr, times, &supervisor, wired).await?;
        let standing = among.standing.clone();

        let open = !config.auth.required;
        let keyring = Keyring::open(db.clone(), clock.clone(), entropy.clone(), open).await?;
        let first_key =
            if open { None } else { place::write_first_key(&keyring, data_dir).await? };

        let relay = Relay::new(relay::Limits {
            log_bytes: usize::try_from(config.relay.per_task)?,
            total_bytes: usize::try_from(config.relay.total)?,
            ..relay::Limits::default()
        });
        let bounds = queue_limits(&config.queue);
        let (queue, shared) = match connection {
            Some(connection) => {
                let (queue, shared) =
                    connection.queue(&config.queue, bounds, &db, &clock, &entropy);
                (queue, Some(shared))
            }
            None => (Queue::new(bounds, clock.clone()), None),
        };
        if clock.is_simulated() {
            blob::work_at_once();
        }
        let bytes = place::bytes(&config).await?;
        let moving::Bytes { artifacts: store, transcripts: blobs } = bytes;
        let artifacts = Artifacts::new(artifacts::Parts {
            db: db.clone(),
            store,
            clock: clock.clone(),
            entropy: entropy.clone(),
            signer: keyring.signer().clone(),
            limits: artifact_limits(&config.artifacts),
            public_url: config.http.public_url.trim_end_matches('/').to_owned(),
        });
        let parts = ledger::Parts {
            db: db.clone(),
            blobs: blobs.clone(),
            clock: clock.clone(),
            entropy: entropy.clone(),
            relay: relay.clone(),
            queue: queue.clone(),
            timers: tasks::timers::Timers::default(),
            tail: Tail::default(),
            metrics: metrics.clone(),
            standing: standing.clone(),
            hints: among.hints.clone(),
        };
        let (ledger, writer) = ledger::new(parts.clone());
        let registry = Registry::new(
            limits,
            clock.clone(),
            entropy.clone(),
            queue.clone(),
            relay.clone(),
            supervisor.clone(),
            ports(&parts, &ledger, &keyring),
        );
        queues::load(&db, &queue).await?;
        registry.adopt(tasks::recovery::running(&parts).await?);

        let loops = &supervisor;
        let writer = writer.starting(dispatch::starter(&registry, loops.token()));
        loops.spawn_loop("ledger", writer.run());
        loops.spawn_loop("timers", parts.timers.clone().run(ledger.clone(), clock.clone()));
        let recorder = Recorder::new(relay.clone(), ledger.clone(), clock.clone(), metrics.clone());
        loops.spawn_flushing_loop("recorder", recorder.run(loops.last_call()));
        // As above.
        if !clock.is_simulated() {
            // Other servers do not see this one's files: without a bucket, segments stay in the
            // database that several may share.
            if standing.id().is_none() || blobs.is_shared() {
                let (clock, entropy) = (clock.clone(), entropy.clone());
                let duty = standing.duty(Lock::Archive);
                let archiver = Archiver::new(db.clone(), blobs, clock, entropy, duty);
                loops.spawn_loop("archive", archiver.run());
            }
            loops.spawn_loop("artifacts", artifacts.clone().run(standing.duty(Lock::Artifacts)));
        }
        loops.spawn_loop("housekeeping", {
            let retention = place::retention(&config.retention);
            let duty = standing.duty(Lock::Housekeeping);
            tasks::housekeeping::run(db.clone(), clock.clone(), retention, duty)
        });
        among.start(&parts, &ledger, &registry, shared.as_ref(), loops).await?;
        loops.spawn_loop("storage health", db::watch_health(db.clone(), clock.clone()));
        loops.spawn_loop("lease sweep", registry.clone().run_sweep());
        loops.spawn_loop("revocations", registry.clone().run_revocations());
        loops.spawn_loop("keys", keyring.clone().run());
        if shared.is_none() {
            let sweep = Sweep::new(db.clone(), queue.clone(), clock.clone());
            loops.spawn_loop("queue sweep", sweep.run());
        }
        let dispatcher = Dispatcher {
            queue: queue.clone(),
            ledger: ledger.clone(),
            registry: registry.clone(),
            clock: clock.clone(),
            supervisor: supervisor.clone(),
        };
        let draining = loops.token();
        loops.spawn_loop("dispatch", async move {
            tokio::select! {
                biased;
                // Nothing new is assigned by a server that is on its way out.
                () = draining.cancelled(), if !faults::planted(Fault::AssignWhileDraining) => Ok(()),
                ended = dispatcher.run() => ended,
            }
        });
        let fan_out = relay.clone();
        loops.spawn_loop("fan-out", async move {
            fan_out.fan_out().await;
            Ok(())
        });

        let services =
            services(&config, &parts, &ledger, &artifacts, &registry, &keyring, &supervisor);
        let health = Health::new(&services).await;
        if let Some(shared) = shared {
            shared.start(health.clone(), metrics.clone(), loops);
        }
        let services = services.with(health.server());
        let services =
            if config.server.reflection { health::with_reflection(services)? } else { services };
        let gauges = gauges(metrics.clone(), relay, registry.clone(), queue, db.clone());
        let calls = Calls::new(Parts {
            services,
            keyring: keyring.clone(),
            auth: config.auth.clone(),
            limits: config.limits.clone(),
            metrics: metrics.clone(),
            supervisor: supervisor.clone(),
        });
        let http = health::router(health.clone(), metrics.clone(), gauges);
        let http = http.merge(facades::router(calls.clone(), &config)?);
        let http = Gateway::new(calls.clone(), &config)?.serve_on(http);
        let edge = Edge::new(calls, http, &entropy);
        let threads_end = CancellationToken::new();
        let threads = config.server.io_threads;
        if let Some(acceptor) = tls.clone() {
            loops.spawn_loop("certificate", acceptor.watch(clock.clone()));
        }
        let port = serve::Port { edge, tls };
        loops.spawn_flushing_loop("accept", {
            serve::serve(listener, port, threads, threads_end.clone())
        });
        tasks::recovery::waiting(&parts).await?;
        loops.spawn_loop("health", follow_storage(health.clone(), parts, registry));
        tracing::info!(%addr, tls = is_tls, data_dir = %data_dir.display(), "serving");
        let grace = config.server.shutdown_grace;
        Ok(Self {
            addr,
            is_tls,
            supervisor,
            metrics,
            keyring,
            db,
            standing,
            first_key,
            health,
            clock,
            grace,
            threads_end,
            _lock: lock,
        })
    }

    /// Whether the server takes calls.
    pub fn is_serving(&self) -> bool {
        self.health.is_serving()
    }

    /// Completes when a loop failed or a stop was asked for.
    pub async fn stopped(&self) {
        self.supervisor.stop_requested().cancelled().await;
    }

    /// Drains and ends within the grace: not serving first, then no new connection, GOAWAY,
    /// streams, loops, and the database last. An error names the loops that had failed.
    pub async fn shutdown(self) -> anyhow::Result<()> {
        self.health.close().await;
        self.supervisor.shutdown(self.grace, &self.clock).await;
        self.threads_end.cancel();
        self.db.close().await;
        let failures = self.supervisor.failures();
        if failures.is_empty() {
            tracing::info!("stopped");
            return Ok(());
        }
        bail!("stopped after a failure: {}", failures.join("; "))
    }
}

fn services(
    config: &Config,
    parts: &ledger::Parts,
    ledger: &ledger::Ledger,
    artifacts: &Artifacts,
    registry: &Registry,
    keyring: &Keyring,
    supervisor: &Supervisor,
) -> Services {
    let limit = usize::try_from(config.limits.message).unwrap_or(usize::MAX);
    let tasks = tasks::service::Service::new(
        parts.clone(),
        ledger.clone(),
        artifacts.clone(),
        supervisor.clone(),
    );
    let tasks = tasks.retrying(tasks::model::RetryPolicy {
        max_attempts: config.queue.max_attempts,
        initial_backoff: config.queue.initial_backoff,
        max_backoff: config.queue.max_backoff,
        ..Default::default()
    });
    let artifacts = artifacts::Service::new(artifacts.clone());
    let runners = runners::service::Service(registry.clone());
    let queues = queues::Service::new(parts.db.clone(), parts.queue.clone(), parts.clock.clone());
    if parts.db.is_shared() {
        supervisor.spawn_loop("pauses", queues.clone().follow());
    }
    let keys = keys::Service::new(keyring.clone());
    Services::new()
        .with(TaskServiceServer::new(tasks).max_decoding_message_size(limit))
        .with(RunnerServiceServer::new(runners).max_decoding_message_size(limit))
        .with(QueueServiceServer::new(queues).max_decoding_message_size(limit))
        .with(ArtifactServiceServer::new(artifacts).max_decoding_message_size(limit))
        .with(KeyServiceServer::new(keys).max_decoding_message_size(limit))
}

/// Serving is what storage and recovery allow: after an outage, what was missed in memory is
/// rebuilt from the rows.
async fn follow_storage(
    health: Health,
    parts: ledger::Parts,
    registry: Registry,
) -> anyhow::Result<()> {
    let mut healthy = parts.db.healthy();
    let mut was_down = false;
    loop {
        if !*healthy.borrow_and_update() {
            was_down = true;
            health.set(false).await;
        } else if was_down {
            match recover(&parts, &registry).await {
                Ok(()) => was_down = false,
                Err(error) => {
                    tracing::warn!(%error, "recovery failed; trying again");
                    parts.clock.sleep(Duration::from_millis(500)).await;
                    continue;
                }
            }
        }
        if !was_down {
            health.set(true).await;
        }
        healthy.changed().await.context("the database is gone")?;
    }
}

async fn recover(parts: &ledger::Parts, registry: &Registry) -> Result<(), Error> {
    registry.adopt(tasks::recovery::running(parts).await?);
    tasks::recovery::waiting(parts).await?;
    Ok(())
}

/// What runners need of the ledger and of keys, which they must not import.
fn ports(parts: &ledger::Parts, ledger: &ledger::Ledger, keyring: &Keyring) -> runners::Ports {
    let (db, signer) = (parts.db.clone(), keyring.signer().clone());
    let (ledger, resuming) = (ledger.clone(), (parts.clone(), ledger.clone()));
    let resume: runners::Resume = Arc::new(move |claims| {
        let (parts, ledger) = resuming.clone();
        Box::pin(async move {
            let tasks = ledger.resume(claims).await?;
            for task in &tasks {
                tasks::recovery::resume(&parts, task).await?;
                parts.timers.watch(task);
            }
            Ok(tasks)
        })
    });
    runners::Ports {
        resume: parts.standing.id().map(|_| resume),
        standing: parts.standing.clone(),
        roster: parts
            .standing
            .id()
            .map(|id| Roster::new(parts.db.clone(), id, parts.standing.dead_after())),
        apply: Arc::new(move |id, event| {
            let ledger = ledger.clone();
            Box::pin(async move { ledger.apply(id, event).await })
        }),
        get: Arc::new(move |id| {
            let db = db.clone();
            Box::pin(async move {
                let found = db
                    .read(move |tx| Box::pin(async move { tasks::store::load(tx, &[id]).await }))
                    .await?;
                found.into_iter().next().ok_or_else(|| Error::not_found("task", id))
            })
        }),
        token: Arc::new(move |task| {
            let ttl = task.spec.execution_timeout + TOKEN_MARGIN;
            signer.attempt_token(&task.namespace, task.id, task.attempt, ttl)
        }),
        receipts: keyring.signer().receipts(),
        metrics: parts.metrics.clone(),
    }
}

fn artifact_limits(config: &config::Artifacts) -> artifacts::Limits {
    artifacts::Limits {
        max_size: config.max_size,
        max_per_namespace: config.max_per_namespace,
        max_uploads: config.max_uploads,
        ttl: config.ttl,
        upload_ttl: config.upload_ttl,
    }
}

fn queue_limits(config: &config::Queue) -> queue::Limits {
    queue::Limits {
        max_per_model: config.max_per_model,
        max_per_namespace: config.max_per_namespace,
        when_full: match config.full {
            config::FullPolicy::Reject => queue::FullPolicy::Reject,
            config::FullPolicy::DropOldest => queue::FullPolicy::DropOldest,
        },
        ageing_step: config.ageing,
        ..queue::Limits::default()
    }
}

fn runner_limits(config: &config::Runners) -> RunnerLimits {
    RunnerLimits {
        heartbeat_interval: config.heartbeat_interval,
        lease_ttl: config.lease_ttl,
        session_grace: config.session_grace,
        max_stream_age: config.max_stream_age,
        cancel_grace: config.cancel_grace,
        ..RunnerLimits::default()
    }
}

/// Brings gauges up to date that are cheaper to ask for than to keep.
fn gauges(
    metrics: Metrics,
    relay: Relay,
    registry: Registry,
    queue: Queue,
    db: Db,
) -> impl Fn() + Clone + Send + Sync + 'static {
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    move || {
        let stats = relay.stats();
        metrics.relay_bytes.set(count(stats.bytes));
        metrics.relay_logs.set(count(stats.logs));
        metrics.relay_subscribers.set(count(stats.subscribers));
        let (sessions, leases) = registry.counts();
        metrics.runners.get_or_create(&StateLabel { state: "any" }).set(count(sessions));
        metrics.running.set(count(leases));
        metrics.queued.set(i64::try_from(queue.waiting()).unwrap_or(i64::MAX));
        metrics.storage_healthy.set(i64::from(*db.healthy().borrow()));
    }
}
