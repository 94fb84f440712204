//! The waiting tasks of one namespace in one class, in order of rank.
//!
//! Within a priority, rank order is order of creation, so a lane is a list for each priority:
//! its head is the best of their heads, and the oldest task of the lowest priority is at hand.

use std::collections::{BTreeMap, VecDeque};

use super::policy::{self, Rank};
use crate::{clock::Micros, id::TaskId};

/// Longest chunk of an [`Ordered`].
const CHUNK: usize = 512;

/// When a task was created, and its id to break ties.
type Key = (Micros, TaskId);

/// A sorted list that also counts: the first key, insert and remove cost a binary search and
/// a short move, the number of keys below one costs a walk over the chunks.
#[derive(Debug, Default)]
struct Ordered {
    /// None is empty.
    chunks: VecDeque<VecDeque<Key>>,
}

impl Ordered {
    fn first(&self) -> Option<Key> {
        self.chunks.front()?.front().copied()
    }

    /// The chunk that holds `key` or would.
    fn chunk(&self, key: Key) -> usize {
        let index = self.chunks.partition_point(|chunk| chunk.back().is_some_and(|k| *k < key));
        index.min(self.chunks.len().saturating_sub(1))
    }

    fn insert(&mut self, key: Key) {
        let index = self.chunk(key);
        let Some(chunk) = self.chunks.get_mut(index) else {
            self.chunks.push_back(VecDeque::from([key]));
            return;
        };
        let Err(at) = chunk.binary_search(&key) else { return };
        if chunk.len() < CHUNK {
            chunk.insert(at, key);
        } else if at == CHUNK {
            self.chunks.insert(index + 1, VecDeque::from([key]));
        } else {
            let upper = chunk.split_off(CHUNK / 2);
            self.chunks.insert(index + 1, upper);
            self.insert(key);
        }
    }

    fn remove(&mut self, key: Key) -> bool {
        let index = self.chunk(key);
        let Some(chunk) = self.chunks.get_mut(index) else { return false };
        let Ok(at) = chunk.binary_search(&key) else { return false };
        chunk.remove(at);
        if chunk.is_empty() {
            self.chunks.remove(index);
        }
        true
    }

    fn before(&self, key: Key) -> usize {
        let index = self.chunk(key);
        let Some(chunk) = self.chunks.get(index) else { return 0 };
        let inside = chunk.partition_point(|k| *k < key);
        self.chunks.iter().take(index).map(VecDeque::len).sum::<usize>() + inside
    }
}

/// The waiting tasks of one namespace in one class.
#[derive(Debug)]
pub(super) struct Lane {
    /// Id of the class.
    pub class: u32,
    /// Id of the namespace.
    pub namespace: u32,
    /// Id of the bucket.
    pub bucket: u32,
    lists: BTreeMap<i32, Ordered>,
    len: usize,
    /// Rank that a step of priority is worth, in microseconds.
    step: i64,
}

impl Lane {
    pub(super) fn new(class: u32, namespace: u32, bucket: u32, step: i64) -> Self {
        Self { class, namespace, bucket, lists: BTreeMap::new(), len: 0, step }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a task; true when it is the new head.
    pub(super) fn insert(&mut self, create_time: Micros, priority: i32, id: TaskId) -> bool {
        let rank = policy::rank(create_time, priority, id, self.step);
        let ahead = self.head().is_none_or(|head| rank < head);
        self.lists.entry(priority).or_default().insert((create_time, id));
        self.len += 1;
        ahead
    }

    pub(super) fn remove(&mut self, create_time: Micros, priority: i32, id: TaskId) {
        let Some(list) = self.lists.get_mut(&priority) else { return };
        if list.remove((create_time, id)) {
            self.len -= 1;
        }
        if list.chunks.is_empty() {
            self.lists.remove(&priority);
        }
    }

    /// The best rank. There are at most 201 priorities, and usually a few.
    pub(super) fn head(&self) -> Option<Rank> {
        self.lists
            .iter()
            .filter_map(|(priority, list)| {
                let (create_time, id) = list.first()?;
                Some(policy::rank(create_time, *priority, id, self.step))
            })
            .min()
    }

    /// How many tasks have a better rank.
    pub(super) fn before(&self, rank: Rank) -> usize {
        self.lists
            .iter()
            .map(|(priority, list)| {
                list.before((policy::create_time_at(rank, *priority, self.step), rank.1))
            })
            .sum()
    }

    /// The oldest task of the lowest priority.
    pub(super) fn lowest(&self) -> Option<(i32, Micros, TaskId)> {
        let (priority, list) = self.lists.first_key_value()?;
        let (create_time, id) = list.first()?;
        Some((*priority, create_time, id))
    }

    /// Creation of the oldest task.
    pub(super) fn oldest(&self) -> Option<Micros> {
        self.lists.values().filter_map(|list| Some(list.first()?.0)).min()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_lane_counts_and_orders_like_a_sorted_set(
            ops in prop::collection::vec((0_i64..400, -3_i32..4, any::<bool>()), 1..3_000),
        ) {
            let step = 7;
            let mut lane = Lane::new(0, 0, 0, step);
            let mut model = BTreeSet::new();
            for (time, priority, add) in ops {
                let id = TaskId(uuid::Uuid::from_u128((time as u128) << 8 | (priority + 3) as u128));
                let rank = policy::rank(Micros(time), priority, id, step);
                if add && !model.contains(&rank) {
                    let ahead = model.first().is_none_or(|first| rank < *first);
                    prop_assert_eq!(lane.insert(Micros(time), priority, id), ahead);
                    model.insert(rank);
                } else {
                    lane.remove(Micros(time), priority, id);
                    model.remove(&rank);
                }
                prop_assert_eq!(lane.len(), model.len());
                prop_assert_eq!(lane.head(), model.first().copied());
                prop_assert_eq!(lane.before(rank), model.range(..rank).count());
            }
        }
    }

    #[test]
    fn a_long_lane_keeps_its_order_through_chunk_splits() {
        let id = |n: i64| TaskId(uuid::Uuid::from_u128(n as u128));
        let mut lane = Lane::new(0, 0, 0, 1);
        for n in (0..5_000).step_by(2).chain((0..5_000).skip(1).step_by(2)) {
            lane.insert(Micros(n), 0, id(n));
        }
        assert_eq!(lane.before((4_321, id(4_321))), 4_321);
        for n in 0..5_000 {
            assert_eq!(lane.head(), Some((n, id(n))));
            lane.remove(Micros(n), 0, id(n));
        }
        assert!(lane.is_empty());
    }
}
