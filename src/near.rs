//! The known name that somebody most likely meant.

/// The nearest of the known names, when it is near enough to be meant.
pub fn nearest<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let bound = (wrong.chars().count() / 3).clamp(1, 4);
    known
        .map(|name| (strsim::damerau_levenshtein(wrong, name), name))
        .filter(|(distance, _)| *distance <= bound)
        .min()
        .map(|(_, name)| name)
}

/// The nearest model: by its whole name, by its name without the owner, or the same name of
/// another owner.
pub fn nearest_model<'a>(wrong: &str, known: &'a [String]) -> Option<&'a str> {
    let bare = |model: &str| model.split('@').next().unwrap_or_default().to_owned();
    let last = |model: &str| bare(model).rsplit('/').next().unwrap_or_default().to_owned();
    let wrong = bare(wrong);
    nearest(&wrong, known.iter().map(String::as_str).filter(|name| *name != "*")).or_else(|| {
        let wanted = last(&wrong);
        known.iter().map(String::as_str).find(|name| {
            *name != "*" && nearest(&wanted, std::iter::once(last(name).as_str())).is_some()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_finds_its_model_and_a_stranger_finds_none() {
        let known = ["baton/ngram".to_owned(), "baton/echo".into(), "*".into()];
        assert_eq!(nearest_model("baton/ngrma", &known), Some("baton/ngram"));
        assert_eq!(nearest_model("ngram", &known), Some("baton/ngram"));
        assert_eq!(nearest_model("batn/echo@2", &known), Some("baton/echo"));
        assert_eq!(nearest_model("meta/llama-70b", &known), None);
    }
}
