//! From a stream to an installation.

use std::collections::BTreeMap;

use futures_util::TryStreamExt as _;
use sha2::Digest as _;
use tokio::io::AsyncRead;

use super::{
    Bytes, FORMAT, Files, Manifest, OF_SERVERS, TableHead, Totals, engine_name, line,
    tape::{self, damaged},
};
use crate::{
    blob::{self, Digest, Key, Store, hash::Hasher},
    clock::Micros,
    db::{
        Engine, Location,
        transfer::{self, Cell, Column, Table, Tally, Target},
    },
    error::{Error, Kind, Reason, Result},
    id::{Entropy, UploadId},
};

/// Most rows of one statement, and most bytes of their lines.
const ROWS: usize = 1_000;
const ROW_BYTES: usize = 4 << 20;
/// Most bytes of a part that is read as a whole.
const PART: u64 = 4 << 30;

/// What becomes of what is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// Nothing is: a target with rows is refused.
    Empty,
    /// Its rows are deleted, in the transaction that writes the new ones.
    Replaced,
    /// Nothing is written; the stream is read and checked to its end.
    Nothing,
}

/// What an import did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Which engine they came from.
    pub from: String,
    /// When the export began, in microseconds since the Unix epoch.
    pub export_time: i64,
    /// Rows of each table.
    pub rows: Vec<(String, u64)>,
    /// Rows that the target had before.
    pub replaced: u64,
    /// Bytes of artifacts.
    pub artifacts: Files,
    /// Of these, those that were there, whole, before.
    pub kept: Files,
    /// Transcripts of ended tasks.
    pub transcripts: Files,
}

/// Reads an export and makes an installation of it. Bytes that were kept by an import that was cut
/// off are not written again.
pub async fn import<R: AsyncRead + Unpin>(
    at: &Location,
    bytes: &Bytes,
    into: Into,
    now: Micros,
    from: R,
) -> Result<Imported> {
    let mut tape = tape::Reader::new(from);
    let manifest = manifest(&mut tape).await?;
    let replaced = if into == Into::Nothing {
        before(at, &manifest).await?
    } else {
        let mut target = Target::begin(at).await?;
        let found = look(&mut target, &manifest).await;
        target.undo().await;
        let (_, n_rows) = found?;
        if into == Into::Empty && n_rows > 0 {
            return Err(not_empty(at, n_rows));
        }
        n_rows
    };
    let done = Imported {
        from: manifest.engine.clone(),
        export_time: manifest.time,
        replaced,
        ..Imported::default()
    };
    let tallies = manifest.tables.iter().map(|head| (head.name.clone(), Tally::default()));
    let tallies = tallies.collect();
    let import = Import { at, bytes, into, now, manifest, tape, target: None, tallies, done };
    import.run().await
}

async fn manifest<R: AsyncRead + Unpin>(tape: &mut tape::Reader<R>) -> Result<Manifest> {
    let first = tape.next().await?;
    if first.is_none_or(|entry| entry.path != "baton/manifest.json") {
        return Err(damaged("it does not begin with a manifest"));
    }
    let text = tape.whole(PART).await?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(damaged)?;
    if manifest.baton_export != FORMAT {
        return Err(damaged(format!("it has the form {}, not {FORMAT}", manifest.baton_export)));
    }
    let engines = [Engine::Sqlite, Engine::Postgres];
    let engine = engines.into_iter().find(|engine| engine_name(*engine) == manifest.engine);
    let known = engine.map(transfer::schema).unwrap_or_default();
    if known != manifest.schema {
        return Err(Error::new(
            Kind::FailedPrecondition,
            Reason::StateConflict,
            format!(
                "the export has migration {} of {} and this binary {known}; migrate and export with the binary that imports",
                manifest.schema, manifest.engine
            ),
        ));
    }
    Ok(manifest)
}

/// Rows that a target has which may not be there yet.
async fn before(at: &Location, manifest: &Manifest) -> Result<u64> {
    if matches!(at, Location::File(path) if !path.exists()) {
        return Ok(0);
    }
    let mut snapshot = transfer::Snapshot::take(at).await?;
    let mut n_rows = 0;
    for table in snapshot.tables().to_vec() {
        if manifest.tables.iter().any(|head| head.name == table.name) {
            n_rows += snapshot.count(&table, "").await?;
        }
    }
    snapshot.close().await;
    Ok(n_rows)
}

fn not_empty(at: &Location, n_rows: u64) -> Error {
    Error::new(
        Kind::FailedPrecondition,
        Reason::StateConflict,
        format!(
            "{at} has {n_rows} rows already; name an empty database, or say --replace to delete them"
        ),
    )
}

/// A target's tables as the export fills them, and the number of rows that they have.
async fn look(target: &mut Target, manifest: &Manifest) -> Result<(Vec<Table>, u64)> {
    let mut tables = Vec::new();
    for head in &manifest.tables {
        let found = target.tables().iter().find(|table| table.name == head.name);
        let columns = found.map(|table| filled(table, head)).transpose()?;
        let columns = columns.ok_or_else(|| lacks(&head.name))?;
        tables.push(Table { name: head.name.clone(), columns });
    }
    let mut n_rows = 0;
    for table in target.tables().to_vec() {
        if !OF_SERVERS.contains(&table.name.as_str()) {
            n_rows += target.count(&table).await?;
        }
    }
    Ok((tables, n_rows))
}

/// The columns of an export, as the target has them.
fn filled(table: &Table, head: &TableHead) -> Result<Vec<Column>> {
    let needed = table.columns.iter().filter(|column| !column.optional);
    for column in needed {
        if !head.columns.contains(&column.name) {
            return Err(damaged(format!("it lacks {}.{}", table.name, column.name)));
        }
    }
    let find = |name: &String| {
        let found = table.columns.iter().find(|column| column.name == *name);
        found.cloned().ok_or_else(|| lacks(&format!("{}.{name}", table.name)))
    };
    head.columns.iter().map(find).collect()
}

fn lacks(what: &str) -> Error {
    let message = format!("the target has no {what}; migrate it: baton db migrate");
    Error::new(Kind::FailedPrecondition, Reason::StateConflict, message)
}

struct Import<'a, R> {
    at: &'a Location,
    bytes: &'a Bytes,
    into: Into,
    now: Micros,
    manifest: Manifest,
    tape: tape::Reader<R>,
    /// Once rows have come.
    target: Option<Open>,
    /// Of the lines that came.
    tallies: BTreeMap<String, Tally>,
    done: Imported,
}

/// The transaction, the tables as the export fills them, and what they were given.
struct Open {
    target: Target,
    tables: Vec<(Table, Tally)>,
}

impl<R: AsyncRead + Unpin> Import<'_, R> {
    async fn run(mut self) -> Result<Imported> {
        match self.read().await {
            Ok(()) => {
                if let Some(Open { target, .. }) = self.target.take() {
                    target.commit().await?;
                }
                Ok(self.done)
            }
            Err(error) => {
                if let Some(Open { target, .. }) = self.target.take() {
                    target.undo().await;
                }
                Err(error)
            }
        }
    }

    async fn read(&mut self) -> Result<()> {
        let mut totals: Option<Totals> = None;
        while let Some(entry) = self.tape.next().await? {
            let mut parts = entry.path.splitn(3, '/');
            match (parts.next(), parts.next(), parts.next()) {
                (Some("artifacts"), Some(kind), Some(name)) if is_kind(kind) => {
                    let key = Key::named(kind, name)
                        .ok_or_else(|| damaged(format!("`{name}` names no bytes")))?;
                    self.artifact(key, entry.size).await?;
                }
                (Some("transcripts"), Some(digest), None) => {
                    self.transcript(digest.parse().map_err(damaged)?).await?;
                }
                (Some("rows"), Some(table), Some(_)) => {
                    let table = table.to_owned();
                    self.rows(&table).await?;
                }
                (Some("baton"), Some("totals.json"), None) => {
                    let text = self.tape.whole(PART).await?;
                    totals = Some(serde_json::from_slice(&text).map_err(damaged)?);
                }
                _ => return Err(damaged(format!("`{}` is not a part of one", entry.path))),
            }
        }
        let totals = totals.ok_or_else(|| damaged("it ends without totals"))?;
        self.compare(&totals)?;
        for head in &self.manifest.tables {
            let rows = self.tallies.get(&head.name).map_or(0, |tally| tally.rows);
            self.done.rows.push((head.name.clone(), rows));
        }
        // Also where there are no rows at all, what was there goes.
        self.open().await?;
        self.verify().await
    }

    /// Whether everything came that was sent.
    fn compare(&self, totals: &Totals) -> Result<()> {
        let came = Totals {
            artifacts: self.done.artifacts,
            transcripts: self.done.transcripts,
            tables: self
                .tallies
                .iter()
                .map(|(name, tally)| (name.clone(), (*tally).into()))
                .collect(),
        };
        for (name, sent) in &totals.tables {
            if came.tables.get(name) != Some(sent) {
                return Err(damaged(format!(
                    "not all {} rows of {name} came as they were",
                    sent.rows
                )));
            }
        }
        if came != *totals {
            return Err(damaged("not all files came"));
        }
        Ok(())
    }

    /// Whether the target gives back what it was given.
    async fn verify(&mut self) -> Result<()> {
        let Some(Open { target, tables }) = &mut self.target else { return Ok(()) };
        for (table, given) in tables {
            let found = target.tally(table).await?;
            if found != *given {
                return Err(Error::internal(format!(
                    "the table {} gives back {} rows that are not the {} that it was given",
                    table.name, found.rows, given.rows
                )));
            }
        }
        Ok(())
    }

    async fn open(&mut self) -> Result<()> {
        if self.into == Into::Nothing || self.target.is_some() {
            return Ok(());
        }
        let mut target = Target::begin(self.at).await?;
        let (tables, n_rows) = look(&mut target, &self.manifest).await?;
        if n_rows > 0 && self.into == Into::Empty {
            target.undo().await;
            return Err(not_empty(self.at, n_rows));
        }
        if n_rows > 0 {
            for table in target.tables().to_vec().iter().rev() {
                if !OF_SERVERS.contains(&table.name.as_str()) {
                    target.clear(table).await?;
                }
            }
            self.done.replaced = n_rows;
        }
        let tables = tables.into_iter().map(|table| (table, Tally::default())).collect();
        self.target = Some(Open { target, tables });
        Ok(())
    }

    async fn rows(&mut self, name: &str) -> Result<()> {
        self.open().await?;
        let text = self.tape.whole(PART).await?;
        let tally = self.tallies.get_mut(name).ok_or_else(|| {
            damaged(format!("it has rows of {name}, which its manifest does not name"))
        })?;
        let (mut rows, mut n_bytes) = (Vec::new(), 0);
        let mut lines = text.split_inclusive(|byte| *byte == b'\n').peekable();
        while let Some(text) = lines.next() {
            tally.add(text);
            rows.push(line::read(text)?);
            n_bytes += text.len();
            if rows.len() == ROWS || n_bytes >= ROW_BYTES || lines.peek().is_none() {
                n_bytes = 0;
                if let Some(open) = &mut self.target {
                    open.insert(name, std::mem::take(&mut rows)).await?;
                }
                rows.clear();
            }
        }
        Ok(())
    }

    async fn transcript(&mut self, digest: Digest) -> Result<()> {
        let bytes = self.tape.whole(PART).await?;
        if sha2::Sha256::digest(&bytes)[..] != digest.0 {
            return Err(damaged(format!("the transcripts {digest} are others")));
        }
        let size = bytes.len() as u64;
        if self.into != Into::Nothing {
            let transcripts = &self.bytes.transcripts;
            transcripts.put(bytes.into()).await.map_err(Error::storage)?;
            // It checks them.
            transcripts.get(digest).await.map_err(Error::storage)?;
        }
        self.done.transcripts.add(size);
        Ok(())
    }

    async fn artifact(&mut self, key: Key, size: u64) -> Result<()> {
        let store = &self.bytes.artifacts;
        self.done.artifacts.add(size);
        if self.into == Into::Nothing || is_kept(store, &key, size).await? {
            let mut hasher = Hasher::default();
            while let Some(piece) = self.tape.read().await? {
                hasher.update(&piece);
            }
            check(&key, hasher.finish())?;
            if self.into != Into::Nothing {
                self.done.kept.add(size);
            }
            return Ok(());
        }
        let id = UploadId::new(self.now, &Entropy::system()).0;
        let upload = blob::Upload {
            id,
            digest: Some(key.digest),
            place: Some(key.clone()),
            size: Some(size),
        };
        let mut writer = store.open(upload, None).await.map_err(Error::storage)?;
        while let Some(piece) = self.tape.read().await? {
            writer.write(piece).await.map_err(Error::storage)?;
        }
        let sealed = writer.finish().await.map_err(Error::storage)?;
        if let Err(error) = check(&key, sealed.digest) {
            sealed.discard().await.map_err(Error::storage)?;
            return Err(error);
        }
        sealed.keep(&key).await.map_err(Error::storage)?;
        if is_kept(store, &key, size).await? {
            return Ok(());
        }
        Err(Error::storage(format!("{key} was written and does not come back as it was")))
    }
}

/// Whether it is what a key may have: it becomes a part of a path.
fn is_kind(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn check(key: &Key, found: Digest) -> Result<()> {
    if found == key.digest {
        return Ok(());
    }
    Err(damaged(format!("the bytes of {key} are others")))
}

/// Whether the store has these bytes, read to their end.
async fn is_kept(store: &Store, key: &Key, size: u64) -> Result<bool> {
    if store.size(key).await.map_err(Error::storage)? != Some(size) {
        return Ok(false);
    }
    let mut pieces = store.read(key, 0, size).await.map_err(Error::storage)?;
    let mut hasher = Hasher::default();
    while let Some(piece) = pieces.try_next().await.map_err(Error::storage)? {
        hasher.update(&piece);
    }
    Ok(hasher.finish() == key.digest)
}

impl Open {
    async fn insert(&mut self, name: &str, rows: Vec<Vec<Cell>>) -> Result<()> {
        let found = self.tables.iter_mut().find(|(table, _)| table.name == name);
        let Some((table, tally)) = found else { return Err(lacks(name)) };
        for row in &rows {
            if row.len() != table.columns.len() {
                return Err(damaged(format!("a row of {name} has {} values", row.len())));
            }
            tally.add_cells(table.columns.iter().map(|column| column.kind).zip(row))?;
        }
        self.target.insert(table, rows).await
    }
}
