//! Reads of the tasks that wait, of all namespaces: for the queues, and for their bounds.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    clock::Micros,
    db::{FromRow, Row, Sql, Statement, Tx},
    error::Result,
    id::{Namespace, TaskId},
    queue,
    tasks::state::Limit,
};

/// A waiting task without its payload.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// How the queue sees it.
    pub entry: queue::Entry,
    /// Must have started by then.
    pub start_by: Option<Micros>,
}

impl Waiting {
    /// Its time limits.
    pub fn limits(&self) -> impl Iterator<Item = (Micros, TaskId, Limit)> {
        let id = self.entry.id;
        let deadline = self.entry.deadline.map(|at| (at, id, Limit::Deadline));
        let start_by = self.start_by.map(|at| (at, id, Limit::StartTimeout));
        deadline.into_iter().chain(start_by)
    }
}

macro_rules! waiting {
    ($condition:literal) => {
        concat!(
            "SELECT id, namespace, model, version, required_labels, priority, create_time,
                    not_before, deadline, start_timeout, session_id, attempt
             FROM tasks WHERE state = 'QUEUED' AND id > $1 ",
            $condition,
            " ORDER BY id LIMIT $2"
        )
    };
}

const WAITING: Sql = Sql::new(waiting!(""));

impl FromRow for Waiting {
    fn from_row(row: &Row) -> Result<Self> {
        let (create_time, attempt): (Micros, u32) = (row.get(6)?, row.get(11)?);
        let start_by = row.get::<Option<i64>>(9)?.filter(|_| attempt == 0);
        Ok(Self {
            start_by: start_by.map(|after| Micros(create_time.0.saturating_add(after))),
            entry: queue::Entry {
                id: row.get(0)?,
                namespace: row.get(1)?,
                model: row.get(2)?,
                version: row.get(3)?,
                required_labels: Arc::new(row.json(4)?),
                priority: row.get(5)?,
                create_time,
                not_before: row.get(7)?,
                deadline: row.get(8)?,
                session: row.get(10)?,
                attempt,
                waited_out: false,
            },
        })
    }
}

/// QUEUED tasks of all namespaces in the order of their ids, after one.
pub async fn waiting_page(tx: &mut Tx, after: Option<TaskId>, limit: u32) -> Result<Vec<Waiting>> {
    let after = after.unwrap_or(TaskId::MIN);
    tx.query(WAITING).bind(after).bind(limit).all().await.map(with_few_labels)
}

/// Most tasks share their few label sets.
fn with_few_labels(mut page: Vec<Waiting>) -> Vec<Waiting> {
    let none = Arc::new(BTreeMap::new());
    for waiting in &mut page {
        if waiting.entry.required_labels.is_empty() {
            waiting.entry.required_labels = none.clone();
        }
    }
    page
}

/// QUEUED tasks of all namespaces in the order of their ids, after one: what the queue should
/// know.
pub async fn queued_page(
    tx: &mut Tx,
    after: Option<TaskId>,
    limit: u32,
) -> Result<Vec<queue::Entry>> {
    let page = waiting_page(tx, after, limit).await?;
    Ok(page.into_iter().map(|waiting| waiting.entry).collect())
}

const STARTABLE: Sql = Sql::each(
    waiting!(
        "AND coalesce(not_before, create_time) <= $3
         AND (model IN (SELECT value FROM json_each($4)) OR $4 IS NULL)"
    ),
    waiting!("AND coalesce(not_before, create_time) <= $3 AND (model = ANY ($4) OR $4 IS NULL)"),
);

/// As [`queued_page`], of tasks that could have started at a time already and are of these models.
pub async fn startable_page(
    tx: &mut Tx,
    after: Option<TaskId>,
    since: Micros,
    models: Option<&[String]>,
    limit: u32,
) -> Result<Vec<queue::Entry>> {
    let after = after.unwrap_or(TaskId::MIN);
    let query = tx.query(STARTABLE).bind(after).bind(limit).bind(since);
    let page = query.bind(models.map(<[String]>::to_vec)).all().await.map(with_few_labels)?;
    Ok(page.into_iter().map(|waiting| waiting.entry).collect())
}

const QUEUED_AMONG: Sql = Sql::each(
    "SELECT id FROM tasks WHERE state = 'QUEUED' AND id IN (SELECT value FROM json_each($1))",
    "SELECT id FROM tasks WHERE state = 'QUEUED' AND id = ANY ($1)",
);

/// Which of these tasks are QUEUED.
pub async fn queued_among(tx: &mut Tx, ids: &[TaskId]) -> Result<Vec<TaskId>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<(TaskId,)> = tx.query(QUEUED_AMONG).bind(ids).all().await?;
    Ok(rows.into_iter().map(|(id,)| id).collect())
}

const COUNT_QUEUED: Sql = Sql::new("SELECT COUNT(*) FROM tasks WHERE state = 'QUEUED'");

/// How many tasks are QUEUED, in all namespaces.
pub async fn queued_count(tx: &mut Tx) -> Result<u64> {
    let (count,): (i64,) = tx.query(COUNT_QUEUED).one().await?;
    Ok(count.unsigned_abs())
}

const COUNT_EACH: Sql = Sql::new(
    "SELECT namespace, model, COUNT(*) FROM tasks WHERE state = 'QUEUED' GROUP BY namespace, model",
);

/// How many tasks of each namespace and model are QUEUED.
pub async fn queued_counts(tx: &mut Tx) -> Result<Vec<(String, String, u64)>> {
    tx.query(COUNT_EACH).all().await
}

const LOWEST: Sql = Sql::new(
    "SELECT id FROM tasks WHERE state = 'QUEUED' AND namespace = $1 AND (model = $2 OR $2 IS NULL)
     AND priority <= $3 AND (not_before IS NULL OR not_before <= $4)
     ORDER BY priority, create_time, id LIMIT $5",
);

/// QUEUED tasks of one model, or of all, that may start and have at most that priority: the lowest
/// first, and of these the oldest.
pub async fn lowest_queued(
    tx: &mut Tx,
    namespace: &Namespace,
    model: Option<&str>,
    priority: i32,
    now: Micros,
    limit: u32,
) -> Result<Vec<TaskId>> {
    let query = tx.query(LOWEST).bind(namespace).bind(model).bind(priority).bind(now).bind(limit);
    let rows: Vec<(TaskId,)> = query.all().await?;
    Ok(rows.into_iter().map(|(id,)| id).collect())
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(WAITING),
    Statement::Query(STARTABLE),
    Statement::Query(QUEUED_AMONG),
    Statement::Query(COUNT_QUEUED),
    Statement::Query(COUNT_EACH),
    Statement::Query(LOWEST),
];
