//! Figures against goals, as a table for people or as JSON.

use std::fmt::{self, Write as _};

use serde::Serialize;

/// How a figure stands against its goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Meets the stricter bound.
    WorldClass,
    /// Meets the bound.
    Good,
    /// Does not.
    Short,
    /// There is no bound, or the bound does not apply to a quick run.
    Noted,
    /// The case did not run to its end.
    Failed,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WorldClass => "world-class",
            Self::Good => "good",
            Self::Short => "short",
            Self::Noted => "-",
            Self::Failed => "FAILED",
        })
    }
}

/// Which side of a bound is the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Less.
    Lower,
    /// More.
    Higher,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The goal's name.
    pub goal: String,
    /// What was measured.
    pub what: String,
    /// Unit of figure and yardstick.
    pub unit: String,
    /// Baton's figure: the median over the repetitions.
    pub figure: f64,
    /// Figures of each repetition.
    pub figures: Vec<f64>,
    /// The yardstick's figure in the same run.
    pub yardstick: Option<f64>,
    /// Figure over yardstick.
    pub ratio: Option<f64>,
    /// Bounds on the ratio, or on the figure where there is no yardstick.
    pub bounds: Option<(f64, f64)>,
    /// The verdict.
    pub verdict: Verdict,
    /// What else there is to know.
    pub note: String,
}

impl Row {
    /// A line without a verdict.
    pub fn new(goal: &str, what: &str, unit: &str, figures: Vec<f64>) -> Self {
        Self {
            goal: goal.to_owned(),
            what: what.to_owned(),
            unit: unit.to_owned(),
            figure: super::figures::median(figures.iter().copied()),
            figures,
            yardstick: None,
            ratio: None,
            bounds: None,
            verdict: Verdict::Noted,
            note: String::new(),
        }
    }

    /// A case that failed.
    pub fn failed(goal: &str, what: &str, error: &anyhow::Error) -> Self {
        let note = format!("{error:#}");
        Self { verdict: Verdict::Failed, note, ..Self::new(goal, what, "", Vec::new()) }
    }

    /// Adds the yardstick's figures.
    #[must_use]
    pub fn against(mut self, figures: impl IntoIterator<Item = f64>) -> Self {
        let yardstick = super::figures::median(figures);
        self.yardstick = Some(yardstick);
        self.ratio = Some(self.figure / yardstick);
        self
    }

    /// Judges the ratio, or the figure where there is none.
    #[must_use]
    pub fn judged(mut self, better: Better, good: f64, world_class: f64) -> Self {
        let value = self.ratio.unwrap_or(self.figure);
        let meets = |bound: f64| match better {
            Better::Lower => value <= bound,
            Better::Higher => value >= bound,
        };
        self.bounds = Some((good, world_class));
        self.verdict = if meets(world_class) {
            Verdict::WorldClass
        } else if meets(good) {
            Verdict::Good
        } else {
            Verdict::Short
        };
        self
    }

    /// Adds a remark.
    #[must_use]
    pub fn noted(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }
}

/// A number with as many digits as it deserves.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1e6 => format!("{:.2} M", value / 1e6),
        v if v >= 1e4 => format!("{:.1} k", value / 1e3),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The table as text; also valid Markdown.
pub fn table(rows: &[Row]) -> String {
    let head = ["goal", "measured", "figure", "yardstick", "ratio", "good / world", "verdict"];
    let mut lines = vec![head.map(str::to_owned)];
    for row in rows {
        let unit = |value| format!("{} {}", number(value), row.unit);
        let bounds = |(good, world)| format!("{} / {}", number(good), number(world));
        lines.push([
            row.goal.clone(),
            row.what.clone(),
            if row.verdict == Verdict::Failed { String::new() } else { unit(row.figure) },
            row.yardstick.map_or_else(String::new, unit),
            row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            row.bounds.map_or_else(String::new, bounds),
            row.verdict.to_string(),
        ]);
    }
    let width = |column: usize| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    // Writing to a string cannot fail.
    let mut text = String::new();
    for (at, line) in lines.iter().enumerate() {
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(text, "| {cell:width$} ");
        }
        text.push_str("|\n");
        if at == 0 {
            for width in &widths {
                let _ = write!(text, "| {:-<width$} ", "");
            }
            text.push_str("|\n");
        }
    }
    for row in rows.iter().filter(|row| !row.note.is_empty()) {
        let _ = write!(text, "\n{}, {}: {}", row.goal, row.what, row.note);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_judged_before_a_figure() {
        let row = Row::new("G1", "cpu", "µs", vec![13.0, 11.0, 12.0]).against([10.0]);
        assert_eq!(row.judged(Better::Lower, 1.3, 0.7).verdict, Verdict::Good);
        let row = Row::new("G7", "memory", "KiB", vec![12.0]);
        assert_eq!(row.clone().judged(Better::Lower, 20.0, 13.0).verdict, Verdict::WorldClass);
        assert_eq!(row.judged(Better::Higher, 20.0, 30.0).verdict, Verdict::Short);
    }
}
