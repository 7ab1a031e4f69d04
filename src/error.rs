//! Error responses of the proxy's own, in the format of OpenAI's API.

use std::{error::Error, io};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use hyper::{Response, StatusCode};
use serde_json::json;

use crate::log::with_sources;

/// A status and a generic message for the client, and the detail for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ErrorReply {
    pub(crate) status: StatusCode,
    /// A word for programs.
    pub(crate) code: &'static str,
    /// A phrase for people: what is allowed, or the step that failed.
    pub(crate) message: &'static str,
    /// The system's or a library's reason, for the log alone. Empty where the message says it all.
    pub(crate) detail: String,
}

impl ErrorReply {
    pub(crate) const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self {
            status,
            code,
            message,
            detail: String::new(),
        }
    }

    /// The request is well-formed and not allowed.
    pub(crate) const fn forbidden(code: &'static str, message: &'static str) -> Self {
        Self::new(StatusCode::FORBIDDEN, code, message)
    }

    pub(crate) const fn bad_request(message: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed_request", message)
    }

    /// No connection to the upstream, so nothing was sent: this step of connecting failed.
    pub(crate) fn unreachable<E: Into<Box<dyn Error>>>(step: &'static str) -> impl Fn(E) -> Self {
        let reply = move || Self::new(StatusCode::BAD_GATEWAY, "upstream_unreachable", step);
        move |error| reply().with_source(&*error.into())
    }

    /// No response from the upstream, or one that can't be forwarded.
    pub(crate) const fn bad_gateway(message: &'static str) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "upstream_failed", message)
    }

    pub(crate) fn with_source(self, error: &(dyn Error + 'static)) -> Self {
        let detail = with_sources(error);
        Self { detail, ..self }
    }

    /// The error as OpenAI's API words it, so that clients show the message.
    pub(crate) fn response(&self) -> Response<Full<Bytes>> {
        let kind = match self.status.is_client_error() {
            true => "invalid_request_error",
            false => "server_error",
        };
        let (code, message) = (self.code, self.message);
        let error = json!({ "message": message, "type": kind, "code": code, "param": null });
        let mut response = Response::builder().status(self.status);
        response = response.header(CONTENT_TYPE, "application/json");
        if self.status == StatusCode::UPGRADE_REQUIRED {
            // Such a response must name the protocol to use (RFC 9110, section 15.5.22).
            response = response.header(UPGRADE, "HTTP/1.1");
            response = response.header(CONNECTION, "upgrade");
        }
        let body = json!({ "error": error }).to_string().into();
        response.body(body).expect("constants are valid headers")
    }
}

impl From<hyper::Error> for ErrorReply {
    /// A request that failed after a part of it may have been sent.
    fn from(error: hyper::Error) -> Self {
        let cause = error.source().and_then(<dyn Error>::downcast_ref);
        let reply = if cause.map(io::Error::kind) == Some(io::ErrorKind::TimedOut) {
            let message = "the request body made no progress for 60 s";
            Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
        } else if error.is_user() {
            // hyper calls what it was given to send the user's: here, the client's body.
            Self::bad_request("the request body is truncated or malformed")
        } else if error.is_parse() {
            Self::bad_gateway("the upstream's response is not valid HTTP (protocol)")
        } else {
            Self::bad_gateway("the upstream closed the connection without a response (protocol)")
        };
        reply.with_source(&error)
    }
}
