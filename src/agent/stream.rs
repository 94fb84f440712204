//! Talking to the server by streams: `Connect` and `Output`, on connections of their own.

use std::time::Duration;

use tonic::{Status, Streaming};

use super::{
    Agent, End, connection,
    output::{Heard, Link, Opening},
};
use crate::{
    clock::Mono,
    pb::{self, connect_request::Body as ToServer, connect_response::Body as FromServer},
};

/// Longest time from a connection to Welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams that end within this are suspected not to get through.
const EARLY: Duration = Duration::from_secs(5);
/// Longest time to get Bye across.
const BYE_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest silence of the server, in heartbeat intervals.
const SILENCE: u32 = 3;
/// Ends of Output in a row after which control is opened anew too.
const OUTPUT_FAILURES: u32 = 4;

fn broken(suspicious: bool, why: &Status) -> End {
    if connection::is_final(why) {
        return End::Refused(why.clone());
    }
    End::Broken { suspicious, why: format!("{}: {}", why.code(), why.message()) }
}

impl Agent {
    /// One life of the streams.
    pub(super) async fn stream(&mut self) -> End {
        let connecting = (self.connector)();
        let channel = match self.meanwhile(connecting).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => {
                return End::Broken { suspicious: false, why: format!("{error:#}") };
            }
            Err(end) => return end,
        };
        let since = self.clock.mono();
        let opening = self.open_control(channel.clone());
        let (welcome, mut control) = match self.meanwhile(opening).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(status)) => return broken(true, &status),
            Err(end) => return end,
        };
        let carrier = match self.on_welcome(welcome) {
            Ok(carrier) => carrier,
            Err(status) => return End::Refused(status),
        };
        let opening = Opening {
            connector: self.connector.clone(),
            beside: Some(channel),
            credential: self.credential.clone(),
            session_id: self.session.id.clone(),
            outbox: self.outbox.clone(),
            clock: self.clock.clone(),
            flush_interval: self.config.flush_interval,
        };
        let mut output = Link::open(opening, carrier, self.entropy.clone());
        self.converse(&mut control, &mut output, since).await
    }

    /// Opens `Connect` and waits for Welcome.
    fn open_control(
        &mut self,
        channel: tonic::transport::Channel,
    ) -> impl Future<Output = Result<(pb::Welcome, Streaming<pb::ConnectResponse>), Status>> + use<>
    {
        let hello = self.hello();
        let request = self.credential.request(self.mailbox.open(hello));
        let clock = self.clock.clone();
        let open = async move {
            let mut control = connection::client(channel).connect(request).await?.into_inner();
            match control.message().await?.and_then(|message| message.body) {
                Some(FromServer::Welcome(welcome)) => Ok((welcome, control)),
                Some(_) => Err(Status::internal("the server's first message was no Welcome")),
                None => Err(Status::unavailable("the stream ended before Welcome")),
            }
        };
        async move {
            tokio::select! {
                biased;
                opened = open => opened,
                () = clock.sleep(WELCOME_TIMEOUT) => Err(Status::deadline_exceeded("no Welcome came in time")),
            }
        }
    }

    async fn converse(
        &mut self,
        control: &mut Streaming<pb::ConnectResponse>,
        output: &mut Link,
        since: Mono,
    ) -> End {
        let mut heard_at = self.clock.mono();
        let mut beat_at = heard_at + self.session.heartbeat_interval;
        let mut bye_until = None;
        loop {
            self.commands_go_on();
            if self.leaving.stopped {
                return End::Left;
            }
            if self.leaving.exit && self.is_drained() && bye_until.is_none() {
                self.mailbox.push(ToServer::Bye(pb::Bye { reason: "drained".into() }));
                bye_until = Some(self.clock.mono() + BYE_TIMEOUT);
            }
            if bye_until.is_some() && self.mailbox.is_settled() {
                return End::Left;
            }
            let silent_at = heard_at + self.session.heartbeat_interval * SILENCE + EARLY;
            let renew_at = self.session.renew_at.filter(|_| bye_until.is_none());
            let clock = self.clock.clone();
            tokio::select! {
                biased;
                () = clock.sleep_until(beat_at) => {
                    beat_at = clock.mono() + self.session.heartbeat_interval;
                    self.mailbox.beat(self.heartbeat());
                }
                local = self.local() => self.on_local(local),
                message = control.message() => {
                    heard_at = clock.mono();
                    let early = heard_at.since(since) < EARLY;
                    match message {
                        Ok(Some(message)) => {
                            if let Err(status) = self.on_control(message) {
                                return broken(false, &status);
                            }
                        }
                        // After Bye the server ends the stream.
                        _ if bye_until.is_some() => return End::Left,
                        Ok(None) => {
                            return broken(early, &Status::unavailable("the stream ended"));
                        }
                        Err(status) => return broken(early, &status),
                    }
                }
                heard = output.next() => match heard {
                    Heard::Response(response) => self.on_acks(response.leases),
                    Heard::Broken(status) => {
                        let why = status.message();
                        tracing::debug!(code = ?status.code(), why, "Output broke");
                        // The session is unknown to the server, or events do not get through.
                        if status.code() == tonic::Code::NotFound
                            || output.n_failures() >= OUTPUT_FAILURES
                        {
                            return broken(output.n_failures() >= OUTPUT_FAILURES, &status);
                        }
                        if connection::is_final(&status) {
                            return End::Refused(status);
                        }
                    }
                },
                () = sleep_until(&clock, renew_at) => return End::Renew,
                () = sleep_until(&clock, bye_until) => return End::Left,
                () = clock.sleep_until(silent_at) => {
                    return broken(false, &Status::unavailable("the server fell silent"));
                }
            }
        }
    }
}

/// Sleeps until then; for ever when there is no such time.
pub(super) async fn sleep_until(clock: &crate::clock::Clock, at: Option<Mono>) {
    match at {
        Some(at) => clock.sleep_until(at).await,
        None => std::future::pending().await,
    }
}
