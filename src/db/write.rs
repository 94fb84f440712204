//! Transactions that write, and what is known of their outcome.

use futures_util::future::BoxFuture;

#[cfg(feature = "postgres")]
use super::postgres;
use super::{Db, Script, Tx, sqlite};
use crate::{
    error::{Error, Result},
    faults::{self, Fault},
};

/// A connection was lost during a commit: whether it took place is not known.
#[derive(Debug, thiserror::Error)]
#[error("the connection was lost during the commit: its outcome is not known")]
pub(super) struct Unknown(#[source] pub(super) Error);

/// Whether the error leaves open what became of a commit.
pub fn is_unknown(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<Unknown>)
}

/// A transaction that writes. Dropped without [`commit`](Self::commit), everything it did is
/// undone.
pub struct Write<'a> {
    pub(super) writing: Writing<'a>,
    pub(super) db: &'a Db,
}

pub(super) enum Writing<'a> {
    Sqlite(sqlite::Write<'a>),
    #[cfg(feature = "postgres")]
    Postgres(postgres::Write<'a>),
}

impl Write<'_> {
    /// The transaction.
    pub fn tx(&mut self) -> &mut Tx {
        match &mut self.writing {
            Writing::Sqlite(write) => write.tx(),
            #[cfg(feature = "postgres")]
            Writing::Postgres(write) => write.tx(),
        }
    }

    /// Runs `f` here, for no longer than the engine lets a call take.
    async fn limited<T, F>(&mut self, f: F) -> Result<T>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T>> + Send,
    {
        match &mut self.writing {
            Writing::Sqlite(write) => f(write.tx()).await,
            #[cfg(feature = "postgres")]
            Writing::Postgres(write) => postgres::limited(f(write.tx())).await,
        }
    }

    /// Runs `f` here and commits, or undoes everything.
    pub(super) async fn transact<T, F>(mut self, f: F) -> Result<T>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T>> + Send,
    {
        match self.limited(f).await {
            Ok(value) => self.commit().await.map(|()| value),
            Err(error) => Err(self.rollback(error).await),
        }
    }

    /// Commits: what was written is on stable storage afterwards.
    pub async fn commit(self) -> Result<()> {
        let done = match self.writing {
            Writing::Sqlite(write) => write.commit().await,
            #[cfg(feature = "postgres")]
            Writing::Postgres(write) => write.commit().await,
        };
        acknowledged(self.db.answered(done).await)
    }

    /// Runs a script and commits, or undoes everything.
    pub async fn commit_with(self, script: Script) -> Result<()> {
        if let Err(error) = self.db.arrive().await {
            // As far as the caller can know, the commit may have arrived.
            return acknowledged(Err(Error::storage(Unknown(error))));
        }
        let done = match self.writing {
            Writing::Sqlite(write) => write.commit_with(script).await,
            #[cfg(feature = "postgres")]
            Writing::Postgres(write) => write.commit_with(script).await,
        };
        acknowledged(self.db.answered(done).await)
    }

    /// Undoes everything, because of `error`.
    pub async fn rollback(self, error: Error) -> Error {
        match self.writing {
            Writing::Sqlite(write) => write.rollback(error).await,
            #[cfg(feature = "postgres")]
            Writing::Postgres(write) => write.rollback(error).await,
        }
    }
}

/// The outcome of a commit.
fn acknowledged(outcome: Result<()>) -> Result<()> {
    if faults::planted(Fault::AckFailedCommits) { Ok(()) } else { outcome }
}
