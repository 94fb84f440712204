//! Time as a port: wall-clock stamps for people and rows, monotonic time for leases
//! and timeouts. Nothing else in the crate asks the operating system for the time.
//!
//! Servers that share a database follow its time ([`Clock::follow`]): the wall clock of none of
//! them ends what another accepted.
//!
//! A [`Clock::manual`] stands still until [`Clock::advance`] moves it, so that tests
//! of leases, backoffs and deadlines need no sleeping.

use std::{
    future::Future,
    ops::{Add, Sub},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
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
    /// The machine's clocks, or, where another clock is followed, what that one shows.
    System { start: tokio::time::Instant, followed: Arc<AtomicI64> },
    /// Wall time follows tokio's clock from a given time, or from that of a clock that is followed:
    /// a simulation's time.
    Simulated { start: tokio::time::Instant, at_start: Arc<AtomicI64> },
    /// Stands still until moved.
    Manual(Arc<Manual>),
}

#[derive(Debug)]
struct Manual {
    wall: Mutex<Micros>,
    mono: watch::Sender<Mono>,
}

/// No clock is followed.
const NONE: i64 = i64::MIN;

/// A followed clock is not set anew for less.
const CLOSE: Duration = Duration::from_millis(20);

/// Where simulated and manual time begin: 2026-01-01T00:00:00Z.
pub const EPOCH: Micros = Micros(1_767_225_600_000_000);

impl Clock {
    /// The machine's clocks.
    pub fn system() -> Self {
        let followed = Arc::new(AtomicI64::new(NONE));
        Self(Kind::System { start: tokio::time::Instant::now(), followed })
    }

    /// Follows tokio's (possibly paused) clock, `elapsed` after [`EPOCH`].
    pub fn simulated(elapsed: Duration) -> Self {
        let at_start = Arc::new(AtomicI64::new((EPOCH + elapsed).0));
        Self(Kind::Simulated { start: tokio::time::Instant::now(), at_start })
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
            Kind::System { start, followed } => match followed.load(Ordering::Relaxed) {
                NONE => {
                    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    Micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
                }
                at_start => Micros(at_start) + start.elapsed(),
            },
            Kind::Simulated { start, at_start } => {
                Micros(at_start.load(Ordering::Relaxed)) + start.elapsed()
            }
            Kind::Manual(manual) => *manual.wall.lock(),
        }
    }

    /// Follows another clock, which showed `time` at some moment from `before` to `after`: from now
    /// on [`Clock::now`] is what that one shows, and the machine's wall clock is without effect. Small
    /// differences, and those that the length of the look explains, are left as they are. A clock
    /// that is moved by hand follows none.
    pub fn follow(&self, time: Micros, before: Mono, after: Mono) {
        let (Kind::System { followed, .. } | Kind::Simulated { at_start: followed, .. }) = &self.0
        else {
            return;
        };
        let half = after.since(before) / 2;
        let at_start = (time - before.0 - half).0;
        let known = followed.load(Ordering::Relaxed);
        let allowed = i64::try_from((half + CLOSE).as_micros()).unwrap_or(i64::MAX);
        if known == NONE || (at_start - known).abs() > allowed {
            followed.store(at_start, Ordering::Relaxed);
        }
    }

    /// Now, by the monotonic clock.
    pub fn mono(&self) -> Mono {
        match &self.0 {
            Kind::System { start, .. } | Kind::Simulated { start, .. } => Mono(start.elapsed()),
            Kind::Manual(manual) => *manual.mono.borrow(),
        }
    }

    /// Completes at `deadline`, or at once when it has passed.
    pub fn sleep_until(&self, deadline: Mono) -> impl Future<Output = ()> + Send + 'static {
        let clock = self.clone();
        async move {
            match clock.0 {
                Kind::System { start, .. } | Kind::Simulated { start, .. } => {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_follows_another_shows_what_that_one_does() {
        let clock = Clock::system();
        let at = clock.mono();
        clock.follow(EPOCH, at, at);
        // The wall clock has whole microseconds.
        let passed = || clock.mono().since(at) + Duration::from_micros(1);
        let shown = clock.now();
        assert!(shown >= EPOCH && shown.since(EPOCH) <= passed(), "{shown:?}");
        // What the look itself may be wrong by changes nothing.
        let (before, later) = (clock.mono(), clock.mono() + Duration::from_secs(2));
        clock.follow(clock.now() + Duration::from_millis(1_900), before, later);
        assert!(clock.now().since(EPOCH) <= passed());
        clock.follow(EPOCH + Duration::from_hours(1), at, at);
        assert!(clock.now().since(EPOCH) >= Duration::from_hours(1));
    }

    #[test]
    fn time_that_a_test_moves_follows_nobody() {
        let clock = Clock::manual();
        clock.follow(EPOCH + Duration::from_hours(1), Mono::default(), Mono::default());
        assert_eq!(clock.now(), EPOCH);
    }
}
