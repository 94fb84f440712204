//! Carries hints and frames between servers, through Redis.

use anyhow::Context as _;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::{Heard, export::inbox};
use crate::{
    error::reason_of,
    events::{Tail, frame},
    id::InstanceId,
    instances::hints::{Hint, Hints, To},
    queue::Revocation,
    redis::{Bell, Bells, Inbox, Listener, Mail, Parcel, Redis},
    relay::frames,
    runners::Registry,
    supervisor::Supervisor,
};

/// The channel that every server listens to.
const ALL: &str = "i:all";

/// Carries what servers tell each other.
pub struct Carrier {
    /// The wire.
    pub redis: Redis,
    /// Its doorbells.
    pub bells: Bells,
    /// This server.
    pub me: InstanceId,
    /// What others ask for.
    pub hints: Hints,
    /// Where frames go, and word of moves.
    pub inlet: mpsc::Sender<Heard>,
    /// Runners that are told of ends elsewhere.
    pub registry: Registry,
    /// Watchers here.
    pub tail: Tail,
}

impl Carrier {
    /// Listens, and starts the loops that carry.
    ///
    /// # Errors
    /// When Redis does not answer.
    pub async fn start(
        self,
        hints: mpsc::Receiver<(To, Hint)>,
        supervisor: &Supervisor,
    ) -> anyhow::Result<()> {
        let own = self.bells.listen(&channel(self.me)).await.context("cannot listen at Redis")?;
        let all = self.bells.listen(ALL).await.context("cannot listen at Redis")?;
        let mail = self.redis.inbox(&inbox(self.me)).await.context("cannot read from Redis")?;
        let carrier = std::sync::Arc::new(self);
        supervisor.spawn_loop("hints out", carry_out(carrier.redis.clone(), hints));
        supervisor.spawn_loop("hints in", listen(carrier.clone(), own));
        supervisor.spawn_loop("hints to all", listen(carrier.clone(), all));
        supervisor.spawn_loop("frames in", take_in(carrier.inlet.clone(), mail));
        Ok(())
    }

    async fn hear(&self, hint: Hint) {
        match hint {
            Hint::Ended { task, attempt, reason, detail } => {
                let reason = reason_of(&reason);
                self.registry.revoke_elsewhere(Revocation { task, attempt, reason, detail });
            }
            Hint::Follow { from, tasks } if from != self.me => self.hints.follow(from, &tasks),
            Hint::Watch { from } if from != self.me => self.hints.watch(from),
            Hint::Follow { .. } | Hint::Watch { .. } | Hint::Unknown => {}
            Hint::Moved { tasks } => self.pass(Heard::Moved(tasks)).await,
            Hint::Rang => self.tail.ring(),
        }
    }

    async fn pass(&self, heard: Heard) {
        // At the end of the process nobody takes it.
        let _ = self.inlet.send(heard).await;
    }
}

fn channel(of: InstanceId) -> String {
    format!("i:{of}")
}

async fn carry_out(redis: Redis, mut hints: mpsc::Receiver<(To, Hint)>) -> anyhow::Result<()> {
    while let Some((to, hint)) = hints.recv().await {
        let text = Bytes::from(serde_json::to_vec(&hint)?);
        let channel = match to {
            To::One(instance) => channel(instance),
            To::All => ALL.to_owned(),
        };
        if let Err(error) = redis.ring(&channel, text).await {
            tracing::debug!(%error, "a hint was not carried");
        }
    }
    Ok(())
}

async fn listen(carrier: std::sync::Arc<Carrier>, mut listener: Listener) -> anyhow::Result<()> {
    while let Some(bell) = listener.next().await {
        match bell {
            Bell::Rang(text) => match serde_json::from_slice(&text) {
                Ok(hint) => carrier.hear(hint).await,
                Err(error) => tracing::debug!(%error, "a hint that makes no sense"),
            },
            Bell::Missed => {
                carrier.tail.ring();
                carrier.pass(Heard::Lost).await;
            }
        }
    }
    // The connection lasts as long as the process.
    std::future::pending().await
}

async fn take_in(inlet: mpsc::Sender<Heard>, mut mail: Inbox) -> anyhow::Result<()> {
    loop {
        match mail.next().await {
            Mail::Lost => inlet.send(Heard::Lost).await?,
            Mail::Parcels(parcels) => {
                for parcel in parcels {
                    if let Some(heard) = opened(parcel) {
                        inlet.send(heard).await?;
                    }
                }
            }
        }
    }
}

/// The frames of a parcel; `None` for one that makes no sense.
fn opened(parcel: Parcel) -> Option<Heard> {
    let task = parcel.topic.parse().ok()?;
    let mut with_sequences = Vec::new();
    for bytes in frames(parcel.frames) {
        let bytes = bytes?;
        with_sequences.push((frame::sequence(&bytes)?, bytes));
    }
    Some(Heard::Frames { task, first: parcel.first, frames: with_sequences })
}
