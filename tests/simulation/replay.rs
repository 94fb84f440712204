//! Tasks that have ended, read anew: P7, whoever reads when, it is the same.

use std::time::Duration;

use baton::pb::{self, task_event::Body, task_service_client::TaskServiceClient};
use prost::Message as _;

use super::hosts::{Site, channel_to};

/// The events of a task, encoded.
type Events = Vec<Vec<u8>>;

/// The events of a task that has ended, as each server has them.
pub async fn read(site: &Site, id: &str) -> Vec<Events> {
    let mut readings = Vec::new();
    for server in site.servers() {
        readings.push(read_at(&server, id).await);
    }
    readings
}

/// Reads them when everything has worked for a while: each server has the same, and all of it was
/// there before. Where an attempt had run, and its server had not heard of its end yet, there may
/// have been more, in the range that the end declares lost.
pub async fn check(site: &Site, id: &str, before: &[Events]) {
    let readings = read(site, id).await;
    let Some(now) = readings.first() else { return };
    for other in &readings {
        assert!(now == other, "{id}: P7, servers differ: {:?}", differing(now, other));
    }
    let decoded = |gap: &[u8]| pb::TaskEvent::decode(gap).expect("an event");
    let gaps = now.iter().filter_map(|event| {
        let event = decoded(event);
        let Some(Body::Gap(gap)) = &event.body else { return None };
        Some(gap.first_sequence..event.sequence)
    });
    let gaps: Vec<_> = gaps.collect();
    for before in before {
        let lost = |event: &Vec<u8>| {
            let sequence = decoded(event).sequence;
            gaps.iter().any(|gap| gap.contains(&sequence))
        };
        let before: Events = before.iter().filter(|event| !lost(event)).cloned().collect();
        assert!(before == *now, "{id}: P7, it ended and changes: {:?}", differing(&before, now));
    }
}

fn differing(one: &Events, other: &Events) -> Option<(pb::TaskEvent, pb::TaskEvent)> {
    let (one, other) = one.iter().zip(other).find(|(one, other)| one != other)?;
    Some((pb::TaskEvent::decode(&**one).ok()?, pb::TaskEvent::decode(&**other).ok()?))
}

/// All events up to the end, whatever interrupts.
async fn read_at(server: &str, id: &str) -> Events {
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
