//! A disk that fails on demand, by a library preloaded into the server's process.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use super::server::Server;

/// The switch of one server's disk.
pub struct Disk {
    control: PathBuf,
}

impl Disk {
    /// Gives a server that is not running yet a disk that can fail.
    pub fn under(server: &mut Server) -> Self {
        let control = server.dir.path().join("disk");
        fs::create_dir(&control).expect("a directory");
        server.set_env("LD_PRELOAD", &library().display().to_string());
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

/// The library, compiled once.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/harness/disk.c");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        // Tests run in processes of their own: each builds its own and moves it in place.
        let built = folder.join(format!("disk-{}.so", std::process::id()));
        let outcome = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&built, &source])
            .status()
            .expect("a C compiler");
        assert!(outcome.success(), "the library was not built");
        let library = folder.join("disk.so");
        fs::rename(&built, &library).expect("the library in place");
        library
    })
}
