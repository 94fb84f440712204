//! Databases of Postgres that go with their case, and the Redis beside them.

#[cfg(feature = "postgres")]
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

/// A database that was made for a case and goes with it.
#[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "there is none"))]
pub(super) struct Database {
    /// Where it is.
    pub(super) url: String,
    server: String,
    name: String,
}

#[cfg(feature = "postgres")]
impl Database {
    /// Makes one on a server.
    pub(super) fn create(server: &str) -> anyhow::Result<Self> {
        let name = format!("baton_bench_{}_{}", std::process::id(), super::process::now_ns());
        let mut url = reqwest::Url::parse(server)?;
        url.set_path(&name);
        run(server, &format!("CREATE DATABASE {name}"))?;
        Ok(Self { url: url.into(), server: server.to_owned(), name })
    }

    /// The process that the server's others descend from, if it runs on this machine.
    pub(super) fn postmaster(&self) -> Option<u32> {
        let pid = block_on(async {
            let mut conn = PgConnection::connect(&self.url).await?;
            let pid: i32 =
                sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut conn).await?;
            let pid = u32::try_from(pid)?;
            let command = std::fs::read_to_string(format!("/proc/{pid}/comm"))?;
            anyhow::ensure!(command.starts_with("postgres"), "another machine's process");
            super::process::parent(pid).ok_or_else(|| anyhow::anyhow!("no parent"))
        });
        pid.ok()
    }
}

#[cfg(not(feature = "postgres"))]
impl Database {
    pub(super) fn create(_server: &str) -> anyhow::Result<Self> {
        anyhow::bail!("this binary was built without the feature `postgres`")
    }

    pub(super) fn postmaster(&self) -> Option<u32> {
        None
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        #[cfg(feature = "postgres")]
        {
            let dropped = run(&self.server, &format!("DROP DATABASE {} WITH (FORCE)", self.name));
            if let Err(error) = dropped {
                eprintln!("the database {} is left behind: {error}", self.name);
            }
        }
    }
}

#[cfg(feature = "postgres")]
fn run(url: &str, sql: &str) -> anyhow::Result<()> {
    block_on(async {
        let mut conn = PgConnection::connect(url).await?;
        sqlx::query(AssertSqlSafe(sql)).execute(&mut conn).await?;
        Ok(conn.close().await?)
    })
}

#[cfg(feature = "postgres")]
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// The process of a Redis that asks for no password, if it runs on this machine.
pub(super) fn redis_pid(url: &str) -> Option<u32> {
    use std::io::{BufRead as _, BufReader, Write as _};
    let url = reqwest::Url::parse(url).ok()?;
    let mut stream =
        std::net::TcpStream::connect((url.host_str()?, url.port().unwrap_or(6379))).ok()?;
    stream.write_all(b"INFO server\r\nQUIT\r\n").ok()?;
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let pid = lines.find_map(|line| line.strip_prefix("process_id:")?.trim().parse().ok())?;
    let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    command.starts_with("redis").then_some(pid)
}
