//! The `baton` command.

use std::process::ExitCode;

/// The system's allocator takes a fifth of a busy server's time; this one takes half of that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    baton::cli::main()
}
