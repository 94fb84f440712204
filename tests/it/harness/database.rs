//! The database under the tests: a file, or, where `BATON_TEST_POSTGRES` names a server, a
//! database of its own there. So the same tests run on both.

use std::{fs, path::Path, process::Command};

/// Where the tests' server is, if they run on one.
pub fn server() -> Option<String> {
    std::env::var_os("BATON_TEST_POSTGRES").map(|url| url.into_string().expect("a URL"))
}

/// The URL of the database that belongs to a directory, made when it is missing; `None` where
/// it is a file.
pub fn url(dir: &Path) -> Option<String> {
    let server = server()?;
    let place = dir.join("database");
    if let Ok(url) = fs::read_to_string(&place) {
        return Some(url);
    }
    let url = create(&server);
    fs::write(place, &url).expect("a directory to write to");
    Some(url)
}

/// Makes an empty database on a server; returns its URL.
pub fn create(server: &str) -> String {
    let random = tempfile::NamedTempFile::new().expect("a file");
    let random = random.path().file_name().expect("a name").to_string_lossy().into_owned();
    let name = hex::encode(random);
    let name = format!("test_{}_{name}", std::process::id());
    psql(server, &format!("CREATE DATABASE {name}"));
    let mut url = reqwest::Url::parse(server).expect("a URL");
    url.set_path(&name);
    url.into()
}

/// Runs SQL text; returns what it answers, unaligned and without headings.
pub fn psql(url: &str, sql: &str) -> String {
    let output = Command::new("psql")
        .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", sql])
        .output()
        .expect("psql");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{sql}: {said}");
    String::from_utf8(output.stdout).expect("text").trim_end().to_owned()
}
