//! Compiles `proto/` without a system protoc.
//!
//! Two passes over one descriptor set: messages and clients with plain types, and
//! the server traits with `TaskEvent` replaced by [`Frame`](crate::pb::Frame), the
//! bytes of an event as they were encoded once.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 9] = [
    "baton/v1/annotations.proto",
    "baton/v1/artifacts.proto",
    "baton/v1/errors.proto",
    "baton/v1/events.proto",
    "baton/v1/keys.proto",
    "baton/v1/queues.proto",
    "baton/v1/runners.proto",
    "baton/v1/tasks.proto",
    // Details of errors, which no message names: they travel in `google.protobuf.Any`.
    "google/rpc/error_details.proto",
];

#[expect(clippy::disallowed_methods, reason = "a build script is told its directory so")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=migrations");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(FILES)?;
    fs::write(out.join("baton.bin"), compiler.encode_file_descriptor_set())?;
    let descriptors = compiler.file_descriptor_set();

    let client = out.join("client");
    fs::create_dir_all(&client)?;
    tonic_prost_build::configure()
        .build_server(false)
        // `RunnerService.Connect` would collide with the constructor `connect`.
        .build_transport(false)
        .bytes(".baton.v1")
        // A request's digest needs the same bytes for the same request.
        .btree_map(".baton.v1.TaskSpec")
        .out_dir(&client)
        .compile_fds(descriptors.clone())?;

    let server = out.join("server");
    fs::create_dir_all(&server)?;
    tonic_prost_build::configure()
        .build_client(false)
        .extern_path(".baton.v1.TaskEvent", "crate::pb::Frame")
        .extern_path(".baton.v1", "crate::pb")
        .extern_path(".google", "crate::pb::google")
        .out_dir(&server)
        .compile_fds(descriptors)?;
    Ok(())
}
