//! Any interleaving of everything loses no id, once whoever keeps the truth compares.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::prelude::*;

use super::{Server, assert_empty, drain, item_in, lane};
use crate::redis::{Consumer, Delivery, Item, Lane, Promise, Redis};

#[derive(Clone, Debug)]
enum Step {
    /// A new attempt may run: it is committed, and added if the server lives that long.
    Runnable {
        id: u8,
        band: u8,
        told: bool,
    },
    /// A new attempt may run later.
    Delayed {
        id: u8,
        band: u8,
        due: bool,
    },
    /// The add or delay of an id is sent again.
    Replay {
        id: u8,
    },
    Reserve {
        id: u8,
    },
    Move,
    Pull {
        who: usize,
        most: usize,
    },
    Claim {
        who: usize,
    },
    /// The oldest delivery runs, or is found not to be wanted: acknowledged.
    Start {
        who: usize,
        acked: bool,
    },
    GiveBack {
        who: usize,
    },
    /// It is gone without a word, and another one takes its place.
    Crash {
        who: usize,
    },
    Leave {
        who: usize,
    },
    Cancel {
        id: u8,
        told: bool,
    },
    Empty,
    LoseGroups,
    Tidy,
    Reconcile,
}

fn step() -> impl Strategy<Value = Step> {
    let (id, band, who) = (0_u8..12, 0_u8..3, 0_usize..3);
    prop_oneof![
        6 => (id.clone(), band.clone(), prop::bool::weighted(0.8))
            .prop_map(|(id, band, told)| Step::Runnable { id, band, told }),
        2 => (id.clone(), band, any::<bool>())
            .prop_map(|(id, band, due)| Step::Delayed { id, band, due }),
        2 => id.clone().prop_map(|id| Step::Replay { id }),
        1 => id.clone().prop_map(|id| Step::Reserve { id }),
        2 => Just(Step::Move),
        6 => (who.clone(), 1_usize..6).prop_map(|(who, most)| Step::Pull { who, most }),
        2 => who.clone().prop_map(|who| Step::Claim { who }),
        6 => (who.clone(), prop::bool::weighted(0.8))
            .prop_map(|(who, acked)| Step::Start { who, acked }),
        2 => who.clone().prop_map(|who| Step::GiveBack { who }),
        1 => who.clone().prop_map(|who| Step::Crash { who }),
        1 => who.prop_map(|who| Step::Leave { who }),
        2 => (id, any::<bool>()).prop_map(|(id, told)| Step::Cancel { id, told }),
        1 => Just(Step::Empty),
        1 => Just(Step::LoseGroups),
        1 => Just(Step::Tidy),
        1 => Just(Step::Reconcile),
    ]
}

/// The world: the truth, and those who share the queues.
struct World<'a> {
    server: &'a Server,
    redis: &'a Redis,
    /// What waits by the truth, and whether it is delayed for an hour.
    waiting: BTreeMap<u8, (Item, bool)>,
    attempts: BTreeMap<u8, u32>,
    consumers: Vec<(Consumer, Vec<Delivery>)>,
    n_consumers: usize,
    lanes: Vec<Lane>,
}

const HOUR: Duration = Duration::from_hours(1);

impl World<'_> {
    fn newcomer(&mut self) -> (Consumer, Vec<Delivery>) {
        self.n_consumers += 1;
        (self.redis.work().consumer(&format!("c{}", self.n_consumers)), Vec::new())
    }

    fn next_attempt(&mut self, id: u8, band: u8) -> Item {
        let attempt = self.attempts.entry(id).or_default();
        *attempt += 1;
        item_in(&lane(band), &format!("id{id}"), *attempt)
    }

    async fn tell(&self, id: u8) {
        match self.waiting.get(&id) {
            Some((item, true)) => {
                self.redis.work().delay(&[(item.clone(), HOUR)]).await.unwrap();
            }
            Some((item, false)) => {
                self.redis.work().add(std::slice::from_ref(item)).await.unwrap();
            }
            None => {}
        }
    }

    async fn reconcile(&self) {
        let ids: Vec<_> = self.waiting.values().map(|(item, _)| item.id.as_str()).collect();
        let known = self.redis.work().known(&ids).await.unwrap();
        for ((&id, (item, _)), known) in self.waiting.iter().zip(known) {
            if known.is_none_or(|attempt| attempt < item.attempt) {
                self.tell(id).await;
            }
        }
    }

    async fn take(&mut self, step: Step) {
        let work = self.redis.work();
        match step {
            Step::Runnable { id, band, told } => {
                let item = self.next_attempt(id, band);
                self.waiting.insert(id, (item, false));
                if told {
                    self.tell(id).await;
                }
            }
            Step::Delayed { id, band, due } => {
                let item = self.next_attempt(id, band);
                if due {
                    work.delay(&[(item.clone(), Duration::ZERO)]).await.unwrap();
                }
                self.waiting.insert(id, (item, !due));
                if !due {
                    self.tell(id).await;
                }
            }
            Step::Replay { id } => self.tell(id).await,
            Step::Reserve { id } => {
                let (place, id) = (lane(0), format!("id{id}"));
                let promise =
                    Promise { lane: &place, id: &id, limit: 5, group_limit: 5, evict: None };
                work.reserve(&[promise], Duration::ZERO).await.unwrap();
            }
            Step::Move => drop(work.move_due(100).await.unwrap()),
            Step::Pull { who, most } => {
                let (consumer, held) = &mut self.consumers[who];
                let got = consumer.pull(&self.lanes, most).await.unwrap();
                assert!(got.len() <= most, "more than was asked for");
                held.extend(got);
            }
            Step::Claim { who } => {
                let (consumer, held) = &mut self.consumers[who];
                held.extend(consumer.claim(&self.lanes, Duration::ZERO, 100).await.unwrap());
            }
            Step::Start { who, acked } => {
                let (consumer, held) = &mut self.consumers[who];
                if held.is_empty() {
                    return;
                }
                let delivery = held.remove(0);
                let id: u8 = delivery.id[2..].parse().unwrap();
                let wanted = self
                    .waiting
                    .get(&id)
                    .is_some_and(|(item, delayed)| item.attempt == delivery.attempt && !delayed);
                if wanted {
                    self.waiting.remove(&id);
                }
                if acked {
                    consumer.ack(&[delivery]).await.unwrap();
                }
            }
            Step::GiveBack { who } => {
                let (consumer, held) = &mut self.consumers[who];
                consumer.give_back(&std::mem::take(held)).await.unwrap();
            }
            Step::Crash { who } => self.consumers[who] = self.newcomer(),
            Step::Leave { who } => {
                self.consumers[who].0.leave(&self.lanes).await.unwrap();
                self.consumers[who] = self.newcomer();
            }
            Step::Cancel { id, told } => {
                self.waiting.remove(&id);
                if told {
                    work.remove(&[&format!("id{id}")]).await.unwrap();
                }
            }
            Step::Empty => drop(self.server.command("FLUSHALL")),
            Step::LoseGroups => {
                for lane in &self.lanes {
                    self.server.command(&format!("XGROUP DESTROY baton:q:{lane} baton"));
                }
            }
            Step::Tidy => drop(work.tidy(Duration::ZERO, Duration::ZERO).await.unwrap()),
            Step::Reconcile => self.reconcile().await,
        }
        self.check_depths().await;
    }

    async fn check_depths(&self) {
        let work = self.redis.work();
        let known = work.ids("0", 10_000).await.unwrap().1.len() as u64;
        let depth: u64 = work.depths().await.unwrap().values().sum();
        assert_eq!(known, depth, "ids known, and their depth");
    }

    /// Everything comes to rest: what is true is told, and somebody does it all.
    async fn settle(mut self) {
        self.reconcile().await;
        self.redis.work().move_due(1000).await.unwrap();
        let (last, _) = self.newcomer();
        let seen = drain(&last, &self.lanes).await;
        let mut delayed = Vec::new();
        for (item, later) in self.waiting.values() {
            if *later {
                delayed.push(item.id.as_str());
            } else {
                assert!(seen.contains(&item.id), "{} was lost", item.id);
            }
        }
        let known = self.redis.work().known(&delayed).await.unwrap();
        assert!(known.iter().all(Option::is_some), "{delayed:?} are delayed: {known:?}");
        // What is known beyond that is what nobody told of: promises, and delayed ids cancelled.
        let ghosts = self.redis.work().ids("0", 10_000).await.unwrap().1;
        let ghosts: BTreeSet<_> = ghosts.iter().map(String::as_str).collect();
        self.redis.work().remove(&ghosts.into_iter().collect::<Vec<_>>()).await.unwrap();
        assert_empty(&self.redis.work()).await;
    }
}

#[test]
fn no_interleaving_loses_an_id_once_the_truth_is_compared() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = Server::start();
    let (redis, _supervisor) = runtime.block_on(server.connect());
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() };
    proptest!(config, |(steps in prop::collection::vec(step(), 1..80))| {
        server.command("FLUSHALL");
        let mut world = World {
            server: &server,
            redis: &redis,
            waiting: BTreeMap::new(),
            attempts: BTreeMap::new(),
            consumers: Vec::new(),
            n_consumers: 0,
            lanes: (0..3).map(lane).collect(),
        };
        for _ in 0..3 {
            let consumer = world.newcomer();
            world.consumers.push(consumer);
        }
        runtime.block_on(async {
            for step in steps {
                world.take(step).await;
            }
            world.settle().await;
        });
    });
}
