//! A wall clock that a test sets, by a library preloaded into the server's process.

use std::{fs::File, os::unix::fs::FileExt as _};

use super::{preload, server::Server};

/// The wall clock of one server.
pub struct Wall(File);

impl Wall {
    /// Gives a server that is not running yet a wall clock that can be set.
    pub fn under(server: &mut Server) -> Self {
        let control = server.dir.path().join("wall");
        let file = File::create_new(&control).expect("the control file");
        server.set_env("LD_PRELOAD", &preload::library("wall").display().to_string());
        server.set_env("WALL_CONTROL", &control.display().to_string());
        let wall = Self(file);
        wall.set_ahead(0);
        wall
    }

    /// Sets it this many seconds ahead of the true time, from now on.
    pub fn set_ahead(&self, seconds: i64) {
        let micros = (seconds * 1_000_000).to_ne_bytes();
        self.0.write_all_at(&micros, 0).expect("the clock is set");
    }
}
