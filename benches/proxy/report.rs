//! Medians, ratios and goals, as a table and as JSON.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::goals::{GOALS, Goal, MEASURES, label};
use crate::measure::median;
use crate::peers::{Kind, Peer};
use crate::round::Figures;

/// What a run has found.
pub(crate) struct Report<'a> {
    peers: &'a [Peer],
    rounds: BTreeMap<&'static str, Vec<Figures>>,
    failures: BTreeMap<&'static str, String>,
    machine: Value,
    time: Duration,
}

impl<'a> Report<'a> {
    pub(crate) fn new(peers: &'a [Peer]) -> Self {
        Self {
            peers,
            rounds: BTreeMap::new(),
            failures: BTreeMap::new(),
            machine: machine(),
            time: Duration::ZERO,
        }
    }

    /// Takes the next figures, all proxies' in the same order.
    ///
    /// A peer that fails is told of and left alone from then on; the run is about this proxy.
    pub(crate) fn add(
        &mut self,
        kind: Kind,
        figures: Result<Figures, Box<dyn Error>>,
    ) -> Result<(), Box<dyn Error>> {
        let figures = match figures {
            Err(error) if kind == Kind::Ours => return Err(error),
            Err(error) => {
                self.failures.insert(kind.name(), error.to_string());
                Figures::new()
            }
            Ok(figures) => figures,
        };
        self.rounds.entry(kind.name()).or_default().push(figures);
        Ok(())
    }

    pub(crate) fn has_failed(&self, kind: Kind) -> bool {
        self.failures.contains_key(kind.name())
    }

    pub(crate) fn finish(&mut self, time: Duration) {
        self.time = time;
    }

    fn rounds(&self, kind: Kind) -> &[Figures] {
        self.rounds.get(kind.name()).map_or(&[], Vec::as_slice)
    }

    fn values(&self, kind: Kind, key: &str) -> Vec<f64> {
        let figures = self.rounds(kind).iter();
        figures
            .filter_map(|round| round.get(key).copied())
            .collect()
    }

    /// The median over rounds of this proxy's figure divided by the other's in the same round.
    fn ratio(&self, key: &str, to: Kind) -> f64 {
        let rounds = self.rounds(Kind::Ours).iter().zip(self.rounds(to));
        let ratios: Vec<f64> = rounds
            .filter_map(|(ours, theirs)| Some(ours.get(key)? / theirs.get(key)?))
            .collect();
        median(&ratios)
    }

    /// The goals that can be told: what was reached, and whether it is enough.
    fn goals(&self) -> impl Iterator<Item = (&'static Goal, f64, bool)> {
        GOALS.iter().filter_map(|goal| {
            let reached = match goal.to {
                Some(to) => self.ratio(goal.key, to),
                None => median(&self.values(Kind::Ours, goal.key)),
            };
            let enough = if goal.at_most {
                reached <= goal.bound
            } else {
                reached >= goal.bound
            };
            (!reached.is_nan()).then_some((goal, reached, enough))
        })
    }

    /// In Markdown, for people.
    pub(crate) fn table(&self) -> String {
        let mut text = String::from("|  |");
        for peer in self.peers {
            let _ = write!(text, " {} {} |", peer.kind.name(), peer.version);
        }
        text.push_str("\n| --- |");
        text.push_str(&" ---: |".repeat(self.peers.len()));
        text.push('\n');
        for measure in &MEASURES {
            let _ = write!(text, "| {} |", [measure.label, measure.unit].join(", "));
            for peer in self.peers {
                let value = rounded(median(&self.values(peer.kind, measure.key)));
                let ratio = rounded(self.ratio(measure.key, peer.kind));
                let _ = match peer.kind {
                    Kind::Ours => write!(text, " {value} |"),
                    _ => write!(text, " {value} ({ratio}) |"),
                };
            }
            text.push('\n');
        }
        let rounds = self.values(Kind::Ours, "cpu_request").len();
        let of = |key| self.machine[key].as_str().unwrap_or_default();
        let _ = writeln!(
            text,
            "\nMedians over {rounds} rounds in {} s; in brackets this proxy's figure divided by the peer's. {} UTC, {} cores of {}, Linux {}, load {} before.\n",
            self.time.as_secs(),
            of("date"),
            self.machine["cores"],
            of("cpu"),
            of("kernel"),
            of("load"),
        );
        for peer in self.peers {
            let _ = writeln!(text, "- {}: {}", peer.kind.name(), peer.note());
        }
        for (name, error) in &self.failures {
            let _ = writeln!(
                text,
                "- {name} failed and was left out from then on: {error}"
            );
        }
        text.push('\n');
        for (goal, reached, enough) in self.goals() {
            let verdict = if enough { "reached" } else { "MISSED" };
            let bound = if goal.at_most { "at most" } else { "at least" };
            let to = goal
                .to
                .map_or(String::new(), |to| format!(" of {}'s", to.name()));
            let _ = writeln!(
                text,
                "- {verdict}: {}: {}, {bound} {}{to}",
                label(goal.key),
                rounded(reached),
                rounded(goal.bound)
            );
        }
        text
    }

    /// For programs: every round's figures, too.
    pub(crate) fn json(&self) -> Value {
        let measures: Vec<Value> = MEASURES
            .iter()
            .map(|measure| {
                let of = |peer: &Peer| {
                    let rounds = self.values(peer.kind, measure.key);
                    let figures = json!({
                        "median": median(&rounds),
                        "ratio": self.ratio(measure.key, peer.kind),
                        "rounds": rounds,
                    });
                    (peer.kind.name().to_owned(), figures)
                };
                let peers: serde_json::Map<String, Value> = self.peers.iter().map(of).collect();
                json!({ "key": measure.key, "label": measure.label, "unit": measure.unit, "peers": peers })
            })
            .collect();
        let peers: Vec<Value> = self
            .peers
            .iter()
            .map(|peer| json!({ "name": peer.kind.name(), "version": peer.version, "note": peer.note() }))
            .collect();
        let goals: Vec<Value> = self
            .goals()
            .map(|(goal, reached, enough)| {
                json!({
                    "key": goal.key,
                    "to": goal.to.map(Kind::name),
                    "bound": goal.bound,
                    "at_most": goal.at_most,
                    "reached": reached,
                    "enough": enough,
                })
            })
            .collect();
        json!({
            "machine": self.machine,
            "seconds": self.time.as_secs(),
            "peers": peers,
            "measures": measures,
            "goals": goals,
            "failures": self.failures,
        })
    }
}

/// Three digits that count.
pub(crate) fn rounded(value: f64) -> String {
    if value.is_nan() {
        return "–".to_owned();
    }
    let digits = match value.abs() {
        0.0..0.1 => 4,
        0.1..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

/// Where and when.
fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let date = Command::new("date").args(["-u", "+%F %H:%M"]).output();
    json!({
        "date": date.map_or(String::new(), |date| String::from_utf8_lossy(&date.stdout).trim().to_owned()),
        "cpu": model.unwrap_or_default().trim_start_matches(['\t', ' ', ':']),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load": read("/proc/loadavg").trim(),
    })
}
