//! Tasks that have ended, read anew: P7, whoever reads when, it is the same.

use std::time::Duration;

use baton::pb::{self, task_event::Body, task_service_client::TaskServiceClient};
use prost::Message as _;

use super::hosts::{Site, channel_to};

/// The events of a task that has ended, as each server has them.
pub async fn read(site: &Site, id: &str) -> Vec<Vec<u8>> {
    let mut first: Option<Vec<Vec<u8>>> = None;
    for server in site.servers() {
        let events = read_at(&server, id).await;
        if let Some(first) = &first {
            compare(id, first, &events);
        }
        first.get_or_insert(events);
    }
    first.unwrap_or_default()
}

/// Reads them again: they are as they were.
pub async fn check(site: &Site, id: &str, before: &[Vec<u8>]) {
    compare(id, before, &read(site, id).await);
}

fn compare(id: &str, one: &[Vec<u8>], other: &[Vec<u8>]) {
    let differs = one.iter().zip(other).find(|(one, other)| one != other);
    let decode = |event: &[u8]| pb::TaskEvent::decode(event);
    let differs = differs.map(|(one, other)| (decode(one), decode(other)));
    assert!(differs.is_none(), "{id}: P7, it ended and changes: {differs:?}");
    let (one, other) = (one.len(), other.len());
    assert_eq!(one, other, "{id}: P7, it ended, and its events become more or fewer");
}

/// All events up to the end, whatever interrupts.
async fn read_at(server: &str, id: &str) -> Vec<Vec<u8>> {
    loop {
        let mut client = TaskServiceClient::new(channel_to(server.to_owned()));
        let request =
            pb::StreamTaskRequest { task_id: id.into(), from_sequence: 1, ..Default::default() };
        if let Ok(stream) = client.stream_task(request).await {
            let (mut stream, mut events) = (stream.into_inner(), Vec::new());
            while let Ok(Some(event)) = stream.message().await {
                events.push(event.encode_to_vec());
                if matches!(event.body, Some(Body::Ended(_))) {
                    return events;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}
