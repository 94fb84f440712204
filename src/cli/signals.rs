//! Ctrl-C and SIGTERM, which mean the same to every command.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::exit::{Exit, Failure, Outcome};

/// Both signals, from the moment on that this is made.
pub struct Interrupts(Signal, Signal);

impl Interrupts {
    /// Takes the signals over from the system, which would end the process.
    pub fn new() -> Outcome<Self> {
        let listen = |kind| {
            signal(kind).map_err(|error| {
                Failure::new(Exit::Unexpected, format!("cannot listen for signals: {error}"))
            })
        };
        Ok(Self(listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?))
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}
