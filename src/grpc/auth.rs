//! From a credential to a [`Principal`], and what scope each method needs.

use tonic::{Request, Status};

use crate::{
    error::{Error, Kind, Reason},
    keys::Principal,
};

/// The principal that the auth layer found for this call.
pub fn principal<T>(request: &Request<T>) -> Result<Principal, Status> {
    request.extensions().get::<Principal>().cloned().ok_or_else(|| {
        Error::new(Kind::Unauthenticated, Reason::Unauthenticated, "no credential").into()
    })
}
