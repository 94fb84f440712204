//! Tokens across servers: readers here of tasks that run elsewhere, and readers elsewhere of tasks
//! that run here.
//!
//! ```text
//!  this server                                   the server that holds the runner
//!  reader ──► relay::Log ◄── Follow ── Follow ──► Export ◄── relay::Log ◄── runner
//!                  ▲            │                    │            │
//!                  └── frames ──┼────────────────────┘            ▼
//!                               └──── rows, segments ◄──────── recorder
//! ```
//!
//! A reader waits at the log of its task, whoever makes its entries. [`Follow`] finds out which
//! logs have readers and no attempt here, and brings them up to what storage has, again and again.
//! That alone is enough, and all there is without a wire between the servers. With one, the server
//! that holds the runner is asked for the frames too and sends them as they are made; they come
//! earlier than storage has them, and what is lost on the way is read there.

#[cfg(feature = "redis")]
mod carry;
#[cfg(feature = "redis")]
mod export;
mod follow;
#[cfg(test)]
#[cfg(feature = "redis")]
mod tests;

pub use self::follow::{Follow, Heard};
#[cfg(feature = "redis")]
pub use self::{carry::Carrier, export::Export};
