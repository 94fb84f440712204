//! Traces leave the process: a call's span reaches a collector as a child of the caller's.
//! Alone in its file, since a process has one subscriber.

#![expect(clippy::unwrap_used, clippy::format_collect, reason = "a test fails by panicking")]

use std::time::Duration;

use baton::{
    app::App,
    clock::Clock,
    config::Config,
    id::Entropy,
    pb::{self, key_service_client::KeyServiceClient},
    supervisor::Supervisor,
    telemetry::Telemetry,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

struct Collector(mpsc::Sender<(Option<String>, ExportTraceServiceRequest)>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let secret = request.metadata().get("x-secret").map(|v| v.to_str().unwrap().to_owned());
        self.0.send((secret, request.into_inner())).await.unwrap();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test]
async fn a_calls_span_is_exported_as_a_child_of_the_callers() {
    let (sender, mut exported) = mpsc::channel(16);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let supervisor = Supervisor::new();
    supervisor.spawn("collector", async move {
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(Collector(sender)))
            .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener))
            .await
            .unwrap();
    });
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.server.addr.set_port(0);
    config.storage.data_dir = dir.path().join("data");
    config.auth.required = false;
    config.telemetry.otlp_endpoint = endpoint;
    config.telemetry.otlp_headers = "x-secret=hush".into();
    let telemetry = Telemetry::init(&config.telemetry).unwrap();
    let app = App::start(config, Clock::system(), Entropy::system()).await.unwrap();

    let address = format!("http://{}", app.addr);
    let mut keys = KeyServiceClient::new(
        tonic::transport::Endpoint::new(address).unwrap().connect().await.unwrap(),
    );
    let mut request = Request::new(pb::ListKeysRequest::default());
    let context = format!("00-{TRACE}-{PARENT}-01");
    request.metadata_mut().insert("traceparent", context.parse().unwrap());
    request.metadata_mut().insert("x-correlation-id", "find-me".parse().unwrap());
    keys.list_keys(request).await.unwrap();
    app.shutdown().await.unwrap();
    telemetry.shutdown().await;

    let found = async {
        while let Some((secret, export)) = exported.recv().await {
            assert_eq!(secret.as_deref(), Some("hush"));
            let spans = export.resource_spans.into_iter().flat_map(|spans| spans.scope_spans);
            let call = spans.flat_map(|scope| scope.spans).find(|span| {
                span.attributes.iter().any(|attribute| {
                    attribute.key == "correlation_id"
                        && format!("{:?}", attribute.value).contains("find-me")
                })
            });
            if let Some(call) = call {
                return call;
            }
        }
        panic!("the span was not exported");
    };
    let call = tokio::time::timeout(Duration::from_secs(20), found).await.unwrap();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!((hex(&call.trace_id).as_str(), hex(&call.parent_span_id).as_str()), (TRACE, PARENT));
}
