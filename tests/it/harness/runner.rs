//! A runner that does exactly what a test says, over real gRPC: it heartbeats or keeps silent,
//! speaks late, twice or out of order.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use baton::{
    pb::{self, connect_request, connect_response, runner_event},
    runners::protocol::HeldDigest,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Request, Status};

use super::{SOON, api::Api, default, within};

/// What a runner holds: task and attempt, last index made.
type Held = Arc<Mutex<BTreeMap<(String, u32), u64>>>;

/// A connected runner.
pub struct Runner {
    pub id: String,
    pub welcome: pb::Welcome,
    pub(super) hello: pb::Hello,
    pub(super) control: mpsc::Sender<pb::ConnectRequest>,
    output: mpsc::Sender<pb::OutputRequest>,
    from_server: mpsc::Receiver<Result<pb::ConnectResponse, Status>>,
    acks: mpsc::Receiver<Result<pb::LeaseAck, Status>>,
    set_aside: VecDeque<connect_response::Body>,
    acks_aside: VecDeque<pb::LeaseAck>,
    held: Held,
    seq: u64,
    last_seen: u64,
    revision: u64,
    output_seq: u64,
    beating: Arc<AtomicBool>,
}

/// A Hello of `id` that serves `models`.
pub fn hello(id: &str, models: &[&str], slots: u32) -> pb::Hello {
    pb::Hello {
        runner_id: id.into(),
        instance_id: format!("{id}-1"),
        min_version: 1,
        max_version: 1,
        node: Some(pb::Node { node_id: "test-node".into(), cpus: 1, ..default() }),
        slots,
        models: models.iter().map(|model| (*model).into()).collect(),
        engine: "scripted".into(),
        engine_version: "1".into(),
        inventory: Some(default()),
        credits: Some(pb::Credits { revision: 1, free_slots: slots, as_of_seq: 0 }),
        ..default()
    }
}

/// A token as the runner sends it.
pub fn token(text: &str) -> pb::RunnerEvent {
    pb::RunnerEvent { body: Some(runner_event::Body::Token(text.into())), ..default() }
}

/// `count` tokens, `t0 t1 …` from `from` on.
pub fn tokens(from: u64, count: u64) -> Vec<pb::RunnerEvent> {
    (from..from + count).map(|i| token(&format!("t{i} "))).collect()
}

/// An end with a result.
pub fn success() -> pb::Finish {
    let result = Some(super::object(&[("done", "yes")]));
    let outcome = pb::finish::Outcome::Success(pb::Success { result });
    pb::Finish { outcome: Some(outcome), usage: None }
}

/// An end with an error.
pub fn failure(retryable: bool) -> pb::Finish {
    let failure = pb::Failure { message: "scripted failure".into(), retryable, ..default() };
    pb::Finish { outcome: Some(pb::finish::Outcome::Failure(failure)), usage: None }
}

/// An attempt given up.
pub fn hand_back() -> pb::Finish {
    let outcome = pb::finish::Outcome::HandBack(pb::HandBack { reason: "scripted".into() });
    pb::Finish { outcome: Some(outcome), usage: None }
}

impl Runner {
    /// Connects with heartbeats on, both streams open.
    pub async fn connect(api: &Api, id: &str, models: &[&str], slots: u32) -> Self {
        Self::hello(api, hello(id, models, slots)).await.expect("a welcome")
    }

    /// Connects with this Hello.
    pub async fn hello(api: &Api, hello: pb::Hello) -> Result<Self, Status> {
        let (control, requests) = mpsc::channel(64);
        let first = pb::ConnectRequest {
            body: Some(connect_request::Body::Hello(hello.clone())),
            ..default()
        };
        control.send(first).await.expect("room for the first message");
        let connect = api.runners().connect(Request::new(ReceiverStream::new(requests))).await;
        let mut answers = within("Connect", SOON, async { connect }).await?.into_inner();
        let first = within("Welcome", SOON, answers.message()).await?;
        let Some(pb::ConnectResponse {
            body: Some(connect_response::Body::Welcome(welcome)), ..
        }) = first
        else {
            panic!("the first message is not Welcome but {first:?}");
        };
        let (forward, from_server) = mpsc::channel(4096);
        tokio::spawn(async move {
            while let Some(message) = answers.next().await {
                if forward.send(message).await.is_err() {
                    return;
                }
            }
        });

        let (output, requests) = mpsc::channel(64);
        let (forward, acks) = mpsc::channel(4096);
        let session_id = welcome.session_id.clone();
        let first =
            pb::OutputRequest { seq: 1, hello: Some(pb::OutputHello { session_id }), ..default() };
        output.send(first).await.expect("room for the first message");
        let mut runners = api.runners();
        tokio::spawn(async move {
            let mut answers = match runners.output(ReceiverStream::new(requests)).await {
                Ok(answers) => answers.into_inner(),
                Err(status) => {
                    let _ = forward.send(Err(status)).await;
                    return;
                }
            };
            while let Some(message) = answers.next().await {
                let leases: Vec<_> = match message {
                    Ok(message) => message.leases.into_iter().map(Ok).collect(),
                    Err(status) => vec![Err(status)],
                };
                for lease in leases {
                    if forward.send(lease).await.is_err() {
                        return;
                    }
                }
            }
        });

        let held = Held::default();
        for attempt in &hello.inventory.clone().unwrap_or_default().held {
            let key = (attempt.task_id.clone(), attempt.attempt);
            held.lock().insert(key, attempt.last_index);
        }
        let beating = Arc::new(AtomicBool::new(true));
        let every = welcome.heartbeat_interval.and_then(|every| every.try_into().ok());
        let every: Duration = every.unwrap_or(Duration::from_secs(1));
        tokio::spawn(beat(control.clone(), held.clone(), beating.clone(), every / 2));
        Ok(Self {
            id: hello.runner_id.clone(),
            welcome,
            hello,
            control,
            output,
            from_server,
            acks,
            set_aside: default(),
            acks_aside: default(),
            held,
            seq: 0,
            last_seen: 0,
            revision: 1,
            output_seq: 1,
            beating,
        })
    }

    /// Opens new streams for the same session, with the inventory held; tries again while the
    /// network fails.
    pub async fn reconnect(self, api: &Api) -> Result<Self, Status> {
        let held = self.held.lock().clone();
        let inventory = held
            .into_iter()
            .map(|((task_id, attempt), last_index)| pb::inventory::Held {
                task_id,
                attempt,
                last_index,
                first_kept_index: 1,
                finished: false,
            })
            .collect();
        let revision = self.revision + 1;
        let hello = pb::Hello {
            session_id: self.welcome.session_id.clone(),
            inventory: Some(pb::Inventory { held: inventory }),
            credits: Some(pb::Credits { revision, free_slots: 0, as_of_seq: self.last_seen }),
            ..self.hello.clone()
        };
        let (seq, last_seen) = (self.seq, self.last_seen);
        self.beating.store(false, Ordering::Relaxed);
        drop(self);
        let mut runner = super::eventually("a welcome", SOON, || async {
            match Self::hello(api, hello.clone()).await {
                Err(status) if is_link(&status) => None,
                outcome => Some(outcome),
            }
        })
        .await?;
        runner.revision = revision;
        if runner.welcome.resumed {
            (runner.seq, runner.last_seen) = (seq, last_seen);
        }
        Ok(runner)
    }

    /// Stops or resumes heartbeats: a runner that is not heard loses its leases.
    pub fn set_beating(&self, beating: bool) {
        self.beating.store(beating, Ordering::Relaxed);
    }

    /// Sends a numbered control message.
    pub async fn send(&mut self, body: connect_request::Body) {
        self.seq += 1;
        let message = pb::ConnectRequest { seq: self.seq, ack: self.last_seen, body: Some(body) };
        self.control.send(message).await.expect("an open control stream");
    }

    /// Says how many more attempts it would take.
    pub async fn credits(&mut self, free_slots: u32) {
        self.revision += 1;
        let credits =
            pb::Credits { revision: self.revision, free_slots, as_of_seq: self.last_seen };
        self.send(connect_request::Body::Credits(credits)).await;
    }

    /// The next control message that is not a heartbeat; `None` when the stream ended.
    pub async fn next(&mut self) -> Option<connect_response::Body> {
        if let Some(body) = self.set_aside.pop_front() {
            return Some(body);
        }
        self.receive().await
    }

    async fn receive(&mut self) -> Option<connect_response::Body> {
        loop {
            let message = self.from_server.recv().await?.ok()?;
            if message.seq > 0 {
                if message.seq <= self.last_seen {
                    continue;
                }
                self.last_seen = message.seq;
            }
            match message.body? {
                connect_response::Body::Heartbeat(_) => {}
                connect_response::Body::InventoryRequest(_) => {
                    let held = self.held.lock().clone();
                    let held = held
                        .into_iter()
                        .map(|((task_id, attempt), last_index)| pb::inventory::Held {
                            task_id,
                            attempt,
                            last_index,
                            first_kept_index: 1,
                            finished: false,
                        })
                        .collect();
                    let inventory = pb::Inventory { held };
                    self.send(connect_request::Body::Inventory(inventory)).await;
                }
                body => return Some(body),
            }
        }
    }

    /// The next message that `pick` takes; others are set aside for later.
    pub async fn wait<T>(
        &mut self,
        what: &str,
        bound: Duration,
        mut pick: impl FnMut(&connect_response::Body) -> Option<T>,
    ) -> T {
        if let Some(at) = self.set_aside.iter().position(|body| pick(body).is_some()) {
            let body = self.set_aside.remove(at).expect("the message found");
            return pick(&body).expect("the same answer");
        }
        within(what, bound, async {
            loop {
                let body = self.receive().await.expect("an open control stream");
                if let Some(value) = pick(&body) {
                    return value;
                }
                self.set_aside.push_back(body);
            }
        })
        .await
    }

    /// The next assignment, accepted.
    pub async fn assigned(&mut self) -> pb::Assign {
        self.assigned_within(SOON).await
    }

    pub async fn assigned_within(&mut self, bound: Duration) -> pb::Assign {
        let assign = self
            .wait("an Assign", bound, |body| match body {
                connect_response::Body::Assign(assign) => Some(assign.clone()),
                _ => None,
            })
            .await;
        let key = (assign.task_id.clone(), assign.attempt);
        self.held.lock().insert(key, 0);
        let accept = pb::Accept { task_id: assign.task_id.clone(), attempt: assign.attempt };
        self.send(connect_request::Body::Accept(accept)).await;
        assign
    }

    /// Waits until the server cancels this attempt.
    pub async fn cancelled(&mut self, lease: &pb::Assign) -> pb::Cancel {
        let cancel = self
            .wait("a Cancel", SOON, |body| match body {
                connect_response::Body::Cancel(cancel)
                    if cancel.task_id == lease.task_id && cancel.attempt == lease.attempt =>
                {
                    Some(cancel.clone())
                }
                _ => None,
            })
            .await;
        self.forget(lease);
        cancel
    }

    /// Sends events of an attempt, and its end if there is one.
    pub async fn output(
        &mut self,
        lease: &pb::Assign,
        first_index: u64,
        events: Vec<pb::RunnerEvent>,
        finish: Option<pb::Finish>,
    ) {
        let last = first_index + events.len() as u64 - 1;
        if let Some(held) = self.held.lock().get_mut(&(lease.task_id.clone(), lease.attempt)) {
            *held = last.max(*held);
        }
        self.output_seq += 1;
        let events = pb::LeaseEvents {
            task_id: lease.task_id.clone(),
            attempt: lease.attempt,
            first_index,
            events,
            finish,
        };
        let message = pb::OutputRequest { seq: self.output_seq, leases: vec![events], ..default() };
        self.output.send(message).await.expect("an open output stream");
    }

    /// The next acknowledgement about this attempt that `pick` takes; others are dropped.
    pub async fn ack(
        &mut self,
        what: &str,
        lease: &pb::Assign,
        mut pick: impl FnMut(&pb::LeaseAck) -> bool,
    ) -> pb::LeaseAck {
        let mut wanted = |ack: &pb::LeaseAck| {
            ack.task_id == lease.task_id && ack.attempt == lease.attempt && pick(ack)
        };
        if let Some(at) = self.acks_aside.iter().position(&mut wanted) {
            return self.acks_aside.remove(at).expect("the ack found");
        }
        within(what, SOON, async {
            loop {
                let ack = self.acks.recv().await.expect("an open output stream");
                let ack = ack.expect("an acknowledgement");
                if wanted(&ack) {
                    return ack;
                }
                self.acks_aside.push_back(ack);
            }
        })
        .await
    }

    /// Waits until the server says what became of a Finish: true when it was kept, false when the
    /// lease had ended, which either stream may tell; `None` when the session ended instead.
    pub async fn verdict(&mut self, lease: &pb::Assign) -> Option<bool> {
        within("a verdict", SOON, async {
            loop {
                tokio::select! {
                    ack = self.acks.recv() => {
                        let ack = ack?.ok()?;
                        if ack.task_id == lease.task_id && (ack.finished || ack.error.is_some()) {
                            return Some(ack.finished);
                        }
                    }
                    message = self.from_server.recv() => {
                        if let Some(connect_response::Body::Cancel(cancel)) = message?.ok()?.body
                            && cancel.task_id == lease.task_id
                        {
                            return Some(false);
                        }
                    }
                }
            }
        })
        .await
    }

    /// Waits until everything up to `index` is on stable storage.
    pub async fn acked(&mut self, lease: &pb::Assign, index: u64) {
        let what = format!("an ack of index {index}");
        self.ack(&what, lease, |ack| ack.acked_index >= index).await;
    }

    /// Waits until the server refuses this attempt with `LEASE_LOST`.
    pub async fn refused(&mut self, lease: &pb::Assign) -> pb::LeaseAck {
        let ack = self.ack("LEASE_LOST", lease, |ack| ack.error.is_some()).await;
        let error = ack.error.as_ref().expect("an error");
        assert_eq!(lease_reason(error), "LEASE_LOST", "{error:?}");
        self.forget(lease);
        ack
    }

    /// Ends an attempt and waits until that is on stable storage.
    pub async fn finish(&mut self, lease: &pb::Assign, next_index: u64, finish: pb::Finish) {
        self.output(lease, next_index, vec![], Some(finish)).await;
        self.ack("an ack of Finish", lease, |ack| ack.finished).await;
        self.forget(lease);
    }

    /// Takes one assignment to a successful end with `count` tokens.
    pub async fn serve_one(&mut self, count: u64) -> pb::Assign {
        let lease = self.assigned().await;
        self.output(&lease, 1, tokens(0, count), None).await;
        self.finish(&lease, count + 1, success()).await;
        lease
    }

    /// Holds the attempt no longer.
    pub fn forget(&mut self, lease: &pb::Assign) {
        self.held.lock().remove(&(lease.task_id.clone(), lease.attempt));
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.beating.store(false, Ordering::Relaxed);
    }
}

/// The reason in the details of an error inside a message.
pub fn lease_reason(status: &pb::google::rpc::Status) -> String {
    status
        .details
        .iter()
        .filter(|any| any.type_url.ends_with("google.rpc.ErrorInfo"))
        .find_map(|any| prost::Message::decode(any.value.as_slice()).ok())
        .map(|info: tonic_types::pb::ErrorInfo| info.reason)
        .unwrap_or_default()
}

async fn beat(
    control: mpsc::Sender<pb::ConnectRequest>,
    held: Held,
    beating: Arc<AtomicBool>,
    every: Duration,
) {
    let mut tick = tokio::time::interval(every);
    loop {
        tick.tick().await;
        if control.is_closed() {
            return;
        }
        if !beating.load(Ordering::Relaxed) {
            continue;
        }
        let mut digest = HeldDigest(0);
        let held: Vec<_> = held.lock().keys().cloned().collect();
        for (task_id, attempt) in &held {
            digest.toggle(task_id.parse().expect("a task id"), *attempt);
        }
        let heartbeat =
            pb::RunnerHeartbeat { held_digest: digest.0, held: held.len() as u32, ..default() };
        let message = pb::ConnectRequest {
            body: Some(connect_request::Body::Heartbeat(heartbeat)),
            ..default()
        };
        if control.send(message).await.is_err() {
            return;
        }
    }
}

/// Whether the link failed rather than the call.
fn is_link(status: &Status) -> bool {
    matches!(status.code(), Code::Unknown | Code::Unavailable | Code::Cancelled)
}
