//! Why there is an answer of our own in place of the upstream's.

use std::error::Error;
use std::io;

use hyper::StatusCode;

use crate::log::with_sources;

/// A status and a plain phrase for the client, and the detail for the log.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The status of the answer.
    pub status: StatusCode,
    /// A word for programs.
    pub code: &'static str,
    /// A phrase for people: what is allowed, or the step that failed.
    pub message: &'static str,
    /// What the system or a library said, for the log alone; nothing where the phrase says it all.
    pub detail: String,
}

impl Failure {
    /// The request is not one that may pass.
    #[must_use]
    pub const fn forbidden(code: &'static str, message: &'static str) -> Self {
        Self::new(StatusCode::FORBIDDEN, code, message)
    }

    /// The request is none that can be understood.
    #[must_use]
    pub const fn malformed(message: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed_request", message)
    }

    /// No connection to the upstream, so nothing was sent.
    pub fn unreachable<E: Error + 'static>(message: &'static str) -> impl Fn(E) -> Self {
        move |error| {
            let failure = Self::new(StatusCode::BAD_GATEWAY, "upstream_unreachable", message);
            failure.because(&error)
        }
    }

    /// No answer of the upstream's, or one that can't be passed on.
    #[must_use]
    pub const fn no_answer(message: &'static str) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "upstream_failed", message)
    }

    /// The same with this detail.
    #[must_use]
    pub fn because(self, error: &(dyn Error + 'static)) -> Self {
        let detail = with_sources(error);
        Self { detail, ..self }
    }

    /// With this status, and no detail.
    #[must_use]
    pub const fn new(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        let detail = String::new();
        Self {
            status,
            code,
            message,
            detail,
        }
    }
}

impl From<hyper::Error> for Failure {
    /// An exchange that failed after a part of the request may have been sent.
    fn from(error: hyper::Error) -> Self {
        let cause = error.source().and_then(<dyn Error>::downcast_ref);
        let failure = if cause.map(io::Error::kind) == Some(io::ErrorKind::TimedOut) {
            let message = "the request's body made no progress for 60 s";
            Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
        } else if error.is_user() {
            // What hyper was given to send, that is: the client's body.
            Self::malformed("the request's body broke off or is malformed")
        } else if error.is_parse() {
            Self::no_answer("the upstream's answer is not HTTP that can be passed on (protocol)")
        } else {
            Self::no_answer("the upstream closed the connection before it answered (protocol)")
        };
        failure.because(&error)
    }
}
