//! Accepting tasks: checked, admitted to the queue, made durable, in this order.

use futures_util::future::join_all;
use prost::Message;
use sha2::{Digest, Sha256};

use super::Service;
use crate::{
    artifacts,
    clock::Micros,
    error::{Error, Kind, Reason, Result, reason_name},
    id::{ArtifactId, TaskId},
    keys::Principal,
    pb,
    queue::{Admission, Asked},
    tasks::{
        convert::{self, View, request as checked},
        ledger::{self, NewTask, queue_entry},
        model::{State, Task},
        state::Event,
        store,
    },
    telemetry::{ReasonLabel, TraceParent},
};

/// A submit on its way to the ledger.
pub(super) struct Ready {
    pub new: NewTask,
    /// Artifacts that it reads.
    pub inputs: Vec<ArtifactId>,
    pub require_on_time: bool,
}

impl Service {
    pub(super) fn check(
        &self,
        caller: &Principal,
        traceparent: Option<&TraceParent>,
        request_id: &str,
        spec: Option<pb::TaskSpec>,
    ) -> Result<Ready> {
        let digest = Sha256::digest(spec.as_ref().map(Message::encode_to_vec).unwrap_or_default());
        let now = self.parts.clock.now();
        let seed = self.parts.entropy.u64();
        let submit = checked::submit(request_id, spec, now, seed, &self.retry)?;
        let inputs = artifacts::references(&submit.spec.input)?;
        let new = NewTask {
            id: self.task_id(&inputs, now),
            namespace: caller.namespace.clone(),
            spec: submit.spec,
            not_before: submit.not_before,
            request_id: submit.request_id,
            digest: digest.into(),
            retry_of: None,
            traceparent: traceparent.map(|trace| trace.0.clone()),
        };
        Ok(Ready { new, inputs, require_on_time: submit.require_on_time })
    }

    /// The id of a task to be, where it has to be known before: its artifacts are held under it,
    /// or room in a shared queue.
    pub(super) fn task_id(&self, inputs: &[ArtifactId], now: Micros) -> Option<TaskId> {
        let is_known = !inputs.is_empty() || self.parts.queue.is_shared();
        is_known.then(|| TaskId::new(now, &self.parts.entropy))
    }

    /// Submits checked tasks; each has its own outcome.
    pub(super) async fn submit_all(
        &self,
        ready: Vec<Result<Ready>>,
    ) -> Vec<Result<pb::SubmitTaskResponse>> {
        let mut outcomes: Vec<Option<Error>> = Vec::with_capacity(ready.len());
        let mut admitted = Vec::new();
        let admissions = ready.into_iter().map(|ready| async {
            let ready = ready?;
            self.admit(&ready).await.map(|admission| (ready.new, admission))
        });
        for admission in join_all(admissions).await {
            outcomes.push(match admission {
                Ok(ready) => {
                    admitted.push(ready);
                    None
                }
                Err(error) => Some(error),
            });
        }
        let (new, admissions): (Vec<_>, Vec<_>) = admitted.into_iter().unzip();
        let answers = self.ledger.submit(new).await;
        let mut answers = answers.into_iter().zip(admissions).map(|(answer, admission)| {
            let submitted = answer?;
            if let Some(admission) = admission {
                admission.done(submitted.task.id);
            }
            Ok(self.submitted(&submitted.task))
        });
        outcomes
            .into_iter()
            .map(|refused| match refused {
                Some(error) => {
                    let reason = reason_name(error.reason());
                    self.parts.metrics.refusals.get_or_create(&ReasonLabel { reason }).inc();
                    Err(error)
                }
                None => answers.next().unwrap_or_else(|| Err(Error::internal("an answer each"))),
            })
            .collect()
    }

    /// A place in the queue for a task whose inputs are there; `None` for a request that was accepted before.
    async fn admit(&self, ready: &Ready) -> Result<Option<Admission>> {
        let new = &ready.new;
        match self.admit_new(ready).await {
            Ok(admission) => Ok(Some(admission)),
            // Even a full server knows what it has accepted.
            Err(error) => match &new.request_id {
                Some(request_id) => {
                    let key = (new.namespace.clone(), request_id.clone());
                    let since = self.parts.clock.now() - store::REQUEST_ID_TTL;
                    let known = self.parts.db.read(move |tx| {
                        Box::pin(async move {
                            store::find_requests(tx, &[(key.0.as_str(), key.1.as_str())]).await
                        })
                    });
                    let counts = known.await?.iter().any(|known| known.create_time >= since);
                    if counts { Ok(None) } else { Err(error) }
                }
                None => Err(error),
            },
        }
    }

    async fn admit_new(&self, ready: &Ready) -> Result<Admission> {
        let Ready { new, inputs, require_on_time } = ready;
        self.parts.db.check_admission()?;
        if *require_on_time {
            self.check_on_time(new)?;
        }
        if let Some(id) = new.id {
            self.artifacts.refer(&new.namespace, id, inputs.clone()).await?;
        }
        let queue = &self.parts.queue;
        let asked = Asked {
            task: new.id.unwrap_or(TaskId::MAX),
            namespace: new.namespace.clone(),
            model: new.spec.model.clone(),
            priority: new.spec.priority,
        };
        let admission = queue.admit(asked).await?;
        if let Some(victim) = admission.evict() {
            let evict = Event::Evict { policy_label: "drop_lru".to_owned() };
            match self.ledger.apply(victim, evict).await {
                // It left the queue by itself meanwhile.
                Err(error) if error.reason() != Reason::StateConflict => return Err(error),
                _ => {}
            }
        }
        Ok(admission)
    }

    fn check_on_time(&self, new: &NewTask) -> Result<()> {
        let now = self.parts.clock.now();
        let prospect = ledger::prospect(new, now);
        let estimate = self.parts.queue.estimate(&queue_entry(&prospect));
        let late_start = match (estimate.predicted_start, new.spec.start_timeout) {
            (Some(start), Some(limit)) => start > limit,
            _ => false,
        };
        let late_end = estimate.on_time_probability.is_some_and(|probability| probability < 0.5);
        if !late_start && !late_end {
            return Ok(());
        }
        let predicted = estimate.predicted_start.unwrap_or_default().as_millis();
        let error = Error::new(
            Kind::FailedPrecondition,
            Reason::DeadlineUnmet,
            format!("the task would start in about {predicted} ms and not be done in time"),
        )
        .with("predicted_start_ms", predicted);
        Err(match new.spec.deadline {
            Some(deadline) => error.with("deadline_ms", deadline.since(now).as_millis()),
            None => error,
        })
    }

    fn submitted(&self, task: &Task) -> pb::SubmitTaskResponse {
        let estimate = match task.state {
            State::Queued => Some(self.parts.queue.estimate(&queue_entry(task))),
            State::Running => Some(self.parts.queue.estimate_started(&queue_entry(task))),
            _ => None,
        };
        let predicted = estimate.as_ref().and_then(|estimate| estimate.predicted_start);
        pb::SubmitTaskResponse {
            task: Some(convert::task(task, View::Basic, Vec::new())),
            queue_position: estimate.as_ref().map_or(0, |estimate| estimate.position),
            predicted_start_ms: predicted.map(|start| start.as_millis() as u64),
            on_time_probability: estimate.and_then(|estimate| estimate.on_time_probability),
        }
    }
}
