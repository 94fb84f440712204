//! Credentials: API keys, and signed tokens that live minutes.
//!
//! A credential becomes a [`Principal`] at the edge; the namespace of every call comes from
//! it and from nowhere else.

mod convert;
mod keyring;
mod service;
mod signer;
mod store;

pub use keyring::{Access, Keyring};
pub use service::Service;
pub use signer::{Claims, Grant, Receipts, Signer, TokenKind};
pub use store::{Key, STATEMENTS};

use crate::{
    error::{Error, Kind, Reason, Result},
    id::{ArtifactId, Namespace, TaskId, UploadId},
};

/// Whether a text has the form of a credential of this server: a key or a token.
pub fn is_credential(text: &str) -> bool {
    text.starts_with("bt_") || text.starts_with(signer::PREFIX)
}

/// What a credential may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Read and watch tasks and queues.
    TasksRead,
    /// Submit, cancel, retry and delete tasks.
    TasksWrite,
    /// Connect as a runner.
    Runner,
    /// List, read and share artifacts.
    ArtifactsRead,
    /// Upload and delete artifacts.
    ArtifactsWrite,
    /// Everything, in its namespace.
    Admin,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 6] = [
        Self::TasksRead,
        Self::TasksWrite,
        Self::Runner,
        Self::ArtifactsRead,
        Self::ArtifactsWrite,
        Self::Admin,
    ];

    /// Name in rows, flags and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TasksRead => "tasks.read",
            Self::TasksWrite => "tasks.write",
            Self::Runner => "runner",
            Self::ArtifactsRead => "artifacts.read",
            Self::ArtifactsWrite => "artifacts.write",
            Self::Admin => "admin",
        }
    }

    /// The scope of that name.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == name)
    }
}

/// A set of scopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// The set of all.
    pub fn all() -> Self {
        Scope::ALL.into_iter().collect()
    }

    /// Whether the set allows what `scope` stands for; `Admin` allows everything.
    pub fn allow(self, scope: Scope) -> bool {
        self.contains(scope) || self.contains(Scope::Admin)
    }

    /// Whether the set holds `scope` itself.
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & (1 << scope as u8) != 0
    }

    /// The scopes in it.
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.contains(*scope))
    }

    /// Whether nothing is in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |set, scope| set | 1 << scope as u8))
    }
}

/// On whose behalf a call is made.
#[derive(Clone, Debug)]
pub struct Principal {
    /// Tenant that the call acts in.
    pub namespace: Namespace,
    /// The API key; `None` for a token, and on an open development server.
    pub key_id: Option<String>,
    /// Name for logs and for `cancelled_by`.
    pub name: String,
    /// What it may do.
    pub scopes: Scopes,
    /// The one thing that a token was made for; `None` for a key.
    pub grant: Option<Grant>,
}

impl Principal {
    /// Whoever reaches a development server on loopback.
    pub fn local() -> Self {
        Self {
            namespace: Namespace::from(Namespace::DEFAULT),
            key_id: None,
            name: "local".into(),
            scopes: Scopes::all(),
            grant: None,
        }
    }

    /// The attempt that an attempt token speaks for.
    pub fn attempt(&self) -> Option<(TaskId, u32)> {
        match self.grant {
            Some(Grant::Attempt(task, attempt)) => Some((task, attempt)),
            _ => None,
        }
    }

    /// Refuses a task that a task token or an attempt token was not made for: as not found, so
    /// that nothing is learnt about it. Every method that such tokens may call asks this.
    pub fn check_task(&self, id: TaskId) -> Result<()> {
        match self.grant {
            None => Ok(()),
            Some(Grant::Task(bound) | Grant::Attempt(bound, _)) if bound == id => Ok(()),
            Some(_) => Err(Error::not_found("task", id)),
        }
    }

    /// Refuses an upload that an upload token was not made for, as not found.
    pub fn check_upload(&self, id: UploadId) -> Result<()> {
        match self.grant {
            Some(Grant::Upload(bound)) if bound != id => Err(Error::not_found("upload", id)),
            _ => Ok(()),
        }
    }

    /// Refuses an artifact that a link was not made for, as not found. What an attempt token may
    /// read is asked of the store.
    pub fn check_artifact(&self, id: ArtifactId) -> Result<()> {
        match self.grant {
            Some(Grant::Artifact(bound)) if bound != id => Err(Error::not_found("artifact", id)),
            _ => Ok(()),
        }
    }

    /// Refuses a credential without `scope`.
    pub fn require(&self, scope: Scope) -> Result<()> {
        if self.scopes.allow(scope) {
            return Ok(());
        }
        let message = format!("`{}` lacks the scope `{}`", self.name, scope.as_str());
        Err(Error::new(Kind::PermissionDenied, Reason::PermissionDenied, message)
            .with("scope", scope.as_str()))
    }
}
