//! What a batch writes.

use std::cmp::Reverse;

use super::batch::Batch;
use crate::{
    db::{Script, Tx},
    error::Result,
    events::store as events,
    instances,
    tasks::store,
};

impl Batch {
    /// What writes everything.
    pub(super) fn script(&self, mut script: Script) -> Result<Script> {
        let mut new = Vec::new();
        let mut moved = Vec::new();
        let mut relied = Vec::new();
        let mut deleted = Vec::new();
        let mut retries = Vec::new();
        let mut elsewhere = Vec::new();
        for (id, row) in &self.rows {
            let Some(was) = row.stored else {
                new.push(&*row.task);
                continue;
            };
            let retry = self.retries.get(id);
            if row.deleted {
                deleted.push(*id);
            } else if was != row.task.revision {
                moved.push((was, &*row.task));
                elsewhere.extend(self.elsewhere.get(id).map(|last| (*id, was, *last)));
            }
            retries.extend(retry.map(|new| (*id, was, *new)));
            if row.deleted || was == row.task.revision && self.recorded.contains(id) {
                relied.push((*id, was));
            }
        }
        // Ids ascend with creation, and so do the pages of the index; and transactions that
        // lock in the same order do not wait for each other in a circle.
        new.sort_unstable_by_key(|task| task.id);
        moved.sort_unstable_by_key(|(_, task)| task.id);
        relied.sort_unstable();
        elsewhere.sort_unstable();
        // The longest of those that begin at the same place.
        let mut segments: Vec<_> = self.segments.iter().collect();
        segments.sort_by_key(|segment| (segment.task, segment.first, Reverse(segment.last)));
        segments.dedup_by_key(|segment| (segment.task, segment.first));
        let mandates: Vec<_> = self.mandates.iter().collect();
        instances::hold(&mut script, &mandates)?;
        store::fence(&mut script, &relied)?;
        store::fence_ends(&mut script, &elsewhere)?;
        store::insert(&mut script, &new)?;
        store::update(&mut script, &moved)?;
        store::link_retries(&mut script, &retries)?;
        store::remove_requests(&mut script, &self.replaced)?;
        store::insert_requests(&mut script, &self.requests)?;
        store::insert_segments(&mut script, &segments)?;
        events::append(&mut script, &self.events)?;
        store::delete(&mut script, &deleted)?;
        Ok(script)
    }

    /// Whether a transaction of this batch took place. It did as a whole or not at all, and every
    /// command that must not be done twice appends an entry.
    pub(super) async fn is_stored(&self, tx: &mut Tx) -> Result<bool> {
        match self.events.first() {
            Some(event) => events::is_stored(tx, event).await,
            None => Ok(false),
        }
    }
}
