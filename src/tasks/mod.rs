//! Tasks.

pub mod model;
