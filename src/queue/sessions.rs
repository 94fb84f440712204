//! Which runner last ran a session: where its KV cache is warm.

use std::{collections::HashMap, mem};

use crate::id::{Namespace, RunnerId};

/// Sessions in a generation; two generations are kept, so that those used lately stay.
const GENERATION: usize = 65_536;

type Name = (Namespace, RunnerId);

/// The runner that last ran each session, for as many sessions as fit.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    young: HashMap<(Namespace, String), Name>,
    old: HashMap<(Namespace, String), Name>,
}

impl Sessions {
    pub(super) fn note(&mut self, namespace: &Namespace, session: &str, runner: Name) {
        if self.young.len() >= GENERATION {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert((namespace.clone(), session.to_owned()), runner);
    }

    pub(super) fn find(&self, namespace: &Namespace, session: &str) -> Option<&Name> {
        let key = (namespace.clone(), session.to_owned());
        self.young.get(&key).or_else(|| self.old.get(&key))
    }
}
