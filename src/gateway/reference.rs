//! The API's description, and a page that shows it and calls it.

use axum::{Router, routing::get};
use bytes::Bytes;
use http::header;

const PAGE: &str = include_str!("reference/index.html");
const SCRIPT: &str = include_str!("reference/reference.js");
const STYLE: &str = include_str!("reference/reference.css");

/// The page loads nothing from elsewhere, and calls nobody else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// `/openapi.json`, and the page at `/docs`.
pub fn router(document: Bytes) -> Router {
    let file = |kind: &'static str, text: &'static str| {
        get(move || async move {
            let headers = [
                (header::CONTENT_TYPE, kind),
                (header::CONTENT_SECURITY_POLICY, POLICY),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            ];
            (headers, text)
        })
    };
    Router::new()
        .route("/docs", file("text/html; charset=utf-8", PAGE))
        .route("/docs/reference.js", file("text/javascript; charset=utf-8", SCRIPT))
        .route("/docs/reference.css", file("text/css; charset=utf-8", STYLE))
        .route(
            "/openapi.json",
            get(move || async move { ([(header::CONTENT_TYPE, "application/json")], document) }),
        )
}
