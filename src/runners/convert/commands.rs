//! Commands between wire and model, and runners as operators see them.

use std::time::Duration;

use prost::Message as _;
use prost_types::Struct;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{MAX_TEXT, cut, duration, from_duration};
use crate::{
    error::{Error, Kind, Reason, Result, Violation},
    events::frame::timestamp,
    grpc::status::{error_reason, to_rpc_status},
    json, pb,
    queue::SupplyState,
    runners::{
        commands::{Action, Busy, Progress, Refusal, Stage},
        operate::{Order, Seen, SeenCommand},
    },
    tasks::convert::request::model_filter,
};

/// Time for attempts in the way of a command, and for a drain, where none is given.
const DEADLINE: Duration = Duration::from_mins(5);
/// Longest request id, in characters.
const MAX_REQUEST_ID: usize = 128;
/// Most malformed fields of a runner's refusal.
const MAX_VIOLATIONS: usize = 16;

fn order(runner_id: String, request_id: String, action: Action) -> Result<Order> {
    if request_id.chars().count() > MAX_REQUEST_ID {
        let what = format!("must have at most {MAX_REQUEST_ID} characters");
        return Err(Error::invalid("request_id", what));
    }
    Ok(Order { runner: runner_id.into(), request_id, action })
}

/// An order to drain.
pub fn drain(request: pb::DrainRunnerRequest) -> Result<Order> {
    let deadline = match request.deadline {
        None => DEADLINE,
        given => from_duration("deadline", given)?,
    };
    let (hand_back, exit) = (request.hand_back, request.exit);
    order(request.runner_id, request.request_id, Action::Drain { deadline, hand_back, exit })
}

/// An order to pause.
pub fn pause(request: pb::PauseRunnerRequest) -> Result<Order> {
    order(request.runner_id, request.request_id, Action::Pause)
}

/// An order to take work again.
pub fn resume(request: pb::ResumeRunnerRequest) -> Result<Order> {
    order(request.runner_id, request.request_id, Action::Resume)
}

/// An order to load or unload a model.
pub fn apply(request: pb::ApplyModelRequest) -> Result<Order> {
    let loaded = match request.state() {
        pb::apply::State::Loaded => true,
        pb::apply::State::Unloaded => false,
        pb::apply::State::Unspecified => {
            return Err(Error::invalid("state", "must be STATE_LOADED or STATE_UNLOADED"));
        }
    };
    if request.model.is_empty() {
        return Err(Error::invalid("model", "must name a model, or `*`"));
    }
    let action = Action::Apply {
        model: model(request.model)?,
        loaded,
        options: object("options", request.options)?,
        busy: busy(request.when_busy)?,
    };
    order(request.runner_id, request.request_id, action)
}

/// An order to load anew.
pub fn reload(request: pb::ReloadRunnerRequest) -> Result<Order> {
    let (model, busy) = (model(request.model)?, busy(request.when_busy)?);
    order(request.runner_id, request.request_id, Action::Reload { model, busy })
}

/// An order to set parameters.
pub fn tune(request: pb::TuneRunnerRequest) -> Result<Order> {
    let params = object("params", request.params)?;
    if params.fields.is_empty() {
        return Err(Error::invalid("params", "must name a parameter"));
    }
    order(request.runner_id, request.request_id, Action::Tune { params })
}

fn model(text: String) -> Result<String> {
    if text != "*" {
        model_filter("model", &text)?;
    }
    Ok(text)
}

fn object(field: &str, value: Option<Struct>) -> Result<Struct> {
    let value = value.unwrap_or_default();
    if !json::depth_is_fine(&value) {
        let what = format!("must nest no deeper than {} levels", json::MAX_DEPTH);
        return Err(Error::invalid(field, what));
    }
    Ok(value)
}

fn busy(when: Option<pb::WhenBusy>) -> Result<Busy> {
    use pb::when_busy::Policy;
    let when = when.unwrap_or_default();
    let given = when.deadline.is_some();
    match when.policy() {
        Policy::Unspecified | Policy::Wait if given => {
            Ok(Busy::Wait(from_duration("when_busy.deadline", when.deadline)?))
        }
        Policy::Unspecified | Policy::Wait => Ok(Busy::Wait(DEADLINE)),
        Policy::Refuse | Policy::HandBack if given => {
            Err(Error::invalid("when_busy.deadline", "belongs to POLICY_WAIT"))
        }
        Policy::Refuse => Ok(Busy::Refuse),
        Policy::HandBack => Ok(Busy::HandBack),
    }
}

/// A command as the runner gets it.
pub fn command(id: &str, action: &Action) -> pb::Command {
    use pb::command::Action as Wire;
    let action = match action {
        Action::Drain { deadline, hand_back, exit } => Wire::Drain(pb::Drain {
            deadline: Some(duration(*deadline)),
            hand_back: *hand_back,
            exit: *exit,
        }),
        Action::Pause => Wire::Pause(pb::Pause { paused: true }),
        Action::Resume => Wire::Pause(pb::Pause { paused: false }),
        Action::Apply { model, loaded, options, busy } => {
            let state = if *loaded { pb::apply::State::Loaded } else { pb::apply::State::Unloaded };
            Wire::Apply(pb::Apply {
                model: model.clone(),
                state: state.into(),
                options: Some(options.clone()),
                when_busy: Some(when_busy(*busy)),
            })
        }
        Action::Reload { model, busy } => {
            Wire::Reload(pb::Reload { model: model.clone(), when_busy: Some(when_busy(*busy)) })
        }
        Action::Tune { params } => Wire::Tune(pb::Tune { params: Some(params.clone()) }),
    };
    pb::Command { command_id: id.to_owned(), action: Some(action) }
}

fn when_busy(busy: Busy) -> pb::WhenBusy {
    use pb::when_busy::Policy;
    let (policy, deadline) = match busy {
        Busy::Wait(deadline) => (Policy::Wait, Some(duration(deadline))),
        Busy::Refuse => (Policy::Refuse, None),
        Busy::HandBack => (Policy::HandBack, None),
    };
    pb::WhenBusy { policy: policy.into(), deadline }
}

/// How much of a command is done, as the runner says.
pub fn progress(progress: pb::CommandProgress) -> Progress {
    let pb::CommandProgress { command_id: _, done, total, detail } = progress;
    Progress { done, total, detail: cut(detail, MAX_TEXT) }
}

/// Why a command failed, as the runner says; `None` when it did not.
pub fn refusal(status: Option<pb::google::rpc::Status>) -> Option<Refusal> {
    let status = status.filter(|status| status.code != 0)?;
    let details = status.encode_to_vec().into();
    let code = Code::from_i32(status.code);
    let told = Status::with_details(code, status.message.as_str(), details);
    let kind = match code {
        Code::InvalidArgument => Kind::InvalidArgument,
        Code::NotFound => Kind::NotFound,
        Code::Aborted => Kind::Aborted,
        Code::ResourceExhausted => Kind::ResourceExhausted,
        Code::Unavailable => Kind::Unavailable,
        Code::Unimplemented => Kind::Unimplemented,
        // The rest are words for a state in which it cannot be done.
        _ => Kind::FailedPrecondition,
    };
    let known = error_reason(&told)
        .and_then(|(name, _)| Reason::from_str_name(&format!("ERROR_REASON_{name}")))
        .filter(|reason| *reason != Reason::Unspecified);
    let bad = told.get_details_bad_request().filter(|_| kind == Kind::InvalidArgument);
    let violations = bad.into_iter().flat_map(|bad| bad.field_violations).take(MAX_VIOLATIONS);
    let violations = violations.map(|violation| Violation {
        field: cut(violation.field, MAX_TEXT),
        description: cut(violation.description, MAX_TEXT),
    });
    Some(Refusal {
        kind,
        reason: known.unwrap_or(Reason::EngineError),
        message: cut(status.message, MAX_TEXT),
        violations: violations.collect(),
    })
}

/// What became of an order, as an encoded status.
pub fn answer(outcome: &Result<()>) -> Vec<u8> {
    match outcome {
        Ok(()) => pb::google::rpc::Status::default().encode_to_vec(),
        Err(error) => to_rpc_status(error).encode_to_vec(),
    }
}

/// A runner as operators see it.
pub fn runner(seen: &Seen) -> pb::Runner {
    let state = match (seen.connected, seen.mode) {
        (false, _) => pb::runner::State::Disconnected,
        (true, SupplyState::Ready) => pb::runner::State::Ready,
        (true, SupplyState::Draining) => pb::runner::State::Draining,
        (true, SupplyState::Paused) => pb::runner::State::Paused,
    };
    let attempts = seen.attempts.iter().map(|(fence, start)| pb::RunningAttempt {
        task_id: fence.task.to_string(),
        attempt: fence.attempt,
        start_time: Some(timestamp(*start)),
    });
    let stopping = seen.stopping.iter().map(|(fence, told)| pb::StoppingAttempt {
        task_id: fence.task.to_string(),
        attempt: fence.attempt,
        cancel_time: Some(timestamp(told.time)),
        acknowledged: told.acked.is_some(),
        overdue: told.overdue,
    });
    let profile = &seen.profile;
    pb::Runner {
        runner_id: profile.runner.to_string(),
        state: state.into(),
        node: Some(profile.node.clone()),
        slots: profile.slots,
        free_slots: seen.free_slots,
        models: profile.models.clone(),
        labels: profile.labels.clone().into_iter().collect(),
        pools: profile.pools.clone(),
        engine: profile.engine.clone(),
        engine_version: profile.engine_version.clone(),
        agent_version: profile.agent_version.clone(),
        connect_time: Some(timestamp(seen.connect_time)),
        last_heartbeat_time: Some(timestamp(seen.heartbeat_time)),
        attempts: attempts.collect(),
        reconnects: seen.n_reconnects,
        commands: seen.commands.iter().map(runner_command).collect(),
        stopping: stopping.collect(),
        features: profile.features.clone(),
        engine_params: Some(profile.engine_params.clone()),
        load: seen.load,
    }
}

fn runner_command(seen: &SeenCommand) -> pb::RunnerCommand {
    use pb::runner_command::State;
    let (state, error) = match &seen.stage {
        Stage::Sent => (State::Sent, None),
        Stage::Accepted => (State::Accepted, None),
        Stage::Done => (State::Done, None),
        Stage::Failed(refusal) => (State::Failed, Some(to_rpc_status(&refusal.error()))),
    };
    pb::RunnerCommand {
        command_id: seen.id.clone(),
        request_id: seen.request_id.clone(),
        action: seen.action.name().to_owned(),
        model: seen.action.model().to_owned(),
        state: state.into(),
        done: seen.progress.done,
        total: seen.progress.total,
        detail: seen.progress.detail.clone(),
        create_time: Some(timestamp(seen.create_time)),
        end_time: seen.end_time.map(timestamp),
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_comes_through_with_its_reason_and_fields() {
        let error = Error::invalid("params.topk", "is unknown");
        let told = refusal(Some(to_rpc_status(&error))).unwrap();
        assert_eq!((told.kind, told.reason), (Kind::InvalidArgument, Reason::InvalidParams));
        assert_eq!(told.error().violations(), error.violations());
        assert_eq!(told.error().message(), error.message());
        assert!(refusal(Some(pb::google::rpc::Status::default())).is_none());
    }

    #[test]
    fn an_error_without_details_is_the_engines() {
        let status = pb::google::rpc::Status { code: 13, message: "oh".into(), details: vec![] };
        let told = refusal(Some(status)).unwrap();
        assert_eq!((told.kind, told.reason), (Kind::FailedPrecondition, Reason::EngineError));
    }

    #[test]
    fn a_deadline_belongs_to_waiting() {
        let when = |policy, seconds: Option<i64>| {
            let deadline = seconds.map(|seconds| prost_types::Duration { seconds, nanos: 0 });
            busy(Some(pb::WhenBusy { policy, deadline }))
        };
        assert_eq!(busy(None).unwrap(), Busy::Wait(DEADLINE));
        assert_eq!(when(1, Some(2)).unwrap(), Busy::Wait(Duration::from_secs(2)));
        assert_eq!(when(2, None).unwrap(), Busy::Refuse);
        assert!(when(3, Some(2)).is_err());
        assert!(when(1, Some(-2)).is_err());
    }
}
