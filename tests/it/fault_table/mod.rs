//! Three servers on one Postgres and one Redis, six runners, a load of tasks, and one fault after
//! another: which promises held, as a table of counts.
//!
//! `BATON_FAULT_SECONDS` says how long each fault lasts (6) and `BATON_FAULT_RATE` how many tasks
//! come in a second (20); `BATON_INFLICT` picks faults whose name contains it.

mod load;
mod site;

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use self::{
    load::{Load, Told},
    site::{Fault, Site},
};
use crate::harness::{
    SOON,
    checks::{self, History, check_end, check_stream},
    eventually, within,
};

/// Promises that the runs look at.
const PROMISES: [&str; 9] = ["P1", "P2", "P3", "P4", "P6", "P7-P9", "P10", "P17", "P18"];
/// A task that waited was found again within this time after the fault, as far as clocks agree.
const FOUND_WITHIN: Duration = Duration::from_secs(10);

/// How often a promise was looked at, and what broke it.
#[derive(Default)]
struct Verdict {
    n_checks: usize,
    broken: Vec<String>,
}

impl Verdict {
    fn check(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        self.n_checks += 1;
        if !holds {
            self.broken.push(otherwise());
        }
    }

    fn cell(&self) -> String {
        match self.broken.len() {
            0 => self.n_checks.to_string(),
            n => format!("{n} BROKEN of {}", self.n_checks),
        }
    }
}

/// What came of one fault.
struct Row {
    fault: Fault,
    figures: [String; 5],
    verdicts: BTreeMap<&'static str, Verdict>,
}

/// P1-P4, P6-P10, P17, P18 under each fault of the cluster.
// The links are carried by this process: no thread that carries may wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn heavy_the_promises_hold_under_each_fault() {
    let number = |name, usual| match std::env::var(name) {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => usual,
    };
    let time = Duration::from_secs_f64(number("BATON_FAULT_SECONDS", 6.0));
    let rate = number("BATON_FAULT_RATE", 20.0);
    let mut site = Site::start(rate).await;
    let mut rows = Vec::new();
    let only = std::env::var("BATON_INFLICT").unwrap_or_default();
    for fault in Fault::ALL.into_iter().filter(|fault| fault.name().contains(&only)) {
        rows.push(run(&mut site, fault, time, rate).await);
        println!("{}", table(&rows));
    }
    let broken: Vec<_> = rows
        .iter()
        .flat_map(|row| row.verdicts.iter().map(move |(promise, verdict)| (row, promise, verdict)))
        .flat_map(|(row, promise, verdict)| {
            let name = row.fault.name();
            verdict.broken.iter().take(5).map(move |what| format!("{promise}, {name}: {what}"))
        })
        .collect();
    assert!(broken.is_empty(), "broken:\n{}", broken.join("\n"));
}

async fn run(site: &mut Site, fault: Fault, time: Duration, rate: f64) -> Row {
    let name = format!("fault-{}", fault as usize);
    let load = Load::start(&name, site.apis(), time + Duration::from_secs(2), rate);
    site.inflict(fault, time).await;
    let healed = std::time::Instant::now();
    site.recovered().await;
    let recovery = healed.elapsed();
    let told = within("the load ends", time + 12 * SOON, load.ended()).await;
    let open = format!(
        "SELECT count(*) FROM tasks WHERE request_id LIKE '{name}-%' AND state IN ('QUEUED', 'RUNNING')"
    );
    // What is still open then is counted below.
    let _ended = tokio::time::timeout(
        6 * SOON,
        eventually("no open task", 7 * SOON, || async { (site.sql(&open) == "0").then_some(()) }),
    )
    .await;
    let verdicts = judge(site, &name, &told, time + fault.skew()).await;
    let numbers = format!(
        "SELECT sum(lost), sum(attempt), round(max(start_time - create_time) / 1e6, 1)
         FROM tasks WHERE request_id LIKE '{name}-%'"
    );
    let numbers = site.sql(&numbers);
    let mut numbers = numbers.split('|').map(str::to_owned);
    let mut next = || numbers.next().unwrap_or_default();
    let (lost, _attempts, waited) = (next(), next(), next());
    let resent: u32 = told.iter().map(|told| told.resent).sum();
    let figures = [
        told.len().to_string(),
        resent.to_string(),
        lost,
        format!("{waited} s"),
        format!("{:.1} s", recovery.as_secs_f64()),
    ];
    Row { fault, figures, verdicts }
}

async fn judge(
    site: &Site,
    name: &str,
    told: &[Told],
    time: Duration,
) -> BTreeMap<&'static str, Verdict> {
    let mut verdicts: BTreeMap<_, _> =
        PROMISES.into_iter().map(|promise| (promise, Verdict::default())).collect();
    let mut look = |promise: &str, holds: bool, otherwise: &dyn Fn() -> String| {
        let verdict = verdicts.get_mut(promise).expect("a promise that is looked at");
        verdict.check(holds, otherwise);
    };
    let mine = format!("FROM tasks t WHERE t.request_id LIKE '{name}-%'");
    let rows = site.sql(&format!("SELECT t.id, t.state {mine}"));
    let states: BTreeMap<_, _> = rows.lines().filter_map(|row| row.split_once('|')).collect();
    for told in told {
        let task = told.task.as_str();
        look("P1", states.contains_key(task), &|| format!("{task} was accepted and is gone"));
        let state = states.get(task).copied().unwrap_or("gone");
        let open = matches!(state, "QUEUED" | "RUNNING");
        look("P3", !open, &|| format!("{task} is still {state}"));
        if let Some(again) = &told.again {
            look("P2", again == task, &|| format!("{task} and {again} of one request id"));
        }
        look("P18", told.was_found, &|| format!("{task} was not found after the answer"));
        if told.cancelled {
            look("P10", state == "CANCELLED", &|| format!("{task} was cancelled and is {state}"));
        } else {
            let sound = state == "SUCCEEDED" || state == "CANCELLED";
            look("P3", sound, &|| format!("{task} is {state}"));
        }
    }
    let n_rows = states.len();
    look("P2", n_rows == told.len(), &|| format!("{n_rows} tasks of {} requests", told.len()));
    // Each attempt started once, and each task ended once, with its last entry.
    let amiss = |condition: &str| site.sql(&format!("SELECT t.id {mine} AND {condition}"));
    let of = "FROM task_events e WHERE e.task_id = t.id AND e.kind";
    let attempts = amiss(&format!("t.attempt <> (SELECT count(*) {of} = 'attempt_started')"));
    look("P4", attempts.is_empty(), &|| format!("attempts of {attempts}"));
    let ends = amiss(&format!(
        "t.state NOT IN ('QUEUED', 'RUNNING') AND
         (SELECT array_agg(e.sequence) {of} = 'ended') IS DISTINCT FROM ARRAY[t.last_sequence]"
    ));
    look("P6", ends.is_empty(), &|| format!("ends of {ends}"));
    let bound = (time + FOUND_WITHIN).as_micros();
    let late = amiss(&format!("t.start_time - t.create_time > {bound}"));
    look("P17", late.is_empty(), &|| format!("found late: {late}"));
    // Readers: those who followed, and one at each server now.
    for told in told.iter().filter(|told| !told.followed.is_empty()) {
        let mut history = History::default();
        let mut readers = vec![told.followed.clone()];
        for (at, api) in site.apis().into_iter().enumerate() {
            let read = load::follow(std::slice::from_ref(&api), &told.task, 0);
            let events = tokio::time::timeout(SOON, read).await;
            let cancelled = told.cancelled;
            look("P7-P9", events.is_ok(), &|| {
                format!("{} has no end at server {at}; cancelled: {cancelled}", told.task)
            });
            readers.extend(events);
        }
        let task = site.apis()[0].get(&told.task).await;
        let problem = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for events in &readers {
                check_stream(&told.task, 0, events);
                check_end(&task, events);
                history.add(&told.task, events);
                if !told.cancelled {
                    assert_eq!(checks::text(events), told.text, "{}", told.task);
                }
            }
        }));
        look("P7-P9", problem.is_ok(), &|| format!("streams of {}", told.task));
    }
    verdicts
}

fn table(rows: &[Row]) -> String {
    let mut text =
        String::from("| fault | tasks | sent again | lost attempts | longest wait | recovery |");
    for promise in PROMISES {
        let _ = write!(text, " {promise} |");
    }
    text += "\n|";
    text += &" --- |".repeat(6 + PROMISES.len());
    for row in rows {
        let _ = write!(text, "\n| {} | {} |", row.fault.name(), row.figures.join(" | "));
        for promise in PROMISES {
            let _ = write!(text, " {} |", row.verdicts[promise].cell());
        }
    }
    text
}
