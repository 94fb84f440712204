//! The gateway: tables of cases from the specifications, and properties of any message and path.

mod corpus;
mod json;
mod paths;
mod random;
mod requests;

use std::sync::LazyLock;

use prost_reflect::DescriptorPool;

use super::{
    mapping::{Mapping, Problem, Reader},
    route::Routes,
};

/// `library.proto` with what it imports.
static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/src/gateway/tests");
    let protos = concat!(env!("CARGO_MANIFEST_DIR"), "/proto");
    let mut compiler = protox::Compiler::new([root, protos]).unwrap();
    compiler.include_imports(true);
    compiler.open_files(["library.proto", "google/rpc/error_details.proto"]).unwrap();
    compiler.open_files(["baton/v1/tasks.proto", "google/rpc/status.proto"]).unwrap();
    compiler.descriptor_pool()
});

static ROUTES: LazyLock<Routes> =
    LazyLock::new(|| Routes::new(&POOL, |path| path.starts_with("/library.")).unwrap());

fn mapping() -> &'static Mapping {
    &ROUTES.mapping
}

/// The encoding of a message from its JSON.
fn read(name: &str, json: &str) -> Result<Vec<u8>, Problem> {
    let mut reader = Reader::new(mapping());
    reader.message(mapping().find(name).unwrap(), json.as_bytes())?;
    Ok(reader.into_message())
}

/// The JSON of an encoded message.
fn write(name: &str, message: &[u8]) -> String {
    let mut json = Vec::new();
    mapping().write(mapping().find(name).unwrap(), message, &mut json).expect(name);
    String::from_utf8(json).unwrap()
}

/// The tables hold at least as many cases as the contract of the gateway asks for.
#[test]
fn the_tables_are_large() {
    let n = json::ACCEPTED.len() + json::REFUSED.len() + requests::CASES.len();
    assert!(n >= 200, "{n} cases");
}
