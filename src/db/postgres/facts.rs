//! What a server says of itself.

use std::time::Duration;

use sqlx::{ConnectOptions as _, Connection as _, PgConnection};

use super::options;
use crate::{
    clock::{Clock, Micros},
    db::Facts,
    error::{Error, Result},
};

/// Longest time for it to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks the server.
pub(in crate::db) async fn ask(url: &str, clock: &Clock) -> Result<Facts> {
    let options = options(url)?;
    let asked = async {
        let mut conn = options.connect().await.map_err(Error::storage)?;
        let facts = facts(&mut conn, clock).await;
        // Nothing is under way on it.
        let _ = conn.close().await;
        facts
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(facts) => facts,
        Err(_) => Err(Error::storage(format!("no answer within {PATIENCE:?}"))),
    }
}

async fn facts(conn: &mut PgConnection, clock: &Clock) -> Result<Facts> {
    let (version, sync, fsync): (String, String, String) = sqlx::query_as(
        "SELECT current_setting('server_version'), current_setting('synchronous_commit'),
                current_setting('fsync')",
    )
    .fetch_one(&mut *conn)
    .await?;
    let (standby, most, used, may_create, encrypted): (bool, i64, i64, bool, bool) =
        sqlx::query_as(
            "SELECT pg_is_in_recovery(), current_setting('max_connections')::bigint,
                    (SELECT COUNT(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
                    has_schema_privilege(current_schema(), 'CREATE'),
                    COALESCE((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false)",
        )
        .fetch_one(&mut *conn)
        .await?;
    let before = clock.now();
    let theirs: i64 =
        sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1e6)::bigint")
            .fetch_one(&mut *conn)
            .await?;
    let after = clock.now();
    let middle = Micros(before.0 + (after.0 - before.0) / 2);
    Ok(Facts {
        major: version
            .split(|c: char| !c.is_ascii_digit())
            .next()
            .unwrap_or_default()
            .parse()
            .unwrap_or(0),
        version: version.split(' ').next().unwrap_or_default().to_owned(),
        synchronous_commit: sync,
        fsync,
        is_standby: standby,
        connections: (most.unsigned_abs(), used.unsigned_abs()),
        may_create,
        round_trip: after.since(before),
        ahead: theirs - middle.0,
        is_encrypted: encrypted,
    })
}
