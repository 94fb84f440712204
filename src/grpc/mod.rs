//! The gRPC edge: connections, limits, credentials, errors. Knows no SQL and no state.

pub mod auth;
pub mod status;
