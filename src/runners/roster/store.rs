//! SQL of the `runners` and `runner_orders` tables.

use std::time::Duration;

use uuid::Uuid;

use crate::{
    clock::Micros,
    db::{Bulk, FromRow, Row, Script, Sql, Statement, Tx, Type},
    error::Result,
    id::{InstanceId, Namespace},
};

/// A runner as the server that holds it shows it.
#[derive(Clone, Debug)]
pub struct SeenRow {
    /// Tenant of the runner.
    pub namespace: Namespace,
    /// Its name.
    pub runner: String,
    /// When its session began.
    pub connect_time: Micros,
    /// Encoded `Runner`.
    pub seen: Vec<u8>,
}

static PUT: Bulk = Bulk::new(
    "WITH new (namespace, runner_id, instance_id, connect_time, seen) AS (",
    &[Type::Text, Type::Text, Type::Id, Type::Int, Type::Bytes],
    ")
     INSERT INTO runners (namespace, runner_id, instance_id, connect_time, seen)
     SELECT * FROM new WHERE namespace IS NOT NULL
     ON CONFLICT (namespace, runner_id) DO UPDATE SET
        instance_id = excluded.instance_id, connect_time = excluded.connect_time,
        seen = excluded.seen
        WHERE runners.instance_id = excluded.instance_id
           OR runners.connect_time <= excluded.connect_time",
);

/// Shows runners that a server holds, unless they began a session with another since.
pub fn put(script: &mut Script, holder: InstanceId, rows: &[SeenRow]) -> Result<()> {
    script.add_rows(&PUT, rows, |values, row| {
        values
            .bind(&row.namespace)
            .bind(&row.runner)
            .bind(holder)
            .bind(row.connect_time)
            .bind(row.seen.clone());
        Ok(())
    })
}

static REMOVE: Bulk = Bulk::new(
    "WITH old (namespace, runner_id, instance_id) AS (",
    &[Type::Text, Type::Text, Type::Id],
    ")
     DELETE FROM runners WHERE EXISTS (
         SELECT 1 FROM old o WHERE o.namespace = runners.namespace
            AND o.runner_id = runners.runner_id AND o.instance_id = runners.instance_id)",
);

/// Shows runners no more that a server held.
pub fn remove(script: &mut Script, holder: InstanceId, gone: &[(Namespace, String)]) -> Result<()> {
    script.add_rows(&REMOVE, gone, |values, (namespace, runner)| {
        values.bind(namespace).bind(runner).bind(holder);
        Ok(())
    })
}

/// Runners of servers that were heard of lately, but for what is asked of them.
macro_rules! shown {
    ($now:literal, $which:literal) => {
        concat!(
            "SELECT r.instance_id, r.seen FROM runners r
             JOIN instances i ON i.id = r.instance_id AND i.heartbeat_time >= ",
            $now,
            " - $3 WHERE r.namespace = $1 AND r.instance_id <> $4 AND ",
            $which
        )
    };
}

const LIST: Sql = Sql::each(
    shown!("(SELECT now FROM server_clock)", "r.runner_id > $2 ORDER BY r.runner_id LIMIT $5"),
    shown!(
        "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
        "r.runner_id > $2 ORDER BY r.runner_id LIMIT $5"
    ),
);

/// Runners of a namespace that other servers than `me` hold, by name, after a name.
pub async fn list(
    tx: &mut Tx,
    namespace: &Namespace,
    after: &str,
    alive: Duration,
    me: InstanceId,
    limit: u32,
) -> Result<Vec<(InstanceId, Vec<u8>)>> {
    let alive = alive.as_micros() as i64;
    tx.query(LIST).bind(namespace).bind(after).bind(alive).bind(me).bind(limit).all().await
}

const FIND: Sql = Sql::each(
    shown!("(SELECT now FROM server_clock)", "r.runner_id = $2"),
    shown!("(extract(epoch FROM clock_timestamp()) * 1000000)::bigint", "r.runner_id = $2"),
);

/// A runner of a namespace that another server than `me` holds.
pub async fn find(
    tx: &mut Tx,
    namespace: &Namespace,
    runner: &str,
    alive: Duration,
    me: InstanceId,
) -> Result<Option<(InstanceId, Vec<u8>)>> {
    let alive = alive.as_micros() as i64;
    tx.query(FIND).bind(namespace).bind(runner).bind(alive).bind(me).first().await
}

/// What an operator asks of a runner that another server holds.
#[derive(Clone, Debug)]
pub struct OrderRow {
    /// Unique.
    pub id: Uuid,
    /// Tenant of the runner.
    pub namespace: Namespace,
    /// Which method was called.
    pub kind: String,
    /// Its encoded request.
    pub request: Vec<u8>,
    /// How long the runner's answer is waited for.
    pub wait: Duration,
}

const ASK: Sql = Sql::new(
    "INSERT INTO runner_orders
        (id, instance_id, namespace, kind, request, wait, create_time, taken)
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
);

/// Leaves an order for the server that holds the runner.
pub async fn ask(tx: &mut Tx, holder: InstanceId, order: &OrderRow, now: Micros) -> Result<()> {
    tx.query(ASK)
        .bind(InstanceId(order.id))
        .bind(holder)
        .bind(&order.namespace)
        .bind(&order.kind)
        .bind(order.request.clone())
        .bind(order.wait.as_micros() as i64)
        .bind(now)
        .bind(false)
        .run()
        .await
        .map(drop)
}

const TAKE: Sql = Sql::each(
    "UPDATE runner_orders SET taken = 1 WHERE instance_id = $1 AND taken = 0
     RETURNING id, namespace, kind, request, wait",
    "UPDATE runner_orders SET taken = true WHERE instance_id = $1 AND NOT taken
     RETURNING id, namespace, kind, request, wait",
);

impl FromRow for OrderRow {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            id: row.get::<InstanceId>(0)?.0,
            namespace: row.get(1)?,
            kind: row.get(2)?,
            request: row.get(3)?,
            wait: Duration::from_micros(row.get::<i64>(4)?.unsigned_abs()),
        })
    }
}

/// Takes the orders that were left for a server.
pub async fn take(tx: &mut Tx, holder: InstanceId) -> Result<Vec<OrderRow>> {
    tx.query(TAKE).bind(holder).all().await
}

const ANY: Sql = Sql::each(
    "SELECT 1 FROM runner_orders WHERE instance_id = $1 AND taken = 0 LIMIT 1",
    "SELECT 1::bigint FROM runner_orders WHERE instance_id = $1 AND NOT taken LIMIT 1",
);

/// Whether orders were left for a server.
pub async fn any(tx: &mut Tx, holder: InstanceId) -> Result<bool> {
    Ok(tx.query(ANY).bind(holder).first::<(i64,)>().await?.is_some())
}

const ANSWER: Sql = Sql::new("UPDATE runner_orders SET answer = $2 WHERE id = $1");

/// Answers an order with an encoded `google.rpc.Status`.
pub async fn answer(tx: &mut Tx, id: Uuid, answer: Vec<u8>) -> Result<()> {
    tx.query(ANSWER).bind(InstanceId(id)).bind(answer).run().await.map(drop)
}

const LOOK: Sql = Sql::new("SELECT taken, answer FROM runner_orders WHERE id = $1");

/// Whether an order was taken, and its answer.
pub async fn look(tx: &mut Tx, id: Uuid) -> Result<(bool, Option<Vec<u8>>)> {
    tx.query(LOOK).bind(InstanceId(id)).one().await
}

const FORGET_RUNNERS: Sql =
    Sql::new("DELETE FROM runners WHERE instance_id NOT IN (SELECT id FROM instances)");
const FORGET_ORDERS: Sql = Sql::new("DELETE FROM runner_orders WHERE create_time < $1");

/// Forgets orders that were given before a time, and the runners of servers that are forgotten.
pub async fn forget(tx: &mut Tx, before: Micros) -> Result<()> {
    tx.query(FORGET_RUNNERS).run().await?;
    tx.query(FORGET_ORDERS).bind(before).run().await.map(drop)
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Rows(&PUT),
    Statement::Rows(&REMOVE),
    Statement::Query(LIST),
    Statement::Query(FIND),
    Statement::Query(ASK),
    Statement::Query(TAKE),
    Statement::Query(ANY),
    Statement::Query(ANSWER),
    Statement::Query(LOOK),
    Statement::Query(FORGET_RUNNERS),
    Statement::Query(FORGET_ORDERS),
];
