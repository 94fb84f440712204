//! Queues as people see them: listed, paused, resumed.
//!
//! What waits is in the `queue` kernel; durable here are the pauses only. A pause is written
//! first and told to the kernel after the commit; [`load`] tells it all of them at start.

mod convert;
mod service;
mod store;

pub use self::{service::Service, store::STATEMENTS};
use crate::{db::Db, error::Result, queue::Queue};

/// Tells the queue which of its parts are paused. Before it hears of any task.
pub async fn load(db: &Db, queue: &Queue) -> Result<()> {
    let pauses = db.read(|tx| Box::pin(async move { store::list(tx).await })).await?;
    for store::Paused { namespace, model, pause } in pauses {
        queue.set_paused(&namespace, &model, Some(pause));
    }
    Ok(())
}
