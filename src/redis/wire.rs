//! The connections to Redis, and what is asked over them: fred's clients, or in a simulation
//! something that takes their place. The words are fred's, since that is what they all say.

use std::{fmt, sync::Arc, time::Duration};

use fred::{
    clients::Client,
    error::{Error, ErrorKind},
    interfaces::PubsubInterface as _,
    prelude::{Builder, ClientLike as _, EventInterface as _, Options, Value},
    types::{ClusterHash, CustomCommand, Message, RespVersion, config::Server},
};
use futures_util::future::BoxFuture;
use tokio::sync::broadcast::Receiver;

use super::Settings;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Commands, or reads that wait.
    Commands,
    /// Channels.
    Subscriptions,
}

/// Makes connections.
pub trait Wire: Send + Sync {
    /// Makes one. It stays: when it is lost it is made again, without subscriptions.
    fn connect(&self, purpose: Purpose) -> BoxFuture<'_, Result<Arc<dyn Line>, Error>>;
}

/// A command.
#[derive(Clone, Debug)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// What follows the name.
    pub args: Vec<Value>,
    /// Whether it may be sent again when the connection broke before the answer.
    pub again: bool,
    /// Most time for the answer where it waits for something; else as set for all commands.
    pub waits: Option<Duration>,
}

impl Call {
    /// A command that may be sent again.
    pub fn new(name: &'static str, args: Vec<Value>) -> Self {
        Self { name, args, again: true, waits: None }
    }
}

/// A connection. Commands go in the order of the first polls of their futures.
pub trait Line: Send + Sync {
    /// Sends a command, and awaits the answer.
    fn call(&self, call: Call) -> BoxFuture<'_, Result<Value, Error>>;
    /// Listens to channels.
    fn listen(&self, channels: Vec<String>) -> BoxFuture<'_, Result<(), Error>>;
    /// What comes over channels.
    fn messages(&self) -> Receiver<Message>;
    /// Tells when the connection was made again.
    fn reconnects(&self) -> Receiver<Server>;
    /// Drops the connection, and makes it again.
    fn reconnect(&self) -> BoxFuture<'_, ()>;
    /// Ends it.
    fn end(&self) -> BoxFuture<'_, ()>;
}

impl fmt::Debug for dyn Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}

/// Connections to a server.
pub(super) struct Fred {
    builder: Builder,
    bound: Duration,
}

impl Fred {
    /// Connections as these settings have them.
    pub(super) fn new(settings: &Settings) -> super::Result<Self> {
        Ok(Self { builder: settings.builder()?, bound: settings.connect_timeout * 2 })
    }
}

impl Wire for Fred {
    fn connect(&self, purpose: Purpose) -> BoxFuture<'_, Result<Arc<dyn Line>, Error>> {
        Box::pin(async move {
            let mut builder = self.builder.clone();
            if purpose == Purpose::Subscriptions {
                // The older protocol allows no other command on a connection that listens.
                builder.with_config(|config| config.version = RespVersion::RESP3);
            }
            let client = builder.build()?;
            tokio::time::timeout(self.bound, client.init())
                .await
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "no answer")))?;
            Ok(Arc::new(client) as Arc<dyn Line>)
        })
    }
}

impl Line for Client {
    fn call(&self, call: Call) -> BoxFuture<'_, Result<Value, Error>> {
        let Call { name, args, again, waits } = call;
        let max_attempts = if again && waits.is_none() { None } else { Some(1) };
        let options = Options { max_attempts, timeout: waits, ..Options::default() };
        let command = CustomCommand::new_static(name, ClusterHash::FirstKey, waits.is_some());
        let client = self.with_options(&options);
        Box::pin(async move { client.custom(command, args).await })
    }

    fn listen(&self, channels: Vec<String>) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { Client::subscribe(self, channels).await })
    }

    fn messages(&self) -> Receiver<Message> {
        self.message_rx()
    }

    fn reconnects(&self) -> Receiver<Server> {
        self.reconnect_rx()
    }

    fn reconnect(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            // What is wrong shows at the next command.
            self.force_reconnection().await.ok();
        })
    }

    fn end(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            // It is the end either way.
            Client::quit(self).await.ok();
        })
    }
}
