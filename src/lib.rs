//! Baton turns a fleet of GPU hosts into a service.

pub mod blob;
pub mod clock;
pub mod config;
pub mod db;
pub mod error;
pub mod events;
pub mod id;
pub mod json;
pub mod pb;
pub mod queue;
pub mod relay;
pub mod supervisor;
pub mod telemetry;

pub mod agent;
pub mod bench;
pub mod keys;
pub mod tasks;

pub mod grpc;
pub mod runners;

pub mod dispatch;

pub mod app;
pub mod cli;
pub mod client;
