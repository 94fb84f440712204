//! What the promise tests drive the server with: the server itself, in process or as a child; a
//! scripted runner that speaks the protocol by hand; a link that can be cut; clients; checks.

pub mod api;
pub mod bucket;
pub mod checks;
pub mod cluster;
pub mod command;
pub mod database;
pub mod disk;
pub mod local;
pub mod postgres;
pub mod preload;
pub mod proxy;
pub mod runner;
pub mod server;
pub mod wall;

use std::{
    future::Future,
    time::{Duration, Instant},
};

use baton::pb;

/// Longest wait for something that should happen at once.
pub const SOON: Duration = Duration::from_secs(10);

/// Waits until `condition` yields a value; panics with `what` when it does not within `bound`.
pub async fn eventually<T, F>(what: &str, bound: Duration, mut condition: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let started = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if let Some(value) = condition().await {
            return value;
        }
        assert!(started.elapsed() < bound, "not within {bound:?}: {what}");
    }
}

/// Awaits `future`; panics with `what` when it takes longer than `bound`.
pub async fn within<T>(what: &str, bound: Duration, future: impl Future<Output = T>) -> T {
    let Ok(value) = tokio::time::timeout(bound, future).await else {
        panic!("not within {bound:?}: {what}")
    };
    value
}

/// Lets real time pass: only where the passing itself is what a test is about, such as a
/// runner that stays stopped past its lease.
pub async fn pass(time: Duration) {
    let never = std::future::pending::<()>();
    let _elapsed = tokio::time::timeout(time, never).await;
}

/// A small task for `model`.
pub fn spec(model: &str) -> pb::TaskSpec {
    pb::TaskSpec { model: model.into(), input: Some(object(&[("text", "hello")])), ..default() }
}

/// A JSON object of texts.
pub fn object(fields: &[(&str, &str)]) -> prost_types::Struct {
    let value = |text: &str| prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(text.into())),
    };
    prost_types::Struct {
        fields: fields.iter().map(|(name, text)| ((*name).into(), value(text))).collect(),
    }
}

/// A protobuf duration.
pub fn seconds(seconds: f64) -> prost_types::Duration {
    prost_types::Duration::try_from(Duration::from_secs_f64(seconds)).expect("a short duration")
}

/// `Default::default()`, short.
pub fn default<T: Default>() -> T {
    T::default()
}
