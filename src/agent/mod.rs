//! The runner agent: holds a session with a server and executes attempts on an engine.

pub mod engine;
pub mod outbox;
