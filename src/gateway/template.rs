//! Path templates of `google.api.http`, and which of them a path fits.
//!
//! ```text
//! Template = "/" Segments [ ":" LITERAL ]
//! Segments = Segment { "/" Segment }
//! Segment  = "*" | "**" | LITERAL | "{" FieldPath [ "=" Segments ] "}"
//! ```
//!
//! Of several templates that fit, the one wins that is the more specific at the first
//! difference: a literal before `*` before `**`. One with a verb comes before one without.

use std::{borrow::Cow, collections::BTreeMap, ops::Range};

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its segments, those of variables included.
    pub segments: Vec<Segment>,
    /// What follows the last colon.
    pub verb: Option<Box<str>>,
    /// Its variables, in order.
    pub variables: Vec<Variable>,
}

/// One segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Itself.
    Literal(Box<str>),
    /// Any one segment that is not empty.
    One,
    /// Any number of segments, also none; only the last.
    Rest,
}

/// A variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Names of the fields from the request down.
    pub path: Vec<Box<str>>,
    /// Which segments it captures.
    pub segments: Range<usize>,
}

impl Variable {
    /// Whether it can capture more than one segment, so that `%2F` in it stays as it is.
    fn is_multi(&self, segments: &[Segment]) -> bool {
        self.segments.len() != 1 || segments[self.segments.start] == Segment::Rest
    }
}

impl Template {
    /// Parses a template; the error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let rest = text.strip_prefix('/').ok_or("must start with `/`")?;
        let (rest, verb) = split_verb(rest);
        if verb.is_some_and(|verb| !is_literal(verb)) {
            return Err("has a malformed verb");
        }
        let mut template =
            Self { segments: Vec::new(), verb: verb.map(Into::into), variables: Vec::new() };
        let mut rest = Some(rest);
        while let Some(text) = rest {
            if let Some(text) = text.strip_prefix('{') {
                let (variable, after) = text.split_once('}').ok_or("has an open `{`")?;
                template.variable(variable)?;
                rest = after.strip_prefix('/');
                if rest.is_none() && !after.is_empty() {
                    return Err("has text behind a `}`");
                }
                continue;
            }
            let (segment, after) = match text.split_once('/') {
                Some((segment, after)) => (segment, Some(after)),
                None => (text, None),
            };
            template.segment(segment)?;
            rest = after;
        }
        let last = template.segments.len() - 1;
        if template.segments[..last].contains(&Segment::Rest) {
            return Err("has `**` before its end");
        }
        Ok(template)
    }

    fn segment(&mut self, text: &str) -> Result<(), &'static str> {
        self.segments.push(match text {
            "*" => Segment::One,
            "**" => Segment::Rest,
            _ if is_literal(text) => Segment::Literal(text.into()),
            _ => return Err("has a malformed segment"),
        });
        Ok(())
    }

    fn variable(&mut self, text: &str) -> Result<(), &'static str> {
        let (path, segments) = text.split_once('=').unwrap_or((text, "*"));
        let path: Vec<Box<str>> = path.split('.').map(Into::into).collect();
        if !path.iter().all(|name| is_identifier(name)) {
            return Err("has a malformed field path");
        }
        if self.variables.iter().any(|other| other.path == path) {
            return Err("has the same variable twice");
        }
        let start = self.segments.len();
        for segment in segments.split('/') {
            self.segment(segment)?;
        }
        self.variables.push(Variable { path, segments: start..self.segments.len() });
        Ok(())
    }
}

/// A template's verb follows its last colon, outside of braces.
fn split_verb(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((rest, verb)) if !verb.contains(['/', '}']) => (rest, Some(verb)),
        _ => (text, None),
    }
}

fn is_identifier(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn is_literal(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.~!$&'()+,;@".contains(c);
    !text.is_empty() && text.chars().all(allowed)
}

/// Templates with a value for each HTTP method, as a tree of segments.
#[derive(Debug)]
pub struct Tree<T> {
    root: Node,
    ends: Vec<End<T>>,
}

#[derive(Debug, Default)]
struct Node {
    literals: BTreeMap<Box<str>, Node>,
    one: Option<Box<Node>>,
    rest: Option<Box<Node>>,
    /// Positions in `ends` of templates that end here.
    ends: Vec<usize>,
}

#[derive(Debug)]
struct End<T> {
    template: Template,
    method: Box<str>,
    value: T,
}

/// The values of a template's variables, decoded, in order.
pub type Captures = Vec<String>;

/// What a path and an HTTP method lead to.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'t, T> {
    /// A template fits.
    Match(&'t T, Captures),
    /// Templates fit, but for these methods only, sorted.
    OtherMethods(Vec<&'t str>),
    /// No template fits.
    Nothing,
    /// The path is not percent-encoded UTF-8.
    Malformed,
}

impl<T> Tree<T> {
    /// An empty tree.
    pub fn new() -> Self {
        Self { root: Node::default(), ends: Vec::new() }
    }

    /// Adds a template; refuses one that the same paths and method lead to already.
    pub fn insert(&mut self, template: Template, method: &str, value: T) -> Result<(), String> {
        let mut node = &mut self.root;
        for segment in &template.segments {
            node = match segment {
                Segment::Literal(text) => node.literals.entry(text.clone()).or_default(),
                Segment::One => node.one.get_or_insert_default(),
                Segment::Rest => node.rest.get_or_insert_default(),
            };
        }
        let taken = node.ends.iter().any(|at| {
            let end = &self.ends[*at];
            end.template.verb == template.verb && &*end.method == method
        });
        if taken {
            return Err(format!("another method has the same path for {method}"));
        }
        node.ends.push(self.ends.len());
        self.ends.push(End { template, method: method.into(), value });
        Ok(())
    }

    /// The templates with their methods and values, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = (&Template, &str, &T)> {
        self.ends.iter().map(|end| (&end.template, &*end.method, &end.value))
    }

    /// What a path, as it came, leads to.
    pub fn find(&self, method: &str, path: &str) -> Found<'_, T> {
        let Some(path) = path.strip_prefix('/') else { return Found::Nothing };
        let mut others = Vec::new();
        // In a path a verb can follow any colon of the last segment; the last is meant.
        let start = path.rfind('/').map_or(0, |at| at + 1);
        if let Some(colon) = path[start..].rfind(':') {
            let (before, verb) = (&path[..start + colon], &path[start + colon + 1..]);
            match self.search(method, before, Some(verb), &mut others) {
                Found::Nothing => {}
                found => return found,
            }
        }
        match self.search(method, path, None, &mut others) {
            Found::Nothing if !others.is_empty() => {
                others.sort_unstable();
                others.dedup();
                Found::OtherMethods(others)
            }
            found => found,
        }
    }

    fn search<'t>(
        &'t self,
        method: &str,
        path: &str,
        verb: Option<&str>,
        others: &mut Vec<&'t str>,
    ) -> Found<'t, T> {
        let raw: Vec<&str> = path.split('/').collect();
        let mut decoded = Vec::with_capacity(raw.len());
        for segment in &raw {
            let Some(segment) = percent_decode(segment) else { return Found::Malformed };
            decoded.push(segment);
        }
        let wanted = |end: &End<T>| &*end.method == method || &*end.method == "*";
        let mut accept = |at: usize| {
            let end = &self.ends[at];
            if end.template.verb.as_deref() != verb {
                return false;
            }
            if !wanted(end) {
                others.push(&*end.method);
                return false;
            }
            true
        };
        match walk(&self.root, &decoded, &mut accept) {
            None => Found::Nothing,
            Some(at) => {
                let End { template, value, .. } = &self.ends[at];
                match template.capture(&raw, &decoded) {
                    Some(captures) => Found::Match(value, captures),
                    None => Found::Malformed,
                }
            }
        }
    }
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Self::new()
    }
}

fn walk(
    node: &Node,
    segments: &[Cow<'_, str>],
    accept: &mut impl FnMut(usize) -> bool,
) -> Option<usize> {
    let Some((segment, after)) = segments.split_first() else {
        let here = node.ends.iter().copied().find(|at| accept(*at));
        return here.or_else(|| rest(node, accept));
    };
    if let Some(next) = node.literals.get(&**segment)
        && let Some(found) = walk(next, after, accept)
    {
        return Some(found);
    }
    if let Some(next) = &node.one
        && !segment.is_empty()
        && let Some(found) = walk(next, after, accept)
    {
        return Some(found);
    }
    rest(node, accept)
}

fn rest(node: &Node, accept: &mut impl FnMut(usize) -> bool) -> Option<usize> {
    node.rest.as_ref()?.ends.iter().copied().find(|at| accept(*at))
}

impl Template {
    /// The values of the variables in a path that fits.
    fn capture(&self, raw: &[&str], decoded: &[Cow<'_, str>]) -> Option<Captures> {
        self.variables
            .iter()
            .map(|variable| {
                let Range { start, end } = variable.segments;
                let open = self.segments[start..end].contains(&Segment::Rest);
                let end = if open { raw.len().max(start) } else { end };
                if variable.is_multi(&self.segments) {
                    let parts: Option<Vec<_>> =
                        raw[start..end].iter().map(|part| decode_but_slashes(part)).collect();
                    Some(parts?.join("/"))
                } else {
                    Some(decoded[start].clone().into_owned())
                }
            })
            .collect()
    }
}

/// Decodes percent-encoding; `None` when it is malformed or not UTF-8.
pub fn percent_decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    decode(text, |_| true).map(Cow::Owned)
}

/// As [`percent_decode`], but an encoded slash stays encoded: beside real ones it could not be
/// told from them.
fn decode_but_slashes(text: &str) -> Option<String> {
    decode(text, |byte| byte != b'/')
}

fn decode(text: &str, wanted: impl Fn(u8) -> bool) -> Option<String> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte != b'%' {
            out.push(byte);
            at += 1;
            continue;
        }
        let digit = |at: usize| bytes.get(at).and_then(|byte| (*byte as char).to_digit(16));
        let value = (digit(at + 1)? * 16 + digit(at + 2)?) as u8;
        if wanted(value) {
            out.push(value);
        } else {
            out.extend_from_slice(&bytes[at..at + 3]);
        }
        at += 3;
    }
    String::from_utf8(out).ok()
}
