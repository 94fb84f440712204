//! The gRPC edge: connections, limits, credentials, errors. Knows no SQL and no state.

pub mod auth;
mod body;
pub mod health;
pub mod layers;
pub mod methods;
pub mod serve;
pub mod status;

pub use body::{Guarded, code_name};
