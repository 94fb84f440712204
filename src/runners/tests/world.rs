//! A server's inside without its edges, and a runner that says what a test tells it to.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{
    clock::Clock,
    db::Db,
    error::{Error, Result},
    events::Tail,
    id::{Entropy, InstanceId, Namespace, TaskId},
    instances::{Standing, hints::Hints},
    keys::Signer,
    pb::{self, RunnerEvent, connect_response::Body, runner_event},
    queue::{self, Queue, SupplyKey},
    relay::{Limits, Relay},
    runners::{
        Ports, Registry, RunnerLimits,
        commands::Action,
        model::{Announcement, Batch, Fence, FromRunner, Held, Hello, Profile, Said, Welcome},
        operate::Order,
        protocol::HeldDigest,
        session::{Attached, Link},
    },
    supervisor::Supervisor,
    tasks::{
        ledger::{self, Ledger, NewTask, Parts, Start},
        model::{RetryPolicy, Spec, Task},
        store,
        timers::Timers,
    },
    telemetry::Metrics,
};

pub struct World {
    pub clock: Clock,
    pub parts: Parts,
    pub ledger: Ledger,
    pub registry: Registry,
    pub supervisor: Supervisor,
    /// While set, the store answers nothing but that it is gone.
    pub store_down: Arc<AtomicBool>,
    dir: Arc<tempfile::TempDir>,
}

/// Who starts attempts.
#[derive(PartialEq, Eq)]
enum Starts {
    Asked,
    Accepting,
}

impl World {
    /// Attempts are started by whoever asks the ledger to.
    pub async fn new() -> Self {
        Self::open(Arc::new(tempfile::tempdir().unwrap()), Starts::Asked).await
    }

    /// The ledger starts what it accepts, where a runner is free.
    pub async fn starting() -> Self {
        Self::open(Arc::new(tempfile::tempdir().unwrap()), Starts::Accepting).await
    }

    /// One of several servers on the database that belongs to a directory.
    pub async fn among(
        dir: Arc<tempfile::TempDir>,
        clock: Clock,
        queue: Queue,
        supervisor: Supervisor,
    ) -> Self {
        let alone = (Standing::alone(clock.clone()), Hints::default());
        Self::assemble(dir, clock, queue, supervisor, Starts::Accepting, alone).await
    }

    async fn open(dir: Arc<tempfile::TempDir>, starts: Starts) -> Self {
        let clock = Clock::manual();
        let queue = Queue::new(queue::Limits::default(), clock.clone());
        let standing = Standing::alone(clock.clone());
        let alone = (standing, Hints::default());
        Self::assemble(dir, clock, queue, Supervisor::new(), starts, alone).await
    }

    /// One server's inside among others on the database of a directory, in real time.
    pub async fn beside(dir: Arc<tempfile::TempDir>, hints: Hints) -> Self {
        let clock = Clock::system();
        let id = InstanceId::new(clock.now(), &Entropy::system());
        let standing = Standing::among(id, Duration::from_secs(15), clock.clone());
        let queue = Queue::new(queue::Limits::default(), clock.clone());
        let among = (standing, hints);
        Self::assemble(dir, clock, queue, Supervisor::new(), Starts::Asked, among).await
    }

    async fn assemble(
        dir: Arc<tempfile::TempDir>,
        clock: Clock,
        queue: Queue,
        supervisor: Supervisor,
        starts: Starts,
        (standing, hints): (Standing, Hints),
    ) -> Self {
        let parts = Parts {
            db: crate::db::testing::open(dir.path()).await,
            blobs: crate::blob::Blobs::open(dir.path().join("transcripts")).await.unwrap(),
            queue,
            clock: clock.clone(),
            entropy: Entropy::system(),
            relay: Relay::new(Limits::default()),
            timers: Timers::default(),
            tail: Tail::default(),
            metrics: Metrics::new(),
            standing,
            hints,
        };
        let (ledger, mut writer) = ledger::new(parts.clone());
        let store_down = Arc::new(AtomicBool::new(false));
        let registry = Registry::new(
            RunnerLimits::default(),
            clock.clone(),
            Entropy::seeded(8),
            parts.queue.clone(),
            parts.relay.clone(),
            supervisor.clone(),
            ports(&ledger, &parts.db, &store_down, &parts.metrics),
        );
        if starts == Starts::Accepting {
            writer = writer.starting(crate::dispatch::starter(&registry, supervisor.token()));
        }
        supervisor.spawn_loop("ledger", writer.run());
        Self { clock, parts, ledger, registry, supervisor, store_down, dir }
    }

    /// The same data after a crash: memory is gone, running attempts are adopted.
    pub async fn restart(self) -> Self {
        let dir = self.dir.clone();
        self.supervisor.shutdown(Duration::from_secs(1), &Clock::system()).await;
        drop(self);
        let world = Self::open(dir, Starts::Asked).await;
        let running = crate::tasks::recovery::running(&world.parts).await.unwrap();
        world.registry.adopt(running);
        world
    }

    pub async fn submit(&self) -> TaskId {
        self.try_submit().await.unwrap()
    }

    pub async fn try_submit(&self) -> Result<TaskId> {
        let submitted = self.ledger.submit(vec![new_task()]).await.pop().unwrap();
        submitted.map(|submitted| submitted.task.id)
    }

    /// Starts an attempt in the store, as dispatch does.
    pub async fn start(&self, task: TaskId) -> Arc<Task> {
        let start = Start {
            task,
            runner: "r1".into(),
            node: "n".into(),
            engine: "echo".into(),
            engine_version: "1".into(),
            waited: None,
        };
        self.ledger.start(vec![start]).await.pop().unwrap().unwrap()
    }

    /// A new task, running on the runner.
    pub async fn run(&self, runner: &Runner) -> Fence {
        let id = self.submit().await;
        self.rerun(runner, id).await
    }

    pub async fn rerun(&self, runner: &Runner, id: TaskId) -> Fence {
        let task = self.start(id).await;
        self.registry.assign(runner.key, task.clone());
        Fence { task: id, attempt: task.attempt }
    }

    pub async fn get(&self, id: TaskId) -> Task {
        get(&self.parts.db, id).await.unwrap()
    }

    /// Puts on stable storage what runners have sent, as the recorder does.
    pub async fn record(&self) {
        loop {
            let logs = self.parts.relay.dirty();
            let segments: Vec<_> = logs.iter().filter_map(|log| log.take_unrecorded()).collect();
            if segments.is_empty() {
                return;
            }
            let taken: Vec<_> = segments
                .iter()
                .map(|segment| (segment.task, segment.last, segment.reserve_to.unwrap_or(0)))
                .collect();
            self.ledger.record(segments).await.unwrap();
            for (task, last, reserved) in taken {
                if let Some(log) = self.parts.relay.find(task) {
                    log.recorded(last, reserved);
                }
            }
        }
    }

    /// Takes what the queue has to tell about ended attempts.
    pub fn revoke(&self, fence: Fence) {
        self.registry.revoke(queue::Revocation {
            task: fence.task,
            attempt: fence.attempt,
            reason: crate::error::Reason::Cancelled,
            detail: "test".into(),
        });
    }

    pub fn leases(&self) -> usize {
        self.registry.counts().1
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.supervisor.failures(), Vec::<String>::new());
        }
    }
}

fn ports(ledger: &Ledger, db: &Db, down: &Arc<AtomicBool>, metrics: &Metrics) -> Ports {
    let (ledger, db, down) = (ledger.clone(), db.clone(), down.clone());
    let down_too = down.clone();
    Ports {
        apply: Arc::new(move |id, event| {
            let (ledger, down) = (ledger.clone(), down.clone());
            Box::pin(async move {
                if down.load(Relaxed) {
                    return Err(Error::storage("down"));
                }
                ledger.apply(id, event).await
            })
        }),
        get: Arc::new(move |id| {
            let (db, down) = (db.clone(), down_too.clone());
            Box::pin(async move {
                if down.load(Relaxed) {
                    return Err(Error::storage("down"));
                }
                get(&db, id).await
            })
        }),
        token: Arc::new(|task| format!("token-{}", task.id)),
        receipts: Signer::new(&[7; 32], Clock::manual()).receipts(),
        resume: None,
        roster: None,
        standing: Standing::alone(Clock::manual()),
        metrics: metrics.clone(),
    }
}

async fn get(db: &Db, id: TaskId) -> Result<Task> {
    let rows = db.read(move |tx| Box::pin(async move { store::load(tx, &[id]).await })).await?;
    rows.into_iter().next().ok_or_else(|| Error::not_found("task", id))
}

pub fn new_task() -> NewTask {
    NewTask {
        id: None,
        namespace: Namespace::from("default"),
        spec: Spec {
            model: "baton/echo".into(),
            version: None,
            input: "{\"a\":1}".into(),
            params: "{}".into(),
            priority: 0,
            labels: Default::default(),
            required_labels: Default::default(),
            deadline: None,
            start_timeout: None,
            execution_timeout: Duration::from_mins(1),
            retry: RetryPolicy { jitter: 0.0, ..RetryPolicy::default() },
            seed: 1,
            session: None,
        },
        not_before: None,
        request_id: None,
        digest: [0; 32],
        retry_of: None,
        traceparent: None,
    }
}

/// Polls until `found` gives something, for a while.
pub async fn until<T, F: Future<Output = Option<T>>>(mut found: impl FnMut() -> F) -> T {
    let clock = Clock::system();
    let deadline = clock.mono() + Duration::from_secs(20);
    while clock.mono() < deadline {
        if let Some(value) = found().await {
            return value;
        }
        tokio::task::yield_now().await;
        // Lets the database's threads come forward.
        std::thread::yield_now();
    }
    panic!("nothing came");
}

/// A runner without a mind of its own.
pub struct Runner {
    pub key: SupplyKey,
    pub link: Link,
    pub output: Link,
    pub welcome: Welcome,
    pub name: &'static str,
    pub instance: &'static str,
    pub seq: u64,
    pub acked: u64,
    output_seq: u64,
}

impl Runner {
    /// Connects with a new session.
    pub fn connect(world: &World) -> Self {
        Self::try_connect(world, hello("r1", "i1")).unwrap()
    }

    /// Connects with that many slots, all free.
    pub fn connect_with_slots(world: &World, slots: u32) -> Self {
        let mut hello = hello("r1", "i1");
        hello.profile.slots = slots;
        hello.credits = Some(Announcement { revision: 1, free_slots: slots, as_of_seq: 0 });
        Self::try_connect(world, hello).unwrap()
    }

    pub fn try_connect(world: &World, hello: Hello) -> Result<Self> {
        let (link, output) = (Link::default(), Link::default());
        let namespace = Namespace::from("default");
        let (key, welcome) =
            world.registry.hello(&namespace, hello, Attached::Stream(link.clone()))?;
        world.registry.attach_output(&namespace, &welcome.session, output.clone())?;
        let (name, instance) = ("r1", "i1");
        let (seq, acked, output_seq) = (0, 0, 0);
        Ok(Self { key, link, output, welcome, name, instance, seq, acked, output_seq })
    }

    /// Comes back with its session and what it holds.
    pub fn reconnect(&mut self, world: &World, inventory: Vec<Held>) {
        let mut hello = hello(self.name, self.instance);
        hello.session = Some(self.welcome.session.to_string());
        hello.inventory = inventory;
        hello.ack = self.acked;
        let (seq, acked) = (self.seq, self.acked);
        *self = Self::try_connect(world, hello).unwrap();
        assert!(self.welcome.resumed);
        (self.seq, self.acked) = (seq, acked);
    }

    pub fn say(&mut self, world: &World, body: Said) {
        self.seq += 1;
        let message = FromRunner { seq: self.seq, ack: self.acked, body };
        world.registry.receive(self.key, &self.link, message).unwrap();
    }

    pub fn heartbeat(&self, world: &World, held: &[Fence]) {
        let digest: HeldDigest = held.iter().map(|fence| (fence.task, fence.attempt)).collect();
        let body = Said::Heartbeat { digest: digest.0, load: 0.0, gpus: Vec::new() };
        let message = FromRunner { seq: 0, ack: self.acked, body };
        world.registry.receive(self.key, &self.link, message).unwrap();
    }

    /// Reads and processes what the server has to say.
    pub fn read(&mut self, world: &World) -> Vec<Body> {
        let messages = world.registry.unsent(self.key, &self.link).unwrap();
        let numbered = messages.iter().filter(|message| message.seq > self.acked);
        let bodies = numbered.map(|message| message.body.clone().unwrap()).collect();
        self.acked = messages.iter().map(|message| message.seq).fold(self.acked, u64::max);
        bodies
    }

    pub fn send(&mut self, world: &World, batch: Batch) {
        self.output_seq += 1;
        let batches = vec![batch];
        world.registry.take(self.key, &self.output, self.output_seq, batches, None).unwrap();
    }

    /// Sends tokens from an index on.
    pub fn tokens(&mut self, world: &World, fence: Fence, first_index: u64, texts: &[&str]) {
        let events = texts.iter().map(|text| token(text)).collect();
        self.send(world, Batch { fence, first_index, events, finish: None });
    }

    pub fn finish(&mut self, world: &World, fence: Fence, first_index: u64) {
        let finish = Some(success());
        self.send(world, Batch { fence, first_index, events: Vec::new(), finish });
    }

    /// What the server tells about events, if anything.
    pub fn acks(&self, world: &World) -> Vec<pb::LeaseAck> {
        let acks = world.registry.acks(self.key, &self.output).unwrap();
        acks.map(|acks| acks.leases).unwrap_or_default()
    }

    pub async fn next_acks(&self, world: &World) -> Vec<pb::LeaseAck> {
        until(|| async { Some(self.acks(world)).filter(|acks| !acks.is_empty()) }).await
    }
}

pub fn hello(name: &str, instance: &str) -> Hello {
    Hello {
        profile: Profile {
            runner: name.into(),
            instance: instance.into(),
            node: pb::Node::default(),
            slots: 8,
            labels: Default::default(),
            pools: Vec::new(),
            models: vec!["*".into()],
            engine: "echo".into(),
            engine_version: "1".into(),
            agent_version: "1".into(),
            features: Vec::new(),
            engine_params: Default::default(),
        },
        leave: Default::default(),
        session: None,
        versions: (1, 1),
        inventory: Vec::new(),
        credits: Some(Announcement { revision: 1, free_slots: 8, as_of_seq: 0 }),
        ack: 0,
    }
}

pub fn token(text: &str) -> RunnerEvent {
    RunnerEvent { body: Some(runner_event::Body::Token(text.into())), elapsed_us: 10 }
}

pub fn success() -> pb::Finish {
    let success = pb::Success { result: None };
    pb::Finish { outcome: Some(pb::finish::Outcome::Success(success)), usage: None }
}

pub fn held(fence: Fence, last_index: u64, first_kept_index: u64) -> Held {
    Held { fence, last_index, first_kept_index, finished: false }
}

/// Name of the reason in an acknowledgement.
pub fn reason(ack: &pb::LeaseAck) -> &'static str {
    let Some(error) = &ack.error else { return "" };
    let details = error.details.iter().map(|detail| String::from_utf8_lossy(&detail.value));
    let text: String = details.collect();
    ["LEASE_LOST", "EVENTS_MISSING", "INVALID_PARAMS"]
        .into_iter()
        .find(|reason| text.contains(reason))
        .unwrap_or("?")
}

/// An order to drain.
pub fn drain(runner: &str) -> Order {
    let deadline = Duration::from_secs(5);
    let action = Action::Drain { deadline, hand_back: false, exit: true };
    Order { runner: runner.into(), request_id: String::new(), action }
}
