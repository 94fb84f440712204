//! A connection to the imitation: what is sent goes in order, takes time, and may be lost.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use baton::redis::wire::{Call, Line, Purpose, Wire};
use fred::{
    error::{Error, ErrorKind},
    prelude::Value,
    types::{Message, MessageKind, config::Server as Address},
};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::{
    Imitation,
    data::{Reply, Text},
};

/// Messages that wait for their readers.
const MESSAGES: usize = 512;
/// Calls that wait for the connection.
const CALLS: usize = 4096;

/// The way from one client to the imitation.
pub struct Way {
    pub(super) server: Imitation,
    /// Whose it is.
    pub(super) name: String,
    /// Most time for an answer.
    pub(super) bound: Duration,
}

impl Wire for Way {
    fn connect(&self, _: Purpose) -> BoxFuture<'_, Result<Arc<dyn Line>, Error>> {
        Box::pin(async move {
            let (calls, queue) = mpsc::channel(CALLS);
            let (heard, pump) = mpsc::channel(MESSAGES);
            let link = Arc::new(Link {
                name: self.name.clone(),
                epoch: watch::Sender::new(0),
                channels: Mutex::default(),
                heard,
                messages: broadcast::Sender::new(MESSAGES),
                reconnects: broadcast::Sender::new(64),
            });
            self.server.attach(&link);
            let opened = self.server.opened(&self.name);
            if tokio::time::timeout(self.bound * 2, opened).await.is_err() {
                return Err(Error::new(ErrorKind::Timeout, "no answer"));
            }
            tokio::spawn(carry(self.server.clone(), link.clone(), queue));
            tokio::spawn(deliver(self.server.clone(), link.clone(), pump));
            let connection =
                Connection { link, calls, server: self.server.clone(), bound: self.bound };
            Ok(Arc::new(connection) as Arc<dyn Line>)
        })
    }
}

/// What the server has of a connection.
pub struct Link {
    pub(super) name: String,
    /// Grows with every break of the connection.
    epoch: watch::Sender<u64>,
    /// What the connection listens to, until it breaks.
    pub(super) channels: Mutex<BTreeSet<String>>,
    pub(super) heard: mpsc::Sender<(Text, Text)>,
    messages: broadcast::Sender<Message>,
    reconnects: broadcast::Sender<Address>,
}

impl Link {
    /// The connection breaks. It is made again by whoever carries its calls.
    pub(super) fn broken(&self) {
        self.channels.lock().clear();
        self.epoch.send_modify(|epoch| *epoch += 1);
    }
}

struct Connection {
    link: Arc<Link>,
    calls: mpsc::Sender<Sent>,
    server: Imitation,
    bound: Duration,
}

/// What was sent and waits for its answer.
struct Sent {
    what: What,
    /// Whether it goes again when the connection breaks.
    again: bool,
    reply: oneshot::Sender<Result<Reply, Error>>,
}

enum What {
    Command(Vec<Text>),
    Listen(Vec<String>),
}

impl Connection {
    async fn send(&self, what: What, again: bool, bound: Duration) -> Result<Reply, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.calls.try_send(Sent { what, again, reply });
        sent.map_err(|_| Error::new(ErrorKind::Canceled, "the connection has ended"))?;
        match tokio::time::timeout(bound, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Error::new(ErrorKind::Canceled, "the connection has ended")),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "request timed out")),
        }
    }
}

impl Line for Connection {
    fn call(&self, call: Call) -> BoxFuture<'_, Result<Value, Error>> {
        let Call { name, args, again, waits } = call;
        let mut command = vec![Text::from(name)];
        command.extend(args.into_iter().map(argument));
        let (again, bound) = (again && waits.is_none(), waits.unwrap_or(self.bound));
        Box::pin(async move {
            match self.send(What::Command(command), again, bound).await? {
                Reply::Error(error) => Err(Error::new(ErrorKind::Unknown, error)),
                reply => Ok(value(reply)),
            }
        })
    }

    fn listen(&self, channels: Vec<String>) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { self.send(What::Listen(channels), true, self.bound).await.map(drop) })
    }

    fn messages(&self) -> broadcast::Receiver<Message> {
        self.link.messages.subscribe()
    }

    fn reconnects(&self) -> broadcast::Receiver<Address> {
        self.link.reconnects.subscribe()
    }

    fn reconnect(&self) -> BoxFuture<'_, ()> {
        self.server.hang_up(&self.link);
        Box::pin(std::future::ready(()))
    }

    fn end(&self) -> BoxFuture<'_, ()> {
        self.server.hang_up(&self.link);
        Box::pin(std::future::ready(()))
    }
}

/// Carries calls to the server, for as long as somebody makes some.
async fn carry(server: Imitation, link: Arc<Link>, mut queue: mpsc::Receiver<Sent>) {
    let (mut waiting, mut epoch): (Vec<Sent>, _) = (Vec::new(), link.epoch.subscribe());
    loop {
        if waiting.is_empty() {
            tokio::select! {
                biased;
                changed = epoch.changed() => if changed.is_err() { return },
                n = queue.recv_many(&mut waiting, CALLS) => if n == 0 { return },
            }
        }
        if epoch.has_changed().unwrap_or(false) || !server.is_open(&link.name) || waiting.is_empty()
        {
            epoch.mark_unchanged();
            broken(&mut waiting);
            server.opened(&link.name).await;
            server.pause(1).await;
            // Nobody may wait for it.
            link.reconnects.send(Address::new("imitation", 0)).ok();
            continue;
        }
        while let Ok(sent) = queue.try_recv() {
            waiting.push(sent);
        }
        tokio::select! {
            biased;
            changed = epoch.changed() => if changed.is_ok() { epoch.mark_changed() },
            () = exchange(&server, &link, &mut waiting) => {}
        }
    }
}

/// A connection broke: what must not be sent again is refused, and what nobody waits for is dropped.
fn broken(waiting: &mut Vec<Sent>) {
    let all = std::mem::take(waiting);
    for sent in all {
        if sent.reply.is_closed() {
            continue;
        }
        if sent.again {
            waiting.push(sent);
        } else {
            let error = Error::new(ErrorKind::IO, "the connection was lost");
            sent.reply.send(Err(error)).ok();
        }
    }
}

/// One trip to the server and back.
async fn exchange(server: &Imitation, link: &Link, waiting: &mut Vec<Sent>) {
    server.pause(0).await;
    server.going_on().await;
    if server.loses_calls() {
        return server.hang_up(link);
    }
    let mut answers = Vec::with_capacity(waiting.len());
    for sent in &*waiting {
        answers.push(match &sent.what {
            What::Command(command) => server.answer(command).await,
            What::Listen(channels) => {
                server.listen(link, channels);
                Reply::Nil
            }
        });
    }
    server.pause(0).await;
    if server.loses_answers() {
        return server.hang_up(link);
    }
    for (sent, answer) in waiting.drain(..).zip(answers) {
        // Whoever asked may have left.
        sent.reply.send(Ok(answer)).ok();
    }
}

/// Delivers what was published, in order.
async fn deliver(server: Imitation, link: Arc<Link>, mut pump: mpsc::Receiver<(Text, Text)>) {
    while let Some((channel, message)) = pump.recv().await {
        let epoch = *link.epoch.borrow();
        server.pause(0).await;
        for _ in 0..server.copies() {
            if *link.epoch.borrow() != epoch {
                break;
            }
            let message = Message {
                channel: String::from_utf8_lossy(&channel).into_owned().into(),
                value: Value::Bytes(message.clone().into()),
                kind: MessageKind::Message,
                server: Address::new("imitation", 0),
            };
            // Nobody may read.
            link.messages.send(message).ok();
        }
    }
}

fn argument(value: Value) -> Text {
    match value {
        Value::Integer(number) => number.to_string().into(),
        value => value.into_bytes().unwrap_or_default().to_vec(),
    }
}

fn value(reply: Reply) -> Value {
    match reply {
        Reply::Nil | Reply::Error(_) => Value::Null,
        Reply::Int(number) => Value::Integer(number),
        Reply::Status(text) => Value::from_static_str(text),
        // As fred has it: text where it is text.
        Reply::Bulk(text) => match String::from_utf8(text) {
            Ok(text) => Value::String(text.into()),
            Err(error) => Value::Bytes(error.into_bytes().into()),
        },
        Reply::Array(replies) => Value::Array(replies.into_iter().map(value).collect()),
    }
}
