//! Rows of a benchmark, in the form of `virt-shadow-lab bench`: a figure, its target, and what stands beside it.

use serde::Serialize;

use super::Failure;

/// One measured figure.
#[derive(Serialize)]
pub struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    /// What it is compared with, of the same run; empty: nothing.
    peer: String,
    peer_value: Option<f64>,
    /// `<= x` or `>= x`.
    target: Option<String>,
    met: Option<bool>,
}

impl Row {
    pub fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, peer: String::new(), peer_value: None, target: None, met: None }
    }

    pub fn beside(mut self, peer: impl Into<String>, value: f64) -> Self {
        (self.peer, self.peer_value) = (peer.into(), Some(value));
        self
    }

    pub fn at_most(mut self, limit: f64) -> Self {
        (self.target, self.met) = (Some(format!("<= {limit}")), Some(self.value <= limit));
        self
    }

    pub fn at_least(mut self, limit: f64) -> Self {
        (self.target, self.met) = (Some(format!(">= {limit}")), Some(self.value >= limit));
        self
    }
}

/// Prints rows as they come.
pub struct Rows {
    json: bool,
}

impl Rows {
    /// `format` is "text" or "json": one object a line.
    pub fn new(format: &str) -> Result<Self, Failure> {
        let json = match format {
            "json" => true,
            "text" => false,
            other => return Err(format!("--format {other}: give text or json").into()),
        };
        if !json {
            println!("{:<52} {:>9} {:<8} {:<8} {:<7} beside, in the same run", "figure", "value", "unit", "target", "");
        }
        Ok(Self { json })
    }

    pub fn print(&self, row: Row) -> Result<(), Failure> {
        if self.json {
            println!("{}", serde_json::to_string(&row)?);
            return Ok(());
        }
        let number = |value: f64| match value.abs() {
            size if size >= 100.0 => format!("{value:.0}"),
            size if size >= 10.0 => format!("{value:.1}"),
            _ => format!("{value:.3}"),
        };
        let peer = row.peer_value.map_or(String::new(), |value| format!("{} {}", number(value), row.peer));
        let met = row.met.map_or("", |met| if met { "met" } else { "MISSED" });
        let (value, target) = (number(row.value), row.target.unwrap_or_default());
        println!("{:<52} {value:>9} {:<8} {target:<8} {met:<7} {peer}", row.name, row.unit);
        Ok(())
    }
}
