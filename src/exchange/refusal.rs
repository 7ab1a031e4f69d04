//! Answers of our own, in OpenAI's error shape.

use http_body_util::Either;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, UPGRADE};
use hyper::{Response, StatusCode};
use serde_json::json;

use super::body::ResponseBody;
use crate::failure::Failure;

/// An error as OpenAI's API words it, so that clients show the message.
pub(super) fn response(failure: &Failure) -> Response<ResponseBody> {
    let kind = match failure.status.is_client_error() {
        true => "invalid_request_error",
        false => "server_error",
    };
    let (code, message) = (failure.code, failure.message);
    let error = json!({ "message": message, "type": kind, "code": code, "param": null });
    let body = json!({ "error": error }).to_string();
    let mut response = Response::new(Either::Left(body.into()));
    *response.status_mut() = failure.status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    if failure.status == StatusCode::UPGRADE_REQUIRED {
        // Such a response must name what to use instead (RFC 9110, section 15.5.22).
        let instead = [(UPGRADE, "HTTP/1.1"), (CONNECTION, "upgrade")];
        let headers = instead.map(|(name, value)| (name, HeaderValue::from_static(value)));
        response.headers_mut().extend(headers);
    }
    response
}
