//! Talking to the server by unary calls, where streams do not get through: `Poll` carries
//! control both ways, `ReportTaskEvents` carries the events of one attempt a call.

use std::{
    collections::HashSet,
    future::poll_fn,
    task::{Poll, ready},
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tonic::{Status, transport::Channel};

use super::{
    Agent, End, Mode,
    connection::{self, Credential},
    outbox::Key,
};
use crate::{
    clock::Clock,
    error::Reason,
    grpc::status,
    pb::{self, connect_request::Body as ToServer, connect_response::Body as FromServer},
};

/// How long a call waits for messages of the server.
const WAIT: Duration = Duration::from_secs(20);
/// Longest time of a call beyond what it asks the server to wait.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of events in one call.
const MAX_BATCH: usize = 256 << 10;
/// Calls that carry events at once.
const MAX_REPORTS: usize = 16;
/// Pause of an attempt whose events were not taken.
const PAUSE: Duration = Duration::from_millis(500);
/// After this long by polling, mode auto tries streams again.
const RETRY_STREAMS: Duration = Duration::from_mins(5);
/// Longest time to get Bye across.
const BYE_TIMEOUT: Duration = Duration::from_secs(2);

type Polled = Result<Vec<pb::ConnectResponse>, Status>;
type Reported = (Key, Result<pb::ReportTaskEventsResponse, Status>);

impl Agent {
    /// One life of polling.
    pub(super) async fn poll(&mut self) -> End {
        let connecting = (self.connector)();
        let channel = match self.meanwhile(connecting).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => {
                return End::Broken { suspicious: true, why: format!("{error:#}") };
            }
            Err(end) => return end,
        };
        match self.poll_on(channel).await {
            Ok(end) => end,
            Err(status) if connection::is_final(&status) => End::Refused(status),
            // Stays with polling: whether streams get through is tried now and then.
            Err(status) => End::Broken { suspicious: true, why: status.message().to_owned() },
        }
    }

    async fn poll_on(&mut self, channel: Channel) -> Result<End, Status> {
        // Opening a stream and dropping it is what holds other messages back until Welcome.
        drop(self.mailbox.open(pb::Hello::default()));
        let hello = pb::ConnectRequest {
            seq: 0,
            ack: self.session.inbox.last(),
            body: Some(ToServer::Hello(self.hello())),
        };
        let first = self.call(channel.clone(), vec![hello], Duration::ZERO);
        let mut messages = match self.meanwhile(first).await {
            Ok(answer) => answer?.into_iter(),
            Err(end) => return Ok(end),
        };
        let Some(FromServer::Welcome(welcome)) = messages.next().and_then(|first| first.body)
        else {
            return Err(Status::internal("the server's first message was no Welcome"));
        };
        let carrier = self.on_welcome(welcome)?;
        for message in messages {
            self.on_control(message)?;
        }

        let clock = self.clock.clone();
        let until = clock.mono() + RETRY_STREAMS;
        let mut beat_at = clock.mono();
        let mut bye_until = None;
        let mut receiving = self.call(channel.clone(), Vec::new(), WAIT);
        let mut sending: Option<(u64, BoxFuture<'static, Polled>)> = None;
        let mut reports: FuturesUnordered<BoxFuture<'static, Reported>> = FuturesUnordered::new();
        let mut reporting: HashSet<Key> = HashSet::new();
        loop {
            self.commands_go_on();
            if self.leaving.stopped {
                return Ok(End::Left);
            }
            if self.leaving.exit && self.is_drained() && bye_until.is_none() {
                self.mailbox.push(ToServer::Bye(pb::Bye { reason: "drained".into() }));
                bye_until = Some(clock.mono() + BYE_TIMEOUT);
            }
            if bye_until.is_some_and(|until| self.mailbox.is_settled() || clock.mono() >= until) {
                return Ok(End::Left);
            }
            if self.config.mode == Mode::Auto && clock.mono() >= until {
                return Ok(End::Renew);
            }
            let (outbox, mailbox) = (self.outbox.clone(), self.mailbox.clone());
            let more = reporting.len() < MAX_REPORTS;
            tokio::select! {
                biased;
                () = clock.sleep_until(beat_at) => {
                    beat_at = clock.mono() + self.session.heartbeat_interval;
                    self.mailbox.beat(self.heartbeat());
                }
                local = self.local() => self.on_local(local),
                messages = &mut receiving => {
                    self.on_polled(messages?);
                    receiving = self.call(channel.clone(), Vec::new(), WAIT);
                }
                (seq, messages) = poll_fn(|cx| match &mut sending {
                    Some((seq, call)) => Poll::Ready((*seq, ready!(call.as_mut().poll(cx)))),
                    None => Poll::Pending,
                }) => {
                    sending = None;
                    let messages = messages?;
                    self.mailbox.delivered(seq);
                    self.on_polled(messages);
                }
                Some((key, reported)) = reports.next(), if !reports.is_empty() => {
                    reporting.remove(&key);
                    self.on_reported(key, reported);
                }
                () = poll_fn(|cx| when(mailbox.poll_ready(cx.waker()))), if sending.is_none() => {
                    let (messages, seq) = self.mailbox.take();
                    sending = Some((seq, self.call(channel.clone(), messages, Duration::ZERO)));
                }
                () = poll_fn(|cx| when(outbox.poll_ready(cx.waker(), |key| reporting.contains(&key)))), if more => {
                    let batch = self.outbox.take(carrier, MAX_BATCH, |key| reporting.contains(&key));
                    let batch = batch.unwrap_or_default();
                    for lease in batch.leases {
                        let Ok(task) = lease.task_id.parse() else { continue };
                        let key = (task, lease.attempt);
                        reporting.insert(key);
                        reports.push(self.report(channel.clone(), key, lease)?);
                    }
                    if let Some(credits) = batch.credits {
                        self.mailbox.push(ToServer::Credits(credits));
                    }
                }
            }
        }
    }

    /// Takes messages in. Two calls at once bring them twice and in any order; what is too
    /// early now comes again, since it is not acknowledged.
    fn on_polled(&mut self, messages: Vec<pb::ConnectResponse>) {
        for message in messages {
            if let Err(early) = self.on_control(message) {
                tracing::debug!("{}", early.message());
                return;
            }
        }
    }

    fn call(
        &self,
        channel: Channel,
        messages: Vec<pb::ConnectRequest>,
        wait: Duration,
    ) -> BoxFuture<'static, Polled> {
        let messages = if messages.is_empty() {
            // Tells what was processed, so that it does not come again.
            let body = Some(ToServer::Heartbeat(self.heartbeat()));
            vec![pb::ConnectRequest { seq: 0, ack: self.session.inbox.last(), body }]
        } else {
            messages
        };
        let request = self.credential.request(pb::PollRequest {
            messages,
            session_id: self.session.id.clone(),
            wait: wait.try_into().ok(),
        });
        let call = async move {
            let answer = connection::client(channel).poll(request).await?;
            Ok(answer.into_inner().messages)
        };
        bounded(self.clock.clone(), wait + TIMEOUT, call)
    }

    fn report(
        &self,
        channel: Channel,
        key: Key,
        lease: pb::LeaseEvents,
    ) -> Result<BoxFuture<'static, Reported>, Status> {
        let token = self.outbox.token(key).filter(|token| !token.is_empty());
        let credential = match token {
            Some(token) => Credential::new(Some(&token))
                .map_err(|_| Status::internal("the attempt's token is no header value"))?,
            None => self.credential.clone(),
        };
        let request = credential.request(pb::ReportTaskEventsRequest {
            task_id: lease.task_id,
            attempt: lease.attempt,
            first_index: lease.first_index,
            events: lease.events,
            finish: lease.finish,
        });
        let clock = self.clock.clone();
        let call = bounded(clock.clone(), TIMEOUT, async move {
            Ok(connection::client(channel).report_task_events(request).await?.into_inner())
        });
        Ok(Box::pin(async move {
            let reported = call.await;
            if reported.is_err() {
                clock.sleep(PAUSE).await;
            }
            (key, reported)
        }))
    }

    fn on_reported(&mut self, key: Key, reported: Result<pb::ReportTaskEventsResponse, Status>) {
        let error = match reported {
            Ok(answer) => {
                self.on_acks(vec![pb::LeaseAck {
                    task_id: key.0.to_string(),
                    attempt: key.1,
                    acked_index: answer.acked_index,
                    finished: answer.finished,
                    error: None,
                    resend_from: 0,
                }]);
                return;
            }
            Err(error) => error,
        };
        let details = status::error_reason(&error);
        let expected = details.as_ref().and_then(|(_, facts)| facts.get("expected_index"));
        match expected.and_then(|index| index.parse().ok()) {
            Some(index) => self.missing(key, index),
            None if status::is_reason(&error, Reason::LeaseLost) => self.lease_lost(key),
            // The token died with its lease.
            None if connection::is_final(&error) => self.lease_lost(key),
            None => {
                tracing::debug!(task.id = %key.0, code = ?error.code(), "events were not taken");
                self.outbox.resend_kept(key);
            }
        }
    }
}

/// Ready when `condition` holds.
fn when(condition: bool) -> Poll<()> {
    if condition { Poll::Ready(()) } else { Poll::Pending }
}

fn bounded<T: Send + 'static>(
    clock: Clock,
    limit: Duration,
    call: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> BoxFuture<'static, Result<T, Status>> {
    Box::pin(async move {
        tokio::select! {
            biased;
            answer = call => answer,
            () = clock.sleep(limit) => Err(Status::deadline_exceeded("no answer came in time")),
        }
    })
}
