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

/// So many are counted, after some that are not: neither the start's instructions nor the connection's
/// are a request's.
const COUNT: u32 = 1_000;
const WARM_UP: u32 = 20;

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
    for tool in ["valgrind", "callgrind_control"] {
        if Command::new(tool).arg("--version").output().is_err() {
            println!("instructions: skipped, there is no {tool} on PATH");
            return Ok(());
        }
    }
    for (unit, name) in [(Unit::Request, "request"), (Unit::Event, "event")] {
        let file = folder.join(format!("callgrind-{name}.out"));
        let each = number(count(folder, unit, &file)?) / f64::from(COUNT);
        println!(
            "instructions per {name}: {each:.0} (callgrind_annotate {})",
            file.display()
        );
    }
    Ok(())
}

/// The instructions of [`COUNT`] units; `file` tells where they went.
fn count(folder: &Path, unit: Unit, file: &Path) -> Result<u64, Box<dyn Error>> {
    let mut upstream = Upstream::start(folder)?;
    let port = process::free_port()?;
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--instr-atstart=no"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(peers::ours())
        .args(config::arguments(port, &upstream))
        .arg("--upstream-ca")
        .arg(&upstream.ca)
        .arg("--http-shutdown");
    let mut running = process::start(&mut command, folder, port, START_TIMEOUT)?;
    let pid = running.pid();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let load = async {
        let mut client = Client::connect(port).await?;
        match unit {
            Unit::Request => {
                let request = wire::small_request(port, Task::Answer);
                for number in 0..WARM_UP + COUNT {
                    if number == WARM_UP {
                        counting(pid, "on")?;
                    }
                    client.exchange(&request).await?;
                }
            }
            Unit::Event => {
                let mut number = 0;
                let step = || {
                    number += 1;
                    if number == WARM_UP + 1 {
                        counting(pid, "on")?;
                    }
                    upstream.step()
                };
                streams::steps(&mut client, WARM_UP + COUNT, step).await?;
            }
        }
        counting(pid, "off")
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

/// Turns the counting of the process `pid` on or off.
fn counting(pid: u32, state: &str) -> std::io::Result<()> {
    let mut control = Command::new("callgrind_control");
    let output = control.args(["-i", state, &pid.to_string()]).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(std::io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )),
    }
}
