//! `QueueService`.

use std::{sync::Arc, time::Duration};

use tokio::sync::Mutex;
use tonic::{Request, Response, Status};

use super::{convert, store};
use crate::{
    clock::Clock,
    db::{Db, page},
    error::Error,
    grpc::auth,
    id::Namespace,
    keys::{Principal, Scope},
    pb,
    queue::{Pause, Queue},
};

/// How late a pause that another server wrote is seen here, at most.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

/// The service over the queue.
#[derive(Clone)]
pub struct Service {
    db: Db,
    queue: Queue,
    clock: Clock,
    /// Held from the write to the kernel's hearing of it, so that both see pauses in one order.
    order: Arc<Mutex<()>>,
}

impl Service {
    /// The service.
    pub fn new(db: Db, queue: Queue, clock: Clock) -> Self {
        Self { db, queue, clock, order: Arc::default() }
    }

    /// Follows the pauses that other servers on the same database write, for ever.
    pub async fn follow(self) -> anyhow::Result<()> {
        loop {
            self.clock.sleep(FOLLOW_EVERY).await;
            if let Err(error) = self.follow_once().await {
                tracing::debug!(%error, "pauses were not read");
            }
        }
    }

    /// Takes over the pauses that are in the database.
    pub async fn follow_once(&self) -> Result<(), Error> {
        let _order = self.order.lock().await;
        let rows = self.db.read(|tx| Box::pin(async move { store::list(tx).await })).await?;
        let mut before = self.queue.pauses();
        for store::Paused { namespace, model, pause } in rows {
            let same = |paused: &(Namespace, String, Pause)| {
                (&paused.0, &paused.1, &paused.2) == (&namespace, &model, &pause)
            };
            if !before.iter().any(same) {
                self.queue.set_paused(&namespace, &model, Some(pause));
            }
            before.retain(|(other, name, _)| (other, name) != (&namespace, &model));
        }
        for (namespace, model, _) in before {
            self.queue.set_paused(&namespace, &model, None);
        }
        Ok(())
    }

    async fn set_paused(
        &self,
        caller: &Principal,
        model: &str,
        pause: Option<Pause>,
    ) -> Result<pb::Queue, Error> {
        let order = self.order.lock().await;
        let (key, row) = ((caller.namespace.clone(), model.to_owned()), pause.clone());
        let written = self.db.write(move |tx| {
            Box::pin(async move {
                let (namespace, model) = &key;
                match &row {
                    Some(pause) => store::put(tx, namespace, model, pause).await,
                    None => store::delete(tx, namespace, model).await,
                }
            })
        });
        written.await?;
        let paused = pause.is_some();
        self.queue.set_paused(&caller.namespace, model, pause);
        drop(order);
        tracing::info!(target: "baton::audit", by = caller.name, namespace = %caller.namespace, model, paused, "queue set");
        Ok(self.get(&caller.namespace, model))
    }

    fn get(&self, namespace: &Namespace, model: &str) -> pb::Queue {
        convert::queue(self.queue.stats(namespace, model))
    }
}

#[tonic::async_trait]
impl pb::server::queue_service_server::QueueService for Service {
    async fn list_queues(
        &self,
        request: Request<pb::ListQueuesRequest>,
    ) -> Result<Response<pb::ListQueuesResponse>, Status> {
        let caller = auth::principal(&request)?;
        let request = request.into_inner();
        let size = page::size(request.page_size, 100, 1_000)? as usize;
        let filter = ("queues", &caller.namespace);
        let after = page::cursor(&filter, &request.page_token)?.unwrap_or_default();
        let mut queues = self.queue.list(&caller.namespace);
        queues.retain(|queue| queue.model > after);
        let next_page_token = match queues.get(size.wrapping_sub(1)) {
            Some(last) if queues.len() > size => page::token(&filter, &last.model),
            _ => String::new(),
        };
        queues.truncate(size);
        let queues = queues.into_iter().map(convert::queue).collect();
        Ok(Response::new(pb::ListQueuesResponse { queues, next_page_token }))
    }

    async fn get_queue(
        &self,
        request: Request<pb::GetQueueRequest>,
    ) -> Result<Response<pb::Queue>, Status> {
        let caller = auth::principal(&request)?;
        let request = request.into_inner();
        let model = convert::model(&request.model)?;
        Ok(Response::new(self.get(&caller.namespace, model)))
    }

    async fn pause_queue(
        &self,
        request: Request<pb::PauseQueueRequest>,
    ) -> Result<Response<pb::Queue>, Status> {
        let caller = auth::principal(&request)?;
        caller.require(Scope::Admin)?;
        let request = request.into_inner();
        let model = convert::model(&request.model)?;
        let reason = convert::reason(request.reason)?;
        let pause = Pause { by: caller.name.clone(), reason, time: self.clock.now() };
        Ok(Response::new(self.set_paused(&caller, model, Some(pause)).await?))
    }

    async fn resume_queue(
        &self,
        request: Request<pb::ResumeQueueRequest>,
    ) -> Result<Response<pb::Queue>, Status> {
        let caller = auth::principal(&request)?;
        caller.require(Scope::Admin)?;
        let request = request.into_inner();
        let model = convert::model(&request.model)?;
        Ok(Response::new(self.set_paused(&caller, model, None).await?))
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::{pb::server::queue_service_server::QueueService as _, queue::Limits};

    fn asked<T>(message: T, scopes: &[Scope]) -> Request<T> {
        let mut request = Request::new(message);
        let scopes = scopes.iter().copied().collect();
        request.extensions_mut().insert(Principal { scopes, ..Principal::local() });
        request
    }

    fn pause(model: &str) -> Request<pb::PauseQueueRequest> {
        let model = model.to_owned();
        asked(pb::PauseQueueRequest { model, reason: "upgrade".into() }, &[Scope::Admin])
    }

    async fn service(dir: &tempfile::TempDir) -> Service {
        let clock = Clock::manual();
        let db = crate::db::testing::open(dir.path()).await;
        let queue = Queue::new(Limits::default(), clock.clone());
        super::super::load(&db, &queue).await.unwrap();
        Service::new(db, queue, clock)
    }

    #[tokio::test]
    async fn a_pause_outlives_the_server_until_it_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let first = service(&dir).await;
        let paused = first.pause_queue(pause("a/m")).await.unwrap().into_inner();
        assert_eq!(paused.pause.unwrap().paused_by, "local");
        first.pause_queue(pause("a/m")).await.unwrap();
        first.db.close().await;

        let second = service(&dir).await;
        let get = || asked(pb::GetQueueRequest { model: "a/m".into() }, &[Scope::TasksRead]);
        let found = second.get_queue(get()).await.unwrap().into_inner();
        assert_eq!(found.pause.unwrap().reason, "upgrade");
        let resume = || asked(pb::ResumeQueueRequest { model: "a/m".into() }, &[Scope::Admin]);
        assert_eq!(second.resume_queue(resume()).await.unwrap().into_inner().pause, None);
        assert_eq!(second.resume_queue(resume()).await.unwrap().into_inner().pause, None);
        second.db.close().await;

        let third = service(&dir).await;
        assert_eq!(third.get_queue(get()).await.unwrap().into_inner().pause, None);
    }

    #[tokio::test]
    async fn a_pause_and_its_end_are_seen_by_another_server() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (service(&dir).await, service(&dir).await);
        one.pause_queue(pause("a/m")).await.unwrap();
        one.pause_queue(pause("b/m")).await.unwrap();
        assert_eq!(other.queue.pauses(), []);
        other.follow_once().await.unwrap();
        assert_eq!(other.queue.pauses().len(), 2);
        let resume = asked(pb::ResumeQueueRequest { model: "a/m".into() }, &[Scope::Admin]);
        other.resume_queue(resume).await.unwrap();
        one.follow_once().await.unwrap();
        let left: Vec<_> = one.queue.pauses().into_iter().map(|(_, model, _)| model).collect();
        assert_eq!(left, ["b/m"]);
    }

    #[tokio::test]
    async fn only_an_admin_pauses_and_only_a_model() {
        let dir = tempfile::tempdir().unwrap();
        let service = service(&dir).await;
        let message = pb::PauseQueueRequest { model: "a/m".into(), reason: String::new() };
        let refused = service.pause_queue(asked(message, &[Scope::TasksWrite])).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        let refused = service.pause_queue(pause("a/m@1")).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }

    #[tokio::test]
    async fn pages_of_queues_come_by_name_and_end() {
        let dir = tempfile::tempdir().unwrap();
        let service = service(&dir).await;
        for model in ["b/m", "a/m", "c/m"] {
            service.pause_queue(pause(model)).await.unwrap();
        }
        let mut models = Vec::new();
        let mut page_token = String::new();
        loop {
            let message = pb::ListQueuesRequest { page_size: 1, page_token };
            let page = service.list_queues(asked(message, &[Scope::TasksRead])).await.unwrap();
            let page = page.into_inner();
            models.extend(page.queues.into_iter().map(|queue| queue.model));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(models, ["a/m", "b/m", "c/m"]);
    }
}
