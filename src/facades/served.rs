//! Whether anybody would run a task.

use tonic::{Code, Status};

use super::wire::InProcess;
use crate::pb;

/// Whether a model is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// A runner serves it, or it has tasks, which wait for a runner that comes back.
    Yes,
    /// No connected runner serves it, and nothing waits for one either.
    No,
    /// It is no name of a model.
    Never,
}

/// Looks whether a model is there, for calls that wait for a result: who mistypes a name is to be
/// told, and not to wait for ever.
pub async fn check(client: &InProcess, model: &str) -> Result<Served, Status> {
    let name = model.split('@').next().unwrap_or_default().to_owned();
    let queue = match client.queues().get_queue(pb::GetQueueRequest { model: name }).await {
        Ok(queue) => queue.into_inner(),
        // Who may run tasks need not be allowed to see queues.
        Err(status) if status.code() == Code::PermissionDenied => return Ok(Served::Yes),
        Err(status) if status.code() == Code::InvalidArgument => return Ok(Served::Never),
        Err(status) => return Err(status),
    };
    let used = queue.depth + queue.delayed + queue.running > 0 || queue.start_rate > 0.0;
    let served = queue.slots > 0 || used || queue.pause.is_some();
    Ok(if served { Served::Yes } else { Served::No })
}
