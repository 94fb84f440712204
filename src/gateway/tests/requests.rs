//! From requests to messages: paths, queries and bodies, by the rules of `google.api.http`.

use http::{HeaderMap, HeaderValue, Method, header};

use super::{POOL, ROUTES, mapping, write};
use crate::{
    error::Error,
    gateway::{
        bind::{self, Parts},
        etag,
        route::Routes,
        template::Found,
    },
};

/// Request line, body, and what becomes of it: `Method {request}`, or `! field: description`.
pub const CASES: &[(&str, &str, &str)] = &[
    // Variables of paths.
    ("GET /v1/shelves/1/books/2", "", r#"Get {"name":"shelves/1/books/2"}"#),
    ("GET /v1/shelves/a%2Fb/books/c%20d", "", r#"Get {"name":"shelves/a%2Fb/books/c d"}"#),
    ("GET /v1/books/x%2Fy", "", r#"Get {"name":"x/y"}"#),
    ("GET /v1/books/a/b", "", r#"Get {"name":"a","inner":{"name":"b"}}"#),
    ("GET /v1/files/a/b/c", "", r#"Read {"name":"a/b/c"}"#),
    ("GET /v1/files/a/b:cover", "", r#"ReadCover {"name":"a/b"}"#),
    ("GET /v1/files/index", "", "ReadIndex {}"),
    ("GET /v1/files/index:cover", "", r#"ReadCover {"name":"index"}"#),
    ("GET /v1/files", "", "Read {}"),
    ("REPORT /v1/books/a", "", r#"Look {"name":"a"}"#),
    ("DELETE /v1/shelves/1/books/2", "", r#"Delete {"name":"shelves/1/books/2"}"#),
    ("POST /v1/shelves/1/books/2:archive", "{}", r#"Archive {"name":"shelves/1/books/2"}"#),
    ("POST /v1/shelves/1:archive", "", r#"Archive {"name":"shelves/1"}"#),
    ("GET /v1/books:list", "", "List {}"),
    (
        "GET /v1/since/2024-01-01T00%3A00%3A00Z/7/true/COLOR_BLUE/_-8/0",
        "",
        r#"ByDay {"since":"2024-01-01T00:00:00Z","from":"7","deep":true,"digest":"/+8=","pages":0,"color":"COLOR_BLUE"}"#,
    ),
    ("GET /v1/since/yesterday/7/true/2/AA/0", "", "! since: must be a time"),
    ("GET /v1/since/2024-01-01T00:00:00Z/-7/true/2/AA/0", "", "! from: must be a whole number"),
    ("GET /v1/since/2024-01-01T00:00:00Z/7/yes/2/AA/0", "", "! deep: must be `true`"),
    ("GET /v1/since/2024-01-01T00:00:00Z/7/true/PINK/AA/0", "", "! color: must be one of"),
    ("GET /v1/since/2024-01-01T00:00:00Z/7/true/2/!/0", "", "! digest: must be base64"),
    // No such path, or not with this method.
    ("GET /v1/nothing/here", "", "404"),
    ("GET /v1/shelves/1/books/", "", "404"),
    ("GET /v1/books/a%zz", "", "! path"),
    ("POST /v1/books/a", "", "405 GET,REPORT"),
    ("GET /v1/shelves/1/books", "", "405 POST"),
    ("GET /v1/shelves/1:archive", "", "405 POST"),
    ("PUT /v1/shelves/1/books/2", "", "405 DELETE,GET,PATCH"),
    // Queries.
    ("GET /v1/books/a?shelf=s", "", r#"Get {"name":"a","shelf":"s"}"#),
    ("GET /v1/books/a?shelf=a+b%2Bc", "", r#"Get {"name":"a","shelf":"a b+c"}"#),
    ("GET /v1/books/a?shelf=", "", r#"Get {"name":"a"}"#),
    ("GET /v1/books/a?shelf", "", r#"Get {"name":"a"}"#),
    ("GET /v1/books/a?&&shelf=s&", "", r#"Get {"name":"a","shelf":"s"}"#),
    ("GET /v1/books/a?authors=x&authors=y", "", r#"Get {"name":"a","authors":["x","y"]}"#),
    ("GET /v1/books/a?inner.name=x", "", r#"Get {"name":"a","inner":{"name":"x"}}"#),
    (
        "GET /v1/books/a?inner.inner.count=3&inner.tags=t&inner.tags=u",
        "",
        r#"Get {"name":"a","inner":{"inner":{"count":3},"tags":["t","u"]}}"#,
    ),
    ("GET /v1/books/a?all.an_int32=-4", "", r#"Get {"name":"a","all":{"anInt32":-4}}"#),
    ("GET /v1/books/a?all.anInt32=-4", "", r#"Get {"name":"a","all":{"anInt32":-4}}"#),
    ("GET /v1/books/a?all.aDouble=NaN", "", r#"Get {"name":"a","all":{"aDouble":"NaN"}}"#),
    ("GET /v1/books/a?all.aBytes=AQI%3D", "", r#"Get {"name":"a","all":{"aBytes":"AQI="}}"#),
    ("GET /v1/books/a?all.wait=1.5s", "", r#"Get {"name":"a","all":{"wait":"1.500s"}}"#),
    ("GET /v1/books/a?all.wrapped_bool=true", "", r#"Get {"name":"a","all":{"wrappedBool":true}}"#),
    ("GET /v1/books/a?all.wrappedInt64=5", "", r#"Get {"name":"a","all":{"wrappedInt64":"5"}}"#),
    ("GET /v1/books/a?mask=aB,c", "", r#"Get {"name":"a","mask":"aB,c"}"#),
    ("GET /v1/books/a?color=COLOR_RED", "", r#"Get {"name":"a","color":"COLOR_RED"}"#),
    ("GET /v1/books/a?color=2", "", r#"Get {"name":"a","color":"COLOR_BLUE"}"#),
    (
        "GET /v1/books/a?colors=1&colors=COLOR_BLUE",
        "",
        r#"Get {"name":"a","colors":["COLOR_RED","COLOR_BLUE"]}"#,
    ),
    ("GET /v1/books/a?labels[k.x]=v", "", r#"Get {"name":"a","labels":{"k.x":"v"}}"#),
    ("GET /v1/books/a?labels%5Bk%5D=v", "", r#"Get {"name":"a","labels":{"k":"v"}}"#),
    ("GET /v1/books/a?pages=0", "", r#"Get {"name":"a","pages":0}"#),
    ("GET /v1/books/a?deep=true", "", r#"Get {"name":"a","deep":true}"#),
    (
        "GET /v1/books/a?since=2024-01-01T00:00:00Z",
        "",
        r#"Get {"name":"a","since":"2024-01-01T00:00:00Z"}"#,
    ),
    ("GET /v1/books/a?shelff=s", "", "! shelff: is no field here; did you mean `shelf`?"),
    ("GET /v1/books/a?unheard=1", "", "! unheard: is no field of the request"),
    ("GET /v1/books/a?inner.nmae=1", "", "! inner.nmae: is no field here; did you mean `name`?"),
    ("GET /v1/books/a?shelf=a&shelf=b", "", "! shelf: is given twice"),
    ("GET /v1/books/a?all.an_int32=1&all.anInt32=1", "", "! all.anInt32: is given twice"),
    ("GET /v1/books/a?shelf.x=a", "", "! shelf.x: `shelf` has no fields"),
    ("GET /v1/books/a?inner=x", "", "! inner: is a message"),
    ("GET /v1/books/a?extra=x", "", "! extra: is a message"),
    ("GET /v1/books/a?extra.fields=x", "", "! extra.fields: `extra` has no fields"),
    ("GET /v1/books/a?labels=v", "", "! labels: needs a key"),
    ("GET /v1/books/a?shelf[k]=v", "", "! shelf[k]: takes no key"),
    ("GET /v1/books/a?deep=yes", "", "! deep: must be `true`"),
    ("GET /v1/books/a?pages=1.5", "", "! pages: must be a whole number"),
    ("GET /v1/books/a?color=PINK", "", "! color: must be one of"),
    ("GET /v1/books/a?name=b", "", "! name: is in the path already"),
    ("GET /v1/books/a?shelf=%C3", "", "! shelf: is not percent-encoded"),
    ("GET /v1/books/a?=x", "", "! : is no field"),
    // Bodies.
    (
        "POST /v1/shelves/s/books",
        r#"{"name":"n","inner":{"count":1}}"#,
        r#"Create {"name":"n","shelf":"s","inner":{"count":1}}"#,
    ),
    ("POST /v1/shelves/s/books", r#"{"shelf":"other"}"#, "! shelf: is `s` in the path and"),
    ("POST /v1/shelves/s/books", r#"{"shelf":"s"}"#, r#"Create {"shelf":"s"}"#),
    ("POST /v1/shelves/s/books", r#"{"shelf":""}"#, r#"Create {"shelf":"s"}"#),
    ("POST /v1/shelves/s/books", "", r#"Create {"shelf":"s"}"#),
    ("POST /v1/shelves/s/books?name=x", "{}", "! name: must be in the body"),
    ("POST /v1/shelves/s/books", "[]", "! body: must not be a list"),
    ("POST /v1/shelves/s/books", "{", "! body: is not JSON"),
    ("POST /v1/shelves/s/books", r#"{"inner":{"x":1}}"#, "! inner.x: is no field here"),
    (
        "PATCH /v1/shelves/1/books/2?mask=inner.name&shelf=s",
        r#"{"name":"n"}"#,
        r#"Update {"name":"shelves/1/books/2","shelf":"s","inner":{"name":"n"},"mask":"inner.name"}"#,
    ),
    ("PATCH /v1/shelves/1/books/2", "null", r#"Update {"name":"shelves/1/books/2"}"#),
    ("PATCH /v1/shelves/1/books/2?inner.name=x", "{}", "! inner.name: is in the body already"),
    ("PATCH /v1/shelves/1/books/2", r#"{"x":1}"#, "! inner.x: is no field here"),
    ("PUT /v1/labels/n", r#"{"k":"v"}"#, r#"Update {"name":"n","labels":{"k":"v"}}"#),
    ("PUT /v1/labels/n", r#"{"k":1}"#, "! labels[k]: must be a string"),
    ("PUT /v1/authors/n", r#"["a","b"]"#, r#"Update {"name":"n","authors":["a","b"]}"#),
    ("PUT /v1/authors/n", r#""a""#, "! authors: must be a list"),
    ("GET /v1/books/a", "{}", "! body: must be empty"),
];

fn outcome(line: &str, body: &str) -> String {
    let (method, uri) = line.split_once(' ').unwrap();
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let (route, captures) = match ROUTES.tree.find(method, path) {
        Found::Match(route, captures) => (route, captures),
        Found::OtherMethods(methods) => return format!("405 {}", methods.join(",")),
        Found::Nothing => return "404".into(),
        Found::Malformed => return "! path".into(),
    };
    let refused = |error: &Error| {
        let violation = &error.violations()[0];
        format!("! {}: {}", violation.field, violation.description)
    };
    let query = match bind::query(query) {
        Ok(query) => query,
        Err(error) => return refused(&error),
    };
    let parts = Parts {
        captures: &captures,
        query: &query,
        body: body.as_bytes(),
        last_event_id: None,
        etag: None,
    };
    match bind::request(mapping(), route, parts) {
        Ok(message) => {
            let name = route.path.rsplit('/').next().unwrap();
            format!("{name} {}", write("library.Book", &message))
        }
        Err(error) => refused(&error),
    }
}

#[test]
fn requests_are_bound_as_the_rules_say() {
    for (line, body, expected) in CASES {
        let found = outcome(line, body);
        let same = match expected.strip_prefix('!') {
            Some(_) => found.starts_with(expected),
            None => found == *expected,
        };
        assert!(same, "{line} {body}\n  gives    {found}\n  expected {expected}");
    }
}

#[test]
fn every_bad_parameter_is_named_at_once() {
    let Found::Match(route, captures) = ROUTES.tree.find("GET", "/v1/books/a") else {
        panic!("no route");
    };
    let query = bind::query("deep=1&pages=x&zzz=1").unwrap();
    let parts =
        Parts { captures: &captures, query: &query, body: b"", last_event_id: None, etag: None };
    let error = bind::request(mapping(), route, parts).unwrap_err();
    let fields: Vec<_> = error.violations().iter().map(|violation| &*violation.field).collect();
    assert_eq!(fields, ["deep", "pages", "zzz"]);
}

#[test]
fn a_browser_that_comes_back_asks_for_the_next_event_whatever_the_address_says() {
    let Found::Match(route, captures) = ROUTES.tree.find("GET", "/v1/books:list") else {
        panic!("no route");
    };
    let query = bind::query("from=3").unwrap();
    let at = |last_event_id| {
        let parts =
            Parts { captures: &captures, query: &query, body: b"", last_event_id, etag: None };
        write("library.Book", &bind::request(mapping(), route, parts).unwrap())
    };
    assert_eq!(at(None), r#"{"from":"3"}"#);
    assert_eq!(at(Some(41)), r#"{"from":"42"}"#);
    assert_eq!(at(Some(u64::MAX)), format!("{{\"from\":\"{}\"}}", u64::MAX));
}

#[test]
fn a_condition_is_the_etag_of_the_request_and_the_etag_of_an_answer_is_a_header() {
    let Found::Match(route, captures) = ROUTES.tree.find("POST", "/v1/shelves/1:archive") else {
        panic!("no route");
    };
    let query = bind::query("").unwrap();
    let bound = |if_match: &'static str, body: &str| {
        let mut headers = HeaderMap::new();
        headers.insert(header::IF_MATCH, HeaderValue::from_static(if_match));
        let etag = etag::wanted(mapping(), route, &Method::POST, &headers)?;
        let parts = Parts {
            captures: &captures,
            query: &query,
            body: body.as_bytes(),
            last_event_id: None,
            etag: etag.as_deref(),
        };
        bind::request(mapping(), route, parts).map(|message| write("library.Book", &message))
    };
    let tagged = r#"{"name":"shelves/1","etag":"v7"}"#;
    assert_eq!(bound("\"v7\"", "").unwrap(), tagged);
    assert_eq!(bound("\"v7\"", r#"{"etag":"v7"}"#).unwrap(), tagged);
    assert_eq!(bound("*", "").unwrap(), r#"{"name":"shelves/1"}"#);
    for (if_match, body, field) in [
        ("\"v7\"", r#"{"etag":"v6"}"#, "etag"),
        ("v7", "", "if-match"),
        ("W/\"v7\"", "", "if-match"),
        ("\"v7\", \"v8\"", "", "if-match"),
        ("\"\"", "", "if-match"),
    ] {
        assert_eq!(bound(if_match, body).unwrap_err().violations()[0].field, field, "{if_match}");
    }
    let answer = |json: &str| {
        etag::of(mapping(), route, &super::read("library.Book", json).unwrap())
            .map(|tag| tag.to_str().unwrap().to_owned())
    };
    assert_eq!(answer(r#"{"name":"n","etag":"v7"}"#).as_deref(), Some("\"v7\""));
    for none in ["{}", r#"{"etag":""}"#, r#"{"etag":"a\"b"}"#, r#"{"etag":"a\nb"}"#] {
        assert_eq!(answer(none), None, "{none}");
    }
}

#[test]
fn a_condition_on_a_method_that_would_not_look_at_it_is_refused() {
    let routes = Routes::new(&POOL, |path| path.starts_with("/baton.v1.TaskService/")).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert(header::IF_MATCH, HeaderValue::from_static("\"v7\""));
    for (method, path, refused) in
        [(Method::POST, "/v1/tasks", true), (Method::GET, "/v1/tasks/x", false)]
    {
        let Found::Match(route, _) = routes.tree.find(method.as_str(), path) else {
            panic!("no route");
        };
        let wanted = etag::wanted(&routes.mapping, route, &method, &headers);
        assert_eq!(wanted.is_err(), refused, "{path}");
    }
}

#[test]
fn statuses_and_fields_of_answers_come_from_the_annotations() {
    let route = |line: &str| {
        let (method, path) = line.split_once(' ').unwrap();
        match ROUTES.tree.find(method, path) {
            Found::Match(route, _) => route.clone(),
            other => panic!("{line}: {other:?}"),
        }
    };
    assert_eq!(route("POST /v1/shelves/s/books").status, 201);
    assert_eq!(route("GET /v1/books/a").status, 200);
    let field = |line: &str, message: &str| {
        let route = route(line);
        let described = mapping().message(route.output);
        let message = super::read("library.Book", message).unwrap();
        let mut json = Vec::new();
        let field = &described.fields[route.response_body.unwrap()];
        mapping().write_field(field, &message, &mut json).unwrap();
        String::from_utf8(json).unwrap()
    };
    let patch = "PATCH /v1/shelves/1/books/2";
    assert_eq!(field(patch, r#"{"authors":["a"],"name":"n"}"#), r#"["a"]"#);
    assert_eq!(field(patch, "{}"), "[]");
    assert_eq!(field("PUT /v1/authors/n", r#"{"inner":{"count":1}}"#), r#"{"count":1}"#);
    assert_eq!(field("PUT /v1/authors/n", "{}"), "null");
}
