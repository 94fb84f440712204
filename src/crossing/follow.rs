//! Brings logs that have readers here and are made elsewhere up to date.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    clock::{Clock, Mono},
    error::Result,
    events::Tail,
    id::{InstanceId, TaskId},
    instances::{
        Standing,
        hints::{ASK_EVERY, Hint, Hints, To},
    },
    relay::Relay,
    tasks::{
        history::History,
        model::State,
        reads::{self, Whereabouts},
    },
};

/// Between two looks at all followed tasks, where other servers send frames and say what moves.
const LOOK: Duration = Duration::from_secs(1);
/// The same, where they do not.
const LOOK_ALONE: Duration = Duration::from_millis(250);
/// The same, while there is no other server: what one left behind before it went.
const LOOK_LONELY: Duration = Duration::from_secs(3);
/// Rows looked at in one read.
const PAGE: usize = 1000;
/// What was heard and not yet taken.
const HEARD: usize = 4096;
/// Tasks asked about in one hint.
const ASKED: usize = 256;

/// What came from other servers.
#[derive(Debug)]
pub enum Heard {
    /// Tasks have moved.
    Moved(Vec<TaskId>),
    /// Frames of a task, each with its sequence: all from `first` on.
    Frames {
        /// Task.
        task: TaskId,
        /// First sequence covered.
        first: u64,
        /// The frames.
        frames: Vec<(u64, Bytes)>,
    },
    /// Some may have been lost.
    Lost,
}

/// A task that has readers here and is not made here.
#[derive(Debug, Default)]
struct Followed {
    /// Where it was at the latest look.
    at: Option<(State, u32, Option<InstanceId>)>,
    /// When its frames were asked for.
    asked: Option<Mono>,
}

/// Follows tasks that others run.
pub struct Follow {
    history: History,
    relay: Relay,
    tail: Tail,
    clock: Clock,
    me: InstanceId,
    standing: Standing,
    hints: Hints,
    followed: HashMap<TaskId, Followed>,
    heard: mpsc::Receiver<Heard>,
    /// Keeps the channel open where nobody else does.
    sender: mpsc::Sender<Heard>,
}

impl Follow {
    /// A follower for the readers of `history`.
    pub fn new(
        history: History,
        tail: Tail,
        me: InstanceId,
        standing: Standing,
        hints: Hints,
    ) -> Self {
        let (sender, heard) = mpsc::channel(HEARD);
        let (relay, clock) = (history.relay.clone(), history.clock.clone());
        relay.follow_far();
        let followed = HashMap::new();
        Self { history, relay, tail, clock, me, standing, hints, followed, heard, sender }
    }

    /// Where what comes from others goes.
    pub fn inlet(&self) -> mpsc::Sender<Heard> {
        self.sender.clone()
    }

    /// Follows for ever.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let mut look_at = self.clock.mono();
        let mut watch_at = look_at;
        loop {
            tokio::select! {
                tasks = self.relay.wanted() => self.look(tasks).await,
                heard = self.heard.recv() => self.hear(heard).await,
                () = self.clock.sleep_until(look_at) => {
                    let all = self.followed.keys().copied().collect();
                    self.look(all).await;
                    look_at = self.clock.mono()
                        + match (self.standing.n_others(), self.hints.are_carried()) {
                            (0, _) => LOOK_LONELY,
                            (_, true) => LOOK,
                            (_, false) => LOOK_ALONE,
                        };
                    if self.clock.mono() >= watch_at && self.tail.is_followed() {
                        watch_at = self.clock.mono() + ASK_EVERY;
                        self.hints.tell(To::All, Hint::Watch { from: self.me });
                    }
                }
            }
        }
    }

    async fn hear(&mut self, heard: Option<Heard>) {
        match heard {
            Some(Heard::Frames { task, first, frames }) => {
                if self.followed.contains_key(&task)
                    && let Some(log) = self.relay.find(task)
                {
                    log.feed(first, &frames);
                }
            }
            Some(Heard::Moved(mut tasks)) => {
                tasks.retain(|task| self.followed.contains_key(task));
                self.look(tasks).await;
            }
            Some(Heard::Lost) => {
                for followed in self.followed.values_mut() {
                    followed.asked = None;
                }
                let all = self.followed.keys().copied().collect();
                self.look(all).await;
            }
            None => {}
        }
    }

    /// Looks where tasks are, and brings their logs up to what storage has.
    async fn look(&mut self, mut tasks: Vec<TaskId>) {
        tasks.retain(|task| {
            let wanted = self.relay.find(*task).is_some_and(|log| log.is_wanted());
            if !wanted {
                self.followed.remove(task);
            }
            wanted
        });
        if tasks.is_empty() {
            return;
        }
        for task in &tasks {
            self.followed.entry(*task).or_default();
        }
        for tasks in tasks.chunks(PAGE) {
            if let Err(error) = self.look_at(tasks).await {
                tracing::debug!(%error, "tasks that run elsewhere are looked for later");
                return;
            }
        }
    }

    async fn look_at(&mut self, tasks: &[TaskId]) -> Result<()> {
        let ids = tasks.to_vec();
        let read = self.history.db.read(move |tx| {
            Box::pin(async move {
                let rows = reads::whereabouts(tx, &ids).await?;
                let running = rows.iter().filter(|row| row.state == State::Running);
                let running: Vec<_> = running.map(|row| row.id).collect();
                Ok((rows, reads::last_stored(tx, &running).await?))
            })
        });
        let (rows, stored) = read.await?;
        let mut missing: HashSet<_> = tasks.iter().copied().collect();
        for row in &rows {
            missing.remove(&row.id);
            let durable = stored.get(&row.id).copied().unwrap_or(0).max(row.last_sequence);
            self.bring_up(row, durable).await?;
        }
        for task in missing {
            self.followed.remove(&task);
            if let Some(log) = self.relay.find(task) {
                // Its readers find out that it is gone.
                log.stir();
            }
        }
        self.ask(&rows);
        Ok(())
    }

    /// Brings a log up to what storage has.
    async fn bring_up(&mut self, row: &Whereabouts, durable: u64) -> Result<()> {
        let Some(log) = self.relay.find(row.id) else { return Ok(()) };
        let Some(followed) = self.followed.get_mut(&row.id) else { return Ok(()) };
        let at = Some((row.state, row.attempt, row.instance));
        if followed.at != at {
            followed.at = at;
            followed.asked = None;
        }
        let ended = row.state.is_terminal();
        if log.start_at(durable) {
            if !ended {
                return Ok(());
            }
        } else if !ended && log.head().is_some_and(|head| head >= durable) {
            return Ok(());
        }
        self.history.bring_up(&log).await
    }

    /// Asks other servers for frames, or to say when a task moves.
    fn ask(&mut self, rows: &[Whereabouts]) {
        if !self.hints.are_carried() {
            return;
        }
        let now = self.clock.mono();
        let mut asked: HashMap<Option<InstanceId>, Vec<(TaskId, u64)>> = HashMap::new();
        for row in rows {
            let Some(followed) = self.followed.get_mut(&row.id) else { continue };
            let whom = match row.state {
                State::Running if row.instance == Some(self.me) => continue,
                State::Running => row.instance,
                State::Queued => None,
                _ => continue,
            };
            if followed.asked.is_some_and(|at| at + ASK_EVERY > now) {
                continue;
            }
            followed.asked = Some(now);
            let head = self.relay.find(row.id).and_then(|log| log.head()).unwrap_or(0);
            asked.entry(whom).or_default().push((row.id, head));
        }
        for (whom, tasks) in asked {
            for tasks in tasks.chunks(ASKED) {
                let hint = Hint::Follow { from: self.me, tasks: tasks.to_vec() };
                self.hints.tell(whom.map_or(To::All, To::One), hint);
            }
        }
    }
}
