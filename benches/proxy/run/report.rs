//! Medians, ranges and ratios, as a table in Markdown, and what a reader needs to judge them.

use std::collections::BTreeMap;
use std::iter::zip;
use std::sync::atomic::Ordering;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use tokio::time::timeout;

use super::load::RETRIES;
use super::peers::{Kind, Peer, Running};
use super::steps::Step;
use super::{Outcome, runtime};

/// How long a step may take. Whoever takes longer hangs.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What a run has found.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<&'static str>,
    /// A figure of each round.
    figures: BTreeMap<(Kind, &'static str), Vec<f64>>,
    failures: BTreeMap<Kind, String>,
    retries: BTreeMap<Kind, usize>,
}

impl Report {
    /// Takes a step with a peer. One that fails is told of and left alone from then on; the run is about
    /// this proxy, which may not.
    pub(crate) fn take(&mut self, peer: &Peer, step: Step, to: &Outcome<Running>) -> Outcome<()> {
        if self.failures.contains_key(&peer.kind) {
            return Ok(());
        }
        let figures = async {
            let to = to.as_ref().map_err(ToString::to_string)?;
            timeout(TIMEOUT, step.measure(peer, to))
                .await
                .map_err(|_| "hung")?
        };
        // Each with a new event loop, so that nothing of one peer's is left when it is another's turn.
        let figures = runtime()?.block_on(figures);
        let retries = RETRIES.swap(0, Ordering::Relaxed);
        *self.retries.entry(peer.kind).or_default() += retries;
        match figures {
            Err(error) => {
                let failure = format!("{} failed at {step:?}: {error}", peer.title);
                if peer.kind == Kind::Ours {
                    return Err(failure.into());
                }
                self.failures.insert(peer.kind, failure);
            }
            Ok(figures) => {
                for (row, figure) in figures {
                    if !self.rows.contains(&row) {
                        self.rows.push(row);
                    }
                    let rounds = self.figures.entry((peer.kind, row)).or_default();
                    rounds.push(figure);
                }
            }
        }
        Ok(())
    }

    /// The table and what is to be known of it; `run` says how it was measured.
    pub(crate) fn markdown(&self, peers: &[Peer], run: &str) -> String {
        let mut table = Table::new();
        table.load_preset(ASCII_MARKDOWN);
        let titles = peers.iter().map(|peer| peer.title.clone());
        table.set_header([String::new()].into_iter().chain(titles));
        for row in &self.rows {
            let cells = peers.iter().map(|peer| self.cell(peer.kind, row));
            table.add_row([row.to_string()].into_iter().chain(cells));
        }
        let retries = |peer: &Peer| {
            let count = self.retries.get(&peer.kind).unwrap_or(&0);
            format!("{} {count}", peer.title)
        };
        let retries: Vec<String> = peers.iter().map(retries).collect();
        let mut text = format!(
            "{table}\n\n\
             - The median of the rounds (least–most) and, **in bold**, this proxy's figure divided by the \
             peer's: the median of the rounds' ratios.\n\
             - {run}\n\
             - Connections that had to be tried again: {}\n",
            retries.join(", ")
        );
        for failure in self.failures.values() {
            text += &format!("- {failure}\n");
        }
        text
    }

    fn cell(&self, kind: Kind, row: &'static str) -> String {
        let figures = |kind| self.figures.get(&(kind, row)).cloned().unwrap_or_default();
        let (ours, figures) = (figures(Kind::Ours), figures(kind));
        let [least, median, most] = [0.0, 0.5, 1.0].map(|it| rounded(quantile(&figures, it)));
        let ratios: Vec<f64> = zip(&ours, &figures).map(|(ours, it)| ours / it).collect();
        let ratio = rounded(quantile(&ratios, 0.5));
        match kind {
            _ if self.failures.contains_key(&kind) => "failed".to_owned(),
            Kind::Direct if median == "NaN" => "no proxy".to_owned(),
            _ if figures.is_empty() => "not supported".to_owned(),
            // Of a process that is not dumpable.
            _ if median == "NaN" => "PSS is for root to read".to_owned(),
            _ if kind == Kind::Ours || ratio == "NaN" => format!("{median} ({least}–{most})"),
            _ => format!("{median} ({least}–{most}) **{ratio}**"),
        }
    }
}

/// The number below which `share` of them are; NaN where there are none.
pub(crate) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|it| !it.is_nan()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let position = sorted.len().saturating_sub(1) as f64 * share;
    *sorted.get(position.round() as usize).unwrap_or(&f64::NAN)
}

/// Three digits that count.
fn rounded(value: f64) -> String {
    let digits = (2.0 - value.log10().floor()).clamp(0.0, 4.0) as usize;
    format!("{value:.digits$}")
}
