//! The servers, their links to Postgres and Redis, the runners, and what can be done to them.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, UnixStream},
};

use super::load::{PACE_MS, WORDS};
use crate::harness::{
    SOON,
    api::Api,
    checks,
    cluster::{Balancer, Redis, SETTINGS},
    database, eventually, pass,
    proxy::Proxy,
    server::{Process, Server, http_status},
    wall::Wall,
};

const N_SERVERS: usize = 3;
const N_RUNNERS: usize = 6;
const MODEL: &str = "test/echo";
/// How far one server's clock is ahead.
const AHEAD: Duration = Duration::from_secs(30);

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
    CutFromPostgres,
    CutFromRedis,
    ClockAhead,
    DeliveredTwice,
}

impl Fault {
    pub const ALL: [Self; 11] = [
        Self::Nothing,
        Self::ServersKilled,
        Self::RedisKilled,
        Self::RedisEmptied,
        Self::RedisPaused,
        Self::PostgresRestarted,
        Self::PostgresPaused,
        Self::CutFromPostgres,
        Self::CutFromRedis,
        Self::ClockAhead,
        Self::DeliveredTwice,
    ];

    /// How far the servers' clocks are apart.
    pub fn skew(self) -> Duration {
        if self == Self::ClockAhead { AHEAD } else { Duration::ZERO }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "none",
            Self::ServersKilled => "servers killed in turn",
            Self::RedisKilled => "Redis killed",
            Self::RedisEmptied => "Redis emptied",
            Self::RedisPaused => "Redis paused",
            Self::PostgresRestarted => "Postgres: all connections ended",
            Self::PostgresPaused => "Postgres silent",
            Self::CutFromPostgres => "one server cut off from Postgres",
            Self::CutFromRedis => "one server cut off from Redis",
            Self::ClockAhead => "one server's clock 30 s ahead",
            Self::DeliveredTwice => "every delivery twice",
        }
    }
}

/// Everything that runs.
pub struct Site {
    url: String,
    servers: Vec<Server>,
    to_postgres: Vec<Proxy>,
    to_redis: Vec<Proxy>,
    redis: Redis,
    wall: Wall,
    agents: Vec<Process>,
    _balancer: Balancer,
}

impl Site {
    /// Servers and as many slots as that many tasks a second need, with a little to spare.
    pub async fn start(rate: f64) -> Self {
        let url = database::create(&database::server().expect("a server"));
        let redis = Redis::start().await;
        let postgres = port_of_postgres(&url).await;
        let (mut servers, mut to_postgres, mut to_redis) = (Vec::new(), Vec::new(), Vec::new());
        let mut wall = None;
        for at in 0..N_SERVERS {
            let (postgres, cache) =
                (Proxy::to(postgres).await, Proxy::to(([127, 0, 0, 1], redis.port).into()).await);
            let mut server = Server::stopped(SETTINGS);
            let database = reqwest::Url::parse(&url).expect("a URL");
            let through = format!("postgres://postgres@{}{}", postgres.addr, database.path());
            server.set_env("BATON_DATABASE_URL", &through);
            server.set_env("BATON_REDIS_URL", &format!("redis://{}", cache.addr));
            if at == 0 {
                wall = Some(Wall::under(&mut server));
            }
            server.restart().await;
            servers.push(server);
            to_postgres.push(postgres);
            to_redis.push(cache);
        }
        let balancer = Balancer::to(servers.iter().map(|server| server.addr).collect()).await;
        let needed = 1.5 * rate * WORDS as f64 * PACE_MS / 1000.0 / N_RUNNERS as f64;
        let agents = (0..N_RUNNERS)
            .map(|i| {
                let name = format!("agent-{i}");
                servers[0].agent(&name, balancer.addr, MODEL, needed.ceil() as u32)
            })
            .collect();
        let wall = wall.expect("the first server's clock");
        let site =
            Self { url, servers, to_postgres, to_redis, redis, wall, agents, _balancer: balancer };
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

    /// Waits until every server is ready and a task that was submitted there has ended.
    pub async fn recovered(&self) {
        for server in &self.servers {
            let addr = server.addr;
            eventually("the server is ready", 3 * SOON, || async move {
                (http_status(addr, "/readyz").await == Some(200)).then_some(())
            })
            .await;
            let api = server.api();
            let task = eventually("a submit is accepted", 3 * SOON, || async {
                Some(api.try_submit(crate::failover::echo(2, 1.0)).await.ok()?.task_id)
            })
            .await;
            eventually("the task ends", 3 * SOON, || async {
                let task = api.try_get(&task).await.ok()?;
                checks::is_terminal(task.state()).then_some(())
            })
            .await;
        }
        assert_eq!(self.agents.len(), N_RUNNERS);
    }

    /// Does it, for that time, and ends it.
    pub async fn inflict(&mut self, fault: Fault, time: Duration) {
        let until = Instant::now() + time;
        match fault {
            Fault::Nothing => pass(time).await,
            Fault::ServersKilled => {
                for at in (0..N_SERVERS).cycle() {
                    if Instant::now() > until {
                        return;
                    }
                    self.servers[at].kill();
                    pass(Duration::from_secs(1)).await;
                    self.servers[at].restart().await;
                    pass(Duration::from_secs(1)).await;
                }
            }
            Fault::RedisKilled => {
                self.redis.process.kill();
                pass(time).await;
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
                pass(time).await;
                self.redis.process.signal(rustix::process::Signal::CONT);
            }
            Fault::PostgresRestarted => {
                while Instant::now() < until {
                    self.sql(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                         WHERE datname = current_database() AND pid <> pg_backend_pid()",
                    );
                    pass(Duration::from_secs(2)).await;
                }
            }
            Fault::PostgresPaused => {
                self.to_postgres.iter().for_each(Proxy::block);
                pass(time).await;
                self.to_postgres.iter().for_each(Proxy::heal);
            }
            Fault::CutFromPostgres => Self::cut_off(&self.to_postgres[1], time).await,
            Fault::CutFromRedis => Self::cut_off(&self.to_redis[2], time).await,
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
    }

    async fn cut_off(link: &Proxy, time: Duration) {
        link.block();
        pass(time).await;
        link.heal();
    }
}

/// A port that leads to the socket of the Postgres that a URL names.
async fn port_of_postgres(url: &str) -> SocketAddr {
    let url = reqwest::Url::parse(url).expect("a URL");
    let host = url.query_pairs().find(|(name, _)| name == "host").expect("a directory").1;
    let socket: PathBuf = Path::new(&*host).join(".s.PGSQL.5432");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("the port's address");
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                let Ok(mut far) = UnixStream::connect(socket).await else { return };
                let _ended = copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    addr
}
