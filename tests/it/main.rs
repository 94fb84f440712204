//! The promises of `DESIGN.md` section 2, each as tests over real gRPC: one file per theme, each
//! test named as the claim, with the promise's number in its doc comment.

#![expect(
    clippy::disallowed_methods,
    reason = "tests drive the server from outside: they spawn, and measure with the real clock"
)]
#![allow(dead_code, reason = "the harness offers more than each moment's tests use")]

mod agent;
mod agent_commands;
mod artifacts;
mod auth;
mod browsers;
mod cluster;
mod command_line;
mod commands;
mod connect;
mod determinism;
mod doctor;
mod failover;
mod fal;
mod fault_table;
mod gateway;
mod harness;
mod jobs;
mod moving;
mod openai;
mod overload;
mod postgres;
mod runner_command;
mod runners;
mod shutdown;
mod statements;
mod storage;
mod streams;
mod tasks;
mod tls;
mod tokens;
mod twins;
mod wall_clock;
