//! Time as a port: wall-clock stamps for people and rows, monotonic time for leases
//! and timeouts. Nothing else in the crate asks the operating system for the time.
//!
//! A [`Clock::manual`] stands still until [`Clock::advance`] moves it, so that tests
//! of leases, backoffs and deadlines need no sleeping.

use std::{
    future::Future,
    ops::{Add, Sub},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Microseconds since the Unix epoch, by the wall clock. What rows and messages hold.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Micros(pub i64);

impl Micros {
    /// The time since `earlier`; zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl Add<Duration> for Micros {
    type Output = Self;
    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(rhs.as_micros()).unwrap_or(i64::MAX)))
    }
}

impl Sub<Duration> for Micros {
    type Output = Self;
    fn sub(self, rhs: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(rhs.as_micros()).unwrap_or(i64::MAX)))
    }
}

/// Time since the clock was made, which no wall-clock jump moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mono(pub Duration);

impl Mono {
    /// The time since `earlier`; zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Mono {
    type Output = Self;
    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(rhs))
    }
}

/// A source of time; clones share it.
#[derive(Clone, Debug)]
pub struct Clock(Kind);

#[derive(Clone, Debug)]
enum Kind {
    /// The machine's clocks.
    System { start: tokio::time::Instant },
    /// Wall time follows tokio's clock from a fixed time: a simulation's time.
    Simulated { start: tokio::time::Instant, wall: Micros },
    /// Stands still until moved.
    Manual(Arc<Manual>),
}

#[derive(Debug)]
struct Manual {
    wall: Mutex<Micros>,
    mono: watch::Sender<Mono>,
}

/// Where simulated and manual time begin: 2026-01-01T00:00:00Z.
pub const EPOCH: Micros = Micros(1_767_225_600_000_000);

impl Clock {
    /// The machine's clocks.
    pub fn system() -> Self {
        Self(Kind::System { start: tokio::time::Instant::now() })
    }

    /// Follows tokio's (possibly paused) clock, `elapsed` after [`EPOCH`].
    pub fn simulated(elapsed: Duration) -> Self {
        Self(Kind::Simulated { start: tokio::time::Instant::now(), wall: EPOCH + elapsed })
    }

    /// Whether this is a simulation's time, in which nothing may wait for real time.
    pub fn is_simulated(&self) -> bool {
        matches!(self.0, Kind::Simulated { .. })
    }

    /// Stands still at [`EPOCH`] until moved.
    pub fn manual() -> Self {
        let mono = watch::Sender::new(Mono::default());
        Self(Kind::Manual(Arc::new(Manual { wall: Mutex::new(EPOCH), mono })))
    }

    /// Now, by the wall clock.
    #[expect(clippy::disallowed_methods, reason = "the one place that asks")]
    pub fn now(&self) -> Micros {
        match &self.0 {
            Kind::System { .. } => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
            }
            Kind::Simulated { start, wall } => *wall + start.elapsed(),
            Kind::Manual(manual) => *manual.wall.lock(),
        }
    }

    /// Now, by the monotonic clock.
    pub fn mono(&self) -> Mono {
        match &self.0 {
            Kind::System { start } | Kind::Simulated { start, .. } => Mono(start.elapsed()),
            Kind::Manual(manual) => *manual.mono.borrow(),
        }
    }

    /// Completes at `deadline`, or at once when it has passed.
    pub fn sleep_until(&self, deadline: Mono) -> impl Future<Output = ()> + Send + 'static {
        let clock = self.clone();
        async move {
            match clock.0 {
                Kind::System { start } | Kind::Simulated { start, .. } => {
                    tokio::time::sleep_until(start + deadline.0).await;
                }
                Kind::Manual(manual) => {
                    let mut mono = manual.mono.subscribe();
                    // The sender lives in `manual`, so waiting cannot fail.
                    let _ = mono.wait_for(|now| *now >= deadline).await;
                }
            }
        }
    }

    /// Completes after `duration`.
    pub fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + Send + 'static {
        self.sleep_until(self.mono() + duration)
    }

    /// Moves a manual clock, wall and monotonic time alike.
    ///
    /// # Panics
    /// On any other clock.
    pub fn advance(&self, by: Duration) {
        let Kind::Manual(manual) = &self.0 else { panic!("only a manual clock can be moved") };
        {
            let mut wall = manual.wall.lock();
            *wall = *wall + by;
        }
        manual.mono.send_modify(|mono| *mono = *mono + by);
    }

    /// Sets the wall clock of a manual clock, as an administrator or NTP would.
    ///
    /// # Panics
    /// On any other clock.
    pub fn set_wall(&self, to: Micros) {
        let Kind::Manual(manual) = &self.0 else { panic!("only a manual clock can be set") };
        *manual.wall.lock() = to;
    }
}
