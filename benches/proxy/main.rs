//! This proxy beside others on the same machine at the same time: `cargo bench --bench proxy`.
//!
//! | argument behind `--` | |
//! | --- | --- |
//! | none | measures, prints a table, and writes `target/tmp/bench/proxy.json` |
//! | `rounds N` | the same with N rounds and no bound on time |
//! | `picture FILE` | draws the last run as SVG |
//! | `instructions` | instructions per request and per event, where valgrind is installed |
//! | `profile PEER requests\|one\|events\|streams SECONDS` | keeps one proxy busy for a profiler |
//!
//! `PROXY`, `NGINX`, `HAPROXY` and `CODEX` may name the programs to measure; without them it is the one
//! just built and those on `PATH`.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod config;
mod goals;
mod instructions;
mod load;
mod measure;
mod peers;
mod picture;
mod process;
mod profile;
mod report;
mod responder;
mod round;
mod streams;
mod upstream;
mod wire;

use std::error::Error;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::peers::Peer;
use crate::report::Report;
use crate::round::{Figures, Step};
use crate::upstream::Upstream;

/// How many rounds there are at most, and at least.
const ROUNDS: usize = 11;
const LEAST_ROUNDS: usize = 3;

/// How often each proxy is measured alone.
const ALONE_ROUNDS: usize = 2;

/// No round is begun that would probably end later than this.
const TIME_LIMIT: Duration = Duration::from_secs(112);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let by_cargo_bench = arguments.iter().any(|argument| argument == "--bench");
    arguments.retain(|argument| argument != "--bench");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["upstream", folder] => responder::main(Path::new(folder)),
        // Test runners start every target there is.
        [] if !by_cargo_bench => Ok(()),
        [] => benchmark(ROUNDS, TIME_LIMIT),
        ["rounds", count] => benchmark(count.parse()?, Duration::MAX),
        ["picture", svg] => picture::main(&place_of_files().join("proxy.json"), Path::new(svg)),
        ["instructions"] => instructions::main(&folder()?),
        ["profile", peer, kind, seconds] => profile::main(
            &folder()?,
            peer,
            kind,
            Duration::from_secs(seconds.parse()?),
        ),
        _ => Err("unknown argument: see benches/proxy/main.rs".into()),
    }
}

/// Where a run leaves its files.
fn place_of_files() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench")
}

/// A folder for this run's files, empty.
fn folder() -> std::io::Result<PathBuf> {
    let folder = place_of_files();
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn benchmark(rounds: usize, limit: Duration) -> Result<(), Box<dyn Error>> {
    let begin = Instant::now();
    // A thousand streams are two thousand descriptors. Children inherit the limit.
    let _ = codex_responses_proxy::client::listener::connection_limit();
    let folder = folder()?;
    let peers = peers::all(&folder);
    let upstream = Upstream::start(&folder)?;
    let mut report = Report::new(&peers);
    for round in 0..ALONE_ROUNDS {
        for peer in &peers {
            progress(&format!(
                "{} alone, {} of {ALONE_ROUNDS}",
                peer.kind.name(),
                round + 1
            ));
            let figures = round::alone(peer, &place(&folder, peer)?, &upstream);
            report.add(peer.kind, figures)?;
        }
    }
    let mut running = Vec::new();
    for peer in &peers {
        running.push(peer.start(&place(&folder, peer)?, &upstream)?);
    }
    let alone = begin.elapsed();
    for round in 0..rounds {
        let spent = begin.elapsed();
        let next = (spent - alone) / u32::try_from(round.max(1))?;
        if round >= LEAST_ROUNDS && spent + next > limit {
            break;
        }
        let mut figures: Vec<_> = peers.iter().map(|_| Ok(Figures::new())).collect();
        for step in Step::ALL {
            for index in 0..peers.len() {
                // Nobody is always first or always behind the same one.
                let index = (index + round) % peers.len();
                let peer = &peers[index];
                progress(&format!(
                    "round {}: {}: {step:?}",
                    round + 1,
                    peer.kind.name()
                ));
                if let Ok(known) = &mut figures[index]
                    && !report.has_failed(peer.kind)
                    && let Err(error) = step.measure(&running[index], known)
                {
                    figures[index] = Err(error);
                }
            }
        }
        for (peer, figures) in peers.iter().zip(figures) {
            report.add(peer.kind, figures)?;
        }
    }
    drop(running);
    progress("");
    report.finish(begin.elapsed());
    println!("{}", report.table());
    let json = folder.join("proxy.json");
    std::fs::write(&json, format!("{:#}\n", report.json()))?;
    println!("As JSON: {}", json.display());
    Ok(())
}

/// A folder for one proxy's files.
fn place(folder: &Path, peer: &Peer) -> std::io::Result<PathBuf> {
    let place = folder.join(peer.kind.name().replace(' ', "-"));
    std::fs::create_dir_all(&place)?;
    Ok(place)
}

/// Says what is being done, on one line that the next replaces; in a log, each on its own.
fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
        let _ = std::io::stderr().flush();
    } else if !text.is_empty() {
        eprintln!("{text}");
    }
}
