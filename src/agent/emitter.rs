//! Where an engine puts the events of its attempt.

use std::sync::Arc;

use tokio::sync::Notify;

use super::outbox::{Key, OVERHEAD, Outbox};
use crate::{
    clock::Clock,
    pb::{self, runner_event::Body},
};

/// The attempt is not held any more; the engine's future is about to be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the attempt was stopped")]
pub struct Stopped;

/// Longest text of one event, in bytes; longer tokens are cut in two or more.
const MAX_TEXT: usize = 64 << 10;

/// Where an engine puts the events of its attempt.
#[derive(Debug)]
pub struct Emitter {
    outbox: Outbox,
    key: Key,
    room: Arc<Notify>,
    clock: Clock,
}

impl Emitter {
    /// The emitter of attempt `key`; `room` is notified when its buffer shrinks.
    pub(super) fn new(outbox: Outbox, key: Key, room: Arc<Notify>, clock: Clock) -> Self {
        Self { outbox, key, room, clock }
    }

    /// Emits a piece of output; waits while the attempt's buffer is full.
    pub async fn token(&self, text: impl Into<String>) -> Result<(), Stopped> {
        let mut text: String = text.into();
        while text.len() > MAX_TEXT {
            let rest = text.split_off(text.floor_char_boundary(MAX_TEXT));
            let piece = std::mem::replace(&mut text, rest);
            self.emit(piece.len(), Body::Token(piece)).await?;
        }
        self.emit(text.len(), Body::Token(text)).await
    }

    /// Emits a stage, with the share done from 0 to 1 where it is known.
    pub async fn stage(
        &self,
        name: String,
        progress: Option<f64>,
        detail: String,
    ) -> Result<(), Stopped> {
        let bytes = name.len() + detail.len();
        self.emit(bytes, Body::Stage(pb::StageEvent { name, progress, detail })).await
    }

    /// Emits a log line; what is beyond 64 KiB of it is cut off.
    pub async fn log(
        &self,
        level: pb::log_event::Level,
        mut message: String,
    ) -> Result<(), Stopped> {
        message.truncate(message.floor_char_boundary(MAX_TEXT));
        let bytes = message.len();
        self.emit(bytes, Body::Log(pb::LogEvent { level: level.into(), message })).await
    }

    /// Lists an artifact that this attempt made as output of the task.
    pub async fn artifact(&self, artifact: &pb::Artifact) -> Result<(), Stopped> {
        let receipt = artifact.receipt.clone();
        self.emit(receipt.len(), Body::ArtifactReceipt(receipt)).await
    }

    async fn emit(&self, bytes: usize, body: Body) -> Result<(), Stopped> {
        let mut event = pb::RunnerEvent { body: Some(body), elapsed_us: 0 };
        loop {
            let now = self.clock.mono();
            match self.outbox.push(self.key, event, bytes + OVERHEAD, now)? {
                None => return Ok(()),
                Some(back) => event = back,
            }
            // A permit given since the push is kept, and nobody else waits on it.
            self.room.notified().await;
        }
    }
}
