//! Claims about frames between servers.

use std::time::Duration;

use bytes::Bytes;

use super::Server;
use crate::redis::{
    Bell, Fit, Inbox, Mail, Parcel, Reading, Redis,
    testing::{BOUND, eventually},
};

fn parcel(topic: &str, first: u64, last: u64) -> Parcel {
    // Not text.
    let frames = Bytes::from(vec![0xff, first as u8, last as u8, b'\r', b'\n']);
    Parcel { topic: topic.into(), first, last, frames }
}

async fn next(inbox: &mut Inbox) -> Mail {
    tokio::time::timeout(BOUND, inbox.next()).await.expect("mail in time")
}

/// Sends until it is known to have arrived, as after an error.
async fn send(redis: &Redis, parcel: &Parcel) {
    let parcels = [parcel.clone()];
    eventually("sent", || async { redis.send("b", &parcels).await.is_ok() }).await;
}

#[tokio::test]
async fn parcels_arrive_whole_and_in_order_also_those_sent_before_anybody_reads() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let sent = [parcel("x", 1, 4), parcel("y", 7, 7), parcel("x", 5, 9)];
    redis.send("b", &sent[..2]).await.unwrap();
    redis.send("b", &sent[2..]).await.unwrap();
    redis.send("b", &[]).await.unwrap();
    let mut inbox = redis.inbox("b").await.unwrap();
    assert_eq!(next(&mut inbox).await, Mail::Parcels(sent.to_vec()));

    // One that waits already gets it too, and what it was given is not given again.
    let later = [parcel("x", 10, 10)];
    let (got, sent) = tokio::join!(next(&mut inbox), redis.send("b", &later));
    sent.unwrap();
    assert_eq!(got, Mail::Parcels(later.to_vec()));
}

#[tokio::test]
async fn an_inbox_that_nobody_reads_stays_bounded_and_the_gap_shows() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let total = 12_000;
    for first in (1..=total).step_by(500) {
        let sends = (first..first + 500).map(|index| {
            let redis = redis.clone();
            async move { redis.send("b", &[parcel("x", index, index)]).await.unwrap() }
        });
        futures_util::future::join_all(sends).await;
    }
    let length: u64 = server.command("XLEN baton:f:b").trim_start_matches(':').parse().unwrap();
    assert!((8192..8400).contains(&length), "{length}");
    let expiry: i64 = server.command("PTTL baton:f:b").trim_start_matches(':').parse().unwrap();
    assert!(expiry > 50_000 && expiry <= 60_000, "{expiry}");

    let mut inbox = redis.inbox("b").await.unwrap();
    let Mail::Parcels(parcels) = next(&mut inbox).await else { panic!("parcels") };
    assert_eq!(Reading::from(1).fit(&parcels[0]), Fit::Missing(1));
}

#[tokio::test]
async fn a_reader_that_waits_comes_back_when_its_connection_is_killed() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let mut inbox = redis.inbox("b").await.unwrap();
    send(&redis, &parcel("x", 1, 1)).await;
    assert_eq!(next(&mut inbox).await, Mail::Parcels(vec![parcel("x", 1, 1)]));
    let wanted = parcel("x", 2, 2);
    let trouble = async {
        eventually("it waits", || async { server.n_blocked() == 1 }).await;
        server.command("CLIENT KILL TYPE normal");
        send(&redis, &wanted).await;
    };
    let (mail, ()) = tokio::join!(next(&mut inbox), trouble);
    assert_eq!(mail, Mail::Lost, "it may lack something, and is told");
    let mail = next(&mut inbox).await;
    let Mail::Parcels(parcels) = mail else { panic!("{mail:?}") };
    assert!(parcels.contains(&wanted), "{parcels:?}");
}

#[tokio::test]
async fn a_reader_learns_that_the_stream_was_lost_and_goes_on() {
    let mut server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let mut inbox = redis.inbox("b").await.unwrap();
    send(&redis, &parcel("x", 1, 1)).await;
    assert!(matches!(next(&mut inbox).await, Mail::Parcels(_)));

    server.command("FLUSHALL");
    assert_eq!(next(&mut inbox).await, Mail::Lost);
    send(&redis, &parcel("x", 2, 2)).await;
    assert_eq!(next(&mut inbox).await, Mail::Parcels(vec![parcel("x", 2, 2)]));

    server.kill();
    server.restart();
    while next(&mut inbox).await != Mail::Lost {}
    send(&redis, &parcel("x", 3, 3)).await;
    loop {
        match next(&mut inbox).await {
            Mail::Lost => {}
            Mail::Parcels(parcels) => {
                assert!(parcels.contains(&parcel("x", 3, 3)), "{parcels:?}");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_read_that_was_given_up_loses_nothing() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let mut inbox = redis.inbox("b").await.unwrap();
    let short = Duration::from_millis(20);
    assert!(tokio::time::timeout(short, inbox.next()).await.is_err());
    send(&redis, &parcel("x", 1, 1)).await;
    assert_eq!(next(&mut inbox).await, Mail::Parcels(vec![parcel("x", 1, 1)]));
}

#[test]
fn a_reading_takes_each_index_once_and_names_what_is_missing() {
    let mut reading = Reading::from(5);
    assert_eq!(reading.fit(&parcel("x", 1, 4)), Fit::Known);
    assert_eq!(reading.fit(&parcel("x", 6, 9)), Fit::Missing(5));
    assert_eq!(reading.fit(&parcel("x", 3, 7)), Fit::From(5));
    assert_eq!(reading.fit(&parcel("x", 3, 7)), Fit::Known);
    assert_eq!(reading.fit(&parcel("x", 8, 8)), Fit::From(8));
    assert_eq!(reading.next(), 9);
}

#[tokio::test]
async fn a_bell_is_heard_by_those_who_listen_to_that_channel() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let bells = redis.bells().await.unwrap();
    let (mut a, mut also_a) = (bells.listen("a").await.unwrap(), bells.listen("a").await.unwrap());
    let mut b = bells.listen("b").await.unwrap();
    let message = Bytes::from_static(&[0xff, 0, 1]);
    assert_eq!(redis.ring("a", message.clone()).await.unwrap(), 1, "one connection listens");
    redis.ring("b", Bytes::new()).await.unwrap();
    assert_eq!(a.next().await, Some(Bell::Rang(message.clone())));
    assert_eq!(also_a.next().await, Some(Bell::Rang(message)));
    assert_eq!(b.next().await, Some(Bell::Rang(Bytes::new())), "and not what rang at `a`");
    assert_eq!(redis.ring("nobody", Bytes::new()).await.unwrap(), 0);
}
