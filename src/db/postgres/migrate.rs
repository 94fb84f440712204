//! Migrations, on a connection of their own: after a failed one the server would keep its lock
//! with the session, so that the session is closed in any case.

use sqlx::{ConnectOptions as _, Connection as _, PgConnection, migrate::Migrator};

use super::{connect, options};
use crate::{
    db::migrations::{self, Migrations},
    error::{Error, Result},
};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/postgres");

/// One server at a time looks and migrates; others wait for it.
const LOCK: &str = "SELECT pg_advisory_lock(7809634872)";

/// Applies what is pending, or with `dry_run` only looks; returns what there was before.
pub(in crate::db) async fn run(url: &str, dry_run: bool) -> Result<Migrations> {
    // Without the limits of other connections: a migration takes its time.
    let mut conn = connect(&options(url)?).await?;
    let done = run_on(&mut conn, dry_run).await;
    // If this fails, the server ends the session when it finds the socket closed.
    let _ = conn.close().await;
    done
}

async fn run_on(conn: &mut PgConnection, dry_run: bool) -> Result<Migrations> {
    if !dry_run {
        sqlx::query(LOCK).execute(&mut *conn).await?;
    }
    let (versioned, columns): (bool, Vec<String>) = sqlx::query_as(
        "SELECT to_regclass('_sqlx_migrations') IS NOT NULL,
                ARRAY(SELECT (table_name || '.' || column_name)::text
                      FROM information_schema.columns WHERE table_schema = current_schema())",
    )
    .fetch_one(&mut *conn)
    .await?;
    let found = migrations::look(&MIGRATOR, conn, versioned, &columns).await?;
    if !dry_run {
        migrations::apply(&MIGRATOR, conn, &found).await?;
    }
    Ok(found)
}

/// The last migration that this binary has.
pub(in crate::db) fn last_migration() -> i64 {
    MIGRATOR.iter().last().map_or(0, |last| last.version)
}

/// Connections of servers, and of others of this program's commands.
pub(in crate::db) async fn servers(url: &str) -> Result<u64> {
    let mut conn = options(url)?.connect().await.map_err(Error::storage)?;
    let n: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database()
         AND application_name = current_setting('application_name') AND pid <> pg_backend_pid()",
    )
    .fetch_one(&mut conn)
    .await?;
    // Nothing is under way on it.
    let _ = conn.close().await;
    Ok(n.unsigned_abs())
}

/// Bytes that the database takes, and how its commits reach the disk.
pub(in crate::db) async fn size(url: &str) -> Result<(u64, String)> {
    let mut conn = options(url)?.connect().await.map_err(Error::storage)?;
    let (size, sync): (i64, String) = sqlx::query_as(
        "SELECT pg_database_size(current_database()), current_setting('synchronous_commit')",
    )
    .fetch_one(&mut conn)
    .await?;
    // Nothing is under way on it.
    let _ = conn.close().await;
    Ok((size.unsigned_abs(), sync))
}
