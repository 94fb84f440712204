//! Runners of other servers: every server shows those that it holds in the database, and does what
//! operators ask of them wherever the call came in.
//!
//! An order for a runner that another server holds is left in a row, which that server looks for
//! several times a second, carries out, and answers.

pub mod store;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use prost::Message as _;

use self::store::{OrderRow, SeenRow};
use super::{Registry, convert::commands};
use crate::{
    clock::Micros,
    db::Db,
    error::{Error, Kind, Reason, Result},
    id::{InstanceId, Namespace, RunnerId, TaskId},
    pb,
};

/// Between two looks for orders.
const LOOK: Duration = Duration::from_millis(200);
/// Looks between two times that runners are shown, where nothing but their load has changed.
const SHOW_EVERY: u32 = 10;
/// Times that they are shown between two at which all are, as they are.
const SHOW_ALL_EVERY: u32 = 3;
/// An order that its server has not taken by then is given up.
const TAKEN_WITHIN: Duration = Duration::from_secs(5);
/// Orders are forgotten after this long.
const KEPT: Duration = Duration::from_hours(1);

/// What servers show each other of their runners; clones share it.
#[derive(Clone)]
pub struct Roster(Arc<Inner>);

struct Inner {
    db: Db,
    me: InstanceId,
    /// A server that was not heard of for so long shows nothing.
    alive: Duration,
    /// What was shown last, without what changes all the time.
    shown: Mutex<BTreeMap<(Namespace, String), Vec<u8>>>,
}

impl Roster {
    /// The roster as a server sees it.
    pub fn new(db: Db, me: InstanceId, alive: Duration) -> Self {
        Self(Arc::new(Inner { db, me, alive, shown: Mutex::default() }))
    }

    async fn list(
        &self,
        namespace: &Namespace,
        after: &str,
        max: usize,
    ) -> Result<Vec<pb::Runner>> {
        let (namespace, after) = (namespace.clone(), after.to_owned());
        let (alive, me) = (self.0.alive, self.0.me);
        let limit = u32::try_from(max).unwrap_or(u32::MAX);
        let read = self.0.db.read(move |tx| {
            Box::pin(async move { store::list(tx, &namespace, &after, alive, me, limit).await })
        });
        read.await?.into_iter().map(|(_, seen)| decoded(&seen)).collect()
    }

    async fn find(
        &self,
        namespace: &Namespace,
        runner: &RunnerId,
    ) -> Result<Option<(InstanceId, pb::Runner)>> {
        let (namespace, runner) = (namespace.clone(), runner.to_string());
        let (alive, me) = (self.0.alive, self.0.me);
        let read = self.0.db.read(move |tx| {
            Box::pin(async move { store::find(tx, &namespace, &runner, alive, me).await })
        });
        let found = read.await?;
        found.map(|(holder, seen)| Ok((holder, decoded(&seen)?))).transpose()
    }
}

fn decoded(seen: &[u8]) -> Result<pb::Runner> {
    pb::Runner::decode(seen).map_err(Error::internal)
}

impl Registry {
    /// Runners of a namespace by name, after a name, whichever server holds them; at most `max`.
    pub async fn list_all(
        &self,
        namespace: &Namespace,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<pb::Runner>> {
        let own = self.list(namespace, after, max);
        let own = own.iter().map(commands::runner);
        let Some(roster) = &self.ports().roster else { return Ok(own.collect()) };
        let others = roster.list(namespace, after.unwrap_or_default(), max).await?;
        let mut all: BTreeMap<String, pb::Runner> = BTreeMap::new();
        for runner in others.into_iter().chain(own) {
            let gone = runner.state() == pb::runner::State::Disconnected;
            if !gone || !all.contains_key(&runner.runner_id) {
                all.insert(runner.runner_id.clone(), runner);
            }
        }
        Ok(all.into_values().take(max).collect())
    }

    /// A runner of a namespace, whichever server holds it.
    pub async fn get_any(&self, namespace: &Namespace, runner: &RunnerId) -> Result<pb::Runner> {
        let own = self.get(namespace, runner).map(|seen| commands::runner(&seen));
        match self.held_elsewhere(namespace, runner).await? {
            Some((_, seen)) => Ok(seen),
            None => own,
        }
    }

    /// Whether a runner is to be found nowhere but here.
    pub(super) fn is_here(&self, namespace: &Namespace, runner: &RunnerId) -> bool {
        let connected = self.get(namespace, runner).is_ok_and(|seen| seen.connected);
        connected || self.ports().roster.is_none()
    }

    /// The server that holds a runner, unless it is connected to this one.
    async fn held_elsewhere(
        &self,
        namespace: &Namespace,
        runner: &RunnerId,
    ) -> Result<Option<(InstanceId, pb::Runner)>> {
        match &self.ports().roster {
            Some(roster) if !self.is_here(namespace, runner) => {
                roster.find(namespace, runner).await
            }
            _ => Ok(None),
        }
    }

    /// Leaves an order for the server that holds its runner and waits for the answer, a status; or
    /// `None` where no other server holds it.
    ///
    /// # Errors
    /// When storage fails, or that server does not take the order.
    pub(super) async fn order_elsewhere(
        &self,
        namespace: &Namespace,
        runner: &RunnerId,
        (kind, request): (&str, Vec<u8>),
        wait: Duration,
    ) -> Result<Option<pb::google::rpc::Status>> {
        let Some(roster) = &self.ports().roster else { return Ok(None) };
        let Some((holder, _)) = self.held_elsewhere(namespace, runner).await? else {
            return Ok(None);
        };
        let now = self.clock().now();
        let id = TaskId::new(now, self.entropy()).0;
        let (namespace, kind) = (namespace.clone(), kind.to_owned());
        let order = OrderRow { id, namespace, kind, request, wait };
        let db = &roster.0.db;
        let ask =
            db.write(move |tx| Box::pin(async move { store::ask(tx, holder, &order, now).await }));
        ask.await?;
        let began = self.clock().mono();
        let stop = self.supervisor().token();
        loop {
            let look = db.read(move |tx| Box::pin(async move { store::look(tx, id).await }));
            let (taken, answer) = look.await?;
            if let Some(answer) = answer {
                let status = pb::google::rpc::Status::decode(&*answer).map_err(Error::internal)?;
                return Ok(Some(status));
            }
            let waited = self.clock().mono().since(began);
            if !taken && waited > TAKEN_WITHIN {
                let message = format!("the server that holds runner `{runner}` does not answer");
                return Err(Error::new(Kind::Unavailable, Reason::NotServing, message));
            }
            // The other side waits as long, and says so.
            if waited > wait + TAKEN_WITHIN || stop.is_cancelled() {
                let message = format!("runner `{runner}` has not answered; the command goes on");
                return Err(Error::new(Kind::DeadlineExceeded, Reason::CallDeadline, message));
            }
            self.clock().sleep(LOOK / 2).await;
        }
    }

    /// Shows the runners of this server and does what is asked of them elsewhere, for ever.
    pub async fn run_roster(self) -> anyhow::Result<()> {
        let Some(roster) = self.ports().roster.clone() else {
            return std::future::pending().await;
        };
        let mut n_looks = 0_u32;
        loop {
            let done = async {
                if n_looks.is_multiple_of(SHOW_EVERY) {
                    let all = n_looks.is_multiple_of(SHOW_EVERY * SHOW_ALL_EVERY);
                    self.show(&roster, all).await?;
                }
                self.take_orders(&roster).await
            };
            if let Err(error) = done.await {
                tracing::debug!(%error, "runners are shown to other servers later");
            }
            n_looks = n_looks.wrapping_add(1);
            self.clock().sleep(LOOK).await;
        }
    }

    /// Shows the runners of this server to the others: those that have changed, or all.
    async fn show(&self, roster: &Roster, all: bool) -> Result<()> {
        let seen = self.views();
        let mut rows = Vec::new();
        let mut shown = BTreeMap::new();
        {
            let before = roster.0.shown.lock();
            for (namespace, connect_time, runner) in seen {
                let key = (namespace.clone(), runner.runner_id.clone());
                let still = pb::Runner {
                    last_heartbeat_time: None,
                    load: 0.0,
                    node: None,
                    ..runner.clone()
                };
                let still = still.encode_to_vec();
                if all || before.get(&key) != Some(&still) {
                    let seen = runner.encode_to_vec();
                    let runner = runner.runner_id;
                    rows.push(SeenRow { namespace, runner, connect_time, seen });
                }
                shown.insert(key, still);
            }
        }
        let gone: Vec<_> = {
            let before = roster.0.shown.lock();
            before.keys().filter(|key| !shown.contains_key(key)).cloned().collect()
        };
        if rows.is_empty() && gone.is_empty() {
            return Ok(());
        }
        let mut script = roster.0.db.script();
        store::put(&mut script, roster.0.me, &rows)?;
        store::remove(&mut script, roster.0.me, &gone)?;
        let before = self.clock().now() - KEPT;
        let write = roster.0.db.write(move |tx| {
            Box::pin(async move {
                script.run(tx).await?;
                if all { store::forget(tx, before).await } else { Ok(()) }
            })
        });
        write.await?;
        *roster.0.shown.lock() = shown;
        Ok(())
    }

    async fn take_orders(&self, roster: &Roster) -> Result<()> {
        let (db, me) = (&roster.0.db, roster.0.me);
        let any = db.read(move |tx| Box::pin(async move { store::any(tx, me).await }));
        if !any.await? {
            return Ok(());
        }
        let take = db.write(move |tx| Box::pin(async move { store::take(tx, me).await }));
        for order in take.await? {
            let (registry, roster) = (self.clone(), roster.clone());
            self.supervisor().spawn("runner_order", async move {
                let id = order.id;
                let answer = commands::answer(&registry.carry_out(order).await);
                // Who asked looks at the runner next.
                let shown = registry.show(&roster, false).await;
                let write = roster
                    .0
                    .db
                    .write(move |tx| Box::pin(async move { store::answer(tx, id, answer).await }));
                if let Err(error) = write.await.and(shown) {
                    tracing::warn!(%error, "an operator elsewhere gets no answer");
                }
            });
        }
        Ok(())
    }

    /// Does what an operator asked another server.
    async fn carry_out(&self, order: OrderRow) -> Result<()> {
        let OrderRow { id: _, namespace, kind, request, wait } = order;
        let order = match kind.as_str() {
            "drain" => {
                let request: pb::DrainRunnerRequest = decode(&request)?;
                let waits = request.wait;
                let order = commands::drain(request)?;
                if !waits {
                    return self.send_order(&namespace, order).map(drop);
                }
                order
            }
            "pause" => commands::pause(decode(&request)?)?,
            "resume" => commands::resume(decode(&request)?)?,
            "apply" => commands::apply(decode(&request)?)?,
            "reload" => commands::reload(decode(&request)?)?,
            "tune" => commands::tune(decode(&request)?)?,
            other => {
                let message = format!("the server that holds the runner does not know `{other}`");
                return Err(Error::new(Kind::Unimplemented, Reason::Unimplemented, message));
            }
        };
        self.order(&namespace, order, wait).await
    }

    /// All runners of this server, with their namespaces and the start of their sessions.
    fn views(&self) -> Vec<(Namespace, Micros, pb::Runner)> {
        let mut views = Vec::new();
        for (namespace, seen) in self.list_everything() {
            views.push((namespace, seen.connect_time, commands::runner(&seen)));
        }
        views
    }
}

fn decode<T: prost::Message + Default>(request: &[u8]) -> Result<T> {
    T::decode(request).map_err(Error::internal)
}
