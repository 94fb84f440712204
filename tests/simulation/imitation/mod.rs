//! An imitation of a redis-server, for simulations: the same scripts on the same kinds of data, in
//! memory, over connections that are slow, break, and lose what they carry. The claims of
//! `src/redis/tests` hold it to the real one.

mod data;
mod line;
mod script;
mod streams;

use std::{
    collections::BTreeSet,
    sync::{Arc, Weak},
    time::Duration,
};

use baton::{clock::Micros, id::Entropy, redis::wire::Wire};
use parking_lot::Mutex;
use tokio::sync::watch;

use self::{
    data::{Data, Reply, Text},
    line::{Link, Way},
    script::Scripts,
};

/// How bad the way is. Chances are of a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// Longest way of a message, in milliseconds.
    pub slowness: u64,
    /// Calls that break the connection before they arrive.
    pub lost_calls: u64,
    /// Answers that break the connection instead of arriving.
    pub lost_answers: u64,
    /// Messages of channels that are lost.
    pub lost_messages: u64,
    /// Messages of channels that come twice.
    pub doubled_messages: u64,
}

/// The server; clones share it.
#[derive(Clone)]
pub struct Imitation(Arc<Inner>);

struct Inner {
    clock: Box<dyn Fn() -> Micros + Send + Sync>,
    dice: Entropy,
    data: Mutex<Data>,
    scripts: Mutex<Scripts>,
    state: Mutex<State>,
    /// Grows with every change that somebody may wait for.
    changes: watch::Sender<u64>,
}

struct State {
    weather: Weather,
    is_up: bool,
    is_paused: bool,
    /// Who cannot reach it.
    cut: BTreeSet<String>,
    links: Vec<Weak<Link>>,
    /// Which start of the server this is.
    process: u64,
    /// What it falls back to when it loses the last writes.
    kept: Data,
    n_blocked: usize,
}

impl Imitation {
    pub fn new(clock: impl Fn() -> Micros + Send + Sync + 'static, dice: Entropy) -> Self {
        let state = State {
            weather: Weather::default(),
            is_up: true,
            is_paused: false,
            cut: BTreeSet::new(),
            links: Vec::new(),
            process: 1,
            kept: Data::default(),
            n_blocked: 0,
        };
        Self(Arc::new(Inner {
            clock: Box::new(clock),
            dice,
            data: Mutex::default(),
            scripts: Mutex::default(),
            state: Mutex::new(state),
            changes: watch::Sender::new(0),
        }))
    }

    /// The way there for somebody of this name, and the longest wait for an answer.
    pub fn way(&self, name: &str, bound: Duration) -> Arc<dyn Wire> {
        Arc::new(Way { server: self.clone(), name: name.into(), bound })
    }

    pub fn set_weather(&self, weather: Weather) {
        self.0.state.lock().weather = weather;
    }

    /// Ends it; what it had is gone.
    pub fn kill(&self) {
        let links = {
            let mut state = self.0.state.lock();
            state.is_up = false;
            state.is_paused = false;
            state.links.clone()
        };
        self.0.data.lock().empty();
        self.0.scripts.lock().forget();
        self.break_links(&links, |_| true);
        self.changed();
    }

    /// Starts it again.
    pub fn restart(&self) {
        let mut state = self.0.state.lock();
        state.is_up = true;
        state.process += 1;
        drop(state);
        self.changed();
    }

    /// Remembers what there is, for [`lose_writes`](Self::lose_writes).
    pub fn keep(&self) {
        let data = self.0.data.lock().clone();
        self.0.state.lock().kept = data;
    }

    /// Another process takes over, which lacks what was written since [`keep`](Self::keep).
    pub fn lose_writes(&self) {
        let kept = self.0.state.lock().kept.clone();
        self.kill();
        *self.0.data.lock() = kept;
        self.restart();
    }

    /// Stops it in its tracks.
    pub fn pause_all(&self) {
        self.0.state.lock().is_paused = true;
        self.changed();
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.0.state.lock().is_paused = false;
        self.changed();
    }

    /// Loses all data, and nothing else.
    pub fn empty(&self) {
        self.0.data.lock().empty();
    }

    /// Cuts somebody off.
    pub fn cut(&self, name: &str) {
        let links = {
            let mut state = self.0.state.lock();
            state.cut.insert(name.into());
            state.links.clone()
        };
        self.break_links(&links, |link| link.name == name);
        self.changed();
    }

    /// Connects somebody again.
    pub fn mend(&self, name: &str) {
        self.0.state.lock().cut.remove(name);
        self.changed();
    }

    /// Breaks the connections that listen, or the others.
    pub fn break_connections(&self, that_listen: bool) {
        let links = self.0.state.lock().links.clone();
        self.break_links(&links, |link| link.channels.lock().is_empty() != that_listen);
    }

    /// How many reads wait.
    pub fn n_blocked(&self) -> usize {
        self.0.state.lock().n_blocked
    }

    /// Runs a command for whoever looks on.
    pub fn look(&self, command: &str) -> Reply {
        let command: Vec<Text> = command.split_whitespace().map(Text::from).collect();
        self.execute(&command)
    }

    fn now(&self) -> i64 {
        (self.0.clock)().0
    }

    fn changed(&self) {
        self.0.changes.send_modify(|changes| *changes += 1);
    }

    fn break_links(&self, links: &[Weak<Link>], which: impl Fn(&Link) -> bool) {
        for link in links.iter().filter_map(Weak::upgrade).filter(|link| which(link)) {
            self.hang_up(&link);
        }
    }

    fn attach(&self, link: &Arc<Link>) {
        let mut state = self.0.state.lock();
        state.links.retain(|link| link.strong_count() > 0);
        state.links.push(Arc::downgrade(link));
    }

    /// A connection breaks.
    fn hang_up(&self, link: &Link) {
        let channels: Vec<String> = link.channels.lock().iter().cloned().collect();
        {
            let mut data = self.0.data.lock();
            for channel in channels {
                if let Some(n) = data.listeners.get_mut(channel.as_bytes()) {
                    *n = n.saturating_sub(1);
                }
            }
        }
        link.broken();
    }

    fn listen(&self, link: &Link, channels: &[String]) {
        for channel in channels {
            if link.channels.lock().insert(channel.clone()) {
                *self.0.data.lock().listeners.entry(channel.clone().into()).or_default() += 1;
            }
        }
    }

    fn is_open(&self, name: &str) -> bool {
        let state = self.0.state.lock();
        state.is_up && !state.cut.contains(name)
    }

    async fn until(&self, holds: impl Fn(&Self) -> bool) {
        let mut changes = self.0.changes.subscribe();
        while !holds(self) {
            // The sender lives here.
            changes.changed().await.ok();
        }
    }

    /// Waits until somebody can reach it.
    async fn opened(&self, name: &str) {
        self.until(|server| server.is_open(name)).await;
    }

    /// Waits until it goes on.
    async fn going_on(&self) {
        self.until(|server| !server.0.state.lock().is_paused).await;
    }

    /// Takes the time of a way, and some more.
    async fn pause(&self, more: u64) {
        let slowness = self.0.state.lock().weather.slowness;
        let ms = more + if slowness == 0 { 0 } else { 1 + self.0.dice.u64() % slowness };
        if ms > 0 {
            let until = tokio::time::Instant::now() + Duration::from_millis(ms);
            tokio::time::sleep_until(until).await;
        }
    }

    fn chance(&self, of: impl Fn(&Weather) -> u64) -> bool {
        let chance = of(&self.0.state.lock().weather);
        chance > 0 && self.0.dice.u64() % 1000 < chance
    }

    fn loses_calls(&self) -> bool {
        self.chance(|weather| weather.lost_calls)
    }

    fn loses_answers(&self) -> bool {
        self.chance(|weather| weather.lost_answers)
    }

    /// How often a message arrives.
    fn copies(&self) -> u32 {
        match () {
            () if self.chance(|weather| weather.lost_messages) => 0,
            () if self.chance(|weather| weather.doubled_messages) => 2,
            () => 1,
        }
    }

    /// Answers a command; a read may wait.
    async fn answer(&self, command: &[Text]) -> Reply {
        let is = |at: usize, word: &str| {
            command.get(at).is_some_and(|text| text.eq_ignore_ascii_case(word.as_bytes()))
        };
        let waits =
            is(0, "XREAD").then(|| command.iter().position(|arg| arg == b"BLOCK")).flatten();
        let Some(at) = waits else { return self.execute(command) };
        let ms = command.get(at + 1).and_then(|ms| data::number(ms).ok()).unwrap_or(0);
        let end = tokio::time::Instant::now() + Duration::from_millis(ms);
        let mut changes = self.0.changes.subscribe();
        let _blocked = Blocked::new(self);
        loop {
            changes.mark_unchanged();
            self.going_on().await;
            let reply = self.execute(command);
            if reply != Reply::Nil {
                return reply;
            }
            tokio::select! {
                biased;
                changed = changes.changed() => if changed.is_err() { return Reply::Nil },
                () = tokio::time::sleep_until(end) => return Reply::Nil,
            }
        }
    }

    fn execute(&self, command: &[Text]) -> Reply {
        let Some((name, args)) = command.split_first() else { return data::arity() };
        let name = String::from_utf8_lossy(name).to_uppercase();
        let reply = match name.as_str() {
            "EVALSHA" => self.0.scripts.lock().run(args, &self.0.data, self.now()),
            "SCRIPT" => match args {
                [load, text] if load == b"LOAD" => self.0.scripts.lock().load(text),
                _ => {
                    self.0.scripts.lock().forget();
                    Reply::Status("OK")
                }
            },
            "INFO" => Reply::text(self.info()),
            "FLUSHALL" => {
                self.empty();
                Reply::Status("OK")
            }
            "CLIENT" => {
                self.break_connections(args.contains(&Text::from("pubsub")));
                Reply::Int(1)
            }
            _ => self.0.data.lock().run(command, self.now()),
        };
        self.carry_published();
        // A read may wait for what came.
        if name == "XADD" {
            self.changed();
        }
        reply
    }

    fn carry_published(&self) {
        let published = std::mem::take(&mut self.0.data.lock().published);
        if published.is_empty() {
            return;
        }
        let links = self.0.state.lock().links.clone();
        for (channel, message) in published {
            let name = String::from_utf8_lossy(&channel).into_owned();
            for link in links.iter().filter_map(Weak::upgrade) {
                if link.channels.lock().contains(&name) {
                    // A reader that is so far behind misses some.
                    link.heard.try_send((channel.clone(), message.clone())).ok();
                }
            }
        }
    }

    fn info(&self) -> String {
        let process = self.0.state.lock().process;
        format!("redis_version:7.0.15\r\nrun_id:{process:040x}\r\nrole:master\r\nmaxmemory:0\r\n")
    }
}

/// A read that waits.
struct Blocked(Imitation);

impl Blocked {
    fn new(server: &Imitation) -> Self {
        server.0.state.lock().n_blocked += 1;
        Self(server.clone())
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0.0.state.lock().n_blocked -= 1;
    }
}
