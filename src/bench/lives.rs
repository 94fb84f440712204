//! The cases about whole lives of tasks at full speed.

use anyhow::Context as _;

use super::{
    Role,
    figures::median,
    floor,
    report::{Better, Row},
    suite::{Plan, baton, each, play},
    tasks,
};

/// Whole lives of tasks, beside the floor of the same store.
pub(super) fn whole_lives(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    const SUBMITTERS: usize = 64;
    let (_baton, server) = baton(plan)?;
    let (mut floor, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat {
        let dir = plan.dir()?;
        let (seconds, payload) = (plan.seconds(), 200);
        let spec = floor::Spec {
            dir: dir.path.clone(),
            database_url: dir.database.as_ref().map(|database| database.url.clone()),
            submitters: SUBMITTERS,
            seconds,
            payload,
        };
        floor.push(play::<floor::Outcome>(&Role::Floor(spec)).context("floor")?);
        let (server, pace) = (server.clone(), tasks::Pace::Closed(SUBMITTERS));
        let spec = tasks::Spec { server, runner_at: None, pace, seconds, payload, slots: 512 };
        ours.push(play::<tasks::Outcome>(&Role::Tasks(spec)).context("baton")?);
    }
    let postgres = plan.database_url.is_some();
    let (goal, bounds) = if postgres { ("G12", (0.3, 0.5)) } else { ("G11", (0.15, 0.35)) };
    let rate = Row::new(
        goal,
        "whole lives per second, 64 submitters, store floor",
        "/s",
        each(&ours, |o| o.rate),
    )
    .against(each(&floor, |o| o.rate))
    .judged(Better::Higher, bounds.0, bounds.1);
    let cpu = if postgres { (150.0, 80.0) } else { (100.0, 50.0) };
    let ratio = format!(
        "{:.2} x of BullMQ with AOF always (2.5 k/s), {:.2} x of everysec (6.2 k/s), as measured once",
        rate.figure / 2_500.0,
        rate.figure / 6_200.0,
    );
    Ok(vec![
        rate.noted(ratio),
        Row::new(
            "G13",
            "CPU per task, server, database and load",
            "µs",
            each(&ours, |o| o.server_us + o.database_us + o.load_us),
        )
        .judged(Better::Lower, cpu.0, cpu.1)
        .noted(format!(
            "server {:.1} µs, database {:.1} µs; store floor {:.1} µs",
            median(each(&ours, |o| o.server_us)),
            median(each(&ours, |o| o.database_us)),
            median(each(&floor, |o| o.cpu_us))
        )),
    ])
}
