//! What the server's error codes mean for a call.

use sqlx::postgres::PgDatabaseError;

use crate::error::{Error, Kind, Reason};

/// The error of a statement that the server refused.
pub(in crate::db) fn from_database(error: sqlx::Error) -> Error {
    let code = error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<PgDatabaseError>())
        .map(|error| error.code().to_owned())
        .unwrap_or_default();
    match code.as_str() {
        // A serialization failure, a deadlock, a lock that was not to be had, a row that another
        // transaction deleted.
        "40001" | "40P01" | "55P03" | "23503" => {
            Error::new(Kind::Aborted, Reason::Conflict, "it changed meanwhile; try again")
                .caused_by(error)
        }
        // A statement that was cancelled, a server that takes no writes, damaged data.
        "57014" | "25006" | "XX001" | "XX002" => Error::storage(error),
        // Connections, resources such as disk space, shutdowns, the system, bad credentials, no
        // such database.
        _ if ["08", "53", "57", "58", "28", "3D"].contains(&code.get(..2).unwrap_or_default()) => {
            Error::storage(error)
        }
        _ => Error::internal(error),
    }
}
