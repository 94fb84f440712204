//! Generated messages, clients and server traits, and the descriptor set.
//!
//! Server traits speak [`Frame`] where the protos say `TaskEvent`: an event is
//! encoded once, when it is appended, and sent as those bytes to every reader.

#![allow(clippy::pedantic, clippy::all, missing_docs, reason = "generated code")]

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType},
};

use crate::twin::{self, Twin, Variant};

/// The protos' own package.
pub mod baton {
    /// Version 1.
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/client/baton.v1.rs"));
    }
}
pub use baton::v1::*;

/// `google.rpc` and `google.api` messages.
pub mod google {
    /// Error model.
    // Its comments are Google's, and have `<` in prose.
    #[allow(rustdoc::invalid_html_tags)]
    pub mod rpc {
        include!(concat!(env!("OUT_DIR"), "/client/google.rpc.rs"));
    }
    /// HTTP annotations.
    pub mod api {
        include!(concat!(env!("OUT_DIR"), "/client/google.api.rs"));
    }
    /// Well-known types.
    pub mod protobuf {
        pub use prost_types::*;
    }
}

/// Server traits.
pub mod server {
    include!(concat!(env!("OUT_DIR"), "/server/baton.v1.rs"));
}

/// All files of `proto/` with imports and comments, as an encoded
/// `FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/baton.bin"));

/// The encoded bytes of one `TaskEvent`, and its place in another encoding where it has one.
#[derive(Clone, Debug, Default)]
pub struct Frame(pub Bytes, Option<(Arc<Twin>, Variant)>);

impl Frame {
    /// An event that was encoded.
    pub fn new(bytes: Bytes) -> Self {
        Self(bytes, None)
    }

    /// An event with the twin of its entry; `variant` says what `bytes` are of it.
    pub fn with_twin(bytes: Bytes, twin: Option<Arc<Twin>>, variant: Variant) -> Self {
        Self(bytes, twin.map(|twin| (twin, variant)))
    }

    /// Encodes an event.
    pub fn encode(event: &TaskEvent) -> Self {
        Self::new(event.encode_to_vec().into())
    }

    /// Decodes the event.
    pub fn event(&self) -> Result<TaskEvent, DecodeError> {
        TaskEvent::decode(self.0.clone())
    }
}

impl Message for Frame {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
        if let Some((twin, variant)) = &self.1 {
            twin::offer(&self.0, twin, *variant);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        let mut event = TaskEvent::decode(self.0.clone())?;
        event.merge_field(tag, wire_type, buf, ctx)?;
        *self = Self::encode(&event);
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}
