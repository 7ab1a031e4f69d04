//! How many instructions a request and an event cost, counted by valgrind: the same on a busy machine
//! as on an idle one, so that a change can be compared with what was before it.

use std::error::Error;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::config;
use crate::load::Client;
use crate::measure::number;
use crate::peers;
use crate::process;
use crate::streams;
use crate::upstream::Upstream;
use crate::wire::{self, Task};

/// A run does so many, and a second one twice as many: what is more is theirs, and neither the
/// start's nor the connection's.
const COUNT: u32 = 1_000;

/// How long the proxy may take to listen; valgrind makes it some fifty times slower.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a run may take.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// What is counted.
#[derive(Clone, Copy)]
enum Unit {
    Request,
    Event,
}

/// Prints instructions per request and per event, or that there is no valgrind.
pub(crate) fn main(folder: &Path) -> Result<(), Box<dyn Error>> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("instructions: skipped, there is no valgrind on PATH");
        return Ok(());
    }
    for (unit, name) in [(Unit::Request, "request"), (Unit::Event, "event")] {
        let file = folder.join(format!("callgrind-{name}.out"));
        let once = count(folder, unit, COUNT, &file)?;
        let twice = count(folder, unit, 2 * COUNT, &file)?;
        let each = number(twice.saturating_sub(once)) / f64::from(COUNT);
        println!(
            "instructions per {name}: {each:.0} (callgrind_annotate {})",
            file.display()
        );
    }
    Ok(())
}

/// The instructions of a whole run of the proxy; `file` tells where they went.
fn count(folder: &Path, unit: Unit, times: u32, file: &Path) -> Result<u64, Box<dyn Error>> {
    let mut upstream = Upstream::start(folder)?;
    let port = process::free_port()?;
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--error-exitcode=0"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(peers::ours())
        .args(config::arguments(port, &upstream))
        .arg("--upstream-ca")
        .arg(&upstream.ca)
        .arg("--http-shutdown");
    let mut running = process::start(&mut command, folder, port, START_TIMEOUT)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let load = async {
        let mut client = Client::connect(port).await?;
        match unit {
            Unit::Request => {
                let request = wire::small_request(port, Task::Answer);
                for _ in 0..times {
                    client.exchange(&request).await?;
                }
            }
            Unit::Event => streams::steps(&mut client, times, || upstream.step()).await?,
        }
        std::io::Result::Ok(())
    };
    runtime.block_on(async { tokio::time::timeout(RUN_TIMEOUT, load).await })??;
    TcpStream::connect((Ipv4Addr::LOCALHOST, port))?
        .write_all(b"GET /shutdown HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    running.wait()?;
    // `==123== Collected : 456`
    let said = std::fs::read_to_string(folder.join("stderr.log"))?;
    let collected = said
        .lines()
        .find_map(|line| line.split_once("Collected :"))
        .ok_or("valgrind told no count")?;
    Ok(collected.1.trim().parse()?)
}
