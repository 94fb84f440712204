//! Defects to plant, so that it can be seen whether the tests would notice them.
//!
//! Each [`Fault`] breaks one mechanism behind one promise, at the one place that asks for it:
//! `if faults::planted(Fault::ForgetRequestIds) { … }`. Without the feature `faults` the answer is
//! a constant, and nothing of this is in the program. With it, the variable `BATON_FAULT` names
//! the fault of this process and of those that it starts; `.ci/faults` plants one after the other
//! and requires that the tests listed there fail.

macro_rules! faults {
    ($($(#[doc = $doc:literal])+ $fault:ident = $name:literal,)+) => {
        /// A defect that can be planted, after the promise that it breaks.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault {
            $($(#[doc = $doc])+ $fault,)+
        }

        impl Fault {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$fault,)+];

            /// What `BATON_FAULT` calls it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$fault => $name,)+
                }
            }
        }
    };
}

faults! {
    /// P1: callers are answered before the commit.
    AckBeforeCommit = "ack-before-commit",
    /// P1: commits are not synced.
    UnsyncedCommits = "unsynced-commits",
    /// P2: request ids are not kept.
    ForgetRequestIds = "forget-request-ids",
    /// P2: a used request id is not compared with its request.
    IgnoreRequestDigests = "ignore-request-digests",
    /// P3: the leases of silent runners never end.
    KeepSilentLeases = "keep-silent-leases",
    /// P4: attempts after the first repeat its number.
    RepeatAttemptNumbers = "repeat-attempt-numbers",
    /// P5: whatever attempt an event names, it is taken for the one that runs.
    SkipFencing = "skip-fencing",
    /// P6: an ended task can be cancelled and can expire.
    MoveEndedTasks = "move-ended-tasks",
    /// P7: sequences that readers may have seen before a crash are given away again.
    ReuseShownSequences = "reuse-shown-sequences",
    /// P8: a reader that lags goes on where memory begins.
    SkipForLaggards = "skip-for-laggards",
    /// P9: events are taken although earlier ones are missing.
    TakeGappedEvents = "take-gapped-events",
    /// P9: events are acknowledged before they are on stable storage.
    AckUnrecordedEvents = "ack-unrecorded-events",
    /// P10: runners are not told of cancelled attempts.
    CancelUntold = "cancel-untold",
    /// P10: an attempt takes events while the transaction that ends it commits.
    LeakIntoEnds = "leak-into-ends",
    /// P11: failed attempts are repeated without a limit.
    RetryWithoutLimit = "retry-without-limit",
    /// P11: hand-backs count as failures of the task.
    CountHandBacks = "count-hand-backs",
    /// P12: leases are timed by the wall clock.
    LeasesByWallClock = "leases-by-wall-clock",
    /// P12: a start does not look for time limits of waiting tasks.
    ForgetLimitsAtStart = "forget-limits-at-start",
    /// P14: bytes are listed whatever was announced.
    ListUnverifiedUploads = "list-unverified-uploads",
    /// P15: queues are never full.
    AdmitWithoutLimit = "admit-without-limit",
    /// P15: recorded frames stay in memory until the task ends.
    KeepEveryFrame = "keep-every-frame",
    /// P16: a failed commit counts as one.
    AckFailedCommits = "ack-failed-commits",
    /// P16: the server stays ready while storage fails.
    ReadyWithoutStorage = "ready-without-storage",
    /// P18: reads find ended tasks as they were.
    StaleReads = "stale-reads",
    /// P19: leases do not survive a restart.
    EndLeasesAtStart = "end-leases-at-start",
    /// P20: tasks of other namespaces can be read.
    SeeOtherNamespaces = "see-other-namespaces",
    /// P20: a namespace is served until it has nothing left.
    ServeUnfairly = "serve-unfairly",
    /// P22: work is handed out during the drain.
    AssignWhileDraining = "assign-while-draining",
    /// P22: open streams are not ended by the drain.
    LeaveStreamsOpen = "leave-streams-open",
    /// P1: a commit whose fate is unknown counts as done.
    TrustUnknownCommits = "trust-unknown-commits",
    /// P2: a request id that another server remembers meanwhile is no conflict.
    RememberUnchecked = "remember-unchecked",
    /// P3: what a dead server held is lost by nobody.
    LeaveOrphans = "leave-orphans",
    /// P3: delayed tasks are not moved when they are due.
    LeaveDelayed = "leave-delayed",
    /// P4: the lease of an attempt that ended elsewhere stays beside that of the next one.
    KeepSuperseded = "keep-superseded",
    /// P6: rows that changed meanwhile are no conflict.
    IgnoreConflicts = "ignore-conflicts",
    /// P7: sequences that another server has shown are given away again.
    ForgetFarShown = "forget-far-shown",
    /// P8: frames of another server are taken although earlier ones are missing.
    FeedGaps = "feed-gaps",
    /// P8: readers are not sent back for the entries that another server added.
    PassOverEntries = "pass-over-entries",
    /// P10: a server is not told that attempts of its runners were ended elsewhere.
    CancelOnlyHere = "cancel-only-here",
    /// P12: living servers count as dead.
    OrphanLiving = "orphan-living",
    /// P12: a server goes by its own clock, whatever the database's shows.
    TrustOwnClock = "trust-own-clock",
    /// P17: nobody takes over what a dead server had fetched.
    LeaveFetched = "leave-fetched",
    /// P17: what Redis lost is not added anew.
    NeverReconcile = "never-reconcile",
    /// P17: of what Redis lost, that which is to be tried again is not added anew.
    ForgetRetries = "forget-retries",
    /// P18: readers are given rows as this server knew them last.
    ReadAtHand = "read-at-hand",
    /// P23: a panic in a handler ends the connection.
    PanicsEndConnections = "panics-end-connections",
}

/// Whether a fault is planted in this process.
#[cfg(not(feature = "faults"))]
pub const fn planted(_: Fault) -> bool {
    false
}

/// Whether a fault is planted in this process.
///
/// # Panics
/// When `BATON_FAULT` names none.
#[cfg(feature = "faults")]
pub fn planted(fault: Fault) -> bool {
    use std::sync::LazyLock;
    static PLANTED: LazyLock<Option<Fault>> = LazyLock::new(|| {
        let name = crate::config::variable("BATON_FAULT")?;
        let found = Fault::ALL.iter().find(|fault| fault.name() == name);
        assert!(found.is_some(), "BATON_FAULT names no fault: `{name}`");
        found.copied()
    });
    *PLANTED == Some(fault)
}
