//! Every statement of every store is understood by both engines.

use baton::{
    artifacts::store as artifacts,
    db::{self, Db, Engine, Location, Statement},
    events,
    id::Entropy,
    instances, keys, queues, runners, tasks,
};

use crate::harness::database;

/// Tables with a row for each server, lock, key or host that someone gives an order to.
const SMALL: [&str; 4] = ["instances", "locks", "api_keys", "runner_orders"];

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

/// A plan is kept, and made while tables are still empty: a scan that costs nothing then costs a
/// second of each later.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn no_statement_reads_a_whole_table_to_find_rows() {
    let url = database::create(&database::server().expect("a server"));
    let at = Location::Url(url.clone());
    let db = Db::open_at(&at, 8, &Entropy::system()).await.expect("a database");
    db.close().await;
    let mut scans = Vec::new();
    for text in all().iter().map(|statement| match statement {
        Statement::Query(sql) => sql.postgres,
        Statement::Rows(bulk) => bulk.text(Engine::Postgres, 1),
    }) {
        let places = (1..100).take_while(|n| text.contains(&format!("${n}"))).count();
        if text.is_empty() || places == 0 {
            continue;
        }
        let values = vec!["NULL"; places].join(", ");
        let settings = db::POSTGRES_SETTINGS.map(|(name, value)| format!("SET {name} = '{value}'"));
        let plan = database::psql(
            &url,
            &format!(
                "{}; SET plan_cache_mode = force_generic_plan; PREPARE looked_at AS {text}; \
                 EXPLAIN (COSTS OFF) EXECUTE looked_at({values})",
                settings.join("; ")
            ),
        );
        let scanned = plan.lines().filter_map(|line| line.split_once("Seq Scan on "));
        let scanned = scanned.map(|(_, table)| table.split(' ').next().unwrap_or_default());
        let large = scanned.filter(|table| !SMALL.contains(table));
        scans.extend(large.map(|table| format!("{table}: {text}")));
    }
    assert_eq!(scans, [""; 0], "{}", scans.join("\n"));
}
