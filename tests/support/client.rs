//! A client that sends literal bytes and reads one response after the other.

use super::http::{Framing, Head, HttpStream, TIMEOUT};
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};

/// A connection to the proxy.
pub(crate) struct Client {
    http: HttpStream<TcpStream>,
    port: u16,
}

#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn status(&self) -> u16 {
        self.head.status()
    }

    /// The message of an error response of the proxy. Checks that it has the format of OpenAI's errors.
    pub(crate) fn error_message(&self) -> String {
        let content_type = self.head.get("content-type").unwrap_or_default();
        assert!(content_type.starts_with("application/json"), "{self:?}");
        let json: serde_json::Value = serde_json::from_slice(&self.body).expect("a JSON body");
        let error = json["error"].as_object().expect("an `error` object");
        let mut names: Vec<_> = error.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["code", "message", "param", "type"]);
        assert!(error["type"].is_string(), "{json}");
        let message = error["message"].as_str().expect("a message");
        assert!(!message.is_empty());
        message.to_owned()
    }
}

impl Client {
    pub(crate) fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        let http = HttpStream::new(stream);
        Self { http, port }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        self.http.reader.get_ref()
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.http.reader.get_mut().write_all(bytes.as_ref())
    }

    /// The head of a well-formed request with `Host` and these header lines, each ended by CRLF.
    pub(crate) fn post_head(&self, headers: &str) -> String {
        let port = self.port;
        format!("POST /v1/responses HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{headers}\r\n")
    }

    /// Sends the head of a request without its body.
    pub(crate) fn send_head(&mut self, headers: &str) -> io::Result<()> {
        self.send(self.post_head(headers))
    }

    /// Sends a well-formed request with a `Content-Length`, and does not wait for the response.
    pub(crate) fn send_post(&mut self, headers: &str, body: impl AsRef<[u8]>) -> io::Result<()> {
        let body = body.as_ref();
        let length = format!("{headers}Content-Length: {}\r\n", body.len());
        let head = self.post_head(&length);
        // One write: a proxy that responds before the body has arrived closes the connection.
        self.send([head.as_bytes(), body].concat())
    }

    /// Sends a chunk; an empty one ends the body.
    pub(crate) fn chunk(&mut self, data: impl AsRef<[u8]>) -> io::Result<()> {
        self.send(super::http::chunk(data.as_ref()))
    }

    /// Sends a small well-formed request and reads the response.
    pub(crate) fn post_default(&mut self) -> io::Result<Response> {
        self.post("", "{}")
    }

    /// Sends a well-formed request with a `Content-Length` and reads the response.
    pub(crate) fn post<B: AsRef<[u8]>>(&mut self, headers: &str, body: B) -> io::Result<Response> {
        self.send_post(headers, body)?;
        self.read_response()
    }

    /// Sends a request such as `GET /v1/models` without a body, and returns the status of the response.
    pub(crate) fn status_of(&mut self, request: &str) -> io::Result<u16> {
        self.send(format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n"))?;
        self.read_response().map(|response| response.status())
    }

    /// The head of the next response. Read its body with [`Self::read_part`] or [`Self::read_rest`].
    pub(crate) fn read_head(&mut self) -> io::Result<Head> {
        let head = self.http.read_head()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.http.body = match head.status() {
            100..200 | 204 | 304 => Framing::Length(0),
            _ => head.framing(Framing::UntilClose),
        };
        Ok(head)
    }

    /// The next part of the body, `None` at its end, an error if it is truncated.
    pub(crate) fn read_part(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.http.read_part()
    }

    /// The rest of the body. An error if it is truncated.
    pub(crate) fn read_rest(&mut self) -> io::Result<Vec<u8>> {
        self.http.read_rest()
    }

    pub(crate) fn read_response(&mut self) -> io::Result<Response> {
        let head = self.read_head()?;
        let body = self.read_rest()?;
        Ok(Response { head, body })
    }

    /// Reads exactly this many bytes after the last response on an upgraded connection.
    pub(crate) fn read_bytes(&mut self, count: usize) -> io::Result<Vec<u8>> {
        self.http.read_bytes(count)
    }

    /// Reads until the proxy closes this connection.
    pub(crate) fn read_until_closed(&mut self) -> io::Result<Vec<u8>> {
        self.http.read_until_closed()
    }

    /// Closes the sending half of the connection.
    pub(crate) fn shutdown_write(&self) {
        // Fails if the proxy has already reset the connection, which is fine.
        let _ = self.socket().shutdown(Shutdown::Write);
    }

    /// Closes the connection with a TCP reset.
    pub(crate) fn reset(self) {
        super::upstream::reset_on_close(self.socket());
    }
}
