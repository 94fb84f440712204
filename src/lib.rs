//! Baton turns a fleet of GPU hosts into a service.
//!
//! Clients submit *tasks* over gRPC and watch tokens arrive; *runners* on the hosts dial out over
//! two bidirectional streams, receive leased work, and stream tokens and progress back. One
//! binary holds the server, the runner agent and the command line.
//!
//! ```text
//!  clients            the server                                          runners
//!  ───────   ┌─────────────────────────────────────────────────────────┐  ───────
//!  submit ──►│ grpc ─► tasks::service ─► queue::admit ─► tasks::ledger │
//!            │                                    one commit ▼         │
//!            │                     queue ◄──────────── SQLite          │
//!            │                       ▼                    ▲            │
//!            │                    dispatch ─► ledger::start            │
//!            │                                    ▼                    │   Assign
//!            │                              runners::session ──────────┼──────────►
//!  stream ◄──│ tasks::history ◄── relay::Log ◄────┘ ◄──────────────────┼─ tokens, Finish
//!            │                       └─► tasks::recorder ─► SQLite     │
//!            └─────────────────────────────────────────────────────────┘
//! ```
//!
//! # A submit, step by step
//!
//! 1. [`grpc`] accepts the connection, finds the [`keys::Principal`] of the credential, and calls
//!    [`tasks::service`]. What comes as JSON was made a gRPC request by [`gateway`] before, and
//!    takes the same way.
//! 2. [`tasks::convert`] checks the request and names every bad field; [`queue`] grants a place or
//!    refuses early.
//! 3. [`tasks::ledger`] takes everything that waits, applies the pure [`tasks::state`] to the rows,
//!    and writes rows and timeline entries in one transaction of [`db`]. After the commit, which
//!    is synced, it tells the queue, the relay and the watchers, and only then answers.
//! 4. [`dispatch`] matches the queue with the runners' credits, has the ledger start the attempts
//!    (each start is a lease with a larger attempt number), and hands them to [`runners`].
//! 5. The session of the runner sends `Assign`.
//!
//! # A result, step by step
//!
//! 1. The agent ([`agent`]) runs the engine and sends whatever all its attempts made since the last
//!    message in one `Output` message.
//! 2. [`runners`] appends each event to the task's [`relay`] log: it is encoded once, numbered as
//!    *base + the runner's own index*, and every subscriber's cursor can read it.
//! 3. [`tasks::recorder`] writes what is new to storage in the background, and only then is it
//!    acknowledged to the runner, which keeps it until then.
//! 4. `Finish` freezes the log; the ledger commits the end together with the last entries, and the
//!    log is sealed. [`tasks::archive`] moves the transcript to a [`blob`] file later.
//! 5. A reader that comes late gets the same bytes from storage ([`tasks::history`]).
//!
//! Files go another way: [`artifacts`] takes them by stream or by one HTTP request, keeps them under
//! their digest in a [`blob`] store, and lists them once they are whole. A runner lists one as output
//! of its task by the receipt that it got for the bytes.
//!
//! # Several servers
//!
//! Where the database is shared, each server is an instance ([`instances`]). The row of a running
//! task says which instance holds its runner, and no other has a say about that attempt. A runner
//! that comes back to another instance takes its attempts along, by one conditional update each
//! ([`runners`]); what a dead instance held and nobody came back with is lost by [`dispatch`].
//! Readers wait at the log of their task wherever it runs: [`crossing`] fills it from storage, and
//! from the instance that makes it. What instances tell each other may be lost; a sweep stands
//! behind each hint.
//!
//! They may share a Redis too. A task that finds no free runner where it is accepted
//! then waits in a backlog in Redis, and each server fetches from it what its own runners can start
//! at once: `backlog`. The rows stay the truth, and a start is a conditional update of one.
//!
//! # Invariants
//!
//! - The database is the truth. Queue, relay, sessions and timers live in memory and are rebuilt
//!   from it; whatever they are told comes after a commit and may be lost, and a sweep makes it
//!   good.
//! - Only [`tasks::state::apply`] moves a task's state, and only the ledger writes it.
//! - `(task, attempt)` is the fencing token: whatever comes under an attempt that does not hold
//!   the lease changes nothing and is answered with `LEASE_LOST`.
//! - No sequence is ever given to two different entries; no reader sees one above the row's
//!   reservation.
//! - A stream never blocks its producer: a reader is a cursor, and one that lags reads storage.
//! - Tokens are never written one by one, and never to the timeline.
//! - Nothing but [`supervisor`] spawns, nothing but [`clock`] knows the time, nothing but
//!   [`config`] reads the environment.
//!
//! # Where things are
//!
//! Kernels know no noun of the domain: [`clock`], [`id`], [`error`], [`db`], [`events`],
//! [`queue`], [`blob`], [`relay`], [`twin`]. Slices have one noun each, and the same file names mean the same
//! role in each: `model`, `state`, `store`, `convert`, `service`. Edges know no SQL: [`grpc`],
//! [`gateway`], [`facades`], [`agent`]. Imports point from edges to slices to kernels;
//! `tests/architecture.rs` holds the code to it. [`faults`] are defects that tests plant.

/// Tests that are compiled here too name the crate as from outside.
#[cfg(test)]
extern crate self as baton;

pub mod blob;
pub mod clock;
pub mod config;
pub mod db;
pub mod error;
pub mod events;
pub mod faults;
pub mod id;
pub mod json;
pub mod near;
pub mod pb;
pub mod queue;
#[cfg(feature = "redis")]
pub mod redis;
pub mod relay;
pub mod supervisor;
pub mod telemetry;
pub mod tls;
pub mod twin;

pub mod agent;
pub mod bench;
pub mod instances;
pub mod keys;

pub mod artifacts;
pub mod moving;
pub mod tasks;

pub mod facades;
pub mod gateway;
pub mod grpc;
pub mod runners;

#[cfg(feature = "redis")]
pub mod backlog;
pub mod crossing;
pub mod dispatch;
pub mod queues;

pub mod app;
pub mod cli;
pub mod client;

/// The client of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
