//! Why there is no answer.

use std::error::Error;

use hyper::StatusCode;

use crate::log::with_sources;

/// What went wrong upstream: a status and a plain phrase for the client, and the detail for the log.
#[derive(Debug)]
pub struct Failure {
    /// The status of the answer in place of the upstream's.
    pub status: StatusCode,
    /// A word for programs.
    pub code: &'static str,
    /// A phrase for people that names the step.
    pub message: &'static str,
    /// What the system or a library said, for the log alone.
    pub detail: String,
}

impl Failure {
    /// No connection, so nothing was sent.
    pub(super) fn unreachable<E: Error + 'static>(message: &'static str) -> impl Fn(E) -> Self {
        move |error| Self {
            status: StatusCode::BAD_GATEWAY,
            code: "upstream_unreachable",
            message,
            detail: with_sources(&error),
        }
    }

    /// No answer, or one that can't be passed on.
    pub(super) fn protocol(message: &'static str, detail: String) -> Self {
        Self {
            status: StatusCode::BAD_GATEWAY,
            code: "upstream_failed",
            message,
            detail,
        }
    }
}

impl From<hyper::Error> for Failure {
    /// An exchange that failed after a part of the request may have been sent.
    fn from(error: hyper::Error) -> Self {
        let detail = with_sources(&error);
        if error.is_user() {
            // What hyper was given to send, that is: the client's body.
            return Self {
                status: StatusCode::BAD_REQUEST,
                code: "malformed_request",
                message: "the request's body broke off or is malformed",
                detail,
            };
        }
        let message = match error.is_parse() {
            true => "the upstream's answer is not HTTP that can be passed on (protocol)",
            false => "the upstream closed the connection before it answered (protocol)",
        };
        Self::protocol(message, detail)
    }
}
