//! Libraries that stand between a server's process and its system, built from C.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The library of `tests/it/harness/NAME.c`, built for this process's use.
pub fn library(name: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/it/harness/{name}.c"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // Tests run in processes of their own: each builds its own and moves it in place.
    let built = folder.join(format!("{name}-{}.so", std::process::id()));
    let outcome = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([&built, &source])
        .status()
        .expect("a C compiler");
    assert!(outcome.success(), "the library was not built");
    let library = folder.join(format!("{name}.so"));
    fs::rename(&built, &library).expect("the library in place");
    library
}
