//! From flags to a table: what is measured after what.
//!
//! `peers` says who is measured and how each is set up, `steps` what is measured; `load` and `upstream` are
//! the two ends, `report` the table.

mod load;
mod peers;
mod report;
mod steps;
mod upstream;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Parser, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};

use self::peers::{Kind, Peer};
use self::report::Report;
use self::steps::Step;
use self::upstream::Upstream;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// How often each proxy is measured alone, at most.
const ALONE_ROUNDS: usize = 3;

/// Prints when and where it is measured.
const MACHINE: &str = r#"
    model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
    load=$(cut -d ' ' -f -3 /proc/loadavg)
    echo "$(date -u '+%F %H:%M UTC') on $(nproc) cores of $model, $(uname -sr), load average $load""#;

/// Behind this line, a file holds figures and nothing else.
const FIGURES: &str = "\n## Figures\n";

/// Measures this proxy beside others and prints a table in Markdown.
#[derive(Parser)]
#[command(bin_name = "cargo bench --bench proxy --")]
struct Flags {
    /// Measure this proxy and PEER, no others; repeatable
    #[arg(long, value_name = "PEER")]
    only: Vec<Kind>,
    /// Measure STEP, nothing else; repeatable
    #[arg(long, value_name = "STEP")]
    step: Vec<Step>,
    /// How often it is measured
    #[arg(long, value_name = "COUNT", default_value_t = 15)]
    rounds: usize,
    /// Write the table to FILE, in place of what is behind its line `## Figures`
    #[arg(long, value_name = "FILE")]
    into: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

pub(crate) fn main() -> Outcome<()> {
    let flags = Flags::parse();
    // Test runners start every target there is.
    if !flags.bench {
        return Ok(());
    }
    // A thousand streams are two thousand descriptors on either side. The proxies inherit the limit.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    let upstream = Upstream::start(&folder)?;
    let Some(file) = &flags.into else {
        print!("{}", measure(&flags, &folder, &upstream)?);
        return Ok(());
    };
    let text = std::fs::read_to_string(file)?;
    let (words, _) = text.split_once(FIGURES).ok_or("FILE has no `## Figures`")?;
    let table = measure(&flags, &folder, &upstream)?;
    Ok(std::fs::write(
        file,
        [words, FIGURES, "\n", &table].concat(),
    )?)
}

fn measure(flags: &Flags, folder: &Path, upstream: &Upstream) -> Outcome<String> {
    let begin = Instant::now();
    let machine = peers::shell(MACHINE).unwrap_or_default();
    let mut kinds = Kind::value_variants().to_vec();
    let only = &flags.only;
    kinds.retain(|kind| *kind == Kind::Ours || only.is_empty() || only.contains(kind));
    let find = |&kind| {
        let peer = Peer::find(kind);
        if peer.is_none() {
            eprintln!("{kind:?} is not installed, so it is left out");
        }
        peer
    };
    let peers: Vec<Peer> = kinds.iter().filter_map(find).collect();
    let start = |peer: &Peer| peer.start(folder, upstream);
    let is_wanted = |step| flags.step.is_empty() || flags.step.contains(step);
    let progress = |round, step| {
        let seconds = begin.elapsed().as_secs();
        eprintln!("{seconds:>4} s: round {}: {step:?}", round + 1);
    };
    let mut report = Report::default();
    let running: Vec<_> = peers.iter().map(start).collect();
    for round in 0..flags.rounds {
        let steps = Step::value_variants().iter().filter(|step| is_wanted(step));
        for &step in steps.filter(|step| !step.is_alone()) {
            progress(round, step);
            for index in 0..peers.len() {
                // Nobody is always first or always behind the same one.
                let index = (index + round) % peers.len();
                report.take(&peers[index], step, &running[index])?;
            }
        }
    }
    drop(running);
    for round in 0..flags.rounds.min(ALONE_ROUNDS) {
        let steps = Step::value_variants().iter().filter(|step| is_wanted(step));
        for &step in steps.filter(|step| step.is_alone()) {
            progress(round, step);
            for peer in &peers {
                report.take(peer, step, &start(peer))?;
            }
        }
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments = arguments.join(" ").replace("--bench", "");
    let command = format!("cargo bench --bench proxy -- {}", arguments.trim());
    let run = format!(
        "`{}`, {} rounds in {} s, begun {machine}",
        command.trim_end_matches(" -- "),
        flags.rounds,
        begin.elapsed().as_secs(),
    );
    Ok(report.markdown(&peers, &run))
}

/// An event loop of the thread that runs it.
pub(crate) fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}
