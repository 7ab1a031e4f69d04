//! Command line and order of the measurements.
//!
//! [`proxies`] configures and starts the proxies, [`steps`] defines what is measured, [`load`] generates the
//! requests, [`upstream`] responds to them, and [`report`] formats the table.

mod load;
mod proxies;
mod report;
mod steps;
mod upstream;

use std::error::Error;
use std::fs::{create_dir_all, read_to_string, remove_dir_all, write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use self::proxies::{Kind, Proxy};
use self::report::Report;
use self::steps::Step;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Time limit of a step with one proxy.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);

/// Maximum number of rounds of a memory step: memory varies less than time.
const MEMORY_ROUNDS: usize = 3;

/// Shell script that prints time and machine.
const MACHINE: &str = r#"
    model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
    load=$(cut -d ' ' -f -3 /proc/loadavg)
    echo "$(date -u '+%F %H:%M UTC') on $(nproc) cores of $model, $(uname -sr), load average $load""#;

/// The heading in the file of `--into` after which everything is replaced.
const FIGURES: &str = "\n## Figures\n";

/// Compares this proxy with nginx, haproxy and codex, where installed, and prints a table in Markdown.
#[derive(Parser)]
#[command(bin_name = "cargo bench --bench proxy --")]
struct Arguments {
    /// Compare this proxy only with PROXY (repeatable)
    #[arg(long, value_name = "PROXY")]
    only: Vec<Kind>,
    /// Measure only STEP (repeatable)
    #[arg(long, value_name = "STEP")]
    step: Vec<Step>,
    /// Number of rounds; memory is measured in 3 at most
    #[arg(long, value_name = "COUNT", default_value_t = 15)]
    rounds: usize,
    /// Write the table to FILE, in place of everything after its line `## Figures`
    #[arg(long, value_name = "FILE")]
    into: Option<PathBuf>,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

pub(crate) fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // `cargo test --all-targets` runs benchmarks without `--bench`.
    if !arguments.bench {
        return Ok(());
    }
    // 1,000 streams need 2,000 descriptors in this process and in a proxy, which inherits the limit.
    let (_, hard_limit) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard_limit, hard_limit)?;
    let Some(file) = &arguments.into else {
        print!("{}", compare(&arguments)?);
        return Ok(());
    };
    let text = read_to_string(file)?;
    let prose = text.split_once(FIGURES).ok_or("no line `## Figures`")?.0;
    let table = compare(&arguments)?;
    Ok(write(file, [prose, FIGURES, "\n", &table].concat())?)
}

fn compare(arguments: &Arguments) -> Result<String> {
    let begin = Instant::now();
    let machine = proxies::shell(MACHINE).unwrap_or_default();
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench");
    let _ = remove_dir_all(&directory);
    create_dir_all(&directory)?;
    let upstream = upstream::start(&directory)?;
    let mut kinds = Kind::value_variants().to_vec();
    let only = &arguments.only;
    kinds.retain(|kind| *kind == Kind::Ours || only.is_empty() || only.contains(kind));
    let mut steps = Step::value_variants().to_vec();
    steps.retain(|step| arguments.step.is_empty() || arguments.step.contains(step));
    let proxies: Vec<Proxy> = kinds.into_iter().filter_map(Proxy::find).collect();
    let mut report = Report::default();
    for round in 0..arguments.rounds {
        for step in &steps {
            let seconds = begin.elapsed().as_secs();
            eprintln!("{seconds:>4} s: round {}: {step:?}", round + 1);
            for index in 0..proxies.len() {
                // Rotated, so that no proxy is always the first or always after the same one.
                let proxy = &proxies[(index + round) % proxies.len()];
                if step.is_memory() && round >= MEMORY_ROUNDS || !step.applies_to(proxy.kind) {
                    continue;
                }
                let running = proxy.start(&directory, upstream)?;
                let add = |row, value| report.add(proxy.kind, row, value);
                let run = async { timeout(STEP_TIMEOUT, step.run(&running, add)).await };
                // Dropping the event loop closes the connections before the proxy is terminated.
                let result = runtime()?.block_on(run).map_err(Into::into).flatten();
                result.map_err(|error| format!("{}: {error}", proxy.title))?;
            }
        }
    }
    let options: Vec<String> = std::env::args().skip(1).collect();
    let options = options.join(" ").replace("--bench", "");
    let seconds = begin.elapsed().as_secs();
    Ok(format!(
        "{}- Options `{}`, {} rounds in {seconds} s, started {machine}\n",
        report.to_markdown(&proxies),
        options.trim(),
        arguments.rounds,
    ))
}

/// A single-threaded event loop.
fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}
