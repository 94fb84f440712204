//! The same claims against the imitation.

#![expect(clippy::duplicate_mod, reason = "the same claims about two servers")]

use super::*;
use crate::{
    clock::Clock,
    id::Entropy,
    redis::{Redis, Settings},
    supervisor::Supervisor,
};

#[path = "real/delivery.rs"]
mod delivery;
#[path = "real/faults.rs"]
mod faults;
#[path = "real/frames.rs"]
mod frames;
#[path = "../../../tests/simulation/imitation/mod.rs"]
#[expect(clippy::disallowed_methods, dead_code, reason = "made for the simulation")]
mod imitation;
#[path = "real/random.rs"]
mod random;
#[path = "real/upkeep.rs"]
mod upkeep;

/// The imitation with the face of a [`testing::Server`](crate::redis::testing::Server).
struct Server(imitation::Imitation);

impl Server {
    fn start() -> Self {
        let clock = Clock::system();
        Self(imitation::Imitation::new(move || clock.now(), Entropy::seeded(7)))
    }

    async fn connect(&self) -> (Redis, Supervisor) {
        let settings = Settings { command_timeout: Duration::from_secs(1), ..Settings::default() };
        let way = self.0.way("test", settings.command_timeout);
        let (supervisor, entropy) = (Supervisor::new(), Entropy::system());
        let redis = Redis::connect_over(way, settings, Clock::system(), entropy, &supervisor);
        (redis.await.unwrap(), supervisor)
    }

    fn kill(&mut self) {
        self.0.kill();
    }

    fn restart(&mut self) {
        self.0.restart();
    }

    fn pause(&self) {
        self.0.pause_all();
    }

    fn resume(&self) {
        self.0.resume();
    }

    fn n_blocked(&self) -> usize {
        self.0.n_blocked()
    }

    /// The first line of the answer, as it goes over a connection.
    fn command(&self, command: &str) -> String {
        self.0.look(command).line()
    }
}
