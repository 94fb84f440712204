//! The scheduling policy: pure, and without a scan of what waits.
//!
//! Runners that are alike form a profile. A decision takes the least loaded runner with a free
//! credit and asks its profile's [`Ring`] which namespace is next, by weighted virtual time,
//! and which of that namespace's lanes has the best-ranked head. Keys in a ring may be better
//! than what they stand for, never worse: they are corrected when they come up. So taking a
//! task costs a few logarithmic steps, however many tasks wait and runners are connected.

use std::collections::{BTreeSet, HashMap};

use crate::{
    clock::Micros,
    faults::{self, Fault},
    id::TaskId,
};

/// Order of start within a namespace: lower first; the id breaks ties.
pub(super) type Rank = (i64, TaskId);

/// Virtual time that one task costs a namespace of weight 1.
const QUANTUM: u64 = 1 << 20;

/// Idle namespaces that a ring remembers before it forgets those with nothing to remember.
const REMEMBERED: usize = 1_024;

/// A step of priority is worth `step` microseconds of waiting. Ageing thus needs no update: of
/// two tasks the order never changes, and no task that comes more than 200 steps later passes.
pub(super) fn rank(create_time: Micros, priority: i32, id: TaskId, step: i64) -> Rank {
    (create_time.0.saturating_sub(i64::from(priority).saturating_mul(step)), id)
}

/// The creation that gives a task of `priority` this rank.
pub(super) fn create_time_at(rank: Rank, priority: i32, step: i64) -> Micros {
    Micros(rank.0.saturating_add(i64::from(priority).saturating_mul(step)))
}

/// Busy share of a runner in thousandths; the least loaded runner is served first.
pub(super) fn load(available: u32, slots: u32) -> u32 {
    let slots = u64::from(slots.max(available).max(1));
    (1_000 - u64::from(available) * 1_000 / slots) as u32
}

/// Which namespace, and which of its lanes, a profile of runners serves next.
#[derive(Debug, Default)]
pub(super) struct Ring {
    members: HashMap<u32, Member>,
    order: BTreeSet<(u64, u32)>,
    /// Sum of the weights in `order`.
    weight: u64,
    /// Start of the last service.
    now: u64,
    /// Spreads which namespace comes first among equals over the rings.
    salt: u64,
}

#[derive(Debug, Default)]
struct Member {
    /// Virtual time at which its next service starts.
    time: u64,
    weight: u32,
    heads: BTreeSet<(Rank, u32)>,
    keys: HashMap<u32, Rank>,
}

impl Ring {
    pub(super) fn new(salt: u64) -> Self {
        Self { salt, ..Self::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Weight of the namespaces with something to start, one of them aside.
    pub(super) fn rivals(&self, namespace: Option<u32>) -> u64 {
        let own = namespace.and_then(|namespace| self.members.get(&namespace));
        let own = own.filter(|member| !member.heads.is_empty());
        self.weight - own.map_or(0, |member| u64::from(member.weight))
    }

    fn member(&mut self, namespace: u32, weight: u32) -> &mut Member {
        let (now, salt) = (self.now, self.salt);
        self.members.entry(namespace).or_insert_with(|| {
            let mixed = (salt ^ u64::from(namespace)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let time = now + (mixed >> 44) % cost(weight);
            Member { time, weight, ..Member::default() }
        })
    }

    /// Notes a lane's head, unless a better one is noted.
    pub(super) fn offer(&mut self, namespace: u32, weight: u32, lane: u32, head: Rank) {
        let now = self.now;
        let member = self.member(namespace, weight);
        if member.heads.is_empty() {
            member.time = member.time.max(now);
            let time = member.time;
            self.order.insert((time, namespace));
            self.weight += u64::from(weight);
        }
        let member = self.member(namespace, weight);
        match member.keys.get(&lane) {
            Some(key) if *key <= head => {}
            _ => member.set(lane, head),
        }
    }

    /// Replaces the noted head of a lane; `None` takes the lane out.
    pub(super) fn correct(&mut self, namespace: u32, lane: u32, head: Option<Rank>) {
        let Some(member) = self.members.get_mut(&namespace) else { return };
        if let Some(head) = head {
            member.set(lane, head);
            return;
        }
        if let Some(key) = member.keys.remove(&lane) {
            member.heads.remove(&(key, lane));
        }
        if member.heads.is_empty() && self.order.remove(&(member.time, namespace)) {
            self.weight -= u64::from(member.weight);
            self.forget();
        }
    }

    /// The next namespace and its lane, with the noted head.
    pub(super) fn first(&self) -> Option<(u32, u32, Rank)> {
        let (_, namespace) = self.order.first()?;
        let (rank, lane) = self.members.get(namespace)?.heads.first()?;
        Some((*namespace, *lane, *rank))
    }

    /// Charges a namespace for one task.
    pub(super) fn charge(&mut self, namespace: u32, weight: u32) {
        let now = self.now;
        let member = self.member(namespace, weight);
        let start = member.time.max(now);
        let cost = if faults::planted(Fault::ServeUnfairly) { 0 } else { cost(weight) };
        let listed = !member.heads.is_empty();
        let before = std::mem::replace(&mut member.time, start + cost);
        let after = member.time;
        if listed {
            self.order.remove(&(before, namespace));
            self.order.insert((after, namespace));
        }
        self.now = start;
    }

    /// Takes back the charge for one task that was not to be had.
    pub(super) fn refund(&mut self, namespace: u32) {
        let now = self.now;
        let Some(member) = self.members.get_mut(&namespace) else { return };
        let before = member.time;
        member.time = before.saturating_sub(cost(member.weight)).max(now);
        if !member.heads.is_empty() {
            let after = member.time;
            self.order.remove(&(before, namespace));
            self.order.insert((after, namespace));
        }
    }

    /// Bounds the memory of namespaces that have gone. One whose time has passed comes back as
    /// if it had never been here.
    fn forget(&mut self) {
        if self.members.len() > REMEMBERED + 2 * self.order.len() {
            let now = self.now;
            self.members.retain(|_, member| !member.heads.is_empty() || member.time > now);
        }
    }
}

impl Member {
    fn set(&mut self, lane: u32, head: Rank) {
        if let Some(key) = self.keys.insert(lane, head) {
            self.heads.remove(&(key, lane));
        }
        self.heads.insert((head, lane));
    }
}

fn cost(weight: u32) -> u64 {
    (QUANTUM / u64::from(weight.max(1))).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(n: i64) -> Rank {
        (n, TaskId(uuid::Uuid::from_u128(n as u128)))
    }

    proptest! {
        #[test]
        fn backlogged_namespaces_share_by_weight(
            weights in prop::collection::vec(1_u32..20, 2..8),
            salt in any::<u64>(),
            rounds in 1_usize..2_000,
        ) {
            let mut ring = Ring::new(salt);
            for (namespace, weight) in weights.iter().enumerate() {
                ring.offer(namespace as u32, *weight, namespace as u32, head(0));
            }
            let mut served = vec![0_u64; weights.len()];
            for _ in 0..rounds {
                let (namespace, ..) = ring.first().unwrap();
                ring.charge(namespace, weights[namespace as usize]);
                served[namespace as usize] += 1;
            }
            // By normalised service no two are ever more than one task of each apart.
            for (i, a) in weights.iter().enumerate() {
                for (j, b) in weights.iter().enumerate() {
                    let (x, y) = (served[i] as f64 / f64::from(*a), served[j] as f64 / f64::from(*b));
                    let bound = 1.01 / f64::from(*a) + 1.01 / f64::from(*b);
                    prop_assert!((x - y).abs() <= bound, "{served:?} for {weights:?}");
                }
            }
        }

        #[test]
        fn coming_and_going_earns_no_extra_share(salt in any::<u64>()) {
            let mut ring = Ring::new(salt);
            ring.offer(0, 1, 0, head(0));
            let mut served = [0_u32; 2];
            for _ in 0..1_000 {
                ring.offer(1, 1, 1, head(0));
                let (namespace, lane, _) = ring.first().unwrap();
                ring.charge(namespace, 1);
                served[namespace as usize] += 1;
                if namespace == 1 {
                    ring.correct(1, lane, None);
                }
            }
            prop_assert!(served[0].abs_diff(served[1]) <= 2, "{served:?}");
        }
    }

    #[test]
    fn a_namespace_that_was_away_cannot_claim_the_past() {
        let mut ring = Ring::new(1);
        ring.offer(0, 1, 0, head(0));
        for _ in 0..100 {
            ring.charge(0, 1);
        }
        ring.offer(1, 1, 1, head(0));
        let mut served = [0; 2];
        for _ in 0..20 {
            let (namespace, ..) = ring.first().unwrap();
            ring.charge(namespace, 1);
            served[namespace as usize] += 1;
        }
        assert!((9..=11).contains(&served[1]), "{served:?}");
    }

    #[test]
    fn load_counts_the_busy_share() {
        assert_eq!(load(4, 4), 0);
        assert_eq!(load(1, 4), 750);
        assert_eq!(load(8, 4), 0);
        assert_eq!(load(1, 0), 0);
    }
}
