//! The shape of the crate as tests: which module may import which, where wire types, SQL and
//! transport may appear, how long a file may be, and that no test sleeps.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const MAX_LINES: usize = 500;

/// What every module may import.
const GROUND: &[&str] = &["error", "id", "clock", "faults", "json", "near", "twin"];

/// What each module may import besides [`GROUND`], itself and what the wire rules allow.
/// Direction of the whole: `main -> cli -> app -> facades -> gateway -> grpc -> slices -> kernels -> ground`.
const EDGES: &[(&str, &[&str])] = &[
    ("error", &["pb"]),
    ("id", &[]),
    ("clock", &[]),
    ("pb", &[]),
    // `google.protobuf.Struct` to text and back, for rows that hold JSON.
    ("json", &["pb"]),
    // The variable that names the planted one.
    ("faults", &["config"]),
    // The known name that somebody most likely meant.
    ("near", &[]),
    ("twin", &[]),
    ("config", &[]),
    ("supervisor", &[]),
    ("telemetry", &["config", "supervisor"]),
    ("tls", &[]),
    // Kernels know no noun of the domain.
    ("db", &["supervisor"]),
    ("events", &["db", "supervisor"]),
    ("queue", &["supervisor"]),
    ("redis", &["supervisor", "tls"]),
    ("relay", &["supervisor"]),
    ("blob", &["supervisor"]),
    // Slices, each importing only those above it.
    ("instances", KERNELS),
    ("keys", KERNELS),
    (
        "artifacts",
        &["db", "events", "queue", "relay", "blob", "supervisor", "telemetry", "keys", "instances"],
    ),
    (
        "tasks",
        &[
            "db",
            "events",
            "queue",
            "relay",
            "blob",
            "supervisor",
            "telemetry",
            "keys",
            "instances",
            "artifacts",
        ],
    ),
    (
        "runners",
        &[
            "db",
            "events",
            "queue",
            "relay",
            "blob",
            "supervisor",
            "telemetry",
            "keys",
            "instances",
            "tasks",
        ],
    ),
    (
        "dispatch",
        &[
            "db",
            "events",
            "queue",
            "relay",
            "blob",
            "supervisor",
            "telemetry",
            "keys",
            "instances",
            "tasks",
            "runners",
        ],
    ),
    // What waits where several servers find it.
    ("backlog", &["db", "queue", "redis", "supervisor", "telemetry", "tasks"]),
    (
        "crossing",
        &["db", "events", "queue", "redis", "relay", "supervisor", "instances", "tasks", "runners"],
    ),
    ("queues", KERNELS_AND_KEYS),
    // Whole tables and whole stores, whatever is in them.
    ("moving", &["db", "blob"]),
    // Edges.
    ("grpc", &["config", "supervisor", "telemetry", "tls", "keys"]),
    ("gateway", &["config", "telemetry", "keys", "grpc"]),
    ("facades", &["config", "keys", "grpc", "gateway"]),
    // The agent shares the pure halves of the protocol and nothing else of the server.
    // For Rust programs: the generated clients, and how errors come back.
    ("client", &["grpc::status", "tls"]),
    (
        "agent",
        &[
            "config",
            "supervisor",
            "telemetry",
            "tls",
            "runners::protocol",
            "grpc::status",
            "queue::ModelPattern",
            // Artifacts go to a runner as they go to any client.
            "client",
        ],
    ),
];
const KERNELS: &[&str] = &["db", "events", "queue", "relay", "blob", "supervisor", "telemetry"];
const KERNELS_AND_KEYS: &[&str] =
    &["db", "events", "queue", "relay", "blob", "supervisor", "telemetry", "keys"];

/// Modules that see everything: composition, the command line, the yardstick.
const OPEN: &[&str] = &["app", "cli", "bench", "main", "lib"];

/// One file, reduced to what the rules look at.
struct Source {
    /// Path below the repository, with `/`.
    path: String,
    text: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    /// Code without comments and without its test module.
    fn code(&self) -> String {
        // A test module in a file of its own leaves the code of this one below it.
        let inline = self.text.find("#[cfg(test)]\nmod tests {");
        let code = &self.text[..inline.unwrap_or(self.text.len())];
        code.lines()
            .map(|line| if line.trim_start().starts_with("//") { "" } else { line })
            .map(|line| line.split(" // ").next().unwrap_or(line))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// Top module below `src/`.
    fn module(&self) -> &str {
        let rest = self.path.strip_prefix("src/").unwrap_or(&self.path);
        rest.split('/').next().unwrap_or(rest).trim_end_matches(".rs")
    }

    /// File or folder name below the module that marks its role, such as `service`.
    fn role(&self) -> &str {
        self.path.split('/').nth(2).unwrap_or_default().trim_end_matches(".rs")
    }

    /// Paths imported or named from `crate::`, two segments deep.
    fn crate_paths(&self) -> BTreeSet<(String, Option<String>)> {
        let code = self.code();
        let mut paths = BTreeSet::new();
        for (at, _) in code.match_indices("crate::") {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
                continue;
            }
            let rest = &code[at + "crate::".len()..];
            for tree in heads(rest) {
                let first = identifier(tree);
                let below = tree[first.len()..].strip_prefix("::");
                let seconds = below.map(heads).unwrap_or_default();
                if seconds.is_empty() {
                    paths.insert((first.to_owned(), None));
                }
                for second in seconds {
                    paths.insert((first.to_owned(), Some(identifier(second).to_owned())));
                }
            }
        }
        paths
    }
}

/// The branches of a use tree that starts here: one, or those of a brace group.
fn heads(tree: &str) -> Vec<&str> {
    let Some(group) = tree.strip_prefix('{') else { return vec![tree] };
    let (mut branches, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                branches.push(group[from..at].trim());
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                branches.push(group[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    branches.retain(|branch| !branch.is_empty());
    branches
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// Everything that is wrong with a file of `src/`, as sentences.
fn faults(source: &Source) -> Vec<String> {
    let mut faults = Vec::new();
    let module = source.module();
    let mut fault = |what: String| faults.push(format!("{}: {what}", source.path));

    if !source.text.starts_with("//!") {
        fault("does not open with `//!`: what it owns, what it must not know".into());
    }
    if source.path.ends_with("/tests.rs") || source.path.contains("/tests/") {
        return faults;
    }
    let edges = EDGES.iter().find(|(name, _)| *name == module).map(|(_, edges)| *edges);
    if edges.is_none() && !OPEN.contains(&module) {
        fault(format!("module `{module}` has no row in the table of edges"));
        return faults;
    }
    let serves = matches!(source.role(), "service" | "convert");
    let at_edge = OPEN.contains(&module)
        || matches!(
            module,
            "grpc" | "gateway" | "facades" | "agent" | "client" | "telemetry" | "tls"
        )
        || serves;
    if let Some(edges) = edges {
        for (first, second) in source.crate_paths() {
            let deep = format!("{first}::{}", second.as_deref().unwrap_or_default());
            let known = first == module
                || GROUND.contains(&first.as_str())
                || edges.contains(&first.as_str())
                || edges.contains(&deep.as_str())
                || !is_module(&first);
            let wire = first == "pb" && (at_edge || wire_exception(&source.path, &deep));
            let door = first == "grpc" && serves;
            if !known && !wire && !door {
                fault(format!("may not import `crate::{deep}`"));
            }
            if first != module && second.as_deref() == Some("store") && first != "events" {
                fault(format!("reaches into `{deep}`; a slice is called through its mod.rs"));
            }
        }
    }
    let code = source.code();
    // The yardstick of the store is SQL by itself.
    let drivers = matches!(module, "db" | "bench");
    for (at, _) in code.match_indices("sqlx::") {
        let name = identifier(&code[at + "sqlx::".len()..]);
        if !drivers {
            fault(format!("names `sqlx::{name}`; stores go through `db`"));
        }
    }
    if module != "redis" && code.contains("fred::") {
        fault("names fred; Redis is spoken in `redis` only".into());
    }
    if !at_edge && (code.contains("tonic::") || code.contains("use tonic")) {
        fault("names tonic; transport stays at the edges".into());
    }
    faults
}

/// Wire types below the edges, each with its reason.
fn wire_exception(path: &str, deep: &str) -> bool {
    // Events are kept and sent as the bytes of their message.
    path.starts_with("src/events/")
        || deep == "pb::Frame"
        // Readers of kept events look into them: for gaps, for text, for what is a token.
        || matches!(path, "src/tasks/history.rs" | "src/tasks/recovery.rs")
        // The session speaks the runner protocol, whose messages are the wire's.
        || path.starts_with("src/runners/")
}

/// Whether the crate has such a module, as opposed to a re-export or a macro.
fn is_module(name: &str) -> bool {
    EDGES.iter().any(|(module, _)| *module == name) || OPEN.contains(&name)
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("an entry of a folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                let below = path.strip_prefix(root()).expect("a path below the root");
                sources.push(Source::new(&below.to_string_lossy(), &text));
            }
        }
    }
    assert!(!sources.is_empty(), "no sources below {}", folder.display());
    sources
}

fn assert_none(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn modules_import_only_downwards_and_wire_types_stay_at_the_edges() {
    let faults: Vec<_> = rust_files(&root().join("src")).iter().flat_map(faults).collect();
    assert_none(&faults);
}

#[test]
fn no_file_is_longer_than_the_limit() {
    let mut faults = Vec::new();
    for source in ["src", "tests"].iter().flat_map(|folder| rust_files(&root().join(folder))) {
        let lines = source.text.lines().count();
        if lines > MAX_LINES {
            faults.push(format!("{}: {lines} lines, {MAX_LINES} are allowed", source.path));
        }
    }
    assert_none(&faults);
}

/// Statements that a file declares and its `STATEMENTS`, by which tests prepare each, lacks.
fn unlisted_statements(source: &Source) -> Vec<String> {
    let code = source.code();
    let mut unlisted = Vec::new();
    for (before, kind, listed) in
        [("const ", "Sql", "Statement::Query("), ("static ", "Bulk", "Statement::Rows(&")]
    {
        for (at, _) in code.match_indices(&format!(": {kind} =")) {
            let declared = code[..at].rfind(before).map(|from| &code[from + before.len()..at]);
            let name = declared.unwrap_or_default();
            if !code.contains(&format!("{listed}{name})")) {
                unlisted.push(format!("{}: `{name}` is not in STATEMENTS", source.path));
            }
        }
        let n_made = code.matches(&format!("{kind}::new(")).count()
            + code.matches(&format!("{kind}::each(")).count();
        if n_made > code.matches(&format!(": {kind} =")).count() {
            unlisted.push(format!("{}: a {kind} without a name of its own", source.path));
        }
    }
    unlisted
}

#[test]
fn every_statement_of_a_store_is_listed() {
    let sources = rust_files(&root().join("src"));
    let stores = sources
        .iter()
        .filter(|source| !source.path.starts_with("src/db/") && !source.path.contains("tests"));
    assert_none(&stores.flat_map(unlisted_statements).collect::<Vec<_>>());
    let faulty = |code: &str| !unlisted_statements(&Source::new("src/x/store.rs", code)).is_empty();
    assert!(faulty("//! x\nconst A: Sql = Sql::new(\"x\");\n"));
    assert!(faulty("//! x\nfn f() { tx.query(Sql::new(\"x\")) }\n"));
    assert!(!faulty(
        "//! x\nstatic A: Bulk = Bulk::new(\"x\");\n\
         const STATEMENTS: &[Statement] = &[Statement::Rows(&A)];\n"
    ));
}

#[test]
fn no_test_sleeps() {
    let call = ["sleep", "("].concat();
    let mut faults = Vec::new();
    for source in rust_files(&root().join("tests")) {
        // A simulation's sleep moves the simulated clock.
        if source.path.starts_with("tests/simulation/") {
            continue;
        }
        for (line, text) in source.text.lines().enumerate() {
            if text.contains(&call) {
                faults.push(format!("{}:{}: wait on a condition", source.path, line + 1));
            }
        }
    }
    assert_none(&faults);
}

#[test]
fn the_table_of_edges_has_no_cycle() {
    for (from, edges) in EDGES {
        for to in *edges {
            let back = EDGES.iter().find(|(name, _)| name == to).map_or(&[][..], |(_, to)| *to);
            assert!(!back.contains(from), "{from} and {to} import each other");
        }
    }
}

#[test]
fn a_forbidden_edge_is_found_in_every_spelling() {
    let faulty = |path: &str, code: &str| !faults(&Source::new(path, code)).is_empty();

    assert!(faulty("src/relay/log.rs", "//! x\nuse crate::tasks::Task;\n"));
    assert!(faulty("src/relay/log.rs", "//! x\nuse crate::{id::TaskId, tasks::{model, state}};\n"));
    assert!(faulty("src/queue/mod.rs", "//! x\nfn f() { crate::runners::go() }\n"));
    assert!(faulty("src/tasks/state.rs", "//! x\nuse crate::pb;\n"));
    assert!(faulty("src/tasks/state.rs", "//! x\nuse tonic::Status;\n"));
    assert!(faulty("src/queue/mod.rs", "//! x\nuse fred::clients::Client;\n"));
    assert!(faulty("src/tasks/store.rs", "//! x\nfn f() { sqlx::query(\"x\") }\n"));
    assert!(faulty("src/runners/registry.rs", "//! x\nuse crate::tasks::store;\n"));
    assert!(faulty("src/agent/mod.rs", "//! x\nuse crate::runners::registry;\n"));
    assert!(faulty("src/tasks/new.rs", "use crate::id;\n"));
    assert!(faulty("src/novel/mod.rs", "//! x\n"));

    assert!(!faulty("src/relay/log.rs", "//! x\nuse crate::id::TaskId;\n"));
    assert!(!faulty("src/tasks/service.rs", "//! x\nuse crate::{grpc::auth, pb};\n"));
    assert!(!faulty("src/db/row.rs", "//! x\nuse sqlx::Row as _;\n"));
    assert!(!faulty("src/relay/log.rs", "//! x\n// crate::tasks is above this\n"));
    assert!(!faulty(
        "src/relay/log.rs",
        "//! x\n#[cfg(test)]\nmod tests { use crate::tasks::Task; }\n"
    ));
}

#[test]
fn every_fault_breaks_one_place_and_is_listed_with_tests_that_exist() {
    let sources: Vec<_> =
        ["src", "tests"].iter().flat_map(|folder| rust_files(&root().join(folder))).collect();
    let list = fs::read_to_string(root().join(".ci/faults")).expect("the list of faults");
    let (_, list) = list.split_once("<<'TABLE'\n").expect("the start of the list");
    let (list, _) = list.split_once("\nTABLE\n").expect("the end of the list");
    let rows: Vec<Vec<_>> = list.lines().map(|row| row.split(' ').collect()).collect();
    let mut faults = Vec::new();

    let code = sources.iter().find(|source| source.path == "src/faults.rs").expect("the faults");
    let mut promise = "";
    let mut known = BTreeSet::new();
    for line in code.text.lines().map(str::trim) {
        if let Some((number, _)) = line.strip_prefix("/// P").and_then(|doc| doc.split_once(':')) {
            promise = number;
        }
        let Some((fault, name)) = line.strip_suffix("\",").and_then(|l| l.split_once(" = \""))
        else {
            continue;
        };
        known.insert((format!("P{promise}"), name.to_owned()));
        let call = format!("faults::planted(Fault::{fault})");
        let n_sites: usize =
            sources.iter().map(|source| source.code().matches(&call).count()).sum();
        if n_sites != 1 {
            faults.push(format!("src/faults.rs: `{name}` is asked for at {n_sites} places"));
        }
    }
    let listed: BTreeSet<_> =
        rows.iter().map(|row| (row[0].to_owned(), row[1].to_owned())).collect();
    for (promise, name) in known.symmetric_difference(&listed) {
        faults.push(format!("`{promise} {name}` is not both in src/faults.rs and .ci/faults"));
    }
    for row in rows {
        let [_, _, kind @ ("lib" | "it" | "sim"), test] = row[..] else {
            panic!("not a row of .ci/faults: {row:?}")
        };
        let name = format!("fn {}(", test.rsplit("::").next().unwrap_or(test));
        let folder = match kind {
            "lib" => "src/",
            "it" => "tests/it/",
            _ => "tests/simulation/",
        };
        let mut places = sources.iter().filter(|source| source.path.starts_with(folder));
        if !places.any(|source| source.text.contains(&name)) {
            faults.push(format!(".ci/faults: there is no test {test}"));
        }
    }
    assert_none(&faults);
}
