//! Writes of one transaction, gathered first and sent together.
//!
//! Each statement that is awaited is a message to the connection's thread and an answer, two
//! waits for a processor. A few small statements therefore go as one text; what touches many
//! rows goes one by one, since the texts of all combinations would not fit the cache of
//! prepared statements. On Postgres, whose protocol takes one statement at a time, arrays make one
//! of any number of rows, and those next to each other that do not look at each other's rows become
//! one ([`Bulk::together`]).

use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, Either, Executor as _};

use super::{
    Engine, Tx,
    bulk::{Bulk, chunks},
    value::{Arguments, Values},
};
use crate::{
    error::{Error, Kind, Reason, Result},
    faults::{self, Fault},
};

/// A statement over more rows than this goes by itself.
const SMALL: usize = 16;

/// Statements to run in order.
pub struct Script {
    engine: Engine,
    /// Whether others write too.
    shared: bool,
    messages: Vec<Message>,
}

/// Statements that go together, and their values.
struct Message {
    text: String,
    /// Its first statement.
    #[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "of a server's database"))]
    bulk: &'static Bulk,
    values: Values,
    /// What each statement must do.
    wants: Vec<Want>,
    /// Whether others may join.
    small: bool,
}

/// What a statement must do, or the script fails.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    Anything,
    /// Change so many rows.
    Changes(u64),
    /// Find so many.
    Rows(u64),
}

impl Script {
    /// An empty script.
    pub(super) fn new(engine: Engine, shared: bool) -> Self {
        Self { engine, shared, messages: Vec::new() }
    }

    /// Adds a statement over any number of rows; `bind` gives a row its values.
    pub fn add_rows<T>(
        &mut self,
        bulk: &'static Bulk,
        rows: &[T],
        bind: impl FnMut(&mut Values, &T) -> Result<()>,
    ) -> Result<()> {
        self.rows(bulk, rows, |_| Want::Anything, bind)
    }

    /// As [`add_rows`](Self::add_rows); the script fails when a row was not changed.
    pub fn add_rows_exactly<T>(
        &mut self,
        bulk: &'static Bulk,
        rows: &[T],
        bind: impl FnMut(&mut Values, &T) -> Result<()>,
    ) -> Result<()> {
        self.rows(bulk, rows, Want::Changes, bind)
    }

    /// As [`add_rows_exactly`](Self::add_rows_exactly) where others may have written meanwhile; the
    /// only writer need not wait for the number.
    pub fn add_rows_if_alone<T>(
        &mut self,
        bulk: &'static Bulk,
        rows: &[T],
        bind: impl FnMut(&mut Values, &T) -> Result<()>,
    ) -> Result<()> {
        let shared = self.shared;
        self.rows(bulk, rows, |n| if shared { Want::Changes(n) } else { Want::Anything }, bind)
    }

    /// A statement that finds, and holds, rows as they were read: the script fails when it does
    /// not find each. The only writer needs none.
    pub fn add_fence<T>(
        &mut self,
        bulk: &'static Bulk,
        rows: &[T],
        bind: impl FnMut(&mut Values, &T) -> Result<()>,
    ) -> Result<()> {
        if self.shared { self.rows(bulk, rows, Want::Rows, bind) } else { Ok(()) }
    }

    fn rows<T>(
        &mut self,
        bulk: &'static Bulk,
        rows: &[T],
        want: impl Fn(u64) -> Want,
        mut bind: impl FnMut(&mut Values, &T) -> Result<()>,
    ) -> Result<()> {
        let engine = self.engine;
        for chunk in chunks(engine, rows) {
            let want = want(chunk.len() as u64);
            let small = chunk.len() <= SMALL && engine == Engine::Sqlite;
            let values = self.push(bulk, chunk.len(), want, small);
            let end = values.len() + bulk.places(engine, chunk.len());
            for row in chunk {
                bind(values, row)?;
            }
            // A value that is missing would be taken from the next statement's.
            while values.len() < end {
                values.bind(None::<i64>);
            }
        }
        Ok(())
    }

    fn push(&mut self, bulk: &'static Bulk, n_rows: usize, want: Want, small: bool) -> &mut Values {
        if !small || !self.messages.last().is_some_and(|message| message.small) {
            self.messages.push(Message {
                text: String::new(),
                bulk,
                values: Values::new(self.engine, bulk.columns()),
                wants: Vec::new(),
                small,
            });
        }
        let at = self.messages.len() - 1;
        let message = &mut self.messages[at];
        if !message.text.is_empty() {
            message.text.push_str(";\n");
        }
        message.text.push_str(bulk.text(self.engine, n_rows));
        message.wants.push(want);
        &mut message.values
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Whether a statement must change a certain number of rows.
    pub(super) fn is_checked(&self) -> bool {
        self.messages.iter().any(|message| message.wants.iter().any(|want| *want != Want::Anything))
    }

    /// Puts a statement without values after all others, into the last message.
    pub(super) fn put_last(&mut self, text: &str) {
        if let Some(last) = self.messages.last_mut() {
            last.text.push_str(";\n");
            last.text.push_str(text);
        }
    }

    /// Puts a statement without values before all others, into the first message.
    pub(super) fn put_first(&mut self, text: &str) {
        if let Some(first) = self.messages.first_mut() {
            first.text.insert_str(0, ";\n");
            first.text.insert_str(0, text);
            first.wants.insert(0, Want::Anything);
        }
    }

    /// Runs everything, in order, in the transaction of `tx`.
    pub async fn run(self, tx: &mut Tx) -> Result<()> {
        let mut messages = self.messages.into_iter().peekable();
        while let Some(message) = messages.next() {
            #[cfg(feature = "postgres")]
            if let Tx::Postgres(conn) = tx
                && message.bulk.goes_together()
            {
                let mut parts = vec![message];
                while let Some(next) = messages.next_if(|next| next.bulk.goes_together()) {
                    parts.push(next);
                }
                Message::send_as_one(parts, conn).await?;
                continue;
            }
            message.send(tx).await?;
        }
        Ok(())
    }
}

impl Message {
    /// Sends messages of one statement each as one statement.
    #[cfg(feature = "postgres")]
    async fn send_as_one(parts: Vec<Self>, conn: &mut sqlx::PgConnection) -> Result<()> {
        let text = Bulk::postgres_texts(parts.iter().map(|part| part.bulk));
        let mut to = sqlx::postgres::PgArguments::default();
        let mut wants = Vec::with_capacity(parts.len());
        for part in parts {
            if let Arguments::Postgres(columns) = part.values.finish()? {
                columns.add_to(&mut to)?;
            }
            wants.extend(part.wants);
        }
        let changed: Vec<i64> =
            sqlx::query_scalar_with(AssertSqlSafe(text), to).fetch_one(conn).await?;
        for (want, changed) in wants.into_iter().zip(changed) {
            check(want, changed.unsigned_abs(), changed.unsigned_abs())?;
        }
        Ok(())
    }

    async fn send(self, tx: &mut Tx) -> Result<()> {
        let mut wants = self.wants.into_iter();
        let mut want = || wants.next().unwrap_or(Want::Anything);
        match (tx, self.values.finish()?) {
            (Tx::Sqlite(conn), Arguments::Sqlite(values)) => {
                let query = sqlx::query_with(AssertSqlSafe(self.text), values);
                // The driver runs the statements of a text in turn and gives each its own values.
                let mut answers = conn.fetch_many(query);
                let mut n_rows = 0;
                while let Some(answer) = answers.try_next().await? {
                    match answer {
                        Either::Left(done) => {
                            check(want(), done.rows_affected(), std::mem::take(&mut n_rows))?;
                        }
                        Either::Right(_) => n_rows += 1,
                    }
                }
            }
            #[cfg(feature = "postgres")]
            (Tx::Postgres(conn), Arguments::Postgres(columns)) => {
                let mut to = sqlx::postgres::PgArguments::default();
                columns.add_to(&mut to)?;
                let query = sqlx::query_with(AssertSqlSafe(self.text), to);
                let done = conn.execute(query).await?;
                check(want(), done.rows_affected(), done.rows_affected())?;
            }
            #[cfg(feature = "postgres")]
            _ => return Err(Error::internal("a script of another engine")),
        }
        Ok(())
    }
}

/// A statement does what it must, or its transaction is undone.
fn check(want: Want, changed: u64, found: u64) -> Result<()> {
    let (wanted, n_rows) = match want {
        Want::Anything => return Ok(()),
        Want::Changes(wanted) => (wanted, changed),
        Want::Rows(wanted) => (wanted, found),
    };
    if wanted == n_rows || faults::planted(Fault::IgnoreConflicts) {
        return Ok(());
    }
    let cause = format!("{n_rows} of {wanted} rows were as they had been read");
    let conflict = "it changed meanwhile; try again";
    Err(Error::new(Kind::Aborted, Reason::Conflict, conflict).caused_by(cause))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::{Db, Sql, Type, testing};

    static INSERT: Bulk = Bulk::new(
        "WITH new (name, value) AS (",
        &[Type::Text, Type::Bytes],
        ") INSERT INTO settings (name, value) SELECT * FROM new WHERE name IS NOT NULL",
    );
    static UPDATE: Bulk = Bulk::new(
        "WITH new (name, value) AS (",
        &[Type::Text, Type::Bytes],
        ") UPDATE settings SET value = n.value FROM new n WHERE settings.name = n.name",
    );
    static DELETE: Bulk = Bulk::new("DELETE FROM settings WHERE name IN (", &[Type::Text], ")");

    fn rows(n: usize, value: u8) -> Vec<(String, Vec<u8>)> {
        (0..n).map(|i| (format!("row {i:03}"), vec![value, i as u8])).collect()
    }

    #[expect(clippy::unnecessary_wraps, reason = "as scripts want it")]
    fn bind(values: &mut Values, (name, value): &(String, Vec<u8>)) -> Result<()> {
        values.bind(name.clone()).bind(value.clone());
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "as scripts want it")]
    fn bind_name(values: &mut Values, (name, _): &(String, Vec<u8>)) -> Result<()> {
        values.bind(name.clone());
        Ok(())
    }

    async fn run(db: &Db, script: Script) -> Result<()> {
        db.write(|tx| Box::pin(script.run(tx))).await
    }

    async fn stored(db: &Db) -> Vec<(String, Vec<u8>)> {
        let read = db.read(|tx| {
            Box::pin(async move {
                const SQL: Sql = Sql::new(
                    "SELECT name, value FROM settings WHERE name LIKE 'row %' ORDER BY name",
                );
                tx.query(SQL).all().await
            })
        });
        read.await.unwrap()
    }

    #[tokio::test]
    async fn each_statement_gets_its_own_values_however_they_are_sent() {
        let dir = tempfile::tempdir().unwrap();
        let db = testing::open(dir.path()).await;
        for n in [1, 2, 3, 4, 5, 63, 64, 65, 200] {
            let mut script = db.script();
            script.add_rows(&DELETE, &rows(200, 1), bind_name).unwrap();
            script.add_rows(&INSERT, &rows(n, 1), bind).unwrap();
            script.add_rows_exactly(&UPDATE, &rows(n, 2)[..n.min(3)], bind).unwrap();
            script.add_rows(&DELETE, &rows(1, 1), bind_name).unwrap();
            run(&db, script).await.unwrap();
            let (old, new) = (rows(n, 1), rows(n, 2));
            let wanted = [&new[..n.min(3)], &old[n.min(3)..]].concat();
            assert_eq!(stored(&db).await, wanted[1..], "{n} rows");
        }
    }

    #[tokio::test]
    async fn what_goes_together_is_done_and_counted_each_by_itself() {
        static INSERT: Bulk = Bulk::together(
            "WITH new (name, value) AS (",
            &[Type::Text, Type::Bytes],
            ") INSERT INTO settings (name, value) SELECT * FROM new WHERE name IS NOT NULL",
        );
        static UPDATE: Bulk = Bulk::together(
            "WITH new (name, value) AS (",
            &[Type::Text, Type::Bytes],
            ") UPDATE settings SET value = n.value FROM new n WHERE settings.name = n.name",
        );
        let dir = tempfile::tempdir().unwrap();
        let db = testing::open(dir.path()).await;
        let mut first = db.script();
        first.add_rows(&INSERT, &rows(3, 1), bind).unwrap();
        run(&db, first).await.unwrap();
        let script = |missing: usize| {
            let mut script = db.script();
            script.add_rows_exactly(&UPDATE, &rows(3 + missing, 2), bind).unwrap();
            script.add_rows_exactly(&INSERT, &rows(90, 3)[40..], bind).unwrap();
            script.add_rows(&DELETE, &rows(1, 1), bind_name).unwrap();
            script
        };
        assert_eq!(run(&db, script(1)).await.unwrap_err().reason(), Reason::Conflict);
        assert_eq!(stored(&db).await, rows(3, 1));
        run(&db, script(0)).await.unwrap();
        assert_eq!(stored(&db).await, [&rows(3, 2)[1..], &rows(90, 3)[40..]].concat());
    }

    #[tokio::test]
    async fn a_row_that_must_change_and_is_not_there_undoes_everything() {
        let dir = tempfile::tempdir().unwrap();
        let db = testing::open(dir.path()).await;
        let mut script = db.script();
        script.add_rows(&INSERT, &rows(1, 1), bind).unwrap();
        script.add_rows_exactly(&UPDATE, &rows(2, 2), bind).unwrap();
        script.add_rows(&DELETE, &rows(1, 1), bind_name).unwrap();
        assert_eq!(run(&db, script).await.unwrap_err().reason(), Reason::Conflict);
        assert_eq!(stored(&db).await, []);
    }
}
