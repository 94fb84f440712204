//! SQL of the `instances` and `locks` tables. All times are the database's.

use std::{collections::BTreeSet, time::Duration};

use super::standing::{Held, Lock, Mandate};
use crate::{
    clock::Micros,
    db::{Bulk, Script, Sql, Statement, Tx, Type},
    error::{Error, Kind, Reason, Result},
    id::InstanceId,
};

/// The database's time in microseconds, in either language.
macro_rules! each {
    ($head:literal, $middle:literal, $tail:literal) => {
        Sql::each(
            concat!(
                $head,
                "(SELECT now FROM server_clock)",
                $middle,
                "(SELECT now FROM server_clock)",
                $tail
            ),
            concat!(
                $head,
                "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
                $middle,
                "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
                $tail
            ),
        )
    };
}

const BEAT: Sql = each!(
    "INSERT INTO instances (id, version, address, draining, start_time, heartbeat_time)
     VALUES ($1, $2, $3, $4, ",
    ", ",
    ") ON CONFLICT (id) DO UPDATE SET
        draining = excluded.draining, heartbeat_time = excluded.heartbeat_time
       RETURNING heartbeat_time"
);

/// Writes down that an instance is there; returns the database's time.
pub async fn beat(
    tx: &mut Tx,
    id: InstanceId,
    version: &str,
    address: &str,
    draining: bool,
) -> Result<Micros> {
    let beat = tx.query(BEAT).bind(id).bind(version).bind(address).bind(draining);
    let (time,) = beat.one().await?;
    Ok(time)
}

const TAKE: Sql = each!(
    "INSERT INTO locks (name, holder, epoch, until) VALUES ($1, $2, 1, $3 + ",
    ") ON CONFLICT (name) DO UPDATE SET
        holder = excluded.holder, until = excluded.until,
        epoch = locks.epoch + CASE WHEN locks.holder = excluded.holder THEN 0 ELSE 1 END
       WHERE locks.holder = excluded.holder OR locks.until < ",
    " RETURNING epoch"
);

/// Takes a lock for some time, or takes it again; its epoch, unless another instance has it.
pub async fn take(
    tx: &mut Tx,
    lock: Lock,
    holder: InstanceId,
    lasts: Duration,
) -> Result<Option<i64>> {
    let lasts = lasts.as_micros() as i64;
    let found: Option<(i64,)> =
        tx.query(TAKE).bind(lock.name()).bind(holder).bind(lasts).first().await?;
    Ok(found.map(|(epoch,)| epoch))
}

const HELD_BY_OTHERS: Sql = Sql::each(
    "SELECT name FROM locks WHERE holder <> $1 AND until >= (SELECT now FROM server_clock)",
    "SELECT name FROM locks WHERE holder <> $1
     AND until >= (extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
);

/// Names of the locks that other instances have; waits for nobody.
pub async fn held_by_others(tx: &mut Tx, holder: InstanceId) -> Result<BTreeSet<String>> {
    let rows: Vec<(String,)> = tx.query(HELD_BY_OTHERS).bind(holder).all().await?;
    Ok(rows.into_iter().map(|(name,)| name).collect())
}

const RELEASE: Sql = Sql::new("UPDATE locks SET until = 0 WHERE holder = $1");

/// Leaves an instance's locks to others.
pub async fn release(tx: &mut Tx, holder: InstanceId) -> Result<()> {
    tx.query(RELEASE).bind(holder).run().await.map(drop)
}

const CHECK: Sql = Sql::each(
    "SELECT 1 FROM locks WHERE name = $1 AND holder = $2 AND epoch = $3",
    "SELECT 1::bigint FROM locks WHERE name = $1 AND holder = $2 AND epoch = $3 FOR SHARE",
);

/// Holds a lock as it was taken until the end of the transaction.
pub async fn check(tx: &mut Tx, held: &Held) -> Result<()> {
    let Held { lock, holder, epoch } = held;
    let found: Option<(i64,)> =
        tx.query(CHECK).bind(lock.name()).bind(*holder).bind(*epoch).first().await?;
    found.map(drop).ok_or_else(|| {
        let message = format!("another server has the lock `{}`", lock.name());
        Error::new(Kind::Aborted, Reason::Conflict, message)
    })
}

static HOLD: Bulk = Bulk::holding(
    "WITH held (name, holder, epoch) AS (",
    &[Type::Text, Type::Id, Type::Int],
    ")
     SELECT 1 FROM locks JOIN held h ON locks.name = h.name
     WHERE locks.holder = h.holder AND locks.epoch = h.epoch",
    " FOR SHARE OF locks",
);

/// As [`Mandate::check`], as part of a script.
pub fn hold(script: &mut Script, mandates: &[&Mandate]) -> Result<()> {
    let held: Vec<_> = mandates.iter().filter_map(|mandate| mandate.0.as_ref()).collect();
    script.add_fence(&HOLD, &held, |row, held| {
        row.bind(held.lock.name()).bind(held.holder).bind(held.epoch);
        Ok(())
    })
}

const OTHERS: Sql = Sql::each(
    "SELECT count(*) FROM instances WHERE id <> $1
     AND heartbeat_time >= (SELECT now FROM server_clock) - $2",
    "SELECT count(*) FROM instances WHERE id <> $1
     AND heartbeat_time >= (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - $2",
);

/// How many other instances were heard of within that time.
pub async fn n_others(tx: &mut Tx, id: InstanceId, silent: Duration) -> Result<u64> {
    let query = tx.query(OTHERS).bind(id).bind(silent.as_micros() as i64);
    let (count,): (i64,) = query.one().await?;
    Ok(count.unsigned_abs())
}

const FORGET: Sql = Sql::each(
    "DELETE FROM instances
     WHERE heartbeat_time < (SELECT now FROM server_clock) - $1",
    "DELETE FROM instances
     WHERE heartbeat_time < (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - $1",
);

/// Forgets instances that were last heard of so long ago.
pub async fn forget(tx: &mut Tx, silent: Duration) -> Result<u64> {
    tx.query(FORGET).bind(silent.as_micros() as i64).run().await
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(BEAT),
    Statement::Query(TAKE),
    Statement::Query(HELD_BY_OTHERS),
    Statement::Query(RELEASE),
    Statement::Query(CHECK),
    Statement::Rows(&HOLD),
    Statement::Query(OTHERS),
    Statement::Query(FORGET),
];
