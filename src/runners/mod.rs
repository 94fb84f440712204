//! Runners: who is connected, what they hold, and the protocol that they speak.

pub mod protocol;
