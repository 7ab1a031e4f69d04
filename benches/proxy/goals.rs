//! What is measured, and what this proxy is to reach.

use crate::peers::Kind;

/// Something measured.
pub(crate) struct Measure {
    pub(crate) key: &'static str,
    pub(crate) label: &'static str,
    pub(crate) unit: &'static str,
}

const fn measure(key: &'static str, label: &'static str, unit: &'static str) -> Measure {
    Measure { key, label, unit }
}

/// The table's rows.
pub(crate) const MEASURES: [Measure; 15] = [
    measure("cpu_request", "CPU per request, 16 connections", "µs"),
    measure("cpu_request_one", "CPU per request, one connection", "µs"),
    measure("cpu_event", "CPU per event of a stream", "µs"),
    measure("delay_p50", "delay of an event, p50", "µs"),
    measure("delay_p99", "delay of an event, p99", "µs"),
    measure("latency_p50", "latency of a request, p50", "µs"),
    measure("latency_p99", "latency of a request, p99", "µs"),
    measure("requests_per_second", "requests, 16 connections", "1/s"),
    measure("upload", "upload, 64 MiB body", "MB/s"),
    measure("cpu_upload", "CPU per MB of upload", "µs"),
    measure("first_byte", "upstream sees a slow body's first byte", "ms"),
    measure("memory_idle", "memory, idle", "MB"),
    measure("memory_streams", "memory, 1,000 streams open", "MB"),
    measure("start", "from key to listening", "ms"),
    measure("size", "binary size", "MB"),
];

/// What this proxy is to reach.
pub(crate) struct Goal {
    pub(crate) key: &'static str,
    /// A ratio to this one, or an absolute figure.
    pub(crate) to: Option<Kind>,
    pub(crate) at_most: bool,
    pub(crate) bound: f64,
}

const fn at_most(key: &'static str, to: Option<Kind>, bound: f64) -> Goal {
    Goal {
        key,
        to,
        at_most: true,
        bound,
    }
}

pub(crate) const GOALS: [Goal; 10] = [
    at_most("cpu_request", Some(Kind::Nginx), 0.90),
    at_most("cpu_event", Some(Kind::Nginx), 0.85),
    at_most("delay_p50", Some(Kind::Nginx), 1.0),
    at_most("delay_p99", Some(Kind::Nginx), 1.0),
    at_most("memory_streams", Some(Kind::Nginx), 0.45),
    at_most("memory_streams", None, 25.0),
    Goal {
        key: "upload",
        to: Some(Kind::Nginx),
        at_most: false,
        bound: 1.0,
    },
    at_most("cpu_request", Some(Kind::Codex), 1.0 / 13.0),
    at_most("delay_p50", Some(Kind::Codex), 1.0 / 100.0),
    at_most("memory_streams", Some(Kind::Codex), 1.0 / 10.0),
];

/// What the table calls a measure.
pub(crate) fn label(key: &str) -> &'static str {
    let measure = MEASURES.iter().find(|measure| measure.key == key);
    measure.map_or("", |measure| measure.label)
}
