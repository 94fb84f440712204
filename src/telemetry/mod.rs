//! Log lines on stderr, traces over OTLP, and the metrics registry.
//!
//! Log lines carry no text of users but in fields, which the formatters escape. Spans of this
//! crate alone are exported, since the exporter itself speaks through h2, hyper and tonic.

mod metrics;
mod trace;

use std::{
    io::{BufWriter, IsTerminal as _},
    sync::atomic::Ordering,
};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry,
    filter::Targets,
    layer::{Filter, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

use crate::config::{self, ConfigError, LogFormat};

pub use metrics::{MethodLabel, Metrics, OutcomeLabel, ReasonLabel, RpcLabels, StateLabel};
pub use trace::{TraceParent, adopt_parent, traceparent};

/// Keeps the exporter and the writer of lines alive; [`Telemetry::shutdown`] sends what is left, and
/// dropped it writes the last lines.
#[derive(Default)]
pub struct Telemetry {
    spans: Option<SdkTracerProvider>,
    _lines: Option<WorkerGuard>,
}

/// Lines that wait to be written; more are left out.
const LINES: usize = 8_192;

/// Which lines are written.
type LineFilter = Box<dyn Filter<Registry> + Send + Sync>;

impl Telemetry {
    /// Installs the process's subscriber. Must run inside the runtime when traces are exported.
    /// A second call in one process changes nothing, which suits tests.
    pub fn init(config: &config::Telemetry) -> Result<Self, ConfigError> {
        let filter = line_filter(&config.log_filter)?;
        // A thread of its own writes, many lines at once: whoever reads them keeps no call waiting.
        let (writer, guard) = NonBlockingBuilder::default()
            .buffered_lines_limit(LINES)
            .thread_name("baton-log")
            .finish(BufWriter::new(std::io::stderr()));
        let lines = tracing_subscriber::fmt::layer().with_writer(writer);
        let lines = match config.log_format {
            LogFormat::Json => lines.json().flatten_event(true).boxed(),
            LogFormat::Text => {
                let colours = std::io::stderr().is_terminal();
                lines.with_ansi(colours).with_target(false).boxed()
            }
        };
        let provider = exporter(config)?;
        trace::EXPORTING.store(provider.is_some(), Ordering::Relaxed);
        let spans = provider.as_ref().map(|provider| {
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer("baton"))
                .with_filter(Targets::new().with_target("baton", tracing::Level::INFO))
        });
        let installed =
            tracing_subscriber::registry().with(lines.with_filter(filter)).with(spans).try_init();
        if installed.is_err() {
            tracing::debug!("a subscriber was installed before");
        }
        Ok(Self { spans: provider, _lines: Some(guard) })
    }

    /// Sends the spans that wait for export.
    pub async fn shutdown(self) {
        let Some(provider) = self.spans else { return };
        // The exporter's thread needs this runtime, so the wait happens beside it.
        let sent = tokio::task::spawn_blocking(move || provider.shutdown()).await;
        if let Ok(Err(error)) = sent {
            tracing::debug!(%error, "spans left unsent");
        }
    }
}

fn line_filter(text: &str) -> Result<LineFilter, ConfigError> {
    // What needs no fields of spans costs less at each span.
    if let Ok(targets) = text.parse::<Targets>() {
        return Ok(Box::new(targets));
    }
    let filter = EnvFilter::try_new(text).map_err(|error| {
        ConfigError::refused("telemetry.log_filter", format!("is not a filter: {error}"))
    })?;
    Ok(Box::new(filter))
}

fn exporter(config: &config::Telemetry) -> Result<Option<SdkTracerProvider>, ConfigError> {
    if config.otlp_endpoint.is_empty() {
        return Ok(None);
    }
    let refuse = |problem: String| ConfigError::refused("telemetry.otlp_endpoint", problem);
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(config.otlp_endpoint.clone())
        .with_metadata(headers(config.otlp_headers.expose())?)
        .build()
        .map_err(|error| refuse(error.to_string()))?;
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name("baton").build())
        .build();
    Ok(Some(provider))
}

fn headers(text: &str) -> Result<MetadataMap, ConfigError> {
    let mut map = MetadataMap::new();
    for pair in text.split(',').filter(|pair| !pair.trim().is_empty()) {
        let refuse = || {
            ConfigError::refused("telemetry.otlp_headers", "must read name=value,name=value".into())
        };
        let (name, value) = pair.split_once('=').ok_or_else(refuse)?;
        let name = MetadataKey::from_bytes(name.trim().as_bytes()).map_err(|_| refuse())?;
        map.insert(name, MetadataValue::try_from(value.trim()).map_err(|_| refuse())?);
    }
    Ok(map)
}
