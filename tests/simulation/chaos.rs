//! What breaks, when, and for how long.

use std::time::Duration;

use baton::id::Entropy;
use turmoil::Sim;

use super::{
    CHAOS, N_RUNNERS,
    hosts::{Shared, Site, runner_name, server_name},
    imitation::Weather,
};

/// What is broken.
enum Fault {
    Crashed(String),
    /// Hosts that hear nothing of each other.
    Cut(Vec<(String, String)>),
    /// Hosts that hear of each other later.
    Held(Vec<(String, String)>),
    /// A server cannot reach the database.
    NoDatabase(String),
    /// A server cannot reach Redis.
    NoRedis(String),
    RedisDown,
    RedisPaused,
}

/// Breaks and mends.
pub struct Chaos {
    site: Site,
    dice: Entropy,
    /// What is broken, by whose it is, and until when.
    faults: Vec<(Duration, String, Fault)>,
    next: Duration,
    over: bool,
}

impl Chaos {
    pub fn new(site: Site) -> Self {
        let dice = Entropy::seeded(site.seed);
        if let Some(shared) = &site.shared {
            worsen(shared, &dice);
        }
        let next = Duration::from_millis(500);
        Self { site, dice, faults: Vec::new(), next, over: false }
    }

    /// Does what is due.
    pub fn step(&mut self, sim: &mut Sim<'_>) {
        let now = sim.elapsed();
        let over = now >= CHAOS;
        while let Some(i) = self.faults.iter().position(|(until, ..)| over || *until <= now) {
            let (_, _, fault) = self.faults.swap_remove(i);
            self.mend(sim, fault);
        }
        self.start_ended(sim, now);
        if over && !self.over {
            self.over = true;
            if let Some(shared) = &self.site.shared {
                shared.redis.set_weather(Weather { slowness: 5, ..Weather::default() });
                shared.database.lock().expect("nobody failed").losses = 0;
            }
        }
        if now >= self.next && !over {
            self.next = now + Duration::from_millis(200 + self.dice.u64() % 3000);
            let lasts = 100 + self.dice.u64() % 20_000 / (1 + self.dice.u64() % 20);
            let whose = self.whose();
            let mut broken = self.faults.iter().filter(|(_, broken, _)| *broken == whose);
            let fault = match broken.next() {
                None => self.fault(sim, &whose),
                // Who is cut off may also crash.
                Some((.., Fault::NoDatabase(_) | Fault::NoRedis(_))) if broken.next().is_none() => {
                    sim.crash(whose.as_str());
                    Some(Fault::Crashed(whose.clone()))
                }
                Some(_) => None,
            };
            if let Some(fault) = fault {
                self.faults.push((now + Duration::from_millis(lasts), whose, fault));
            }
        }
    }

    /// Starts servers again that could not start: they show as crashed for a moment.
    fn start_ended(&mut self, sim: &mut Sim<'_>, now: Duration) {
        for server in self.site.servers() {
            let is_known = self.faults.iter().any(|(_, whose, _)| *whose == server);
            if !is_known && !sim.is_host_running(server.as_str()) {
                let again = now + Duration::from_millis(500);
                self.faults.push((again, server.clone(), Fault::Crashed(server)));
            }
        }
    }

    fn whose(&self) -> String {
        let n_servers = self.site.n_servers;
        let others = if self.site.shared.is_some() { 3 } else { 1 };
        match self.dice.u64() % (n_servers + N_RUNNERS + others) {
            n if n < n_servers => server_name(n),
            n if n < n_servers + N_RUNNERS => runner_name(n - n_servers),
            n if n == n_servers + N_RUNNERS => "client".into(),
            _ => "redis".into(),
        }
    }

    /// Breaks something of somebody's.
    fn fault(&self, sim: &mut Sim<'_>, whose: &str) -> Option<Fault> {
        let dice = self.dice.u64();
        if whose == "redis" {
            return self.break_redis(dice);
        }
        let is_server = whose.starts_with("server");
        if is_server && self.site.shared.is_some() && !dice.is_multiple_of(3) {
            let shared = self.site.shared.as_ref()?;
            if dice % 3 == 1 {
                let mut database = shared.database.lock().expect("nobody failed");
                database.cut.push(whose.into());
                return Some(Fault::NoDatabase(whose.into()));
            }
            shared.redis.cut(whose);
            return Some(Fault::NoRedis(whose.into()));
        }
        if is_server || (whose != "client" && dice.is_multiple_of(3)) {
            sim.crash(whose);
            return Some(Fault::Crashed(whose.into()));
        }
        // From one server, or from all.
        let servers: Vec<String> = match self.dice.u64() % 2 {
            0 => vec![server_name(self.dice.u64() % self.site.n_servers)],
            _ => self.site.servers().collect(),
        };
        let links: Vec<_> = servers.into_iter().map(|server| (whose.to_owned(), server)).collect();
        Some(if whose == "client" || dice % 3 == 1 {
            for (a, b) in &links {
                sim.partition(a.as_str(), b.as_str());
            }
            Fault::Cut(links)
        } else {
            for (a, b) in &links {
                sim.hold(a.as_str(), b.as_str());
            }
            Fault::Held(links)
        })
    }

    fn break_redis(&self, dice: u64) -> Option<Fault> {
        let redis = &self.site.shared.as_ref()?.redis;
        match dice % 6 {
            0 => {
                redis.kill();
                Some(Fault::RedisDown)
            }
            1 => {
                redis.pause_all();
                Some(Fault::RedisPaused)
            }
            2 => {
                redis.empty();
                None
            }
            3 => {
                redis.keep();
                None
            }
            4 => {
                redis.lose_writes();
                None
            }
            _ => {
                redis.break_connections(dice & 64 == 0);
                None
            }
        }
    }

    fn mend(&self, sim: &mut Sim<'_>, fault: Fault) {
        let shared = self.site.shared.as_ref();
        match fault {
            Fault::Crashed(host) => sim.bounce(host),
            Fault::Cut(links) => links.into_iter().for_each(|(a, b)| sim.repair(a, b)),
            Fault::Held(links) => links.into_iter().for_each(|(a, b)| sim.release(a, b)),
            Fault::NoDatabase(server) => {
                if let Some(shared) = shared {
                    let mut database = shared.database.lock().expect("nobody failed");
                    database.cut.retain(|cut| *cut != server);
                }
            }
            Fault::NoRedis(server) => shared.into_iter().for_each(|it| it.redis.mend(&server)),
            Fault::RedisDown => shared.into_iter().for_each(|it| it.redis.restart()),
            Fault::RedisPaused => shared.into_iter().for_each(|it| it.redis.resume()),
        }
    }
}

/// How bad the ways to the shared parts are while things break.
fn worsen(shared: &Shared, dice: &Entropy) {
    let up_to = |most: u64| dice.u64() % (most + 1);
    shared.redis.set_weather(Weather {
        slowness: 1 + up_to(9),
        lost_calls: up_to(10),
        lost_answers: up_to(10),
        lost_messages: up_to(300),
        doubled_messages: up_to(300),
    });
    shared.database.lock().expect("nobody failed").losses = up_to(20);
}
