//! Claims about the kernels, each against a real server. Those that are not about connecting hold
//! for the imitation too that takes its place in the simulation.

mod connection;
mod imitated;
mod real;

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;

use super::{Consumer, Delivery, Item, Lane, Work};

fn lane(band: u8) -> Lane {
    Lane::new("team/model", "v1", band).unwrap()
}

fn item(id: &str, attempt: u32) -> Item {
    item_in(&lane(2), id, attempt)
}

fn item_in(lane: &Lane, id: &str, attempt: u32) -> Item {
    Item {
        lane: lane.clone(),
        info: Bytes::from_static(b"what it is"),
        id: id.into(),
        attempt,
        // Not text, as encoded messages are not.
        data: Bytes::from(vec![0xff, 0x00, b'\r', b'\n', attempt as u8]),
    }
}

fn items(n_items: usize) -> Vec<Item> {
    (0..n_items).map(|number| item(&format!("id{number:04}"), 1)).collect()
}

fn ids(deliveries: &[Delivery]) -> Vec<&str> {
    deliveries.iter().map(|delivery| delivery.id.as_str()).collect()
}

async fn pull(consumer: &Consumer, most: usize) -> Vec<Delivery> {
    consumer.pull(&[lane(2)], most).await.unwrap()
}

/// Everything there is to get, acknowledged as it comes; what others hold is taken over.
async fn drain(consumer: &Consumer, lanes: &[Lane]) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    loop {
        let mut got = consumer.pull(lanes, 100).await.unwrap();
        got.extend(consumer.claim(lanes, Duration::ZERO, 100).await.unwrap());
        if got.is_empty() {
            return seen;
        }
        consumer.ack(&got).await.unwrap();
        seen.extend(got.into_iter().map(|delivery| delivery.id));
    }
}

/// What must hold when nothing is left.
async fn assert_empty(work: &Work) {
    assert_eq!(work.depths().await.unwrap(), [].into(), "depths of nothing");
    assert!(work.ids("0", 1000).await.unwrap().1.is_empty(), "known ids of nothing");
    let lanes: Vec<_> = work.lanes().await.unwrap().into_iter().map(|info| info.lane).collect();
    for stats in work.stats(&lanes).await.unwrap() {
        assert_eq!((stats.entries, stats.delivered, stats.oldest), (0, 0, None));
        assert_eq!(stats.next, None);
    }
}
