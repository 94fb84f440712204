//! Room in the queues, over all servers: counted in Redis where it changes, and asked for before
//! the commit.

use std::{sync::Arc, time::Duration};

use super::convert;
use crate::{
    error::Result,
    id::TaskId,
    queue::{Admit, Asked, Full, FullPolicy, Limits},
    redis::{Promise, Redis, Room, Work},
};

/// How long room is kept for a task whose commit is on its way.
const KEEP: Duration = Duration::from_mins(1);

/// How long a submit waits for Redis to say whether there is room. After that it is accepted: what
/// is in the database counts, and a limit is missed rather than a task.
const WAIT: Duration = Duration::from_millis(500);

/// Asks Redis for room.
pub(super) fn by(redis: &Redis, limits: Limits) -> Arc<Admit> {
    let (redis, work, limits) = (redis.clone(), redis.work(), Arc::new(limits));
    Arc::new(move |asked| {
        let (redis, work, limits) = (redis.clone(), work.clone(), limits.clone());
        Box::pin(async move {
            if !redis.health().borrow().is_up() {
                return Ok(None);
            }
            let asking = reserve(&work, &limits, &asked);
            tokio::time::timeout(WAIT, asking).await.unwrap_or_else(|_| {
                tracing::warn!("Redis did not say whether there is room; accepting");
                Ok(None)
            })
        })
    })
}

async fn reserve(work: &Work, limits: &Limits, asked: &Asked) -> Result<Option<TaskId>> {
    let Asked { task, namespace, model, priority } = asked;
    let lane = convert::plain_lane(namespace, model, *priority)?;
    let promise = Promise {
        lane: &lane,
        id: &task.to_string(),
        limit: limits.max_per_model,
        group_limit: limits.max_per_namespace,
        evict: match limits.when_full {
            FullPolicy::Reject => None,
            FullPolicy::DropOldest => Some(lane.band()),
        },
    };
    let room = match work.reserve(&[promise], KEEP).await {
        Ok(rooms) => rooms.into_iter().next(),
        Err(error) => {
            tracing::warn!(%error, "Redis did not say whether there is room; accepting");
            None
        }
    };
    match room {
        None => Ok(None),
        // What cannot be read names no task that could be ended; it is out of the queue.
        Some(Room::Promised { evicted }) => Ok(evicted.and_then(|id| id.parse().ok())),
        Some(Room::AccountFull(depth)) => {
            Err(Full::Model(model).error(limits.max_per_model, depth))
        }
        Some(Room::GroupFull(depth)) => {
            Err(Full::Namespace(namespace).error(limits.max_per_namespace, depth))
        }
    }
}
