//! JSON of an event is made once, whoever reads it and in whatever form.

use baton::pb::TaskState;
use reqwest::{Client, Response};
use serde_json::{Value, json};

use crate::{
    gateway::{at, clients, get, submit},
    harness::{SOON, local::Local, runner::Runner, within},
};

/// A stream and what came of it.
struct Reader {
    response: Response,
    text: String,
}

impl Reader {
    /// A stream that has the first events of `tasks`, which lie in storage.
    async fn new(response: Response, tasks: usize) -> Self {
        let mut reader = Self { response, text: String::new() };
        reader.until(|text| text.matches("\"queued\"").count() == tasks).await;
        reader
    }

    /// Reads until what came is enough, or to the end.
    async fn until(&mut self, enough: impl Fn(&str) -> bool) {
        while !enough(&self.text) {
            let chunk = within("a chunk", SOON, self.response.chunk()).await.expect("sound");
            let Some(chunk) = chunk else { return };
            self.text.push_str(std::str::from_utf8(&chunk).expect("UTF-8, whole in each chunk"));
        }
    }

    /// The events, whatever form they came in.
    fn events(&self) -> Vec<Value> {
        if self.text.starts_with('[') {
            return serde_json::from_str(&self.text).expect("an array");
        }
        let lines = self.text.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line));
        let json = lines.filter(|line| line.starts_with('{'));
        json.map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

#[tokio::test]
async fn an_event_is_made_json_once_for_all_its_readers() {
    const TOKENS: u64 = 20;
    let server = Local::start(&[]).await;
    let (addr, api, encoded) = (server.addr, server.api(), &server.app().metrics.json_answers);
    let client = Client::new();
    let (id, other) = (submit(&client, addr).await, submit(&client, addr).await);
    let (mut plain, mut tagged) = (Vec::new(), Vec::new());
    for client in clients() {
        for accept in ["text/event-stream", "application/x-ndjson", "application/json"] {
            let url = at(addr, &format!("/v1/tasks/{id}/stream"));
            plain.push(Reader::new(get(&client, url, &[("accept", accept)]).await, 1).await);
            let both = json!({"taskId": id, "others": [{"taskId": other}]});
            let both = client.post(at(addr, "/v1/tasks:stream")).json(&both);
            let both = within("a stream", SOON, both.header("accept", accept).send());
            tagged.push(Reader::new(both.await.expect("an answer"), 2).await);
        }
    }
    let before = encoded.get();
    let mut runner = Runner::connect(&api, "r1", &["test/echo"], 1).await;
    runner.serve_one(TOKENS).await;

    for reader in &mut plain {
        reader.until(|_| false).await;
    }
    assert_eq!(plain[0].events().len() as u64, TOKENS + 3);
    assert!(plain.iter().all(|reader| reader.events() == plain[0].events()));
    for reader in &mut tagged {
        reader.until(|text| text.contains("\"ended\"")).await;
    }
    // The start, the tokens, the end; for streams of one task, and for those of several.
    assert_eq!(encoded.get() - before, 2 * (TOKENS + 2));
    server.stop().await;
}

#[tokio::test]
async fn an_entry_is_made_json_once_for_all_watchers() {
    let server = Local::start(&[]).await;
    let (addr, api, encoded) = (server.addr, server.api(), &server.app().metrics.json_answers);
    let client = Client::new();
    let mut watchers = Vec::new();
    for client in clients() {
        for accept in ["text/event-stream", "application/x-ndjson", "application/json"] {
            let watch = get(&client, at(addr, "/v1/tasks:watch"), &[("accept", accept)]).await;
            watchers.push(Reader { response: watch, text: String::new() });
        }
    }
    let before = encoded.get();
    let id = submit(&client, addr).await;
    for watcher in &mut watchers {
        watcher.until(|text| text.contains("\"queued\"")).await;
    }
    assert_eq!(encoded.get() - before, 1);
    api.cancel(&id).await.expect("cancelled");
    api.wait_for(&id, &[TaskState::Cancelled], SOON).await;
    for watcher in &mut watchers {
        watcher.until(|text| text.contains("\"ended\"")).await;
        assert!(watcher.text.contains(&id));
    }
    assert_eq!(encoded.get() - before, 2);
    server.stop().await;
}
