//! A disk that fails on demand, by a library preloaded into the server's process.

use std::{fs, path::PathBuf};

use super::{preload, server::Server};

/// The switch of one server's disk.
pub struct Disk {
    control: PathBuf,
}

impl Disk {
    /// Gives a server that is not running yet a disk that can fail.
    pub fn under(server: &mut Server) -> Self {
        let control = server.dir.path().join("disk");
        fs::create_dir(&control).expect("a directory");
        server.set_env("LD_PRELOAD", &preload::library("disk").display().to_string());
        server.set_env("DISK_CONTROL", &control.display().to_string());
        let data = server.data_dir();
        server.set_env("DISK_DATA", &data.display().to_string());
        Self { control }
    }

    /// Switches `hold`, `eio` or `full` on.
    pub fn start(&self, fault: &str) {
        fs::write(self.control.join(fault), "").expect("the switch");
    }

    /// Switches it off.
    pub fn stop(&self, fault: &str) {
        fs::remove_file(self.control.join(fault)).expect("the switch");
    }

    /// Syncs that succeeded so far.
    pub fn synced(&self) -> u64 {
        fs::metadata(self.control.join("synced")).map_or(0, |file| file.len())
    }
}
