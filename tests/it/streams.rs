//! Readers of very different speed beside each other.

use std::time::{Duration, Instant};

use baton::pb;

use crate::harness::{
    SOON, checks,
    local::Local,
    pass,
    runner::{self, Runner},
    server::metric,
    within,
};

const MODEL: &str = "test/echo";

/// P15: a subscriber that reads nothing costs bounded memory and does not slow its neighbour;
/// when it reads at last it gets the whole stream.
#[tokio::test]
async fn heavy_a_reader_that_reads_nothing_delays_nobody_and_misses_nothing() {
    const TOKENS: u64 = 200_000;
    let server = Local::start(&[("BATON_RELAY_PER_TASK", "1MiB")]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let mut stalled = Vec::new();
    for _ in 0..20 {
        // Connections of their own: one window each.
        stalled.push(server.api().stream(&task, 1).await.expect("a stream"));
    }
    let (neighbour, id) = (server.api(), task.clone());
    let reading = tokio::spawn(async move {
        let mut stream = neighbour.stream(&id, 1).await.expect("a stream");
        let mut events: Vec<pb::TaskEvent> = Vec::new();
        while let Some(event) = stream.message().await.expect("an event") {
            events.push(event);
        }
        events
    });
    let lease = runner.assigned().await;
    let before = resident_bytes();
    let started = Instant::now();
    let mut sent = 0;
    while sent < TOKENS {
        runner.output(&lease, sent + 1, runner::tokens(sent, 500), None).await;
        sent += 500;
        if sent % 10_000 == 0 {
            runner.acked(&lease, sent).await;
        }
    }
    runner.finish(&lease, sent + 1, runner::success()).await;
    let events = within("the neighbour", 6 * SOON, reading).await.expect("a sound reader");
    let took = started.elapsed();
    checks::check_stream(&task, 0, &events);
    assert_eq!(events.len() as u64, TOKENS + 3);
    assert!(took < Duration::from_mins(1), "{TOKENS} tokens in {took:?}");
    let own = events.len() * 200;
    let grown = resident_bytes().saturating_sub(before + own as u64);
    assert!(grown < 160 << 20, "20 stalled readers cost {} MiB", grown >> 20);
    // Still stalled a while later; then one of them reads everything.
    pass(Duration::from_secs(2)).await;
    let mut late = stalled.pop().expect("a stalled reader");
    let mut seen = Vec::new();
    within("the stalled reader", 6 * SOON, async {
        while let Some(event) = late.message().await.expect("an event, or the end") {
            seen.push(event);
        }
    })
    .await;
    checks::check_stream(&task, 0, &seen);
    assert_eq!(seen.len(), events.len());
    drop(stalled);
    server.stop().await;
}

/// P15: for a whole minute of real time some read nothing, and their neighbour has every token
/// within two seconds of its making. The test before this one has the bytes; this has the time.
#[tokio::test]
async fn readers_that_read_nothing_for_a_minute_delay_nobody_and_miss_nothing() {
    const MINUTE: Duration = Duration::from_mins(1);
    const STEP: u64 = 200;
    let server = Local::start(&[("BATON_RELAY_PER_TASK", "1MiB")]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let mut stalled = Vec::new();
    for _ in 0..5 {
        stalled.push(server.api().stream(&task, 1).await.expect("a stream"));
    }
    let (seen, mut seen_by_neighbour) = tokio::sync::watch::channel(0);
    let mut stream = server.api().stream(&task, 1).await.expect("a stream");
    let reading = tokio::spawn(async move {
        while let Some(event) = stream.message().await.expect("an event") {
            assert_eq!(event.sequence, *seen.borrow() + 1);
            seen.send_replace(event.sequence);
        }
    });
    let lease = runner.assigned().await;
    let started = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let mut sent = 0;
    while started.elapsed() < MINUTE {
        tick.tick().await;
        runner.output(&lease, sent + 1, runner::tokens(sent, STEP), None).await;
        sent += STEP;
        // Queued and started come before the tokens.
        let wanted = seen_by_neighbour.wait_for(|seen| *seen >= sent + 2);
        within("the neighbour has it", Duration::from_secs(2), wanted).await.expect("a reader");
    }
    let held = metric(server.addr, "baton_relay_bytes").await.expect("a figure");
    assert!(held < 4 << 20, "{held} bytes are held for readers that read nothing");
    runner.finish(&lease, sent + 1, runner::success()).await;
    within("the neighbour's end", SOON, reading).await.expect("a sound reader");
    for mut late in stalled {
        let mut seen = 0;
        within("a stalled reader", 6 * SOON, async {
            while let Some(event) = late.message().await.expect("an event, or the end") {
                assert_eq!(event.sequence, seen + 1);
                seen = event.sequence;
            }
        })
        .await;
        assert_eq!(seen, sent + 3);
    }
    server.stop().await;
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    pages * 4096
}

/// P15: readers that leave are forgotten at once.
#[tokio::test]
async fn a_reader_that_leaves_is_forgotten() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let task = api.submit_to(MODEL).await;
    let mut streams = Vec::new();
    for _ in 0..50 {
        let mut stream = api.stream(&task, 1).await.expect("a stream");
        within("queued", SOON, stream.message()).await.expect("a stream").expect("an event");
        streams.push(stream);
    }
    drop(streams);
    let what = "no subscriber is left";
    let address = server.addr;
    crate::harness::eventually(what, SOON, || async move {
        (metric(address, "baton_relay_subscribers").await? == 0).then_some(())
    })
    .await;
    server.stop().await;
}
