//! A run's two most telling figures as a picture, for light and dark pages alike.

use std::error::Error;
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use crate::report::rounded;

/// What is drawn: a measure's key, its heading, and what it tells.
const PANELS: [(&str, &str, Scale); 2] = [
    ("cpu_request", "CPU time per request, µs", Scale::Linear),
    (
        "delay_p50",
        "Delay of a stream's event, median, µs (each line is ten times the last)",
        Scale::Decades,
    ),
];

/// How lengths stand for figures.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    /// Logarithmic, from [`LEAST`] on.
    Decades,
}

/// Where a logarithmic scale begins.
const LEAST: f64 = 10.0;

/// Lengths in the picture's own units.
const WIDTH: f64 = 720.0;
const LABELS: f64 = 120.0;
const VALUES: f64 = 80.0;
const BAR: f64 = 18.0;
const ROW: f64 = 26.0;
const HEADING: f64 = 40.0;
const FOOT: f64 = 34.0;

/// Colours that can be told apart on white and on GitHub's dark, also by those who see few.
const STYLE: &str = "
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.heading { font-weight: 600; }
.foot { font-size: 11px; fill: #59636e; }
.ours { fill: #0969da; }
.theirs { fill: #8c959f; }
.line { stroke: #8c959f; stroke-opacity: 0.35; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .foot { fill: #9198a1; }
  .ours { fill: #4493f8; }
  .theirs { fill: #6e7681; }
}
";

/// Draws the run that `json` tells of into the file `svg`.
pub(crate) fn main(json: &Path, svg: &Path) -> Result<(), Box<dyn Error>> {
    let run = std::fs::read(json)
        .map_err(|error| format!("{}: {error}: run the benchmark first", json.display()))?;
    let run: Value = serde_json::from_slice(&run)?;
    std::fs::write(svg, draw(&run)?)?;
    println!("{}", svg.display());
    Ok(())
}

fn draw(run: &Value) -> Result<String, Box<dyn Error>> {
    let mut body = String::new();
    let mut y = 0.0;
    for (key, heading, scale) in PANELS {
        let figures = figures(run, key)?;
        writeln!(
            body,
            r#"<text class="heading" x="0" y="{}">{heading}</text>"#,
            y + 22.0
        )?;
        y += HEADING;
        y = panel(&mut body, &figures, scale, y)?;
    }
    let machine = &run["machine"];
    let text = |key: &str| machine[key].as_str().unwrap_or_default();
    writeln!(
        body,
        r#"<text class="foot" x="0" y="{}">Less is better. {}, {} cores of {}. 16 connections; 64 streams of 50 events a second.</text>"#,
        y + 22.0,
        text("date").split(' ').next().unwrap_or_default(),
        machine["cores"],
        text("cpu"),
    )?;
    y += FOOT;
    Ok(format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" aria-label="CPU time per request and delay of an event, this proxy beside others">
<style>{STYLE}</style>
{body}</svg>
"#
    ))
}

/// Each proxy's name and version, and its median.
fn figures(run: &Value, key: &str) -> Result<Vec<(String, f64)>, Box<dyn Error>> {
    let measures = run["measures"].as_array().ok_or("no measures")?;
    let measure = measures.iter().find(|measure| measure["key"] == key);
    let measure = measure.ok_or_else(|| format!("no measure {key}"))?;
    let peers = run["peers"].as_array().ok_or("no peers")?;
    let figure = |peer: &Value| {
        let name = peer["name"].as_str()?;
        let median = measure["peers"][name]["median"].as_f64()?;
        Some((format!("{name} {}", peer["version"].as_str()?), median))
    };
    Ok(peers.iter().filter_map(figure).collect())
}

/// One bar for each figure, ours first; gives where they end.
fn panel(
    body: &mut String,
    figures: &[(String, f64)],
    scale: Scale,
    top: f64,
) -> Result<f64, std::fmt::Error> {
    let most = figures.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    let space = WIDTH - LABELS - VALUES;
    let length = |value: f64| match scale {
        Scale::Linear => space * value / most,
        Scale::Decades => space * (value / LEAST).log10().max(0.0) / (most / LEAST).log10(),
    };
    let mut y = top;
    for (index, (name, value)) in figures.iter().enumerate() {
        let class = if index == 0 { "ours" } else { "theirs" };
        let (length, text) = (length(*value), y + BAR - 4.0);
        writeln!(
            body,
            r#"<text x="{}" y="{text}" text-anchor="end">{name}</text>
<rect class="{class}" x="{LABELS}" y="{y}" width="{length:.1}" height="{BAR}" rx="2"/>
<text x="{:.1}" y="{text}">{}</text>"#,
            LABELS - 8.0,
            LABELS + length + 6.0,
            rounded(*value)
        )?;
        y += ROW;
    }
    if scale == Scale::Decades {
        let mut decade = LEAST;
        while decade <= most {
            let x = LABELS + length(decade);
            writeln!(
                body,
                r#"<line class="line" x1="{x:.1}" x2="{x:.1}" y1="{}" y2="{y}"/>"#,
                top - 6.0
            )?;
            decade *= 10.0;
        }
    }
    Ok(y)
}
