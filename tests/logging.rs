//! The log on stderr: one line per request, no content of requests, and no request waits for the reader of stderr.

mod support;

use support::*;

#[test]
fn log_has_one_line_per_request_and_no_content() {
    let (_upstream, mut proxy) = serve(|request| {
        request.read_body()?;
        request.respond("429 Too Many Requests", "X-Secret: hunter2\r\n", b"hunter2")
    });
    let mut client = proxy.client();
    let headers = "X-Secret: hunter2\r\nUser-Agent: hunter2\r\n";
    let response = client.post(headers, "hunter2 and more").unwrap();
    assert_eq!(response.status(), 429);
    drop(client);
    let words = [" status=429 ", " in=16 ", " out=7", " ms="];
    proxy.wait_for_request("request ", &words);
    let log = proxy.stop().stderr;
    let requests = log.iter().filter(|line| line.starts_with("request "));
    assert_eq!(requests.count(), 1, "{log:#?}");
    let log = log.join("\n");
    assert!(!log.contains("hunter2") && !log.contains(KEY), "{log}");
}

#[cfg(target_os = "linux")]
#[test]
fn blocked_stderr_loses_lines_and_delays_no_request() {
    use nix::sys::signal::Signal;
    use std::io::Read;
    use std::net::TcpStream;
    use std::os::fd::AsRawFd;
    let upstream = Upstream::start(ok);
    let (mut unread, stderr) = std::io::pipe().unwrap();
    let port = unused_port();
    let command = ProxyCommand::for_upstream(&upstream).args(["--port", &port.to_string()]);
    let pipe = stderr.as_raw_fd();
    let command = command.pre_exec(move || dup2(pipe, nix::libc::STDERR_FILENO));
    let mut proxy = command.spawn();
    drop(stderr);
    proxy.port = port;
    let listens = || TcpStream::connect(("127.0.0.1", port)).is_ok();
    wait_until("the proxy listens", listens);
    let mut client = proxy.client();
    // A line is about 140 bytes long, and a pipe holds 64 KiB (pipe(7)).
    for _ in 0..1000 {
        assert_eq!(client.status_of("GET /").unwrap(), 403);
    }
    assert_eq!(client.post_default().unwrap().status(), 200);
    unread.read_exact(&mut [0; 1 << 15]).unwrap();
    assert_eq!(client.status_of("GET /").unwrap(), 403);
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.wait().status.code(), Some(0));
    let mut rest = String::new();
    unread.read_to_string(&mut rest).unwrap();
    let lost = rest.matches("lines that stderr did not take").count();
    assert_eq!(lost, 1, "{rest}");
    assert!(rest.ends_with("stopped\n"), "{rest}");
}
