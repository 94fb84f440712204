//! A bucket that is away for a while costs time, and no attempt.

use std::{fs, sync::Arc};

use baton::{
    client::{Client, Progress},
    pb::{self, TaskState},
};

use super::{
    download, noise, put, sha256, spec,
    work::{MODEL, task},
};
use crate::harness::{
    SOON,
    bucket::Bucket,
    eventually,
    proxy::Proxy,
    server::{FAST, Process, Server},
    within,
};

/// Connections that are refused to no single call: by then, it was made again.
const TRIED_AGAIN: u64 = 7;

/// A server whose bucket is behind a link, and its runner.
struct World {
    server: Server,
    link: Proxy,
    _agent: Process,
    _bucket: Bucket,
}

impl World {
    async fn new() -> Self {
        let bucket = Bucket::start().await;
        let link = Proxy::to(bucket.server.addr).await;
        let mut server = Server::stopped(FAST);
        for (name, value) in bucket.env() {
            server.set_env(&name, &value);
        }
        server.set_env("BATON_ARTIFACTS_ENDPOINT", &format!("http://{}", link.addr));
        server.restart().await;
        let agent = server.agent("r1", server.addr, MODEL, 1);
        Self { server, link, _agent: agent, _bucket: bucket }
    }

    /// The bucket goes away.
    fn cut(&self) {
        self.link.set(|link| link.refusing = true);
        self.link.cut();
    }

    /// Waits until whoever wants the bucket has tried again, unless `ended` says that it gave up.
    async fn tried_again<F: Future<Output = bool>>(&self, mut ended: impl FnMut() -> F) {
        let before = self.link.refused();
        eventually("more tries", 3 * SOON, || {
            let ended = ended();
            async {
                assert!(!ended.await, "it gave up");
                (self.link.refused() - before >= TRIED_AGAIN).then_some(())
            }
        })
        .await;
    }

    /// Waits until the only attempt of a task has tried again.
    async fn attempt_tried_again(&self, id: &str) {
        let api = self.server.api();
        self.tried_again(async || {
            let state = api.get(id).await.state();
            !matches!(state, TaskState::Queued | TaskState::Running)
        })
        .await;
    }
}

fn once(spec: pb::TaskSpec) -> pb::TaskSpec {
    let retry = pb::RetryPolicy { max_attempts: 1, ..pb::RetryPolicy::default() };
    pb::TaskSpec { retry: Some(retry), ..spec }
}

#[tokio::test]
async fn an_attempt_goes_on_reading_and_saving_while_the_bucket_is_away() {
    let world = World::new().await;
    let api = world.server.api();
    let said = "to be or not to be";
    let input = put(&api, spec("input.txt"), said.as_bytes()).await.expect("an artifact");
    world.cut();
    let id = api.submit(once(task(&input.artifact_id))).await.task_id;
    world.attempt_tried_again(&id).await;
    world.link.heal();
    let ended = api.wait_for(&id, &[TaskState::Succeeded, TaskState::Failed], 3 * SOON).await;
    assert_eq!((ended.state(), ended.attempt), (TaskState::Succeeded, 1), "{:?}", ended.error);

    // One that reads nothing begins to save at once.
    let mut writer = once(crate::harness::spec(MODEL));
    writer.params = Some(crate::harness::object(&[("save_as", "said.txt")]));
    world.cut();
    let id = api.submit(writer.clone()).await.task_id;
    world.attempt_tried_again(&id).await;
    world.link.heal();
    let ended = api.wait_for(&id, &[TaskState::Succeeded, TaskState::Failed], 3 * SOON).await;
    assert_eq!((ended.state(), ended.attempt), (TaskState::Succeeded, 1), "{:?}", ended.error);
    let get = pb::GetArtifactRequest { artifact_id: ended.artifacts[0].artifact_id.clone() };
    let made = api.artifacts().get_artifact(get).await.expect("an artifact").into_inner();
    assert_eq!(download(&api, &made).await.expect("its bytes"), b"hello");

    // A cancel ends the tries with the attempt, and frees its place.
    world.cut();
    let id = api.submit(writer).await.task_id;
    world.attempt_tried_again(&id).await;
    let canceled = api.cancel(&id).await.expect("the cancel");
    assert_eq!(canceled.state(), TaskState::Cancelled);
    let next = api.submit(crate::harness::spec(MODEL)).await.task_id;
    api.wait_for(&next, &[TaskState::Succeeded], SOON).await;
}

#[tokio::test]
async fn a_file_is_put_and_got_while_the_bucket_is_away() {
    let world = World::new().await;
    let client = Client::connect(&world.server.addr.to_string(), None).await.expect("a client");
    let dir = tempfile::tempdir().expect("a directory");
    let (from, to) = (dir.path().join("from.bin"), dir.path().join("to.bin"));
    let bytes = noise(3_000_000, 1);
    fs::write(&from, &bytes).expect("a file");
    let unheard = || Arc::new(|_: Progress| {});

    world.cut();
    let (putter, path) = (client.clone(), from.clone());
    let putting = tokio::spawn(async move { putter.put_file(&path, spec("a"), unheard()).await });
    world.tried_again(async || putting.is_finished()).await;
    world.link.heal();
    let made = within("the upload", 3 * SOON, putting).await.expect("no panic");
    let made = made.expect("an artifact");
    assert_eq!(made.sha256, sha256(&bytes));

    world.cut();
    let (path, artifact) = (to.clone(), made.clone());
    let getting = tokio::spawn(async move { client.get_file(&artifact, &path, unheard()).await });
    world.tried_again(async || getting.is_finished()).await;
    world.link.heal();
    within("the download", 3 * SOON, getting).await.expect("no panic").expect("the file");
    assert_eq!(sha256(&fs::read(&to).expect("a file")), made.sha256);
}
