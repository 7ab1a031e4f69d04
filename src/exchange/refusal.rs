//! Answers of our own: what is refused and why, in OpenAI's error shape.

use http_body_util::Either;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

use super::body::AnswerBody;

/// An answer that this program gives in place of the upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The status.
    pub(super) status: StatusCode,
    /// A word for programs.
    pub(super) code: &'static str,
    /// A plain phrase for people, which also goes into the log.
    pub(super) message: &'static str,
}

impl Refusal {
    pub(super) const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self {
            status,
            code,
            message,
        }
    }

    /// The answer: an error as OpenAI's API words it, so that clients show the message.
    pub(super) fn response(&self) -> Response<AnswerBody> {
        let kind = match self.status.is_client_error() {
            true => "invalid_request_error",
            false => "server_error",
        };
        let error =
            json!({ "message": self.message, "type": kind, "code": self.code, "param": null });
        let body = json!({ "error": error }).to_string();
        let mut response = Response::new(Either::Left(body.into()));
        *response.status_mut() = self.status;
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(CONTENT_TYPE, json);
        response
    }
}
