//! Where a task stands at this moment.

use std::time::Duration;

use tonic::Status;

use super::wire::InProcess;
use crate::pb::{self, TaskState, task_event::Body};

/// A look takes no longer than this.
const SETTLE: Duration = Duration::from_secs(2);

/// Where a task stands.
#[derive(Debug, Default)]
pub struct Standing {
    /// The task.
    pub task: pb::Task,
    /// Place in the queue from 1; 0 when it is not there.
    pub position: u64,
    /// Its log lines and stages so far, where they were asked for.
    pub lines: Vec<pb::TaskEvent>,
}

/// Whether a task has ended.
pub fn has_ended(task: &pb::Task) -> bool {
    !matches!(task.state(), TaskState::Queued | TaskState::Running)
}

/// Where the task stands now.
pub async fn now(client: &InProcess, task: pb::Task, with_lines: bool) -> Result<Standing, Status> {
    if !with_lines && task.state() != TaskState::Queued {
        return Ok(Standing { task, ..Standing::default() });
    }
    let mut look = match tokio::time::timeout(SETTLE, look(client, &task, with_lines)).await {
        Ok(look) => look?,
        // What is known is an answer too.
        Err(_) => Look { state: Some(task.state()), ..Look::default() },
    };
    let mut task = task;
    if let Some(state) = look.state {
        task.set_state(state);
    } else {
        let request = pb::GetTaskRequest { task_id: task.task_id };
        task = client.tasks().get_task(request).await?.into_inner();
        look.position = 0;
    }
    Ok(Standing { task, position: look.position, lines: look.lines })
}

/// What a task's stream says up to now.
#[derive(Default)]
struct Look {
    /// State; `None` when it has ended since.
    state: Option<TaskState>,
    position: u64,
    lines: Vec<pb::TaskEvent>,
}

async fn look(client: &InProcess, task: &pb::Task, with_lines: bool) -> Result<Look, Status> {
    let ended = has_ended(task);
    // The last entry says where it stands; lines are anywhere before it.
    let from_sequence = if with_lines { 1 } else { task.last_sequence.max(1) };
    let request = pb::StreamTaskRequest {
        task_id: task.task_id.clone(),
        from_sequence,
        include_metrics: !ended,
        ..Default::default()
    };
    let mut look = Look { state: Some(task.state()), ..Look::default() };
    let mut events = client.tasks().stream_task(request).await?.into_inner();
    let mut seen = 0;
    while let Some(event) = events.message().await? {
        seen = event.sequence.max(seen);
        match &event.body {
            Some(Body::Queued(_)) => look.state = Some(TaskState::Queued),
            Some(Body::AttemptStarted(_)) => look.state = Some(TaskState::Running),
            Some(Body::Metrics(metrics)) => {
                look.position = metrics.queue_position;
                // They come when nothing else is at hand, which may be storage on its way.
                if seen >= task.last_sequence {
                    return Ok(look);
                }
            }
            Some(Body::Ended(_)) => look.state = ended.then(|| task.state()),
            Some(Body::Log(_) | Body::Stage(_)) if with_lines => look.lines.push(event),
            _ => {}
        }
    }
    Ok(look)
}
