//! Every statement of every store is understood by both engines.

use baton::{
    artifacts::store as artifacts,
    db::{self, Db, Location, Statement},
    events,
    id::Entropy,
    instances, keys, queues, runners, tasks,
};

use crate::harness::database;

fn all() -> Vec<Statement> {
    [
        artifacts::STATEMENTS,
        artifacts::stored::STATEMENTS,
        artifacts::uploads::STATEMENTS,
        db::STATEMENTS,
        events::store::STATEMENTS,
        instances::STATEMENTS,
        keys::STATEMENTS,
        queues::STATEMENTS,
        runners::roster::store::STATEMENTS,
        tasks::queued::STATEMENTS,
        tasks::reads::STATEMENTS,
        tasks::store::STATEMENTS,
        tasks::transcripts::STATEMENTS,
    ]
    .concat()
}

async fn refused(db: Db) -> Vec<(&'static str, String)> {
    let refused = db.check(&all()).await.expect("a database");
    db.close().await;
    refused
}

#[tokio::test]
async fn every_statement_is_prepared_on_sqlite() {
    let dir = tempfile::tempdir().expect("a directory");
    let db = Db::open(&dir.path().join("baton.db")).await.expect("a database");
    assert_eq!(refused(db).await, []);
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn every_statement_is_prepared_on_postgres() {
    let url = database::create(&database::server().expect("a server"));
    let at = Location::Url(url);
    let db = Db::open_at(&at, 8, &Entropy::system()).await.expect("a database");
    assert_eq!(refused(db).await, []);
}
