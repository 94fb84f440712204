//! A second encoding of an entry beside its bytes: made once, at the first demand, and shared by
//! everybody who reads the entry.
//!
//! Whoever keeps entries hangs a [`Twin`] on those that a reader wants in another encoding. The
//! keeper does not know which encoding that is; it counts the bytes ([`Charge`]).
//!
//! Between the keeper and whoever makes the encoding lies a gRPC call within this process, whose
//! body is bytes and nothing else. Twins pass beside it: a message that has one offers it while
//! it is encoded ([`offer`]), and whoever polls the body has what was offered during that poll
//! ([`collect`]). For all other bodies nobody makes twins ([`wanted`]).

use std::{
    cell::RefCell,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;

/// What an empty twin costs: itself, and the counts of its `Arc`.
const EMPTY: usize = size_of::<Twin>() + 2 * size_of::<usize>();

/// Counts the bytes of the twins that live.
#[derive(Debug, Default)]
pub struct Charge {
    bytes: AtomicUsize,
    all: Option<Arc<Charge>>,
}

impl Charge {
    /// A count whose bytes count in `all` too.
    pub fn within(all: &Arc<Self>) -> Self {
        Self { bytes: AtomicUsize::new(0), all: Some(all.clone()) }
    }

    /// Bytes now.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Relaxed);
        if let Some(all) = &self.all {
            all.add(bytes);
        }
    }

    fn sub(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Relaxed);
        if let Some(all) = &self.all {
            all.sub(bytes);
        }
    }
}

/// The second encoding of one entry; empty until somebody wants it.
#[derive(Debug)]
pub struct Twin {
    /// By [`Variant`]; `None` in one for an entry that has no such encoding.
    encodings: [OnceLock<Option<Bytes>>; 2],
    charge: Arc<Charge>,
}

/// In which form readers get the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// As it is.
    Plain,
    /// With the name of its stream in it.
    Tagged,
}

impl Twin {
    /// An empty one that is counted in `charge` while it lives.
    pub fn new(charge: &Arc<Charge>) -> Arc<Self> {
        charge.add(EMPTY);
        Arc::new(Self { encodings: Default::default(), charge: charge.clone() })
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        let made = self.encodings.iter().filter_map(|encoding| encoding.get()?.as_ref());
        EMPTY + made.map(Bytes::len).sum::<usize>()
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        self.charge.sub(self.bytes());
    }
}

/// A message that was encoded, with its entry's twin.
#[derive(Clone, Debug)]
pub struct Offer {
    message: Bytes,
    twin: Arc<Twin>,
    variant: Variant,
}

impl Offer {
    /// The message as it was encoded.
    pub fn message(&self) -> &Bytes {
        &self.message
    }

    /// The message in the second encoding: `make` makes it where nobody did before, and says
    /// `None` of a message that has none. Of several callers at once one makes it and the others
    /// wait.
    pub fn encoding(&self, make: impl FnOnce(&[u8]) -> Option<Bytes>) -> Option<Bytes> {
        let made = self.twin.encodings[self.variant as usize].get_or_init(|| {
            let made = make(&self.message);
            self.twin.charge.add(made.as_ref().map_or(0, Bytes::len));
            made
        });
        made.clone()
    }
}

thread_local! {
    /// What was offered in the poll that runs; `None` while nobody collects.
    static OFFERS: RefCell<Option<Vec<Offer>>> = const { RefCell::new(None) };
}

/// Does `work`, during which messages may be encoded, and adds what they offer to `offers`, in
/// their order.
pub fn collect<T>(offers: &mut Vec<Offer>, work: impl FnOnce() -> T) -> T {
    /// Puts back what was there before, also when `work` panics.
    struct Outer(Option<Vec<Offer>>);
    impl Drop for Outer {
        fn drop(&mut self) {
            OFFERS.set(self.0.take());
        }
    }

    let _outer = Outer(OFFERS.replace(Some(std::mem::take(offers))));
    let result = work();
    *offers = OFFERS.take().unwrap_or_default();
    result
}

/// Whether somebody collects: whether twins are of use to the reader that is being polled.
pub fn wanted() -> bool {
    OFFERS.with_borrow(Option::is_some)
}

/// Offers the twin of a message that is being encoded to whoever collects.
pub fn offer(message: &Bytes, twin: &Arc<Twin>, variant: Variant) {
    OFFERS.with_borrow_mut(|offers| {
        if let Some(offers) = offers {
            offers.push(Offer { message: message.clone(), twin: twin.clone(), variant });
        }
    });
}

#[cfg(test)]
mod tests {
    use std::{panic::catch_unwind, thread};

    use super::*;

    const MESSAGE: Bytes = Bytes::from_static(b"message");

    fn offered(twin: &Arc<Twin>, variant: Variant) -> Offer {
        let mut offers = Vec::new();
        collect(&mut offers, || offer(&MESSAGE, twin, variant));
        assert_eq!(offers.len(), 1);
        offers.remove(0)
    }

    #[test]
    fn an_encoding_is_made_once_whoever_asks_first() {
        let twin = Twin::new(&Arc::default());
        let n_made = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let offer = offered(&twin, Variant::Plain);
                    let made = offer.encoding(|message| {
                        n_made.fetch_add(1, Relaxed);
                        Some(Bytes::copy_from_slice(message))
                    });
                    assert_eq!(made.as_deref(), Some(&*MESSAGE));
                });
            }
        });
        assert_eq!(n_made.load(Relaxed), 1);
        let tagged = offered(&twin, Variant::Tagged);
        assert_eq!(tagged.encoding(|_| Some("tagged".into())).as_deref(), Some(&b"tagged"[..]));
        let none = offered(&Twin::new(&Arc::default()), Variant::Plain);
        assert_eq!(none.encoding(|_| None), None);
        assert_eq!(none.encoding(|_| panic!("asked again")), None);
    }

    #[test]
    fn bytes_are_counted_while_a_twin_lives() {
        let all = Arc::new(Charge::default());
        let (one, two) = (Arc::new(Charge::within(&all)), Arc::new(Charge::within(&all)));
        let (first, second) = (Twin::new(&one), Twin::new(&two));
        assert_eq!((one.bytes(), all.bytes()), (EMPTY, 2 * EMPTY));
        for _ in 0..2 {
            offered(&first, Variant::Plain).encoding(|_| Some("0123456789".into()));
        }
        assert_eq!((first.bytes(), one.bytes()), (EMPTY + 10, EMPTY + 10));
        assert_eq!((two.bytes(), all.bytes()), (EMPTY, 2 * EMPTY + 10));
        drop((first, second));
        assert_eq!((one.bytes(), two.bytes(), all.bytes()), (0, 0, 0));
    }

    #[test]
    fn only_who_collects_has_offers_and_only_of_its_own_poll() {
        let twin = Twin::new(&Arc::default());
        offer(&MESSAGE, &twin, Variant::Plain);
        assert!(!wanted());
        let (mut outer, mut inner) = (Vec::new(), Vec::new());
        collect(&mut outer, || {
            assert!(wanted());
            collect(&mut inner, || offer(&MESSAGE, &twin, Variant::Plain));
            offer(&Bytes::from_static(b"second"), &twin, Variant::Plain);
        });
        assert!(!wanted());
        assert_eq!(inner.len(), 1);
        assert_eq!(outer.iter().map(Offer::message).collect::<Vec<_>>(), ["second"]);
        let panicked = catch_unwind(|| collect(&mut Vec::new(), || panic!("in a poll")));
        assert!(panicked.is_err() && !wanted());
    }
}
