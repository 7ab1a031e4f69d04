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
    /// 403 with a reason.
    pub(super) const fn forbidden(code: &'static str, message: &'static str) -> Self {
        Self {
            status: StatusCode::FORBIDDEN,
            code,
            message,
        }
    }

    /// 400 with a reason.
    pub(super) const fn malformed(message: &'static str) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            code: "malformed_request",
            message,
        }
    }
}

/// An error as OpenAI's API words it, so that clients show the message.
pub(super) fn error_response(
    status: StatusCode,
    code: &str,
    message: &str,
) -> Response<AnswerBody> {
    let kind = if status.is_client_error() {
        "invalid_request_error"
    } else {
        "server_error"
    };
    let message = json!(message);
    let body = format!(
        r#"{{"error":{{"message":{message},"type":"{kind}","code":"{code}","param":null}}}}"#
    );
    let mut response = Response::new(Either::Left(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
