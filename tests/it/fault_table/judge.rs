//! Which promises held under a fault: what clients were told against what is there afterwards.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use baton::pb;
use futures_util::{StreamExt as _, stream};
use tonic::Code;

use super::{
    load::{self, Told, insist},
    probes::Looks,
    site::{AHEAD, Fault, Inflicted, Site},
};
use crate::{
    artifacts::{download, sha256},
    harness::{
        SOON,
        api::Api,
        checks::{self, History, check_end, check_stream},
    },
};

/// Promises that the runs look at.
pub const PROMISES: [&str; 14] =
    ["P1", "P2", "P3", "P4", "P5", "P6", "P7-P9", "P10", "P12", "P14", "P15", "P16", "P17", "P18"];
/// A task that waited was found again within this time after the fault, as far as clocks agree.
const FOUND_WITHIN: Duration = Duration::from_secs(10);
/// Tasks whose streams are read again at each server afterwards.
const READ_AGAIN: usize = 100;

/// How often a promise was looked at, and what broke it.
#[derive(Default)]
pub struct Verdict {
    n_checks: usize,
    pub broken: Vec<String>,
}

impl Verdict {
    pub fn cell(&self) -> String {
        match self.broken.len() {
            0 if self.n_checks == 0 => "-".into(),
            0 => self.n_checks.to_string(),
            n => format!("{n} BROKEN of {}", self.n_checks),
        }
    }
}

/// Of each promise.
pub struct Verdicts(pub BTreeMap<&'static str, Verdict>);

impl Verdicts {
    pub fn new() -> Self {
        Self(PROMISES.into_iter().map(|promise| (promise, Verdict::default())).collect())
    }

    pub fn look(&mut self, promise: &str, holds: bool, otherwise: impl FnOnce() -> String) {
        let verdict = self.0.get_mut(promise).expect("a promise that is looked at");
        verdict.n_checks += 1;
        if !holds {
            verdict.broken.push(otherwise());
        }
    }

    pub fn extend(&mut self, promise: &str, looks: Looks) {
        for (holds, what) in looks {
            self.look(promise, holds, || what);
        }
    }
}

/// One run: what was told, and what is asked about it.
pub struct Run<'a> {
    pub site: &'a Site,
    pub fault: Fault,
    /// What the request ids of its tasks begin with.
    pub name: &'a str,
    /// Of the fault.
    pub time: Duration,
    pub told: &'a [Told],
    pub seen: &'a Inflicted,
}

impl Run<'_> {
    /// What came of everything but the probes.
    pub async fn judge(&self) -> Verdicts {
        let mut verdicts = Verdicts::new();
        self.judge_answers(&mut verdicts);
        self.judge_rows(&mut verdicts);
        self.judge_outages(&mut verdicts);
        self.judge_readers(&mut verdicts).await;
        self.judge_artifacts(&mut verdicts).await;
        verdicts
    }

    /// P1, P2, P3, P10, P18.
    fn judge_answers(&self, verdicts: &mut Verdicts) {
        let rows = format!("SELECT id, state FROM tasks WHERE request_id LIKE '{}-%'", self.name);
        let rows = self.site.sql(&rows);
        let states: BTreeMap<_, _> = rows.lines().filter_map(|row| row.split_once('|')).collect();
        for told in self.told {
            let task = told.task.as_str();
            let gone = || format!("{task} was accepted and is gone");
            verdicts.look("P1", states.contains_key(task), gone);
            let state = states.get(task).copied().unwrap_or("gone");
            if let Some(again) = &told.again {
                let both = || format!("{task} and {again} of one request id");
                verdicts.look("P2", again == task, both);
            }
            let not_found = || format!("{task} was not found after the answer");
            verdicts.look("P18", told.was_found, not_found);
            if told.cancelled {
                let other = || format!("{task} was cancelled and is {state}");
                verdicts.look("P10", state == "CANCELLED", other);
            } else {
                let sound = state == "SUCCEEDED" || state == "CANCELLED";
                verdicts.look("P3", sound, || format!("{task} is {state}"));
            }
        }
        let n_rows = states.len();
        let other = || format!("{n_rows} tasks of {} requests", self.told.len());
        verdicts.look("P2", n_rows == self.told.len(), other);
    }

    /// P4, P6, P12, P17: each attempt started once, and each task ended once, with its last entry.
    fn judge_rows(&self, verdicts: &mut Verdicts) {
        let (site, n_tasks) = (self.site, self.told.len());
        let amiss = |condition: &str| {
            let mine = format!("FROM tasks t WHERE t.request_id LIKE '{}-%'", self.name);
            let found = site.sql(&format!("SELECT t.id {mine} AND {condition}"));
            found.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let mut all = |promise: &str, found: Vec<String>, what: &str| {
            for _ in found.len()..n_tasks {
                verdicts.look(promise, true, String::new);
            }
            for task in found {
                verdicts.look(promise, false, || format!("{what} {task}"));
            }
        };
        let of = "FROM task_events e WHERE e.task_id = t.id AND e.kind";
        let attempts = format!("t.attempt <> (SELECT count(*) {of} = 'attempt_started')");
        all("P4", amiss(&attempts), "attempts of");
        let ends = format!(
            "t.state NOT IN ('QUEUED', 'RUNNING') AND
             (SELECT array_agg(e.sequence) {of} = 'ended') IS DISTINCT FROM ARRAY[t.last_sequence]"
        );
        all("P6", amiss(&ends), "ends of");
        let is_ahead = self.fault == Fault::ClockAhead;
        let skew = if is_ahead { AHEAD } else { Duration::ZERO };
        let bound = (self.time + skew + FOUND_WITHIN).as_micros();
        all("P17", amiss(&format!("t.start_time - t.create_time > {bound}")), "found late:");
        if is_ahead {
            all("P12", amiss("t.lost > 0"), "an expired lease of");
        }
    }

    /// P16: nothing is acknowledged that cannot have been kept, and servers say that they are not
    /// ready.
    fn judge_outages(&self, verdicts: &mut Verdicts) {
        for ready_for in &self.seen.ready_for {
            let within = ready_for.is_some();
            verdicts.look("P16", within, || "a server without storage stayed ready".into());
        }
        for outage in &self.seen.outages {
            for told in self.told {
                let kept = !outage.rules_out(told.acked, false);
                verdicts.look("P16", kept, || format!("{} was acknowledged", told.task));
                if let Some((artifact, at)) = &told.input {
                    let kept = !outage.rules_out((*at, usize::MAX), true);
                    let id = &artifact.artifact_id;
                    verdicts.look("P16", kept, || format!("artifact {id} was acknowledged"));
                }
            }
        }
    }

    /// P7 to P9: those who followed, and one at each server now.
    async fn judge_readers(&self, verdicts: &mut Verdicts) {
        let followed = self.told.iter().filter(|told| !told.followed.is_empty());
        for (n, told) in followed.enumerate() {
            let mut history = History::default();
            let mut readers = vec![told.followed.clone()];
            let apis = if n < READ_AGAIN { self.site.apis() } else { Vec::new() };
            for (at, api) in apis.into_iter().enumerate() {
                let read = load::follow(std::slice::from_ref(&api), &told.task, 0);
                let events = tokio::time::timeout(SOON, read).await;
                let none = || format!("{} has no end at server {at}", told.task);
                verdicts.look("P7-P9", events.is_ok(), none);
                readers.extend(events);
            }
            let task = self.site.apis()[0].get(&told.task).await;
            let problem = catch_unwind(AssertUnwindSafe(|| {
                for events in &readers {
                    check_stream(&told.task, 0, events);
                    check_end(&task, events);
                    history.add(&told.task, events);
                    if !told.cancelled {
                        assert_eq!(checks::text(events), told.text, "{}", told.task);
                    }
                }
            }));
            verdicts.look("P7-P9", problem.is_ok(), || format!("streams of {}", told.task));
        }
    }

    /// P14: what was acknowledged or is listed is there, whole, at any server, and nothing else is.
    async fn judge_artifacts(&self, verdicts: &mut Verdicts) {
        let apis = self.site.apis();
        let files = self.told.iter().enumerate().filter(|(_, told)| told.input.is_some());
        let looks = stream::iter(files).map(|(at, told)| {
            let apis = &apis;
            async move {
                let get = insist(apis, at, |api| {
                    let task = told.task.clone();
                    async move { api.try_get(&task).await }
                });
                let task = get.await.expect("the task").0;
                let mut looks = vec![];
                if task.state() == pb::TaskState::Succeeded {
                    let (n, task) = (task.artifacts.len(), &told.task);
                    looks.push((n > 0, format!("{task} succeeded and lists {n} artifacts")));
                }
                let input = told.input.iter().map(|(artifact, _)| artifact.artifact_id.clone());
                let output = task.artifacts.into_iter().map(|listed| listed.artifact_id);
                for id in input.chain(output) {
                    looks.push(is_whole(apis, at, &id, &told.text).await);
                }
                looks
            }
        });
        let looks: Vec<Looks> = looks.buffer_unordered(16).collect().await;
        for looks in looks {
            verdicts.extend("P14", looks);
        }
        let known = "SELECT type || '/' || left(name, 2) || '/' || substr(name, 3) FROM (
            SELECT type, sha256 || '-' || generation AS name FROM artifact_bytes
            UNION SELECT type, sha256 || '-' || generation FROM artifact_garbage) known";
        let stored = self.site.stored();
        let known = self.site.sql(known);
        let known: BTreeSet<_> = known.lines().collect();
        for key in stored {
            let is_known = known.contains(key.as_str());
            verdicts.look("P14", is_known, || format!("{key} is there and nobody knows"));
        }
    }
}

/// Whether an artifact is found and its bytes are this text.
async fn is_whole(apis: &[Api], at: usize, id: &str, text: &str) -> (bool, String) {
    let found = insist(apis, at, |api| {
        let request = pb::GetArtifactRequest { artifact_id: id.to_owned() };
        async move {
            let artifact = api.artifacts().get_artifact(request).await?.into_inner();
            // Damaged bytes are no passing failure.
            let bytes = download(&api, &artifact).await.map_err(|status| match status.code() {
                Code::Internal => tonic::Status::data_loss(status.message()),
                _ => status,
            })?;
            Ok((artifact, bytes))
        }
    });
    match found.await {
        Ok(((artifact, bytes), _)) => {
            let announced = artifact.size_bytes == text.len() as u64
                && artifact.sha256 == sha256(text.as_bytes());
            (announced && bytes == text.as_bytes(), format!("artifact {id} has other bytes"))
        }
        Err(status) => (false, format!("artifact {id}: {status:?}")),
    }
}
