//! An S3 server over a directory, for trials of `--artifact-store s3://…` without a cloud:
//! `cargo run --example s3_server [DIRECTORY]`. Not for anything that matters.

#[path = "../src/blob/testing.rs"]
mod server;

use std::path::PathBuf;

use server::{ACCESS_KEY, BUCKET, SECRET_KEY, TestServer};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let dir = std::env::args_os().nth(1).map_or_else(|| "s3-data".into(), PathBuf::from);
    let server = TestServer::start(&dir).await;
    println!("export AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY}");
    println!("export BATON_ARTIFACTS_ENDPOINT=http://{}", server.addr);
    println!("export BATON_ARTIFACTS_PATH_STYLE=true BATON_ARTIFACTS_STORE=s3://{BUCKET}/baton");
    tokio::signal::ctrl_c().await?;
    Ok(())
}
