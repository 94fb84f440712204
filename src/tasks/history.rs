//! The stream of a task, whole: what storage has, then what the log brings.
//!
//! The log is opened before storage is read, so that nothing falls between them: what was
//! committed before is in storage, what is published later is in the log. A reader that the
//! log has left behind goes back to storage and comes again. In storage an entry lies in the
//! timeline, in a segment, or in the archived transcript; they are merged by sequence, and
//! what does not follow without a hole is left for the next look.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{FutureExt, Stream, StreamExt, future::BoxFuture};

use prost::Message;

use super::{
    archive::{Place, read_records},
    model::Task,
    reads,
    transcripts::{self, Role},
};
use crate::{
    blob::{self, Blobs},
    clock::Clock,
    db::Db,
    error::{Error, Kind, Reason, Result},
    id::{Namespace, TaskId},
    pb::{self, Frame, task_event::Body},
    relay::{self, Entry, Log, Ready, Relay, Subscriber},
    twin::{self, Variant},
};

/// Entries of the timeline read at once.
const ENTRIES: u32 = 256;

/// Bytes of segments read at once.
const BYTES: usize = 256 << 10;

/// Looks at storage in a row that may find nothing, before it is a defect: one may come too
/// early, one may meet the archiver.
const MAX_FUTILE: u32 = 3;

/// Between two looks for what another server is about to store.
const LAG: Duration = Duration::from_millis(100);

/// Places for entries that an idle reader keeps.
const IDLE_CAPACITY: usize = 16;

/// Where streams are read from; clones share it.
#[derive(Clone)]
pub struct History {
    /// Storage.
    pub db: Db,
    /// Archived transcripts.
    pub blobs: Blobs,
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
    /// The entries of a namespace's task after a sequence, up to its end.
    ///
    /// # Errors
    /// `NOT_FOUND`, and `OUT_OF_RANGE` when the task ended before `after`.
    pub async fn stream(
        &self,
        namespace: &Namespace,
        id: TaskId,
        after: u64,
        options: Options,
    ) -> Result<TaskStream> {
        let namespace = namespace.clone();
        let read =
            self.db.read(move |tx| Box::pin(async move { reads::get(tx, &namespace, id).await }));
        let task = read.await?;
        if task.state.is_terminal() && after > task.last_sequence {
            return Err(out_of_range(id, task.last_sequence));
        }
        Ok(self.follow(id, after, options))
    }

    /// As [`stream`](Self::stream), for a caller that is known to own the task.
    pub fn follow(&self, task: TaskId, after: u64, options: Options) -> TaskStream {
        let log = self.relay.open(task);
        // What the log has, it has without a hole; so storage is asked only for the rest.
        let source = match log.head() {
            Some(_) => Source::Log,
            None => Source::Storage(self.stored(task, after, Place::default())),
        };
        TaskStream {
            history: self.clone(),
            subscriber: log.subscribe(after),
            task,
            after,
            source,
            place: Place::default(),
            ready: VecDeque::new(),
            n_futile: 0,
            behind: false,
            prefix: if options.tagged { id_field(task) } else { Bytes::new() },
            window: options.window,
            busy: false,
        }
    }

    /// The tokens of an ended task's last attempt, joined, up to `most` bytes, and whether
    /// that cut them.
    pub async fn text(&self, task: &Task, most: usize) -> Result<(String, bool)> {
        let mut entries = self.follow(task.id, task.base_sequence, Options::default());
        let mut text = String::new();
        while let Some(frame) = entries.next().await {
            let event = frame?.event().map_err(Error::internal)?;
            let Some(Body::Token(token)) = event.body else { continue };
            if event.attempt != task.attempt {
                continue;
            }
            if text.len() + token.text.len() > most {
                return Ok((text, true));
            }
            text.push_str(&token.text);
        }
        Ok((text, false))
    }

    /// Brings a log whose entries are made elsewhere up to what storage has.
    ///
    /// # Errors
    /// When storage fails.
    pub async fn bring_up(&self, log: &Arc<Log>) -> Result<()> {
        let mut place = Place::default();
        loop {
            let Some(head) = log.head() else { return Ok(()) };
            let page = match self.page(log.task(), head, place).await {
                Ok(page) => page,
                Err(error) if error.kind() == Kind::OutOfRange => {
                    log.seal();
                    return Ok(());
                }
                Err(error) if error.kind() == Kind::NotFound => {
                    // Its readers find out.
                    log.stir();
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            let frames: Vec<_> =
                page.frames.into_iter().map(|entry| (entry.sequence, entry.frame)).collect();
            log.feed(head + 1, &frames);
            if page.ended {
                log.seal();
            }
            if !page.more {
                return Ok(());
            }
            place = page.place;
        }
    }

    fn stored(&self, task: TaskId, after: u64, place: Place) -> BoxFuture<'static, Result<Page>> {
        let history = self.clone();
        async move { history.page(task, after, place).await }.boxed()
    }

    /// What storage has after a sequence, as far as one look goes.
    async fn page(&self, task: TaskId, after: u64, place: Place) -> Result<Page> {
        let read = self.db.read(move |tx| {
            Box::pin(async move {
                // Statements see what was committed before each of them. An entry moves from
                // a segment to the transcript, so it is looked for in this order.
                let entries = transcripts::entries(tx, task, after, ENTRIES).await?;
                let (segments, more) = transcripts::segments(tx, task, after, BYTES).await?;
                let mut transcript = None;
                if segments.is_empty() {
                    transcript = transcripts::transcript(tx, task).await?;
                }
                let mut last = None;
                if entries.is_empty() {
                    last = Some(transcripts::last_entry(tx, task).await?);
                }
                Ok((entries, segments, more, transcript, last))
            })
        });
        let (entries, segments, more, transcript, last) = read.await?;
        match last {
            Some(None) => return Err(Error::not_found("task", task)),
            Some(Some((last, true))) if after > last => return Err(out_of_range(task, last)),
            Some(Some((_, true))) if segments.is_empty() => {
                return Ok(Page { ended: true, ..Page::default() });
            }
            _ => {}
        }

        let (records, place) = match transcript {
            Some(transcript) if transcript.last > after => {
                match read_records(&self.blobs, &transcript, after, place).await {
                    Ok(found) => found,
                    // It was deleted since the row was read; another look will tell.
                    Err(blob::Error::NotFound(_)) => (Vec::new(), Place::default()),
                    Err(error) => return Err(Error::storage(error)),
                }
            }
            _ => (segments, place),
        };
        // Who archived has stored the end before.
        let full = more || entries.len() == ENTRIES as usize || transcript.is_some();
        let mut page = merge(after, entries, records)?;
        page.more = full && !page.ended && !page.frames.is_empty();
        page.place = place;
        Ok(page)
    }
}

/// What one look at storage found.
#[derive(Debug, Default)]
struct Page {
    /// Contiguous entries.
    frames: VecDeque<Entry>,
    /// The last of them is the task's end, or there is none and the end came before.
    ended: bool,
    /// Storage may well have more.
    more: bool,
    /// Where the transcript goes on.
    place: Place,
}

/// Merges the timeline and the runner's entries, both in order, into one stream without holes.
fn merge(
    after: u64,
    entries: Vec<transcripts::Entry>,
    segments: Vec<transcripts::Segment>,
) -> Result<Page> {
    let mut page = Page::default();
    let mut cursor = after;
    let mut entries = entries.into_iter().peekable();
    let mut runner = segments
        .into_iter()
        .flat_map(|segment| (segment.first..).zip(relay::frames(segment.frames.into())))
        .peekable();
    loop {
        // Stages and artifacts are found twice.
        while entries.next_if(|entry| entry.sequence <= cursor).is_some() {}
        while runner.next_if(|(sequence, _)| *sequence <= cursor).is_some() {}
        if let Some((sequence, frame)) = runner.next_if(|(sequence, _)| *sequence == cursor + 1) {
            cursor = sequence;
            let frame = frame.ok_or_else(|| Error::internal("a segment is damaged"))?;
            page.frames.push_back(Entry::new(cursor, frame));
        } else if let Some(entry) = entries.next_if(|entry| covers(entry, cursor + 1)) {
            cursor = entry.sequence;
            page.ended = entry.role == Role::Ended;
            page.frames.push_back(Entry::new(cursor, entry.frame.into()));
        } else {
            return Ok(page);
        }
    }
}

/// Whether an entry follows what comes before `next`.
fn covers(entry: &transcripts::Entry, next: u64) -> bool {
    if entry.sequence == next || entry.role != Role::Gap {
        return entry.sequence == next;
    }
    let event = pb::TaskEvent::decode(&*entry.frame);
    let body = event.ok().and_then(|event| event.body);
    matches!(body, Some(Body::Gap(gap)) if gap.first_sequence <= next)
}

/// The entries of one task after a position; ends after the task's end, or with an error.
pub struct TaskStream {
    history: History,
    subscriber: Subscriber,
    task: TaskId,
    after: u64,
    source: Source,
    place: Place,
    ready: VecDeque<Entry>,
    /// Looks at storage in a row that found nothing of what must be there.
    n_futile: u32,
    /// Whether storage must have what follows.
    behind: bool,
    prefix: Bytes,
    window: Option<Duration>,
    /// Whether something was handed out since the last rest.
    busy: bool,
}

enum Source {
    Storage(BoxFuture<'static, Result<Page>>),
    Log,
    Rest(BoxFuture<'static, ()>),
    Done,
}

impl TaskStream {
    /// Sequence up to which entries were handed out or are about to be.
    pub fn cursor(&self) -> u64 {
        self.subscriber.cursor()
    }

    fn look(&mut self) {
        let after = self.subscriber.cursor();
        self.source = Source::Storage(self.history.stored(self.task, after, self.place));
    }

    /// Takes over what storage had.
    fn take(&mut self, page: Page) -> Result<()> {
        self.place = page.place;
        match page.frames.back() {
            Some(last) => {
                self.subscriber.seek(last.sequence);
                self.n_futile = 0;
            }
            None => self.n_futile += u32::from(self.behind),
        }
        let lags = self.n_futile > 0 && self.subscriber.log().is_fed();
        if self.n_futile > MAX_FUTILE && !lags {
            let next = self.subscriber.cursor() + 1;
            return Err(Error::internal(format!("entry {next} of {} is nowhere", self.task)));
        }
        self.ready = page.frames;
        match (page.ended, page.more) {
            (true, _) => self.source = Source::Done,
            (false, true) => self.look(),
            // The server that makes it has not stored it yet.
            (false, false) if lags => {
                self.source = Source::Rest(self.history.clock.sleep(LAG).boxed());
            }
            (false, false) => self.source = Source::Log,
        }
        Ok(())
    }

    /// Does what the log says.
    fn poll_log(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        match self.subscriber.poll_fill(cx, &mut self.ready, twin::wanted()) {
            Poll::Ready(Ready::Frames) => {
                self.n_futile = 0;
                self.busy = true;
            }
            Poll::Ready(Ready::Behind) => {
                self.behind = true;
                self.look();
            }
            Poll::Ready(Ready::Stirred) => {
                self.behind = false;
                self.look();
            }
            Poll::Ready(Ready::End) => {
                self.source = Source::Done;
                let last = self.subscriber.log().head().unwrap_or(self.after);
                if self.after > last {
                    return Poll::Ready(Err(out_of_range(self.task, last)));
                }
            }
            Poll::Pending => {
                if self.ready.capacity() > IDLE_CAPACITY {
                    self.ready = VecDeque::new();
                }
                let busy = std::mem::take(&mut self.busy);
                let Some(window) = self.window.filter(|_| busy) else { return Poll::Pending };
                self.source = Source::Rest(self.history.clock.sleep(window).boxed());
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Stream for TaskStream {
    type Item = Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(Entry { frame, twin, .. }) = this.ready.pop_front() {
                let tagged = !this.prefix.is_empty();
                let variant = if tagged { Variant::Tagged } else { Variant::Plain };
                let frame = prefixed(&this.prefix, frame);
                return Poll::Ready(Some(Ok(Frame::with_twin(frame, twin, variant))));
            }
            let done = match &mut this.source {
                Source::Storage(look) => match ready!(look.poll_unpin(cx)) {
                    Ok(page) => this.take(page),
                    Err(error) => Err(error),
                },
                Source::Log => ready!(this.poll_log(cx)),
                Source::Rest(rest) => {
                    ready!(rest.poll_unpin(cx));
                    this.source = Source::Log;
                    Ok(())
                }
                Source::Done => return Poll::Ready(None),
            };
            if let Err(error) = done {
                this.source = Source::Done;
                return Poll::Ready(Some(Err(error)));
            }
        }
    }
}

fn out_of_range(task: TaskId, last: u64) -> Error {
    Error::new(
        Kind::OutOfRange,
        Reason::InvalidParams,
        format!("task `{task}` ended with sequence {last}"),
    )
    .with("task_id", task)
    .with("last_sequence", last)
}

/// Sets `task_id` in an encoded event that has none.
pub fn tag(task: TaskId, frame: &Bytes) -> Bytes {
    prefixed(&id_field(task), frame.clone())
}

/// The field `task_id` of an event. Fields may come in any order, so it may stand before the
/// others.
fn id_field(task: TaskId) -> Bytes {
    pb::TaskEvent { task_id: task.to_string(), ..pb::TaskEvent::default() }.encode_to_vec().into()
}

fn prefixed(prefix: &Bytes, frame: Bytes) -> Bytes {
    if prefix.is_empty() {
        return frame;
    }
    let mut whole = BytesMut::with_capacity(prefix.len() + frame.len());
    whole.put_slice(prefix);
    whole.put_slice(&frame);
    whole.freeze()
}
