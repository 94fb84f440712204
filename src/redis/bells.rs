//! Doorbells: short messages over channels, for servers that wait for something. One may be lost
//! at any time, and whoever listens is told when that may have been, so every bell needs a sweep.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use fred::types::Message;
use parking_lot::Mutex;
use tokio::sync::{
    broadcast::{Receiver, error::RecvError},
    watch,
};

use super::{
    Error, Redis, Result,
    wire::{Call, Line, Purpose},
};

/// How often the connection is tried: what only listens does not notice that nobody is there.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// Pause before subscribing again after it failed.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// The connection for subscriptions; clones share it.
#[derive(Clone)]
pub struct Bells {
    redis: Redis,
    line: Arc<dyn Line>,
    /// What is listened to.
    channels: Arc<Mutex<BTreeSet<String>>>,
    /// Grows when the subscriptions were made anew.
    renewed: watch::Sender<u64>,
}

/// What a listener hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bell {
    /// Somebody rang, with this message.
    Rang(Bytes),
    /// The connection was lost for a while, or this listener was slow: some may be missed.
    Missed,
}

/// Listens to one channel.
pub struct Listener {
    channel: String,
    messages: Receiver<Message>,
    renewed: watch::Receiver<u64>,
    /// Keeps the connection.
    _bells: Bells,
}

impl Redis {
    /// Opens the connection for subscriptions. One is enough for a process.
    pub async fn bells(&self) -> Result<Bells> {
        let line = self.dedicated(Purpose::Subscriptions).await?;
        let (redis, renewed) = (self.clone(), watch::Sender::new(0));
        let bells = Bells { redis, line, channels: Arc::default(), renewed };
        bells.watch();
        Ok(bells)
    }

    /// Rings a channel: tells whoever listens at this moment. Returns how many those were.
    pub async fn ring(&self, channel: &str, message: Bytes) -> Result<u64> {
        let key = self.key(&format!("c:{channel}"));
        let call = Call::new("PUBLISH", vec![key.into(), message.into()]);
        let heard = self.0.line.call(call).await.and_then(fred::prelude::Value::convert);
        heard.map_err(Error::command("publish"))
    }
}

impl Bells {
    /// Listens to a channel from now on.
    pub async fn listen(&self, channel: &str) -> Result<Listener> {
        self.listen_key(self.redis.key(&format!("c:{channel}"))).await
    }

    /// Listens to a channel by its full name.
    pub(super) async fn listen_key(&self, channel: String) -> Result<Listener> {
        let messages = self.line.messages();
        let renewed = self.renewed.subscribe();
        let wanted = vec![channel.clone()];
        self.line.listen(wanted).await.map_err(Error::command("subscribe"))?;
        self.channels.lock().insert(channel.clone());
        Ok(Listener { channel, messages, renewed, _bells: self.clone() })
    }

    /// Subscribes again whenever the connection is new, and tries it when nothing is heard.
    fn watch(&self) {
        let bells = self.clone();
        let mut reconnects = self.line.reconnects();
        let end = self.redis.0.supervisor.last_call();
        self.redis.0.supervisor.spawn_flushing_loop("redis bells", async move {
            loop {
                let again = tokio::select! {
                    () = end.cancelled() => return Ok(()),
                    event = reconnects.recv() => match event {
                        Err(RecvError::Closed) => {
                            end.cancelled().await;
                            return Ok(());
                        }
                        // Having missed some, it is the last one that counts.
                        Ok(_) | Err(RecvError::Lagged(_)) => true,
                    },
                    () = bells.redis.0.clock.sleep(TRY_EVERY) => {
                        if bells.line.call(Call::new("PING", Vec::new())).await.is_err() {
                            // A new connection is announced by `reconnects`.
                            bells.line.reconnect().await;
                        }
                        false
                    }
                };
                if again && !bells.renew().await {
                    bells.redis.0.clock.sleep(AGAIN_AFTER).await;
                    bells.line.reconnect().await;
                }
            }
        });
    }

    /// Subscribes again; only then can listeners look for what they missed.
    async fn renew(&self) -> bool {
        let channels: Vec<_> = self.channels.lock().iter().cloned().collect();
        if channels.is_empty() {
            return true;
        }
        match self.line.listen(channels).await {
            Ok(()) => {
                self.renewed.send_modify(|times| *times += 1);
                true
            }
            Err(error) => {
                tracing::warn!(%error, "cannot listen at Redis; trying again");
                false
            }
        }
    }
}

impl Listener {
    /// The next bell, or that some may be missed. Dropping the future loses nothing.
    ///
    /// Ends with `None` when the process does.
    pub async fn next(&mut self) -> Option<Bell> {
        loop {
            tokio::select! {
                biased;
                changed = self.renewed.changed() => {
                    return changed.ok().map(|()| Bell::Missed);
                }
                message = self.messages.recv() => match message {
                    Ok(message) if *message.channel == *self.channel => {
                        return Some(Bell::Rang(message.value.into_bytes().unwrap_or_default()));
                    }
                    // Another listener's.
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => return Some(Bell::Missed),
                    Err(RecvError::Closed) => return None,
                },
            }
        }
    }
}
