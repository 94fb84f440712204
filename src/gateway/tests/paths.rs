//! Path templates: what parses, and which of several a path fits.

use proptest::prelude::*;

use crate::gateway::template::{Found, Segment, Template, Tree};

#[test]
fn templates_that_break_the_grammar_are_refused() {
    for text in [
        "",
        "v1",
        "/",
        "//",
        "/v1/",
        "/v1//x",
        "/{",
        "/{a",
        "/a}",
        "/{a}b",
        "/{a=}",
        "/{=*}",
        "/{1a}",
        "/{a.}",
        "/{a=*/}",
        "/**/x",
        "/{a=**}/x",
        "/a*",
        "/x:",
        "/{a}/{a}",
        "/a b",
        "/{a={b}}",
    ] {
        assert!(Template::parse(text).is_err(), "{text} parses");
    }
    let template = Template::parse("/v1/{a.b=x/*/y/**}:go").unwrap();
    assert_eq!(template.verb.as_deref(), Some("go"));
    assert_eq!(template.variables[0].path, [Box::<str>::from("a"), Box::from("b")]);
    assert_eq!(template.variables[0].segments, 1..5);
    assert_eq!(template.segments[2..], [Segment::One, Segment::Literal("y".into()), Segment::Rest]);
}

fn tree(templates: &[&'static str]) -> Tree<&'static str> {
    let mut tree = Tree::new();
    for text in templates {
        tree.insert(Template::parse(text).unwrap(), "GET", *text).unwrap();
    }
    tree
}

#[test]
fn the_more_specific_template_wins_wherever_it_was_added() {
    let mut templates =
        ["/v1/**", "/v1/*", "/v1/a", "/v1/a/*", "/v1/*/b", "/v1/a/b:c", "/v1/*/*:c", "/{x=**}"];
    for _ in 0..2 {
        let tree = tree(&templates);
        for (path, expected) in [
            ("/v1/a", "/v1/a"),
            ("/v1/z", "/v1/*"),
            ("/v1/a/b", "/v1/a/*"),
            ("/v1/z/b", "/v1/*/b"),
            ("/v1/a/b:c", "/v1/a/b:c"),
            ("/v1/a/z:c", "/v1/*/*:c"),
            ("/v1/a/b:d", "/v1/a/*"),
            ("/v1/z/z", "/v1/**"),
            ("/v1", "/v1/**"),
            ("/v1/", "/v1/**"),
            ("/v2/x", "/{x=**}"),
            ("/v1/%61", "/v1/a"),
            ("/v1/a/b%3Ac", "/v1/a/*"),
        ] {
            assert!(
                matches!(tree.find("GET", path), Found::Match(found, _) if *found == expected),
                "{path}: {:?}",
                tree.find("GET", path)
            );
        }
        templates.reverse();
    }
}

#[test]
fn a_single_segment_is_decoded_whole_and_several_keep_their_encoded_slashes() {
    let tree = tree(&["/one/{a}", "/two/{a=*/*}", "/rest/{a=**}", "/rest/{a=**}:verb"]);
    for (path, expected) in [
        ("/one/x%2Fy%20z", Some("x/y z")),
        ("/one/x+y", Some("x+y")),
        ("/one/a:b", Some("a:b")),
        ("/one/%C3%A9", Some("é")),
        ("/one/%C3", None),
        ("/one/%4", None),
        ("/one/%zz", None),
        ("/two/o%2Fp/q%20r", Some("o%2Fp/q r")),
        ("/two/o%2fp/q", Some("o%2fp/q")),
        ("/rest/a/b%2Fc", Some("a/b%2Fc")),
        ("/rest", Some("")),
        ("/rest/", Some("")),
        ("/rest/a//b", Some("a//b")),
        ("/rest/a/b:verb", Some("a/b")),
    ] {
        match (tree.find("GET", path), expected) {
            (Found::Match(_, captures), Some(expected)) => {
                assert_eq!(captures, [expected], "{path}");
            }
            (Found::Malformed, None) => {}
            (found, _) => panic!("{path}: {found:?}"),
        }
    }
    assert_eq!(tree.find("GET", "/one/"), Found::Nothing);
    assert_eq!(tree.find("GET", "/one"), Found::Nothing);
    assert_eq!(tree.find("GET", "/one/a/b"), Found::Nothing);
    assert_eq!(tree.find("GET", "*"), Found::Nothing);
    assert_eq!(tree.find("POST", "/one/a"), Found::OtherMethods(vec!["GET"]));
}

#[test]
fn two_methods_cannot_share_a_path() {
    let mut tree = tree(&["/v1/{a}/b"]);
    let same = Template::parse("/v1/{other}/b").unwrap();
    assert!(tree.insert(same.clone(), "GET", "x").is_err());
    tree.insert(same, "POST", "x").unwrap();
}

/// Whether the segments of a path fit, by the rule and nothing else.
fn fits(template: &[Segment], path: &[&str]) -> bool {
    match (template.split_first(), path.split_first()) {
        (None, None) | (Some((Segment::Rest, [])), _) => true,
        (Some((Segment::One, template)), Some((segment, path))) => {
            !segment.is_empty() && fits(template, path)
        }
        (Some((Segment::Literal(text), template)), Some((segment, path))) => {
            **text == **segment && fits(template, path)
        }
        _ => false,
    }
}

/// Orders templates as they are tried.
fn rank(template: &Template) -> (bool, Vec<(u8, String)>) {
    let ranks = template.segments.iter().map(|segment| match segment {
        Segment::Literal(text) => (0, text.to_string()),
        Segment::One => (1, String::new()),
        Segment::Rest => (2, String::new()),
    });
    // Where one ends and the other goes on with `**`, the shorter is the more specific, which
    // the order of vectors has it be.
    (template.verb.is_none(), ranks.collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_template_routes_as_the_rule_says(
        texts in prop::collection::vec("(/(a|b|\\*)){1,3}(/\\*\\*)?(:v|:w)?", 1..8),
        path in "(/(a|b|c|)){1,4}(:v|:w|:x)?",
    ) {
        let mut tree = Tree::new();
        let mut templates = Vec::new();
        for text in texts {
            let template = Template::parse(&text).unwrap();
            if tree.insert(template.clone(), "GET", text.clone()).is_ok() {
                templates.push((template, text));
            }
        }
        let whole: Vec<_> = path[1..].split('/').collect();
        let (bare, verb) = match path.rsplit_once(':') {
            Some((bare, verb)) => (bare[1..].split('/').collect(), Some(verb)),
            None => (Vec::new(), None),
        };
        let expected = templates
            .iter()
            .filter(|(template, _)| match template.verb.as_deref() {
                None => fits(&template.segments, &whole),
                wanted => wanted == verb && fits(&template.segments, &bare),
            })
            .min_by_key(|(template, _)| rank(template))
            .map(|(_, text)| text);
        match tree.find("GET", &path) {
            Found::Match(found, _) => prop_assert_eq!(Some(found), expected, "{}", path),
            Found::Nothing => prop_assert_eq!(None, expected, "{}", path),
            other => prop_assert!(false, "{path}: {other:?}"),
        }
    }

    #[test]
    fn no_path_and_no_template_is_too_strange(path in ".{0,40}", template in "[/a*{}=.:]{0,20}") {
        let tree = tree(&["/{a=**}", "/x/{b}:v", "/{c=*/*}"]);
        let _ = tree.find("GET", &path);
        if let Ok(template) = Template::parse(&template) {
            let mut tree = Tree::new();
            tree.insert(template, "GET", ()).unwrap();
            let _ = tree.find("GET", &path);
        }
    }
}
