//! The servers, their links to Postgres, Redis and the bucket, the runners, and what can be done to
//! them.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use super::{
    load::{PACE_MS, WORDS},
    probes,
};
use crate::harness::{
    SOON,
    api::Api,
    bucket::Bucket,
    checks,
    cluster::{Balancer, Redis, SETTINGS},
    database, eventually, pass,
    postgres::Postgres,
    proxy::Proxy,
    server::{Process, Server, http_status},
    wall::Wall,
};

const N_SERVERS: usize = 3;
const N_RUNNERS: usize = 6;
const MODEL: &str = "test/echo";
/// How far one server's clock is ahead.
pub const AHEAD: Duration = Duration::from_secs(30);
/// Longest silence of Redis and Postgres, and of the bucket; the load goes on for the rest.
const SILENCE: Duration = Duration::from_secs(20);
const BUCKET_DOWN: Duration = Duration::from_secs(30);
/// Servers are down for a second and Postgres for two, in turn.
const SERVER_DOWN: Duration = Duration::from_secs(1);
const DOWN: Duration = Duration::from_secs(2);
/// Readiness is withdrawn within a second, and looked at this long after.
const NOT_READY_WITHIN: Duration = Duration::from_millis(1_500);
/// What was on its way when storage went is answered within this time.
const ON_ITS_WAY: Duration = Duration::from_millis(200);

/// Adds every entry of every lane once more.
const TWICE: &str = "
    local n = 0
    for _, key in ipairs(redis.call('KEYS', '*q:*')) do
      if redis.call('TYPE', key).ok == 'stream' then
        local last = redis.call('HGET', 'test:twice', key)
        local from = last and ('(' .. last) or '-'
        for _, entry in ipairs(redis.call('XRANGE', key, from, '+')) do
          redis.call('XADD', key, '*', unpack(entry[2]))
          n = n + 1
        end
        local tail = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
        if tail then redis.call('HSET', 'test:twice', key, tail[1]) end
      end
    end
    return n";

/// What is done to the cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Nothing,
    ServersKilled,
    RedisKilled,
    RedisEmptied,
    RedisPaused,
    PostgresRestarted,
    PostgresPaused,
    BucketDown,
    CutFromPostgres,
    CutFromRedis,
    ClockAhead,
    DeliveredTwice,
}

impl Fault {
    pub const ALL: [Self; 12] = [
        Self::Nothing,
        Self::ServersKilled,
        Self::RedisKilled,
        Self::RedisEmptied,
        Self::RedisPaused,
        Self::PostgresRestarted,
        Self::PostgresPaused,
        Self::BucketDown,
        Self::CutFromPostgres,
        Self::CutFromRedis,
        Self::ClockAhead,
        Self::DeliveredTwice,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "none",
            Self::ServersKilled => "servers killed in turn",
            Self::RedisKilled => "Redis killed",
            Self::RedisEmptied => "Redis emptied",
            Self::RedisPaused => "Redis paused",
            Self::PostgresRestarted => "Postgres restarted",
            Self::PostgresPaused => "Postgres silent",
            Self::BucketDown => "S3 down",
            Self::CutFromPostgres => "one server cut off from Postgres",
            Self::CutFromRedis => "one server cut off from Redis",
            Self::ClockAhead => "one server's clock 30 s ahead",
            Self::DeliveredTwice => "every delivery twice",
        }
    }
}

/// A time in which something could be kept by nobody, or not by one server.
pub struct Outage {
    pub from: Instant,
    pub to: Instant,
    pub of: Of,
}

/// What could not be kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Of {
    Rows,
    RowsAt(usize),
    Bytes,
}

impl Outage {
    /// Whether an acknowledgement of a server at that time cannot be one.
    pub fn rules_out(&self, (at, server): (Instant, usize), bytes: bool) -> bool {
        let concerned = match self.of {
            Of::Rows => true,
            Of::RowsAt(one) => one == server,
            Of::Bytes => bytes,
        };
        concerned && at > self.from + ON_ITS_WAY && at < self.to
    }
}

/// What was seen while it was done.
#[derive(Default)]
pub struct Inflicted {
    pub outages: Vec<Outage>,
    /// How long servers without storage were ready; `None` for one that stayed so.
    pub ready_for: Vec<Option<Duration>>,
}

/// Everything that runs.
pub struct Site {
    url: String,
    pub servers: Vec<Server>,
    to_postgres: Vec<Proxy>,
    to_redis: Vec<Proxy>,
    to_bucket: Proxy,
    postgres: Postgres,
    redis: Redis,
    bucket: Bucket,
    wall: Wall,
    agents: Vec<Process>,
    _balancer: Balancer,
}

impl Site {
    /// Servers and three times the slots that so many tasks a second need: what waited is to be made good.
    pub async fn start(rate: f64) -> Self {
        let (postgres, redis, bucket) =
            (Postgres::start().await, Redis::start().await, Bucket::start().await);
        let url = database::create(&postgres.url());
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let to_bucket = Proxy::to(bucket.server.addr).await;
        let (mut servers, mut to_postgres, mut to_redis) = (Vec::new(), Vec::new(), Vec::new());
        let mut wall = None;
        for at in 0..N_SERVERS {
            let (rows, cache) =
                (Proxy::to(local(postgres.port)).await, Proxy::to(local(redis.port)).await);
            let mut server = Server::stopped(SETTINGS);
            let database = reqwest::Url::parse(&url).expect("a URL");
            let through = format!("postgres://postgres@{}{}", rows.addr, database.path());
            server.set_env("BATON_DATABASE_URL", &through);
            server.set_env("BATON_REDIS_URL", &format!("redis://{}", cache.addr));
            for (name, value) in bucket.env() {
                server.set_env(&name, &value);
            }
            server.set_env("BATON_ARTIFACTS_ENDPOINT", &format!("http://{}", to_bucket.addr));
            server.set_env("BATON_QUEUE_MAX_PER_MODEL", &probes::most_waiting(rate).to_string());
            if at == 0 {
                wall = Some(Wall::under(&mut server));
            }
            server.restart().await;
            servers.push(server);
            to_postgres.push(rows);
            to_redis.push(cache);
        }
        let balancer = Balancer::to(servers.iter().map(|server| server.addr).collect()).await;
        let needed = 3.0 * rate * WORDS as f64 * PACE_MS / 1000.0 / N_RUNNERS as f64;
        let agents = (0..N_RUNNERS)
            .map(|i| {
                let name = format!("agent-{i}");
                servers[0].agent(&name, balancer.addr, MODEL, needed.ceil() as u32)
            })
            .collect();
        let wall = wall.expect("the first server's clock");
        let site = Self {
            url,
            servers,
            to_postgres,
            to_redis,
            to_bucket,
            postgres,
            redis,
            bucket,
            wall,
            agents,
            _balancer: balancer,
        };
        site.recovered().await;
        site
    }

    /// A caller at each server.
    pub fn apis(&self) -> Vec<Api> {
        self.servers.iter().map(Server::api).collect()
    }

    pub fn sql(&self, sql: &str) -> String {
        tokio::task::block_in_place(|| database::psql(&self.url, sql))
    }

    /// Objects with bytes of artifacts, by their keys.
    pub fn stored(&self) -> BTreeSet<String> {
        let root = self.bucket.dir.path().join("test-bucket/baton/blobs");
        let (mut found, mut dirs) = (BTreeSet::new(), vec![root.clone()]);
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path: PathBuf = entry.path();
                let key = path.strip_prefix(&root).expect("below the root").to_string_lossy();
                match path.is_dir() {
                    true => dirs.push(path),
                    // What the server of the bucket keeps for itself begins with a dot.
                    false if entry.file_name().to_string_lossy().starts_with('.') => {}
                    false => drop(found.insert(key.into_owned())),
                }
            }
        }
        found
    }

    /// Waits until every server is ready and a task that was submitted there has ended.
    pub async fn recovered(&self) {
        for server in &self.servers {
            let addr = server.addr;
            eventually("the server is ready", 9 * SOON, || async move {
                (http_status(addr, "/readyz").await == Some(200)).then_some(())
            })
            .await;
            let api = server.api();
            let task = eventually("a submit is accepted", 9 * SOON, || async {
                Some(api.try_submit(crate::failover::echo(2, 1.0)).await.ok()?.task_id)
            })
            .await;
            eventually("the task ends", 9 * SOON, || async {
                let task = api.try_get(&task).await.ok()?;
                checks::is_terminal(task.state()).then_some(())
            })
            .await;
        }
        assert_eq!(self.agents.len(), N_RUNNERS);
    }

    /// Does it, for that time or as long as it lasts, and ends it.
    pub async fn inflict(&mut self, fault: Fault, time: Duration) -> Inflicted {
        let until = Instant::now() + time;
        match fault {
            Fault::Nothing => pass(time).await,
            Fault::ServersKilled => {
                for at in (0..N_SERVERS).cycle() {
                    if Instant::now() > until {
                        break;
                    }
                    self.servers[at].kill();
                    pass(SERVER_DOWN).await;
                    self.servers[at].restart().await;
                    pass(rest(time)).await;
                }
            }
            Fault::RedisKilled => {
                self.redis.process.kill();
                pass(time.min(SILENCE)).await;
                self.redis.restart().await;
            }
            Fault::RedisEmptied => {
                while Instant::now() < until {
                    self.redis.flush().await;
                    pass(Duration::from_millis(1500)).await;
                }
            }
            Fault::RedisPaused => {
                self.redis.process.signal(rustix::process::Signal::STOP);
                pass(time.min(SILENCE)).await;
                self.redis.process.signal(rustix::process::Signal::CONT);
            }
            Fault::PostgresRestarted => return self.restart_postgres(until, 3 * rest(time)).await,
            Fault::PostgresPaused => {
                self.to_postgres.iter().for_each(Proxy::block);
                let seen = self.outage(Of::Rows, time.min(SILENCE)).await;
                self.to_postgres.iter().for_each(Proxy::heal);
                return seen;
            }
            Fault::BucketDown => {
                self.to_bucket.set(|link| link.refusing = true);
                self.to_bucket.cut();
                let seen = self.outage(Of::Bytes, time.min(BUCKET_DOWN)).await;
                self.to_bucket.heal();
                return seen;
            }
            Fault::CutFromPostgres => {
                self.to_postgres[1].block();
                let seen = self.outage(Of::RowsAt(1), time.min(SILENCE)).await;
                self.to_postgres[1].heal();
                return seen;
            }
            Fault::CutFromRedis => {
                self.to_redis[2].block();
                pass(time.min(SILENCE)).await;
                self.to_redis[2].heal();
            }
            Fault::ClockAhead => {
                self.wall.set_ahead(AHEAD.as_secs() as i64);
                pass(time).await;
                self.wall.set_ahead(0);
            }
            Fault::DeliveredTwice => {
                let mut n_added = 0;
                while Instant::now() < until {
                    n_added += tokio::task::block_in_place(|| self.redis.eval(TWICE))
                        .parse::<u64>()
                        .expect("a number");
                    pass(Duration::from_millis(30)).await;
                }
                println!("{n_added} deliveries were added");
            }
        }
        Inflicted::default()
    }

    async fn restart_postgres(&mut self, until: Instant, rest: Duration) -> Inflicted {
        let mut seen = Inflicted::default();
        loop {
            self.postgres.stop_at_once().await;
            let down = self.outage(Of::Rows, DOWN).await;
            seen.outages.extend(down.outages);
            seen.ready_for.extend(down.ready_for);
            self.postgres.restart().await;
            if Instant::now() + rest > until {
                return seen;
            }
            pass(rest).await;
        }
    }

    /// Lets the time of an outage pass, and looks when servers say that they are not ready.
    async fn outage(&self, of: Of, time: Duration) -> Inflicted {
        let from = Instant::now();
        let concerned = self.servers.iter().enumerate().filter(|(at, _)| match of {
            Of::Rows => true,
            Of::RowsAt(one) => one == *at,
            Of::Bytes => false,
        });
        let looks: Vec<_> = concerned
            .map(|(_, server)| tokio::spawn(ready_for(server.addr, from + NOT_READY_WITHIN)))
            .collect();
        let mut ready_for = Vec::new();
        for look in looks {
            ready_for.push(look.await.expect("a look"));
        }
        pass(time.saturating_sub(from.elapsed())).await;
        Inflicted { outages: vec![Outage { from, to: Instant::now(), of }], ready_for }
    }
}

/// Between two kills in such a time, some 25 of them in five minutes; a third as many restarts of what
/// all servers need.
fn rest(time: Duration) -> Duration {
    (time / 30).clamp(Duration::from_secs(1), Duration::from_secs(10))
}

/// How long from now on a server says that it is ready, if it stops before `until`.
async fn ready_for(addr: SocketAddr, until: Instant) -> Option<Duration> {
    let started = Instant::now();
    let client = reqwest::Client::new();
    while Instant::now() < until {
        let look = client.get(format!("http://{addr}/readyz")).timeout(Duration::from_secs(1));
        if !look.send().await.is_ok_and(|answer| answer.status().is_success()) {
            return Some(started.elapsed());
        }
        pass(Duration::from_millis(25)).await;
    }
    None
}
