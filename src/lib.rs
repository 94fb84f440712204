//! Baton turns a fleet of GPU hosts into a service.

pub mod clock;
pub mod error;
pub mod id;
pub mod pb;
pub mod supervisor;

pub mod keys;
pub mod tasks;

pub mod grpc;
pub mod runners;
