//! Whether the server serves: `grpc.health.v1` per service, `/livez` and `/readyz`, and what
//! describes the API: reflection and `/metrics`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{
    Router,
    http::{StatusCode, header},
    routing::get,
};
use tokio::sync::watch;
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};

use super::calls::Services;
use crate::{error::Error, pb, telemetry::Metrics};

/// The state of health of all services at once; clones share it.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
    names: Arc<[&'static str]>,
    serving: watch::Sender<bool>,
    /// What is amiss though the services serve.
    amiss: watch::Sender<Option<String>>,
    closed: Arc<AtomicBool>,
}

impl Health {
    /// Not serving yet.
    pub async fn new(services: &Services) -> Self {
        let health = Self {
            reporter: HealthReporter::new(),
            names: services.names().into(),
            serving: watch::Sender::new(false),
            amiss: watch::Sender::new(None),
            closed: Arc::default(),
        };
        health.set(false).await;
        health
    }

    /// Says for good that no service serves: the server is on its way out.
    pub async fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.set(false).await;
    }

    /// Says that all services serve, or that none does.
    pub async fn set(&self, serving: bool) {
        let serving = serving && !self.closed.load(Ordering::SeqCst);
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status("", status).await;
        for name in self.names.iter() {
            self.reporter.set_service_status(name, status).await;
        }
        self.serving.send_replace(serving);
    }

    /// Says how a part is that the services can do without: it is watched under its own name, and
    /// `/readyz` says what is amiss.
    pub async fn set_part(&self, name: &str, amiss: Option<String>) {
        let status =
            if amiss.is_none() { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status(name, status).await;
        self.amiss.send_replace(amiss);
    }

    /// Whether the services serve.
    pub fn is_serving(&self) -> bool {
        *self.serving.borrow()
    }

    /// The gRPC service.
    pub fn server(&self) -> HealthServer<HealthService> {
        HealthServer::new(HealthService::from_health_reporter(self.reporter.clone()))
    }
}

/// Adds reflection, v1 and v1alpha: some clients know only the older.
pub fn with_reflection(services: Services) -> Result<Services, Error> {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let v1 = builder().build_v1().map_err(Error::internal)?;
    let v1alpha = builder().build_v1alpha().map_err(Error::internal)?;
    Ok(services.with(v1).with(v1alpha))
}

/// `/livez`, `/readyz` and `/metrics`; `on_scrape` brings gauges up to date.
pub fn router(
    health: Health,
    metrics: Metrics,
    on_scrape: impl Fn() + Clone + Send + Sync + 'static,
) -> Router {
    let ready = move || async move {
        let amiss = health.amiss.borrow().as_ref().map(|amiss| format!("; {amiss}"));
        let amiss = amiss.unwrap_or_default();
        if health.is_serving() {
            (StatusCode::OK, format!("ready{amiss}\n"))
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not serving{amiss}\n"))
        }
    };
    let scrape = move || async move {
        on_scrape();
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(header::CONTENT_TYPE, kind)], metrics.text())
    };
    Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(scrape))
}
