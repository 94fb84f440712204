//! What the fuzzer has found worth keeping, run once more.

use std::{fs, path::Path};

use crate::gateway::fuzz;

type Target = (&'static str, fn(&[u8]));

#[test]
fn whatever_strangers_send_is_refused_or_read_and_never_a_panic() {
    let targets: [Target; 3] =
        [("path", fuzz::path), ("json", fuzz::json), ("events", fuzz::events)];
    for (name, run) in targets {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut n_inputs = 0;
        for entry in fs::read_dir(&folder).unwrap() {
            let input = fs::read(entry.unwrap().path()).unwrap();
            run(&input);
            // A part of it, as of a request that was cut off.
            run(&input[..input.len() / 2]);
            n_inputs += 1;
        }
        assert!((10..=500).contains(&n_inputs), "{n_inputs} inputs in {}", folder.display());
    }
}
