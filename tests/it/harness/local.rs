//! The server in this process, on a free port: quick to start, and its time can be moved.

use std::{future::Future, net::SocketAddr, time::Duration};

use baton::{
    app::App,
    clock::Clock,
    config::{self, Config, Sources},
    id::Entropy,
};
use tempfile::TempDir;

use super::{SOON, api::Api, database, eventually, within};

/// A server in this process.
pub struct Local {
    app: App,
    pub addr: SocketAddr,
    pub clock: Clock,
    pub dir: TempDir,
}

impl Local {
    /// One by the machine's clocks, without credentials.
    pub async fn start(env: &[(&str, &str)]) -> Self {
        Self::start_at(Clock::system(), env).await
    }

    /// One whose time stands still until the test moves it.
    pub async fn manual(env: &[(&str, &str)]) -> Self {
        Self::start_at(Clock::manual(), env).await
    }

    async fn start_at(clock: Clock, env: &[(&str, &str)]) -> Self {
        Self::start_in(tempfile::tempdir().expect("a directory"), clock, env).await
    }

    /// One on data that are there.
    pub async fn start_in(dir: TempDir, clock: Clock, env: &[(&str, &str)]) -> Self {
        let config = config(&dir, env);
        let app = App::start(config, clock.clone(), Entropy::system()).await.expect("a server");
        Self { addr: app.addr, app, clock, dir }
    }

    pub fn api(&self) -> Api {
        Api::new(self.addr)
    }

    pub fn app(&self) -> &App {
        &self.app
    }

    /// Moves the time in small steps, so that everything due in between happens in order. For a
    /// heartbeat that is due the time stands almost still: databases answer in real time.
    pub async fn advance(&self, by: Duration) {
        let step = Duration::from_millis(100);
        let mut left = by;
        while !left.is_zero() {
            let now = left.min(step);
            self.clock.advance(now);
            left -= now;
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            let standing = &self.app.standing;
            let is_heard = || async {
                let is_heard = standing.silent() <= standing.interval();
                if !is_heard {
                    self.clock.advance(Duration::from_millis(1));
                }
                is_heard.then_some(())
            };
            eventually("a heartbeat", SOON, is_heard).await;
        }
    }

    /// Awaits `future` while the time moves on slowly.
    pub async fn while_time_passes<T>(&self, future: impl Future<Output = T>) -> T {
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        tokio::pin!(future);
        loop {
            tokio::select! {
                biased;
                value = &mut future => return value,
                _ = tick.tick() => self.clock.advance(Duration::from_millis(5)),
            }
        }
    }

    /// Ends it in order; fails when one of its loops had died or a handler had panicked.
    pub async fn stop(self) -> TempDir {
        let Self { app, dir, .. } = self;
        within("the shutdown", Duration::from_secs(40), app.shutdown()).await.expect("sound loops");
        dir
    }

    /// Ends it and starts another on the same data, with the same clock and another port.
    pub async fn restarted(self, env: &[(&str, &str)]) -> Self {
        let clock = self.clock.clone();
        let dir = self.stop().await;
        Self::start_in(dir, clock, env).await
    }
}

fn config(dir: &TempDir, env: &[(&str, &str)]) -> Config {
    let data_dir = dir.path().join("data").display().to_string();
    let base = [
        ("BATON_SERVER_ADDR", "127.0.0.1:0"),
        ("BATON_SERVER_SHUTDOWN_GRACE", "10s"),
        ("BATON_STORAGE_DATA_DIR", &data_dir),
        ("BATON_STORAGE_MIN_FREE", "0"),
        ("BATON_AUTH_REQUIRED", "false"),
    ];
    let url = database::url(dir.path()).unwrap_or_default();
    let url = [("BATON_DATABASE_URL", url.as_str())];
    let all = base.iter().chain(&url).chain(env);
    let env = all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let sources = Sources { env, ..Sources::default() };
    config::load(&sources).expect("a configuration").config
}
