//! Three servers on one Postgres, one Redis and one bucket, six runners, a load of tasks, and one
//! fault after another: which promises held, as a table of counts.
//!
//! `BATON_FAULT_SECONDS` says how long each fault lasts (4) and `BATON_FAULT_RATE` how many tasks
//! come in a second (20); `BATON_INFLICT` picks faults whose name contains it.

mod judge;
mod load;
mod probes;
mod site;

use std::{
    collections::VecDeque,
    fmt::Write as _,
    time::{Duration, Instant, SystemTime},
};

use tokio::task::JoinSet;

use self::{
    judge::{PROMISES, Run, Verdicts},
    load::Load,
    probes::Press,
    site::{Fault, Site},
};
use crate::harness::{SOON, eventually, pass, within};

/// The load is under way this long before a fault.
const BEFORE: Duration = Duration::from_secs(2);
/// Runners that are silent until they lose their lease, in each fault.
const N_LATE: usize = 3;
/// Longest time for throughput to come back, and for all that waited to be done after that.
const RECOVERY: Duration = Duration::from_mins(1);
const CATCHING_UP: Duration = Duration::from_secs(20);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(100);

/// What came of one fault.
struct Row {
    fault: Fault,
    figures: Vec<String>,
    verdicts: Verdicts,
}

impl Row {
    /// Names of the columns, and the line below them.
    fn head() -> String {
        let mut text = String::from(
            "| fault | tasks | sent again | lost attempts | longest wait | ready without storage \
             for | ready again | flowing | caught up |",
        );
        for promise in PROMISES {
            let _ = write!(text, " {promise} |");
        }
        text + "\n|" + &" --- |".repeat(9 + PROMISES.len())
    }

    fn line(&self) -> String {
        let mut text = format!("| {} | {} |", self.fault.name(), self.figures.join(" | "));
        for promise in PROMISES {
            let _ = write!(text, " {} |", self.verdicts.0[promise].cell());
        }
        text
    }
}

/// P1-P10, P12, P14-P18 under each fault of the cluster.
// The links are carried by this process: no thread that carries may wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an installed Postgres"]
async fn heavy_the_promises_hold_under_each_fault() {
    let number = |name, usual| match std::env::var(name) {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => usual,
    };
    let time = Duration::from_secs_f64(number("BATON_FAULT_SECONDS", 4.0));
    let rate = number("BATON_FAULT_RATE", 20.0);
    let mut site = Site::start(rate).await;
    let mut waiting = probes::fill(&site.apis()[0]).await;
    let mut rows = Vec::new();
    let only = std::env::var("BATON_INFLICT").unwrap_or_default();
    println!("\n{}", Row::head());
    for fault in Fault::ALL.into_iter().filter(|fault| fault.name().contains(&only)) {
        let row = run(&mut site, fault, time, rate, &mut waiting).await;
        println!("{}", row.line());
        rows.push(row);
    }
    let broken: Vec<_> = rows
        .iter()
        .flat_map(|row| {
            row.verdicts.0.iter().map(move |(promise, verdict)| (row, promise, verdict))
        })
        .flat_map(|(row, promise, verdict)| {
            let name = row.fault.name();
            verdict.broken.iter().take(5).map(move |what| format!("{promise}, {name}: {what}"))
        })
        .collect();
    assert!(broken.is_empty(), "broken:\n{}", broken.join("\n"));
}

async fn run(
    site: &mut Site,
    fault: Fault,
    time: Duration,
    rate: f64,
    waiting: &mut Vec<String>,
) -> Row {
    let name = format!("fault-{}", fault as usize);
    let pulse = Pulse::begin(rate);
    let load = Load::start(&name, site.apis(), rate);
    let press = Press::begin(site.apis());
    let (mut late, mut run_out) = (JoinSet::new(), JoinSet::new());
    for i in 0..N_LATE {
        late.spawn(probes::late_words(site.apis(), format!("late-{}-{i}", fault as usize), i));
    }
    pass(BEFORE).await;
    if matches!(fault, Fault::Nothing | Fault::ClockAhead) {
        for (i, api) in site.apis().into_iter().enumerate() {
            run_out.spawn(probes::run_out(api, format!("out-{}-{i}", fault as usize)));
        }
    }
    let pids: Vec<_> = site.servers.iter_mut().map(|server| server.process().pid()).collect();
    let usual = pulse.look(site).n_open;
    let seen = site.inflict(fault, time).await;
    let mended = Instant::now();
    let (recovery, ready) = tokio::join!(pulse.recover(site, mended, usual), async {
        site.recovered().await;
        mended.elapsed()
    });
    pass((BEFORE + time).saturating_sub(pulse.begun.elapsed())).await;
    let told = within("the load ends", 12 * SOON, load.ended()).await;
    let open = format!(
        "SELECT count(*) FROM tasks WHERE request_id LIKE '{name}-%' AND state IN ('QUEUED', 'RUNNING')"
    );
    // What is still open then is counted below.
    let _ended = tokio::time::timeout(
        6 * SOON,
        eventually("no open task", 7 * SOON, || async { (site.sql(&open) == "0").then_some(()) }),
    )
    .await;
    let judged = Run { site, fault, name: &name, time, told: &told, seen: &seen };
    let mut verdicts = judged.judge().await;
    for looks in late.join_all().await {
        verdicts.extend("P5", looks);
    }
    for looks in run_out.join_all().await {
        verdicts.extend("P12", looks);
    }
    let (refused, accepted) = press.ended().await;
    verdicts.extend("P15", refused);
    waiting.extend(accepted);
    judge_queue(site, rate, waiting, &mut verdicts);
    if fault != Fault::ServersKilled {
        for (server, before) in site.servers.iter_mut().zip(pids) {
            let same = server.process().pid() == before && server.process().exit_code().is_none();
            verdicts.look("P16", same, || "a server ended".into());
        }
    }
    let numbers = format!(
        "SELECT sum(lost), round(max(start_time - create_time) / 1e6, 1)
         FROM tasks WHERE request_id LIKE '{name}-%'"
    );
    let numbers = site.sql(&numbers);
    let (lost, waited) = numbers.split_once('|').unwrap_or_default();
    let resent: u32 = told.iter().map(|told| told.resent).sum();
    let not_ready = seen.ready_for.iter().flatten().max();
    let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
    let figures = vec![
        told.len().to_string(),
        resent.to_string(),
        lost.to_owned(),
        format!("{waited} s"),
        not_ready.map_or("-".into(), |time| seconds(*time)),
        seconds(ready),
        recovery.flowing.map_or("-".into(), seconds),
        recovery.caught_up.map_or("-".into(), seconds),
    ];
    Row { fault, figures, verdicts }
}

/// P15: a full queue takes no more, on any server, and drops nothing that it took.
fn judge_queue(site: &Site, rate: f64, waiting: &[String], verdicts: &mut Verdicts) {
    let found = site.sql("SELECT id FROM tasks WHERE model = 'test/full' AND state = 'QUEUED'");
    let found: std::collections::BTreeSet<_> = found.lines().collect();
    let dropped = waiting.iter().filter(|task| !found.contains(task.as_str())).count();
    verdicts.look("P15", dropped == 0, || format!("{dropped} of {} are gone", waiting.len()));
    let most = probes::most_waiting(rate);
    let n_waiting = found.len() as u64;
    let few = n_waiting <= most + most / 20;
    verdicts.look("P15", few, || format!("{n_waiting} wait where {most} may"));
}

/// How many tasks of the load there are, and how many of them are open.
struct Pulse {
    begun: Instant,
    /// The least id of a task from then on.
    first: String,
    rate: f64,
}

/// One look at it.
struct Beat {
    at: Instant,
    n_open: u64,
    n_ended: u64,
}

/// How long it took after a fault.
#[derive(Default)]
struct Recovery {
    /// Until the first second in which nine in ten tasks ended of those that come in one.
    flowing: Option<Duration>,
    /// Until no more tasks were open than before it, and what comes in half a second.
    caught_up: Option<Duration>,
}

impl Pulse {
    fn begin(rate: f64) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
        let millis = now.as_millis() as u64;
        let first = format!("{:08x}-{:04x}-7000-8000-000000000000", millis >> 16, millis & 0xffff);
        Self { begun: Instant::now(), first, rate }
    }

    fn look(&self, site: &Site) -> Beat {
        let counts = site.sql(&format!(
            "SELECT count(*) FILTER (WHERE state IN ('QUEUED', 'RUNNING')), count(*)
             FROM tasks WHERE id >= '{}' AND model = 'test/echo'",
            self.first
        ));
        let (open, all) = counts.split_once('|').expect("two counts");
        let [n_open, n_all] = [open, all].map(|count| count.parse::<u64>().expect("a count"));
        Beat { at: Instant::now(), n_open, n_ended: n_all - n_open }
    }

    async fn recover(&self, site: &Site, mended: Instant, usual: u64) -> Recovery {
        let mut recovery = Recovery::default();
        let mut beats: VecDeque<Beat> = VecDeque::new();
        let enough = usual + (self.rate / 2.0) as u64;
        while (recovery.flowing.is_none() && mended.elapsed() < RECOVERY)
            || (recovery.caught_up.is_none() && mended.elapsed() < CATCHING_UP)
        {
            let beat = self.look(site);
            if recovery.caught_up.is_none() && beat.n_open <= enough {
                recovery.caught_up = Some(beat.at - mended);
            }
            while beats.get(1).is_some_and(|next| beat.at - next.at >= Duration::from_secs(1)) {
                beats.pop_front();
            }
            if let Some(before) = beats.front()
                && beat.at - before.at >= Duration::from_secs(1)
            {
                let time = (beat.at - before.at).as_secs_f64();
                let n_ended = (beat.n_ended - before.n_ended) as f64;
                if recovery.flowing.is_none() && n_ended >= 0.9 * self.rate * time {
                    recovery.flowing = Some(before.at - mended);
                }
            }
            beats.push_back(beat);
            pass(LOOK).await;
        }
        recovery
    }
}
