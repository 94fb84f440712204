//! `KeyService`.

use std::time::Duration;

use tonic::{Request, Response, Status};

use super::{
    Principal,
    convert::{self, NewKey},
    keyring::Keyring,
    signer::{Claims, Grant},
};
use crate::{
    error::{Error, Kind, Reason},
    grpc::auth,
    id::Namespace,
    pb,
};

/// The service over a keyring.
#[derive(Clone)]
pub struct Service(Keyring);

impl Service {
    /// The service.
    pub fn new(keyring: Keyring) -> Self {
        Self(keyring)
    }
}

/// The namespace that a caller is held to; `None` for the operator, who sees all keys.
fn held_to(caller: &Principal) -> Option<Namespace> {
    (caller.namespace.as_str() != Namespace::DEFAULT).then(|| caller.namespace.clone())
}

#[tonic::async_trait]
impl pb::server::key_service_server::KeyService for Service {
    async fn create_key(
        &self,
        request: Request<pb::CreateKeyRequest>,
    ) -> Result<Response<pb::CreateKeyResponse>, Status> {
        let caller = auth::principal(&request)?;
        let new = NewKey::try_from(request.into_inner())?;
        let namespace = new.namespace.unwrap_or_else(|| caller.namespace.clone());
        if held_to(&caller).is_some_and(|own| own != namespace) {
            return Err(Error::new(
                Kind::PermissionDenied,
                Reason::PermissionDenied,
                "only an admin of the namespace `default` makes keys for another namespace",
            )
            .into());
        }
        let (key, secret) = self.0.create(namespace, new.display_name, new.scopes, new.ttl).await?;
        tracing::info!(target: "baton::audit", by = caller.name, key = key.id, namespace = %key.namespace, "key created");
        let key = Some(convert::key_to_pb(key));
        Ok(Response::new(pb::CreateKeyResponse { key, secret }))
    }

    async fn list_keys(
        &self,
        request: Request<pb::ListKeysRequest>,
    ) -> Result<Response<pb::ListKeysResponse>, Status> {
        let caller = auth::principal(&request)?;
        let request = request.into_inner();
        let limit = match request.page_size {
            0 => 100,
            size @ 1..=1_000 => size.unsigned_abs(),
            _ => return Err(Error::invalid("page_size", "must be from 1 to 1000").into()),
        };
        let before = convert::read_page_token(&request.page_token)?;
        let mut keys = self.0.list(held_to(&caller), before, limit + 1).await?;
        let more = keys.len() > limit as usize;
        keys.truncate(limit as usize);
        let next_page_token = match keys.last() {
            Some(last) if more => convert::page_token(last),
            _ => String::new(),
        };
        let keys = keys.into_iter().map(convert::key_to_pb).collect();
        Ok(Response::new(pb::ListKeysResponse { keys, next_page_token }))
    }

    async fn revoke_key(
        &self,
        request: Request<pb::RevokeKeyRequest>,
    ) -> Result<Response<pb::Key>, Status> {
        let caller = auth::principal(&request)?;
        let id = request.into_inner().key_id;
        let key = self.0.revoke(held_to(&caller), id).await?;
        tracing::info!(target: "baton::audit", by = caller.name, key = key.id, "key revoked");
        Ok(Response::new(convert::key_to_pb(key)))
    }

    async fn issue_token(
        &self,
        request: Request<pb::IssueTokenRequest>,
    ) -> Result<Response<pb::IssueTokenResponse>, Status> {
        const LONGEST: Duration = Duration::from_hours(1);
        let caller = auth::principal(&request)?;
        let request = request.into_inner();
        // Whether the task exists is asked when the token is used, in the token's namespace.
        let task = request
            .task_id
            .parse()
            .map_err(|_| Error::invalid("task_id", "must be a task's id, a UUID"))?;
        let ttl = match request.ttl {
            None => Duration::from_mins(10),
            Some(ttl) => match Duration::try_from(ttl) {
                Ok(ttl) if !ttl.is_zero() && ttl <= LONGEST => ttl,
                _ => {
                    return Err(Error::invalid("ttl", "must be more than zero, at most 1 h").into());
                }
            },
        };
        let expire_time = self.0.clock().now() + ttl;
        let claims = Claims {
            namespace: caller.namespace,
            grant: Grant::Task(task),
            key_id: caller.key_id,
            expire_time,
        };
        tracing::info!(target: "baton::audit", by = caller.name, task.id = %task, "token issued");
        Ok(Response::new(pb::IssueTokenResponse {
            token: self.0.signer().sign(&claims),
            expire_time: Some(convert::timestamp(expire_time)),
        }))
    }
}
