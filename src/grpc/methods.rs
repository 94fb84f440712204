//! Every method that is served: its shape, from the descriptors, and who may call it.

use std::{collections::HashMap, sync::LazyLock};

use prost::Message as _;
use prost_types::FileDescriptorSet;

use crate::{
    keys::{Principal, Scope, TokenKind},
    pb,
};

/// A method.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Such as `baton.v1.TaskService/GetTask`: for metrics and logs.
    pub name: &'static str,
    /// Such as `baton.v1.TaskService`.
    pub service: &'static str,
    /// Whether the client sends many messages.
    pub client_streaming: bool,
    /// Whether the server sends many messages.
    pub server_streaming: bool,
    /// Whether the handler may wait for a runner or for work before it answers: such a call does
    /// nothing for most of its time, and takes the place of a stream.
    pub waits: bool,
    /// Who may call it.
    pub access: Access,
}

impl Method {
    /// Whether a call lasts as long as either side likes.
    pub fn is_streaming(&self) -> bool {
        self.client_streaming || self.server_streaming
    }
}

/// Who may call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Credentials with the scope.
    Scope(Scope),
    /// Credentials with the scope, and tokens of these kinds for what the request names.
    ScopeOrToken(Scope, &'static [TokenKind]),
    /// Health checks: everybody, unless the configuration closes it.
    Health,
    /// Reflection: any credential, or everybody by configuration.
    Reflection,
}

impl Access {
    /// Whether `principal` may call; what a token was made for is checked by the method.
    pub fn admits(self, principal: &Principal) -> bool {
        let kinds: &[TokenKind] = match self {
            Self::Scope(_) => &[],
            Self::ScopeOrToken(_, kinds) => kinds,
            Self::Health | Self::Reflection => return true,
        };
        match principal.grant {
            Some(grant) => kinds.contains(&grant.kind()),
            None => self.scope().is_some_and(|scope| principal.scopes.allow(scope)),
        }
    }

    /// The scope that it asks for.
    pub fn scope(self) -> Option<Scope> {
        match self {
            Self::Scope(scope) | Self::ScopeOrToken(scope, _) => Some(scope),
            Self::Health | Self::Reflection => None,
        }
    }
}

/// The table: `None` for a method that nobody thought about, which is then not served.
fn access(service: &str, method: &str) -> Option<Access> {
    use Scope::{Admin, ArtifactsRead, ArtifactsWrite, Runner, TasksRead, TasksWrite};
    use TokenKind::{Artifact, Attempt, Task, Upload};
    let access = match (service, method) {
        ("baton.v1.TaskService", method) => match method {
            "SubmitTask" | "BatchSubmitTasks" | "RunTask" | "CancelTask" | "RetryTask"
            | "DeleteTask" => Access::Scope(TasksWrite),
            "ListTasks" | "WatchTasks" => Access::Scope(TasksRead),
            "GetTask" | "StreamTask" | "ListTaskEvents" | "GetTaskResult" | "ExplainTask" => {
                Access::ScopeOrToken(TasksRead, &[Task])
            }
            _ => return None,
        },
        ("baton.v1.QueueService", "ListQueues" | "GetQueue")
        | ("baton.v1.RunnerService", "ListRunners" | "GetRunner")
        | ("baton.v1.KeyService", "IssueToken") => Access::Scope(TasksRead),
        ("baton.v1.QueueService", "PauseQueue" | "ResumeQueue")
        | (
            "baton.v1.RunnerService",
            "DrainRunner" | "PauseRunner" | "ResumeRunner" | "ApplyModel" | "ReloadRunner"
            | "TuneRunner",
        )
        | ("baton.v1.KeyService", "CreateKey" | "ListKeys" | "RevokeKey") => Access::Scope(Admin),
        ("baton.v1.RunnerService", "Connect" | "Output" | "Poll") => Access::Scope(Runner),
        ("baton.v1.RunnerService", "ReportTaskEvents") => Access::ScopeOrToken(Runner, &[Attempt]),
        ("baton.v1.ArtifactService", method) => match method {
            "UploadArtifact" => Access::ScopeOrToken(ArtifactsWrite, &[Attempt, Upload]),
            "CreateArtifact" | "CreateUpload" | "GetUpload" | "CompleteUpload" | "DeleteUpload" => {
                Access::ScopeOrToken(ArtifactsWrite, &[Attempt])
            }
            "DeleteArtifact" => Access::Scope(ArtifactsWrite),
            "GetArtifact" | "DownloadArtifact" => {
                Access::ScopeOrToken(ArtifactsRead, &[Attempt, Artifact])
            }
            "ListArtifacts" | "VerifyArtifact" | "ShareArtifact" => Access::Scope(ArtifactsRead),
            "CollectArtifacts" => Access::Scope(Admin),
            _ => return None,
        },
        ("grpc.health.v1.Health", _) => Access::Health,
        ("grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection", _) => {
            Access::Reflection
        }
        _ => return None,
    };
    Some(access)
}

/// Whether a unary method may wait for long.
fn waits(service: &str, method: &str) -> bool {
    let runners = service == "baton.v1.RunnerService";
    let commands =
        ["DrainRunner", "PauseRunner", "ResumeRunner", "ApplyModel", "ReloadRunner", "TuneRunner"];
    runners && (method == "Poll" || commands.contains(&method))
}

/// All methods by path, such as `/baton.v1.TaskService/GetTask`.
pub static METHODS: LazyLock<HashMap<&'static str, Method>> = LazyLock::new(|| {
    let sets = [
        pb::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let mut methods = HashMap::new();
    for set in sets {
        let set = FileDescriptorSet::decode(set).expect("descriptors compiled into the program");
        for file in &set.file {
            for service in &file.service {
                // Kept for the life of the process, as labels and map keys.
                let service_name: &'static str =
                    format!("{}.{}", file.package(), service.name()).leak();
                for method in &service.method {
                    let Some(access) = access(service_name, method.name()) else { continue };
                    let path: &'static str = format!("/{service_name}/{}", method.name()).leak();
                    methods.insert(
                        path,
                        Method {
                            name: &path[1..],
                            service: service_name,
                            client_streaming: method.client_streaming(),
                            server_streaming: method.server_streaming(),
                            waits: waits(service_name, method.name()),
                            access,
                        },
                    );
                }
            }
        }
    }
    methods
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::EPOCH,
        id::{Entropy, TaskId},
        keys::{Grant, Scopes},
    };

    fn with(scopes: &[Scope]) -> Principal {
        Principal { scopes: scopes.iter().copied().collect(), ..Principal::local() }
    }

    #[test]
    fn every_method_of_the_descriptors_has_an_entry() {
        let set = FileDescriptorSet::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
        let mut n = 0;
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    assert!(METHODS.contains_key(path.as_str()), "{path} has no entry");
                    n += 1;
                }
            }
        }
        assert!(n >= 25, "{n} methods found");
    }

    #[test]
    fn scopes_open_what_they_say_and_no_more() {
        let may = |path: &str, principal: &Principal| METHODS[path].access.admits(principal);
        let submit = "/baton.v1.TaskService/SubmitTask";
        let get = "/baton.v1.TaskService/GetTask";
        let connect = "/baton.v1.RunnerService/Connect";
        let create = "/baton.v1.KeyService/CreateKey";
        let reader = with(&[Scope::TasksRead]);
        assert!(may(get, &reader) && !may(submit, &reader) && !may(connect, &reader));
        let runner = with(&[Scope::Runner]);
        assert!(may(connect, &runner) && !may(get, &runner) && !may(create, &runner));
        let writer = with(&[Scope::TasksWrite]);
        assert!(may(submit, &writer) && !may(get, &writer) && !may(create, &writer));
        let admin = with(&[Scope::Admin]);
        assert!(METHODS.values().all(|method| method.access.admits(&admin)));
        let nobody = Principal { scopes: Scopes::default(), ..Principal::local() };
        let open: Vec<_> =
            METHODS.values().filter(|method| method.access.admits(&nobody)).collect();
        assert!(open.iter().all(|method| method.access.scope().is_none()), "{open:?}");
    }

    #[test]
    fn tokens_open_only_the_methods_made_for_them() {
        let task = TaskId::new(EPOCH, &Entropy::seeded(1));
        let reading = Principal { grant: Some(Grant::Task(task)), ..with(&[Scope::TasksRead]) };
        let mut open: Vec<_> = METHODS
            .values()
            .filter(|method| method.access.scope().is_some() && method.access.admits(&reading))
            .map(|method| method.name.rsplit('/').next().unwrap())
            .collect();
        open.sort_unstable();
        assert_eq!(
            open,
            ["ExplainTask", "GetTask", "GetTaskResult", "ListTaskEvents", "StreamTask"]
        );
        let reporting =
            Principal { grant: Some(Grant::Attempt(task, 1)), ..with(&[Scope::Runner]) };
        let mut open: Vec<_> = METHODS
            .values()
            .filter(|method| method.access.scope().is_some() && method.access.admits(&reporting))
            .map(|method| method.name.rsplit('/').next().unwrap())
            .collect();
        open.sort_unstable();
        assert_eq!(
            open,
            [
                "CompleteUpload",
                "CreateArtifact",
                "CreateUpload",
                "DeleteUpload",
                "DownloadArtifact",
                "GetArtifact",
                "GetUpload",
                "ReportTaskEvents",
                "UploadArtifact",
            ]
        );
    }
}
