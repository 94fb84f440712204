//! Several servers' insides on one database and one Redis, each with a runner that does as it is
//! told.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{
    backlog::{Backlog, Settings},
    clock::{Clock, Micros},
    dispatch::Dispatcher,
    error::{Reason, Result},
    id::{Entropy, Namespace, TaskId},
    pb::connect_response::Body,
    queue::{Asked, Limits, Queue},
    redis::testing::Server,
    runners::{
        model::{Announcement, Fence, Said},
        tests::world::{Runner, World, hello, new_task},
    },
    supervisor::Supervisor,
    tasks::{
        ledger::NewTask,
        model::{State, Task},
        state::Event,
    },
};

/// How long anything here may take.
pub const BOUND: Duration = Duration::from_secs(20);

/// What the servers share.
pub struct Site {
    pub redis: Server,
    pub clock: Clock,
    pub settings: Settings,
    dir: Arc<tempfile::TempDir>,
    n_members: AtomicU64,
}

/// A server.
pub struct Member {
    pub world: World,
    pub backlog: Backlog,
    pub runner: Option<Runner>,
    /// Attempts that its runner was given, in order.
    pub given: Vec<Fence>,
    slots: u32,
    revision: u64,
}

impl Site {
    pub fn new() -> Self {
        let settings = Settings {
            limits: Limits::default(),
            ack_timeout: Duration::from_secs(1),
            dead_letter_ttl: Duration::from_hours(1),
        };
        Self {
            redis: Server::start(),
            clock: Clock::system(),
            settings,
            dir: Arc::new(tempfile::tempdir().unwrap()),
            n_members: AtomicU64::new(0),
        }
    }

    /// A server that does nothing by itself but write to its ledger.
    pub async fn still(&self) -> Member {
        self.open(false).await
    }

    /// A server whose loops run.
    pub async fn member(&self) -> Member {
        self.open(true).await
    }

    /// Servers whose loops run.
    pub async fn members<const N: usize>(&self) -> [Member; N] {
        let mut members = Vec::new();
        for _ in 0..N {
            members.push(self.member().await);
        }
        members.try_into().ok().unwrap()
    }

    /// A server that does not share its queue.
    pub async fn stranger(&self) -> World {
        let queue = Queue::new(Limits::default(), self.clock.clone());
        World::among(self.dir.clone(), self.clock.clone(), queue, Supervisor::new()).await
    }

    async fn open(&self, runs: bool) -> Member {
        // The database is made by the first.
        let db = crate::db::testing::open(self.dir.path()).await;
        let supervisor = Supervisor::new();
        let redis = crate::redis::Redis::connect(
            self.redis.settings(),
            self.clock.clone(),
            Entropy::system(),
            &supervisor,
        );
        let redis = redis.await.unwrap();
        let name = format!("member{}", self.n_members.fetch_add(1, Relaxed));
        let (queue, backlog) =
            Backlog::open(&redis, db, self.clock.clone(), &name, self.settings.clone());
        let world =
            World::among(self.dir.clone(), self.clock.clone(), queue, supervisor.clone()).await;
        if runs {
            backlog.start(&redis.bells().await.unwrap(), &supervisor);
            let dispatcher = Dispatcher {
                queue: world.parts.queue.clone(),
                ledger: world.ledger.clone(),
                registry: world.registry.clone(),
                clock: self.clock.clone(),
                supervisor: supervisor.clone(),
            };
            supervisor.spawn_loop("dispatch", dispatcher.run());
        }
        let (runner, given) = (None, Vec::new());
        Member { world, backlog, runner, given, slots: 0, revision: 1 }
    }
}

impl Member {
    /// Accepts a task as the service does.
    pub async fn try_submit(&self, new: NewTask) -> Result<TaskId> {
        let id = TaskId::new(self.world.clock.now(), &Entropy::system());
        let asked = Asked {
            task: id,
            namespace: new.namespace.clone(),
            model: new.spec.model.clone(),
            priority: new.spec.priority,
        };
        let admission = self.world.parts.queue.admit(asked).await?;
        if let Some(victim) = admission.evict() {
            let evict = Event::Evict { policy_label: "drop_lru".into() };
            match self.world.ledger.apply(victim, evict).await {
                Err(error) if error.reason() != Reason::StateConflict => return Err(error),
                _ => {}
            }
        }
        let new = NewTask { id: Some(id), ..new };
        let submitted = self.world.ledger.submit(vec![new]).await.pop().unwrap()?;
        admission.done(submitted.task.id);
        Ok(submitted.task.id)
    }

    pub async fn submit(&self, new: NewTask) -> TaskId {
        self.try_submit(new).await.unwrap()
    }

    /// Accepts plain tasks.
    pub async fn submit_many(&self, n_tasks: usize) -> Vec<TaskId> {
        let submits = (0..n_tasks).map(|_| self.submit(task()));
        futures_util::future::join_all(submits).await
    }

    /// Connects a runner for every model.
    pub fn connect(&mut self, slots: u32) {
        self.connect_for(slots, &["*"]);
    }

    pub fn connect_for(&mut self, slots: u32, models: &[&str]) {
        let mut hello = hello("r1", "i1");
        hello.profile.slots = slots;
        hello.profile.models = models.iter().map(|&model| model.to_owned()).collect();
        hello.credits = Some(Announcement { revision: 1, free_slots: slots, as_of_seq: 0 });
        self.runner = Some(Runner::try_connect(&self.world, hello).unwrap());
        self.slots = slots;
    }

    /// What the runner was given since the last look.
    pub fn look(&mut self) -> Vec<Fence> {
        let Some(runner) = &mut self.runner else { return Vec::new() };
        let bodies = runner.read(&self.world);
        let fences = bodies.into_iter().filter_map(|body| match body {
            Body::Assign(assign) => {
                Some(Fence { task: assign.task_id.parse().unwrap(), attempt: assign.attempt })
            }
            _ => None,
        });
        let fences: Vec<_> = fences.collect();
        self.given.extend(fences.iter().copied());
        fences
    }

    /// Waits until the runner was given something: a start is sent after it is committed.
    pub async fn given_soon(&mut self) -> Vec<Fence> {
        let mut pause = tokio::time::interval(Duration::from_millis(5));
        let looking = async {
            loop {
                let fences = self.look();
                if !fences.is_empty() {
                    return fences;
                }
                pause.tick().await;
            }
        };
        tokio::time::timeout(BOUND, looking).await.expect("an assignment")
    }

    /// The runner does all that it was given, and takes as much again.
    pub fn work(&mut self) -> usize {
        let fences = self.look();
        self.finish(&fences);
        fences.len()
    }

    /// The runner has done these, and takes as much again.
    pub fn finish(&mut self, fences: &[Fence]) {
        let Some(runner) = self.runner.as_mut().filter(|_| !fences.is_empty()) else { return };
        for fence in fences {
            runner.finish(&self.world, *fence, 0);
        }
        self.revision += 1;
        let (revision, free_slots, as_of_seq) = (self.revision, self.slots, runner.acked);
        let credits = Announcement { revision, free_slots, as_of_seq };
        runner.say(&self.world, Said::Credits(credits));
    }

    pub async fn get(&self, id: TaskId) -> Task {
        self.world.get(id).await
    }
}

/// A plain task.
pub fn task() -> NewTask {
    let mut new = new_task();
    new.spec.model = "a/m".into();
    new
}

/// A plain task of a namespace.
pub fn task_of(namespace: &str) -> NewTask {
    NewTask { namespace: Namespace::from(namespace), ..task() }
}

/// A plain task with a priority.
pub fn urgent(priority: i32) -> NewTask {
    let mut new = task();
    new.spec.priority = priority;
    new
}

/// A plain task that may start later.
pub fn later(at: Micros) -> NewTask {
    NewTask { not_before: Some(at), ..task() }
}

/// Has the runners work until all tasks have succeeded, each at its first attempt; returns how
/// often each was given to a runner.
pub async fn work_off(members: &mut [Member], ids: &[TaskId]) -> HashMap<TaskId, usize> {
    let mut open: Vec<TaskId> = ids.to_vec();
    let mut pause = tokio::time::interval(Duration::from_millis(5));
    let working = async {
        while !open.is_empty() {
            pause.tick().await;
            for member in &mut *members {
                member.work();
            }
            let asked = open.clone();
            let read = members[0].world.parts.db.read(move |tx| {
                Box::pin(async move { crate::tasks::store::load(tx, &asked).await })
            });
            let ended = read.await.unwrap().into_iter().filter(|task| task.state.is_terminal());
            for task in ended {
                assert_eq!((task.state, task.attempt), (State::Succeeded, 1), "{task:?}");
                open.retain(|id| *id != task.id);
            }
        }
    };
    let in_time = tokio::time::timeout(BOUND, working).await.is_ok();
    assert!(in_time, "{} of {} tasks were not done", open.len(), ids.len());
    let mut times = HashMap::new();
    for fence in members.iter().flat_map(|member| &member.given) {
        *times.entry(fence.task).or_default() += 1;
    }
    times
}

/// Waits until something holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let mut pause = tokio::time::interval(Duration::from_millis(5));
    let waiting = async {
        while !holds().await {
            pause.tick().await;
        }
    };
    assert!(tokio::time::timeout(BOUND, waiting).await.is_ok(), "in vain waited for: {what}");
}
