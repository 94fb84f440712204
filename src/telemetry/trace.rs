//! W3C trace context: where a call's trace comes from, and what a task keeps of it.

use std::sync::atomic::{AtomicBool, Ordering};

use http::HeaderMap;
use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState,
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Whether spans leave the process; without, calls do no work for traces.
pub(super) static EXPORTING: AtomicBool = AtomicBool::new(false);

/// The trace context of a call, in the request's extensions: what a task keeps as `traceparent`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceParent(pub String);

/// Reads a well-formed `traceparent` header.
pub fn traceparent(headers: &HeaderMap) -> Option<TraceParent> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    parse(text).map(|_| TraceParent(text.to_owned()))
}

/// Makes `span` a child of the caller's trace, and returns the context that later work of this
/// call should name as its parent: the span's own where traces are exported, else the caller's.
pub fn adopt_parent(span: &Span, caller: Option<TraceParent>) -> Option<TraceParent> {
    if !EXPORTING.load(Ordering::Relaxed) {
        return caller;
    }
    if let Some(context) = caller.as_ref().and_then(|caller| parse(&caller.0)) {
        let context = opentelemetry::Context::new().with_remote_span_context(context);
        // Fails when the filter dropped the span; the caller's own context serves then.
        let _ = span.set_parent(context);
    }
    let own = span.context().span().span_context().clone();
    if !own.is_valid() {
        return caller;
    }
    let flags = own.trace_flags().to_u8();
    Some(TraceParent(format!("00-{}-{}-{flags:02x}", own.trace_id(), own.span_id())))
}

fn parse(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let shaped = [version, trace, span, flags].into_iter().map(str::len).eq([2, 32, 16, 2]);
    if !shaped
        || text.len() > 55
        || version != "00"
        || parts.next().is_some()
        || !hex(&text.replace('-', ""))
    {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::NONE,
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<TraceParent> {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", text.parse().unwrap());
        traceparent(&headers)
    }

    #[test]
    fn only_well_formed_contexts_are_kept() {
        assert!(read("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").is_some());
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-extra",
            "zz-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert!(read(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn without_an_exporter_the_callers_context_is_passed_on() {
        let caller = read("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert_eq!(adopt_parent(&Span::none(), caller.clone()), caller);
    }
}
