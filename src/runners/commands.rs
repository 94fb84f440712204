//! Commands to a runner: what they ask for and how far they are.
//!
//! Plain data under the registry's lock. Who waits for an answer holds a receiver and no lock;
//! a command whose session ends is answered by that.

use std::{collections::VecDeque, time::Duration};

use prost_types::Struct;
use tokio::sync::watch;

use super::protocol::feature;
use crate::{
    clock::Micros,
    error::{Error, Kind, Reason, Result, Violation},
};

/// Commands that a runner may have under way.
const MAX_OPEN: usize = 64;
/// Ended commands that are remembered: for who asks again, and for people.
const MAX_ENDED: usize = 32;

/// What a command asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Take no more work, finish or hand back what is held.
    Drain {
        /// Attempts still held by then are handed back.
        deadline: Duration,
        /// Hand back at once.
        hand_back: bool,
        /// Leave when done.
        exit: bool,
    },
    /// Take no work for now.
    Pause,
    /// Take work again.
    Resume,
    /// Load or unload a model.
    Apply {
        /// As tasks name it, or `*`.
        model: String,
        /// Loaded, or else unloaded.
        loaded: bool,
        /// The engine's own.
        options: Struct,
        /// What becomes of its attempts.
        busy: Busy,
    },
    /// Load anew what is loaded.
    Reload {
        /// Which; empty for all.
        model: String,
        /// What becomes of its attempts.
        busy: Busy,
    },
    /// Set parameters of the engine.
    Tune {
        /// The engine's own.
        params: Struct,
    },
}

/// What becomes of attempts that are in a command's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// They may finish for so long, and are then handed back.
    Wait(Duration),
    /// The command is refused.
    Refuse,
    /// They are handed back at once.
    HandBack,
}

impl Action {
    /// Its name for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Drain { .. } => "drain",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Apply { .. } => "apply",
            Self::Reload { .. } => "reload",
            Self::Tune { .. } => "tune",
        }
    }

    /// The model that it concerns; empty for none.
    pub fn model(&self) -> &str {
        match self {
            Self::Apply { model, .. } | Self::Reload { model, .. } => model,
            Self::Drain { .. } | Self::Pause | Self::Resume | Self::Tune { .. } => "",
        }
    }

    /// The feature that a runner must have named; none for what all understand.
    pub fn feature(&self) -> Option<&'static str> {
        match self {
            Self::Drain { .. } | Self::Pause | Self::Resume => None,
            Self::Apply { .. } => Some(feature::APPLY),
            Self::Reload { .. } => Some(feature::RELOAD),
            Self::Tune { .. } => Some(feature::TUNE),
        }
    }
}

/// How far a command is.
#[derive(Clone, Debug, PartialEq)]
pub enum Stage {
    /// Sent, or kept until the runner is back.
    Sent,
    /// The runner works on it.
    Accepted,
    /// Done.
    Done,
    /// It failed.
    Failed(Refusal),
}

impl Stage {
    /// Whether there is nothing more to come.
    pub fn is_end(&self) -> bool {
        matches!(self, Self::Done | Self::Failed(_))
    }
}

/// Why a command failed: an error that several may read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Class of failure.
    pub kind: Kind,
    /// Reason.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// Malformed fields.
    pub violations: Vec<Violation>,
}

impl Refusal {
    /// The runner left without an answer.
    pub fn gone(why: &str) -> Self {
        Self {
            kind: Kind::Unavailable,
            reason: Reason::RunnerLost,
            message: format!("the command was not answered: {why}"),
            violations: Vec::new(),
        }
    }

    /// As the error of a call.
    pub fn error(&self) -> Error {
        if self.violations.is_empty() {
            Error::new(self.kind, self.reason, self.message.clone())
        } else {
            Error::invalid_all(self.violations.clone())
        }
    }
}

/// How much of a command is done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Steps done.
    pub done: u64,
    /// Steps in all; 0 when unknown.
    pub total: u64,
    /// What is being done.
    pub detail: String,
}

/// A command to a runner.
#[derive(Debug)]
pub struct Command {
    /// On the wire.
    pub id: String,
    /// As the call gave it; empty for none.
    pub request_id: String,
    /// What it asks for.
    pub action: Action,
    /// When it was sent.
    pub create_time: Micros,
    /// When it ended.
    pub end_time: Option<Micros>,
    /// How much is done.
    pub progress: Progress,
    stage: watch::Sender<Stage>,
}

impl Command {
    /// How far it is.
    pub fn stage(&self) -> Stage {
        self.stage.borrow().clone()
    }

    fn is_open(&self) -> bool {
        !self.stage.borrow().is_end()
    }
}

/// The commands of a session, oldest first.
#[derive(Debug, Default)]
pub struct Commands {
    known: VecDeque<Command>,
    n_made: u64,
}

impl Commands {
    /// All that are remembered, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Command> {
        self.known.iter()
    }

    /// What is asked for by those under way.
    pub fn open(&self) -> impl Iterator<Item = &Action> {
        self.known.iter().filter(|command| command.is_open()).map(|command| &command.action)
    }

    /// The command that came with a `request_id`.
    ///
    /// # Errors
    /// When it asked for something else.
    pub fn find(
        &self,
        request_id: &str,
        action: &Action,
    ) -> Result<Option<watch::Receiver<Stage>>> {
        let found = self.known.iter().find(|command| command.request_id == request_id);
        match found.filter(|_| !request_id.is_empty()) {
            Some(command) if command.action == *action => Ok(Some(command.stage.subscribe())),
            Some(command) => Err(Error::new(
                Kind::AlreadyExists,
                Reason::RequestIdReused,
                format!("request id `{request_id}` was used for another command"),
            )
            .with("request_id", request_id)
            .with("command_id", &command.id)),
            None => Ok(None),
        }
    }

    /// Makes a command; `session` keeps its id apart from those of other sessions.
    ///
    /// # Errors
    /// When too many are under way.
    pub fn make(
        &mut self,
        session: &str,
        request_id: String,
        action: Action,
        now: Micros,
    ) -> Result<(String, watch::Receiver<Stage>)> {
        if self.known.iter().filter(|command| command.is_open()).count() >= MAX_OPEN {
            let message = format!("{MAX_OPEN} commands to the runner are under way");
            return Err(Error::new(Kind::ResourceExhausted, Reason::Overloaded, message)
                .with("policy_label", "runner_commands")
                .retry_after(Duration::from_secs(1)));
        }
        self.n_made += 1;
        let id = format!("{}-{}", &session[..session.len().min(8)], self.n_made);
        let (stage, seen) = watch::channel(Stage::Sent);
        self.known.push_back(Command {
            id: id.clone(),
            request_id,
            action,
            create_time: now,
            end_time: None,
            progress: Progress::default(),
            stage,
        });
        Ok((id, seen))
    }

    /// The runner works on it.
    pub fn accepted(&mut self, id: &str) {
        if let Some(command) = self.open_mut(id) {
            command.stage.send_replace(Stage::Accepted);
        }
    }

    /// So much is done.
    pub fn progressed(&mut self, id: &str, progress: Progress) {
        if let Some(command) = self.open_mut(id) {
            command.progress = progress;
            command.stage.send_replace(Stage::Accepted);
        }
    }

    /// It has ended; what it asked for, unless it is unknown or had ended before.
    pub fn ended(&mut self, id: &str, refusal: Option<Refusal>, now: Micros) -> Option<Action> {
        let command = self.open_mut(id)?;
        command.end_time = Some(now);
        let action = command.action.clone();
        command.stage.send_replace(refusal.map_or(Stage::Done, Stage::Failed));
        let n_ended = self.known.iter().filter(|command| !command.is_open()).count();
        if n_ended > MAX_ENDED
            && let Some(oldest) = self.known.iter().position(|command| !command.is_open())
        {
            self.known.remove(oldest);
        }
        Some(action)
    }

    /// The session has ended: nothing more is heard of those under way.
    pub fn give_up(&mut self, why: &str) {
        for command in self.known.iter().filter(|command| command.is_open()) {
            command.stage.send_replace(Stage::Failed(Refusal::gone(why)));
        }
    }

    fn open_mut(&mut self, id: &str) -> Option<&mut Command> {
        self.known.iter_mut().find(|command| command.id == id && command.is_open())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(commands: &mut Commands, request_id: &str) -> (String, watch::Receiver<Stage>) {
        commands.make("0123456789", request_id.into(), Action::Pause, Micros(1)).unwrap()
    }

    #[test]
    fn a_request_id_names_one_command() {
        let mut commands = Commands::default();
        let (id, _) = make(&mut commands, "a");
        assert_eq!(id, "01234567-1");
        commands.ended(&id, None, Micros(2));
        let again = commands.find("a", &Action::Pause).unwrap().unwrap();
        assert_eq!(*again.borrow(), Stage::Done);
        let other = commands.find("a", &Action::Resume).unwrap_err();
        assert_eq!(other.reason(), Reason::RequestIdReused);
        make(&mut commands, "");
        assert!(commands.find("", &Action::Pause).unwrap().is_none());
    }

    #[test]
    fn the_first_end_stands() {
        let mut commands = Commands::default();
        let (id, seen) = make(&mut commands, "");
        commands.progressed(&id, Progress { done: 1, total: 2, detail: "x".into() });
        assert_eq!(*seen.borrow(), Stage::Accepted);
        assert_eq!(commands.ended(&id, None, Micros(2)), Some(Action::Pause));
        assert_eq!(commands.ended(&id, Some(Refusal::gone("x")), Micros(3)), None);
        commands.accepted(&id);
        commands.give_up("the runner left");
        assert_eq!(*seen.borrow(), Stage::Done);
        let command = commands.iter().next().unwrap();
        assert_eq!((command.end_time, command.progress.done), (Some(Micros(2)), 1));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut commands = Commands::default();
        let open: Vec<_> = (0..MAX_OPEN).map(|_| make(&mut commands, "").0).collect();
        let full = commands.make("s", String::new(), Action::Pause, Micros(1)).unwrap_err();
        assert_eq!(full.kind(), Kind::ResourceExhausted);
        for id in &open {
            commands.ended(id, None, Micros(2));
        }
        assert_eq!(commands.iter().count(), MAX_ENDED);
        assert_eq!(commands.iter().last().unwrap().id, *open.last().unwrap());
    }
}
