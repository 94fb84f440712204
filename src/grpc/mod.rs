//! The gRPC edge: connections, limits, credentials, errors. Knows no SQL and no state.

pub mod auth;
mod body;
pub mod calls;
pub mod health;
pub mod layers;
pub mod methods;
pub mod protocol;
pub mod serve;
pub mod status;
#[cfg(test)]
mod tests;
mod wire;
mod work;

pub use body::{Guarded, code_name};
