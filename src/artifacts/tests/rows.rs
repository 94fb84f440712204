//! Rows of tasks, as far as artifacts look at them.

use crate::{
    db::{Sql, Tx},
    error::Result,
    id::TaskId,
};

const INSERT: Sql = Sql::new(
    "INSERT INTO tasks (id, namespace, model, input, params, priority, labels,
     required_labels, execution_timeout, retry, seed, create_time, state, revision, attempt,
     failed, lost, handed_back, base_sequence, last_sequence, reserved_sequence)
     VALUES ($1, 'a', 'm/m', '{}', '{}', 0, '{}', '{}', 1, '{}', 1, 1, $2, 1, $3, 0, 0, 0, 0, 0, 0)",
);

/// A task of namespace `a` in that state.
pub async fn insert_task(tx: &mut Tx, task: TaskId, attempt: u32, state: &str) -> Result<()> {
    tx.query(INSERT).bind(task).bind(state).bind(attempt).run().await.map(drop)
}

const END: Sql = Sql::new("UPDATE tasks SET state = 'SUCCEEDED' WHERE id = $1");

/// The task ends.
pub async fn end_task(tx: &mut Tx, task: TaskId) -> Result<()> {
    tx.query(END).bind(task).run().await.map(drop)
}

const DELETE: Sql = Sql::new("DELETE FROM tasks WHERE id = $1");

/// The task is deleted.
pub async fn delete_task(tx: &mut Tx, task: TaskId) -> Result<()> {
    tx.query(DELETE).bind(task).run().await.map(drop)
}

const FORGET_GENERATIONS: [Sql; 2] = [
    Sql::new("UPDATE artifacts SET generation = ''"),
    Sql::new("UPDATE artifact_bytes SET generation = ''"),
];

/// What there is was made by a version that had no generations.
pub async fn forget_generations(tx: &mut Tx) -> Result<()> {
    for sql in FORGET_GENERATIONS {
        tx.query(sql).run().await?;
    }
    Ok(())
}
