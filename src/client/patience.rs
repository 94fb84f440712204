//! How long whoever moves bytes goes on trying while nothing moves.

use std::time::Duration;

use tokio::time::Instant;
use tonic::{Code, Status};

use super::{Client, LONGEST_BACKOFF};
use crate::{
    error::{Reason, reason_name},
    grpc::status,
};

/// Counts failures since the last progress.
pub struct Patience<'a> {
    client: &'a Client,
    failing_since: Option<Instant>,
    n_failures: u32,
}

impl<'a> Patience<'a> {
    /// Patience that nothing has tried yet.
    pub fn new(client: &'a Client) -> Self {
        Self { client, failing_since: None, n_failures: 0 }
    }

    /// Something moved: what failed before is forgotten.
    pub fn renew(&mut self) {
        (self.failing_since, self.n_failures) = (None, 0);
    }

    /// Waits until another try makes sense.
    ///
    /// # Errors
    /// With what failed, when trying again cannot help or has been tried for long enough.
    pub async fn bear(&mut self, error: Status) -> Result<(), Status> {
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        if !passes(&error) || since.elapsed() > self.client.patience {
            return Err(error);
        }
        if self.n_failures == 0 {
            tracing::info!(code = ?error.code(), why = error.message(), "a transfer goes on later");
        }
        let least = status::retry_delay(&error).unwrap_or(Duration::ZERO).min(LONGEST_BACKOFF);
        let wait = least + self.client.backoff(self.n_failures);
        self.n_failures += 1;
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// Whether what failed so may go well later: the server said "not now", is still busy with what
/// broke off, or the connection broke and nobody said anything.
pub fn passes(error: &Status) -> bool {
    let reason = status::error_reason(error);
    match error.code() {
        Code::Unavailable => true,
        Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded => {
            reason.is_none()
        }
        Code::ResourceExhausted => {
            reason.is_some_and(|(name, _)| name == reason_name(Reason::Overloaded))
        }
        Code::FailedPrecondition => {
            reason.is_some_and(|(_, facts)| facts.get("state").is_some_and(|state| state == "BUSY"))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client::endpoint,
        error::{Error, Kind},
    };

    #[test]
    fn what_passes_is_told_from_what_does_not() {
        let refused = |kind, reason| Status::from(Error::new(kind, reason, "no"));
        let busy = Error::state_conflict("upload", "u", "BUSY", "being written");
        for passing in [
            Error::storage("the bucket is away").into(),
            Status::unknown("transport error"),
            Status::deadline_exceeded("no answer"),
            refused(Kind::ResourceExhausted, Reason::Overloaded),
            busy.into(),
        ] {
            assert!(passes(&passing), "{passing}");
        }
        let complete = Error::state_conflict("upload", "u", "COMPLETE", "complete");
        for lasting in [
            Error::internal("a defect").into(),
            Error::not_found("artifact", "a").into(),
            refused(Kind::FailedPrecondition, Reason::LeaseLost),
            refused(Kind::ResourceExhausted, Reason::AdmissionReject),
            refused(Kind::PermissionDenied, Reason::PermissionDenied),
            complete.into(),
        ] {
            assert!(!passes(&lasting), "{lasting}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_after_its_time_without_progress_and_no_sooner() {
        let channel = endpoint("127.0.0.1:1").unwrap().connect_lazy();
        let bound = Duration::from_mins(2);
        let client = Client::over(channel, None).unwrap().with_patience(bound);
        let mut patience = Patience::new(&client);
        for _ in 0..2 {
            let begun = Instant::now();
            while patience.bear(Status::unavailable("not now")).await.is_ok() {
                assert!(begun.elapsed() <= bound + LONGEST_BACKOFF);
            }
            assert!(begun.elapsed() > bound);
            patience.renew();
        }
        assert!(patience.bear(Status::not_found("gone")).await.is_err());
        let endless = client.clone().with_patience(Duration::MAX);
        let (mut patience, begun) = (Patience::new(&endless), Instant::now());
        while begun.elapsed() < 100 * bound {
            patience.bear(Status::unavailable("not now")).await.unwrap();
        }
    }
}
