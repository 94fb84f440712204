//! What the runner offers: models, and whether it takes work at all; and which attempts it
//! refuses because of that.

use super::{Agent, engine::Change};
use crate::{json, pb, queue::ModelPattern};

/// What is not offered while a change is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Withheld {
    /// A model.
    Model(String),
    /// Any work.
    All,
}

impl Agent {
    /// Whether free slots are offered.
    pub(super) fn is_accepting(&self) -> bool {
        let withheld = self.commands.withheld() == Some(&Withheld::All);
        !self.leaving.draining && !self.paused && !withheld
    }

    /// What is offered now.
    pub(super) fn offer(&self) -> pb::Offer {
        let withheld = match self.commands.withheld() {
            Some(Withheld::Model(model)) => Some(model),
            Some(Withheld::All) | None => None,
        };
        let models = self.models.iter().filter(|model| Some(*model) != withheld);
        pb::Offer {
            models: models.cloned().collect(),
            engine_version: self.engine.version(),
            engine_params: Some(json::struct_from_map(self.engine.params())),
            paused: self.paused,
            draining: self.leaving.draining,
        }
    }

    /// Why an attempt for this model cannot be taken now; `None` when it can.
    pub(super) fn refusal(&self, model: &str, version: &str) -> Option<&'static str> {
        let version = Some(version).filter(|version| !version.is_empty());
        let offers = |name: &String| ModelPattern::parse(name).matches(model, version);
        if self.leaving.draining {
            Some("the runner is draining")
        } else if self.paused {
            Some("the runner is paused")
        } else if !self.is_accepting() {
            Some("the runner is reloading")
        } else if !self.offer().models.iter().any(offers) {
            Some("the runner does not serve the model now")
        } else if self.outbox.free_slots() == 0 {
            Some("the runner has no free slot")
        } else {
            None
        }
    }

    /// What must not be offered while a change is made: what it changes. A model that a wider
    /// name covers too can only be withheld together with all.
    pub(super) fn to_withhold(&self, change: &Change, n_in_way: u64) -> Option<Withheld> {
        let (Change::Load { model, .. }
        | Change::Unload { model }
        | Change::Reload { model: Some(model) }) = change
        else {
            return matches!(change, Change::Reload { .. }).then_some(Withheld::All);
        };
        if self.wider(model).is_some() {
            return (n_in_way > 0).then_some(Withheld::All);
        }
        self.models.contains(model).then(|| match model.as_str() {
            "*" => Withheld::All,
            model => Withheld::Model(model.to_owned()),
        })
    }

    /// Another name that the runner serves and that covers the model too.
    pub(super) fn wider(&self, model: &str) -> Option<&String> {
        let own = ModelPattern::parse(model);
        self.models.iter().find(|name| match (ModelPattern::parse(name), &own) {
            (ModelPattern::Any, own) => *own != ModelPattern::Any,
            (ModelPattern::Model(name), ModelPattern::Version(model, _)) => name == *model,
            (ModelPattern::Model(_) | ModelPattern::Version(..), _) => false,
        })
    }
}
