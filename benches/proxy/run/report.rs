//! Collects the values of all rounds and formats the table.

use std::collections::BTreeMap;
use std::iter::zip;

use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;

use super::proxies::{Kind, Proxy};

#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<&'static str>,
    /// One value per round.
    values: BTreeMap<(Kind, &'static str), Vec<f64>>,
}

impl Report {
    pub(crate) fn add(&mut self, kind: Kind, row: &'static str, value: f64) {
        if !self.rows.contains(&row) {
            self.rows.push(row);
        }
        self.values.entry((kind, row)).or_default().push(value);
    }

    pub(crate) fn to_markdown(&self, proxies: &[Proxy]) -> String {
        let mut table = Table::new();
        table.load_preset(ASCII_MARKDOWN);
        let titles = proxies.iter().map(|proxy| proxy.title.clone());
        table.set_header([String::new()].into_iter().chain(titles));
        for row in &self.rows {
            let cells = proxies.iter().map(|proxy| self.cell(proxy.kind, row));
            table.add_row([row.to_string()].into_iter().chain(cells));
        }
        format!(
            "{table}\n\n\
             - Median of the rounds (minimum–maximum) and, **in bold**, the median of the rounds' ratios: this \
             proxy's value divided by the other's.\n"
        )
    }

    fn cell(&self, kind: Kind, row: &'static str) -> String {
        let values = |kind| self.values.get(&(kind, row)).map_or(&[][..], Vec::as_slice);
        let (ours, values) = (values(Kind::Ours), values(kind));
        let [minimum, median, maximum] = [0.0, 0.5, 1.0].map(|it| rounded(quantile(values, it)));
        let ratios: Vec<f64> = zip(ours, values).map(|(ours, it)| ours / it).collect();
        let ratio = rounded(quantile(&ratios, 0.5));
        match kind {
            _ if values.is_empty() => "not supported".to_owned(),
            _ if median == "NaN" => "readable by root only".to_owned(),
            _ if kind == Kind::Ours || ratio == "NaN" => format!("{median} ({minimum}–{maximum})"),
            _ => format!("{median} ({minimum}–{maximum}) **{ratio}**"),
        }
    }
}

/// The quantile `share` (0 to 1) of `values`, ignoring NaN; NaN if there is no value.
pub(crate) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|it| !it.is_nan()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let position = sorted.len().saturating_sub(1) as f64 * share;
    *sorted.get(position.round() as usize).unwrap_or(&f64::NAN)
}

/// Three significant digits, at most four decimals.
fn rounded(value: f64) -> String {
    let digits = (2.0 - value.log10().floor()).clamp(0.0, 4.0) as usize;
    format!("{value:.digits$}")
}
