//! Databases for tests: of SQLite, or of the server that `BATON_TEST_POSTGRES` names, so that the
//! same tests run on both.

use std::path::Path;

use super::{Db, Location};
use crate::id::Entropy;

/// The database that belongs to a directory, made when it is missing.
pub async fn open(dir: &Path) -> Db {
    let at = location(dir).await;
    Db::open_at(&at, 8, &Entropy::system()).await.unwrap()
}

/// Where the database that belongs to a directory is, made when it is missing.
pub async fn location(dir: &Path) -> Location {
    #[cfg(feature = "postgres")]
    if let Some(server) = std::env::var_os("BATON_TEST_POSTGRES") {
        let server = server.into_string().unwrap();
        return Location::Url(database(&server, dir).await.unwrap());
    }
    Location::File(dir.join("baton.db"))
}

/// A database of the server, whose name is in the directory.
#[cfg(feature = "postgres")]
async fn database(server: &str, dir: &Path) -> crate::error::Result<String> {
    use crate::error::Error;
    use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
    let mut url = reqwest::Url::parse(server).map_err(Error::internal)?;
    let place = dir.join("database");
    if let Ok(name) = std::fs::read_to_string(&place) {
        url.set_path(&name);
        return Ok(url.into());
    }
    let name = format!("test_{:016x}", Entropy::system().u64());
    let mut conn = PgConnection::connect(server).await?;
    sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut conn).await?;
    conn.close().await?;
    std::fs::write(place, &name).map_err(Error::internal)?;
    url.set_path(&name);
    Ok(url.into())
}
