//! A client that writes what it is told, byte for byte, and reads one answer after the other.

use super::http::{Framing, Head, PATIENCE, Wire};
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};

pub(crate) struct Client {
    wire: Wire<TcpStream>,
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

    /// The message of an error made by the proxy, whose shape must be that of OpenAI's errors.
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
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let wire = Wire::new(stream);
        Self { wire, port }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        self.wire.reader.get_ref()
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.wire.reader.get_mut().write_all(bytes.as_ref())
    }

    /// The head of a well-formed request with these header lines, each ended by CRLF, beside `Host`.
    pub(crate) fn post_head(&self, headers: &str) -> String {
        let port = self.port;
        format!("POST /v1/responses HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{headers}\r\n")
    }

    /// Sends such a head and nothing more.
    pub(crate) fn send_head(&mut self, headers: &str) -> io::Result<()> {
        self.send(self.post_head(headers))
    }

    /// Sends a well-formed request whose body has a known length.
    pub(crate) fn post(&mut self, headers: &str, body: impl AsRef<[u8]>) -> io::Result<()> {
        let body = body.as_ref();
        let length = format!("{headers}Content-Length: {}\r\n", body.len());
        self.send_head(&length)?;
        self.send(body)
    }

    /// Sends a chunk; an empty one ends the body.
    pub(crate) fn chunk(&mut self, data: impl AsRef<[u8]>) -> io::Result<()> {
        self.send(super::http::chunk(data.as_ref()))
    }

    /// Sends a small well-formed request and reads the whole answer.
    pub(crate) fn ask(&mut self) -> io::Result<Response> {
        self.ask_with("", "{}")
    }

    /// Sends a request as [`Self::post`] does, and reads the whole answer.
    pub(crate) fn ask_with<B: AsRef<[u8]>>(
        &mut self,
        headers: &str,
        body: B,
    ) -> io::Result<Response> {
        self.post(headers, body)?;
        self.response()
    }

    /// Sends this request, `GET /v1/models` for example, with no body, and reads the status of the answer.
    pub(crate) fn status_of(&mut self, request: &str) -> io::Result<u16> {
        self.send(format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n"))?;
        self.response().map(|response| response.status())
    }

    /// The head of the next answer; its body is then read with [`Self::piece`] or [`Self::rest`].
    pub(crate) fn head(&mut self) -> io::Result<Head> {
        let head = self.wire.head()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.wire.body = match head.status() {
            100..200 | 204 | 304 => Framing::Length(0),
            _ => head.framing(Framing::UntilClose),
        };
        Ok(head)
    }

    /// The next piece of the body, `None` after its proper end, an error if it breaks off.
    pub(crate) fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.wire.piece()
    }

    /// The rest of the body, an error if it breaks off.
    pub(crate) fn rest(&mut self) -> io::Result<Vec<u8>> {
        self.wire.rest()
    }

    pub(crate) fn response(&mut self) -> io::Result<Response> {
        let head = self.head()?;
        let body = self.rest()?;
        Ok(Response { head, body })
    }

    /// Exactly this many of the bytes that follow the last response, on a connection that was upgraded.
    pub(crate) fn receive(&mut self, count: usize) -> io::Result<Vec<u8>> {
        self.wire.receive(count)
    }

    /// Waits for the proxy to close this connection; what it still sent.
    pub(crate) fn until_closed(&mut self) -> io::Result<Vec<u8>> {
        self.wire.until_closed()
    }

    /// Tells the proxy that nothing more will be sent.
    pub(crate) fn finish_sending(&self) {
        // It fails if the proxy has already reset the connection, which is as good.
        let _ = self.socket().shutdown(Shutdown::Write);
    }

    pub(crate) fn reset(self) {
        super::upstream::reset_on_close(self.socket());
    }
}
