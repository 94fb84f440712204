//! A task's stream for a reader: what storage has, then what the live log brings.
//!
//! The log is opened before storage is read, so nothing falls between the two. The live part
//! copies no frame and allocates nothing for one.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{Stream, future::BoxFuture};

use super::{model::Task, reads};
use crate::{
    clock::{Clock, Micros},
    db::Db,
    error::{Error, Kind, Reason, Result},
    events::{self, frame},
    id::{Namespace, TaskId},
    pb::{self, Frame, task_event::Body},
    relay::{self, Ready, Relay, Subscriber},
};

/// Timeline entries and segments read at once.
const PAGE: u32 = 256;

/// Opens streams; clones share their parts.
#[derive(Clone)]
pub struct History {
    /// Storage.
    pub db: Db,
    /// Live logs.
    pub relay: Relay,
    /// Time.
    pub clock: Clock,
}

/// How a stream is delivered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Frames carry the task's id.
    pub tagged: bool,
    /// Least time between deliveries.
    pub window: Option<Duration>,
}

impl History {
    /// A stream of the task's entries after `after`. It ends after the terminal entry.
    ///
    /// # Errors
    /// NOT_FOUND, and OUT_OF_RANGE when the task has ended before `after + 1`.
    pub async fn stream(
        &self,
        namespace: &Namespace,
        id: TaskId,
        after: u64,
        options: Options,
    ) -> Result<TaskStream> {
        let log = self.relay.open(id);
        let namespace = namespace.clone();
        let task = self
            .db
            .read(move |tx| Box::pin(async move { reads::get(tx, &namespace, id).await }))
            .await?;
        let last = task.state.is_terminal().then_some(task.last_sequence);
        if let Some(last) = last.filter(|last| after > *last) {
            return Err(Error::new(
                Kind::OutOfRange,
                Reason::InvalidParams,
                format!("task `{id}` ended at sequence {last}; nothing follows {after}"),
            )
            .with("last_sequence", last));
        }
        let source = Source { history: self.clone(), task: id, last };
        Ok(TaskStream {
            page: Some(source.clone().page(after)),
            source,
            live: log.subscribe(after),
            ready: VecDeque::new(),
            options,
            pause: None,
            ended: false,
        })
    }

    /// The tokens of an ended task's last attempt, joined, up to `most` bytes, and whether that
    /// cut them.
    pub async fn text(&self, task: &Task, most: usize) -> Result<(String, bool)> {
        let last = Some(task.last_sequence);
        let source = Source { history: self.clone(), task: task.id, last };
        let mut cursor = task.base_sequence;
        let mut text = String::new();
        while cursor < task.last_sequence {
            let page = source.clone().page(cursor).await?;
            let Some((last, _)) = page.last() else { break };
            cursor = *last;
            for (_, bytes) in &page {
                let event = Frame(bytes.clone()).event().map_err(Error::internal)?;
                if event.attempt != task.attempt {
                    continue;
                }
                if let Some(Body::Token(token)) = event.body {
                    if text.len() + token.text.len() > most {
                        return Ok((text, true));
                    }
                    text.push_str(&token.text);
                }
            }
        }
        Ok((text, false))
    }
}

type Entries = Vec<(u64, Bytes)>;

/// Storage's part of a stream.
#[derive(Clone)]
struct Source {
    history: History,
    task: TaskId,
    /// The terminal entry, when the task had ended.
    last: Option<u64>,
}

impl Source {
    /// Entries that follow `after` without a hole; empty when storage has no more.
    fn page(self, after: u64) -> BoxFuture<'static, Result<Entries>> {
        Box::pin(async move {
            let task = self.task;
            let read = self.history.db.read(move |tx| {
                Box::pin(async move {
                    let rows = events::store::list(tx, task, after, PAGE).await?;
                    let segments = reads::segments_after(tx, task, after, PAGE).await?;
                    Ok((rows, segments))
                })
            });
            let (rows, segments) = read.await?;
            let rows = rows.into_iter().map(|row| (row.sequence, row.frame)).collect();
            Ok(merge(after, rows, segments))
        })
    }
}

/// Joins timeline entries and segments (first sequence, frames) into entries that follow
/// `after`. Where both have nothing but something comes later, history was dropped, and a gap
/// says so.
fn merge(after: u64, rows: Entries, segments: Vec<(u64, Bytes)>) -> Entries {
    let mut rows = VecDeque::from(rows);
    let mut runner_made: VecDeque<(u64, Bytes)> = segments
        .into_iter()
        .flat_map(|(first, frames)| (first..).zip(relay::frames(frames).flatten()))
        .filter(|(sequence, _)| *sequence > after)
        .collect();
    let full = rows.len() as u32 == PAGE;
    let last_row = rows.back().map(|(sequence, _)| *sequence);
    let mut cursor = after;
    let mut entries = Vec::new();
    loop {
        while runner_made.front().is_some_and(|(sequence, _)| *sequence <= cursor) {
            runner_made.pop_front();
        }
        while rows.front().is_some_and(|(sequence, _)| *sequence <= cursor) {
            rows.pop_front();
        }
        let next = match (runner_made.front(), rows.front()) {
            (Some(made), Some(row)) if made.0 < row.0 => runner_made.pop_front(),
            (Some(_), None) => runner_made.pop_front(),
            (_, Some(_)) => rows.pop_front(),
            (None, None) => break,
        };
        let Some((sequence, bytes)) = next else { break };
        // Behind the last row of a full page, rows may be missing here.
        if full && last_row.is_some_and(|last| sequence > last) {
            break;
        }
        let first = first_of(sequence, &bytes);
        if first > cursor + 1 {
            entries.push((first - 1, dropped(cursor + 1, first - 1)));
        }
        cursor = sequence;
        entries.push((sequence, bytes));
    }
    entries
}

/// The first sequence that an entry stands for.
fn first_of(sequence: u64, bytes: &Bytes) -> u64 {
    match Frame(bytes.clone()).event().ok().and_then(|event| event.body) {
        Some(Body::Gap(gap)) => gap.first_sequence.min(sequence),
        _ => sequence,
    }
}

fn dropped(first: u64, last: u64) -> Bytes {
    let reason = "dropped by retention".to_owned();
    let body = Body::Gap(pb::GapEvent { first_sequence: first, reason });
    frame::encode(last, Micros::default(), 0, body)
}

/// The entries of one task, for one reader.
pub struct TaskStream {
    source: Source,
    live: Subscriber,
    /// A read of storage under way.
    page: Option<BoxFuture<'static, Result<Entries>>>,
    ready: VecDeque<(u64, Bytes)>,
    options: Options,
    pause: Option<BoxFuture<'static, ()>>,
    ended: bool,
}

impl Stream for TaskStream {
    type Item = Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some((_, bytes)) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(this.deliver(bytes))));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            if let Some(pause) = &mut this.pause {
                std::task::ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            if let Some(page) = &mut this.page {
                let page = std::task::ready!(page.as_mut().poll(cx));
                this.page = None;
                match page {
                    Ok(page) => this.take(page),
                    Err(error) => {
                        this.ended = true;
                        return Poll::Ready(Some(Err(error)));
                    }
                }
                continue;
            }
            match std::task::ready!(this.live.poll_fill(cx, &mut this.ready)) {
                Ready::Frames => this.rest(),
                Ready::Behind => this.read_on(),
                Ready::End => this.ended = true,
            }
        }
    }
}

impl TaskStream {
    fn read_on(&mut self) {
        self.page = Some(self.source.clone().page(self.live.cursor()));
    }

    /// Takes what storage had and decides what to read next.
    fn take(&mut self, page: Entries) {
        let more = page.len() as u32 >= PAGE;
        if let Some((last, _)) = page.last() {
            self.live.seek(*last);
        }
        self.ready.extend(page);
        if self.source.last.is_some_and(|last| self.live.cursor() >= last) {
            self.ended = true;
        } else if more || self.source.last.is_some() && !self.ready.is_empty() {
            self.read_on();
        } else if self.source.last.is_some() {
            // The rows went while they were read.
            self.ended = true;
        }
    }

    /// Lets the next entries gather for a while, when that is wanted.
    fn rest(&mut self) {
        if let Some(window) = self.options.window {
            self.pause = Some(Box::pin(self.source.history.clock.sleep(window)));
        }
    }

    fn deliver(&self, bytes: Bytes) -> Frame {
        if self.options.tagged { Frame(tag(self.source.task, &bytes)) } else { Frame(bytes) }
    }
}

/// Sets `task_id` in an encoded event that has none: field 1 may stand before the others.
pub fn tag(task: TaskId, bytes: &Bytes) -> Bytes {
    let id = task.to_string();
    let mut tagged = BytesMut::with_capacity(2 + id.len() + bytes.len());
    tagged.put_u8(1 << 3 | 2);
    tagged.put_u8(id.len() as u8);
    tagged.put_slice(id.as_bytes());
    tagged.put_slice(bytes);
    tagged.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(sequence: u64) -> (u64, Bytes) {
        let body = Body::Token(pb::TokenEvent { text: sequence.to_string(), index: 0 });
        (sequence, frame::encode(sequence, Micros(0), 1, body))
    }

    fn segment(first: u64, last: u64) -> (u64, Bytes) {
        let mut frames = BytesMut::new();
        (first..=last).for_each(|sequence| relay::put_frame(&mut frames, &entry(sequence).1));
        (first, frames.freeze())
    }

    fn sequences(entries: &Entries) -> Vec<u64> {
        entries.iter().map(|(sequence, _)| *sequence).collect()
    }

    #[test]
    fn rows_and_segments_are_merged_in_order_each_sequence_once() {
        let rows = vec![entry(1), entry(2), entry(4), entry(8)];
        let merged = merge(0, rows.clone(), vec![segment(3, 5), segment(5, 7)]);
        assert_eq!(sequences(&merged), [1, 2, 3, 4, 5, 6, 7, 8]);
        let merged = merge(5, vec![entry(8)], vec![segment(5, 7)]);
        assert_eq!(sequences(&merged), [6, 7, 8]);
    }

    #[test]
    fn a_hole_in_storage_is_told_as_a_gap() {
        let merged = merge(0, vec![entry(1), entry(5)], Vec::new());
        assert_eq!(sequences(&merged), [1, 4, 5]);
        assert_eq!(first_of(4, &merged[1].1), 2);
    }

    #[test]
    fn a_tagged_frame_is_the_same_event_with_its_task() {
        let id: TaskId = "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap();
        let plain = Frame(entry(3).1);
        let tagged = Frame(tag(id, &plain.0)).event().unwrap();
        assert_eq!(tagged.task_id, id.to_string());
        assert_eq!(pb::TaskEvent { task_id: String::new(), ..tagged }, plain.event().unwrap());
    }
}
