//! Calling a coordinator: the authenticated stub, and the blocking client for operators.
//!
//! Owns addresses, tokens in metadata, deadlines of single calls. It holds no lease: that is [`super::Session`].

use std::time::Duration;

use moe_proto::v1;
use moe_proto::v1::coordinator_client::CoordinatorClient;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use super::error::CoordinationError;
use super::event::{Epoch, Phase};
use super::status::JobStatus;
use super::token::JoinToken;
use super::wire;

/// A client of the contract that shows the join token with every call.
pub(super) type Stub = CoordinatorClient<InterceptedService<Channel, ShowToken>>;

/// Puts the token on every call.
#[derive(Clone)]
pub(super) struct ShowToken(MetadataValue<Ascii>);

impl Interceptor for ShowToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// A stub for `HOST:PORT` that connects with its first call, and again after a connection broke. Pings an idle connection every
/// `keepalive` and gives it up when no answer comes in that time. Must be called inside a runtime.
pub(super) fn stub(addr: &str, token: &JoinToken, keepalive: Duration) -> Result<Stub, CoordinationError> {
    let bad = |reason: String| CoordinationError::BadAddress { addr: addr.to_owned(), reason };
    if !addr.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
        return Err(bad("no host and port number".to_owned()));
    }
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|error| bad(error.to_string()))?;
    let channel = endpoint
        .connect_timeout(keepalive)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(keepalive)
        .keep_alive_while_idle(true)
        .connect_lazy();
    let text = format!("Bearer {}", token.expose());
    let mut value = MetadataValue::try_from(text).map_err(|_| bad("the token is no metadata".to_owned()))?;
    value.set_sensitive(true);
    Ok(CoordinatorClient::with_interceptor(channel, ShowToken(value)))
}

/// A status in words that name the connection's trouble, which tonic puts into the error's sources.
pub(super) fn explain(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        source = error.source();
    }
    if text.is_empty() { status.code().description().to_owned() } else { text }
}

/// What an operator does with a running job: look, ask for a checkpoint, ask it to stop. Blocking.
#[derive(Debug)]
pub struct Operator {
    addr: String,
    stub: Stub,
    timeout: Duration,
    runtime: tokio::runtime::Runtime,
}

impl Operator {
    /// A client of the coordinator at `addr` (`HOST:PORT`). Connects with the first call; each call is given up after `timeout`.
    ///
    /// Errors: an address that is none, a runtime that the system refuses.
    pub fn new(addr: &str, token: &JoinToken, timeout: Duration) -> Result<Self, CoordinationError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
            CoordinationError::Start { what: format!("a client of {addr}"), reason: error.to_string() }
        })?;
        let stub = {
            let _inside = runtime.enter();
            stub(addr, token, timeout)?
        };
        Ok(Self { addr: addr.to_owned(), stub, timeout, runtime })
    }

    /// What the coordinator knows.
    pub fn status(&self) -> Result<JobStatus, CoordinationError> {
        let mut stub = self.stub.clone();
        let response = self.call(async move { stub.status(v1::StatusRequest { epoch: 0 }).await })?;
        wire::status_from(response).ok_or_else(|| self.unknown("a status"))
    }

    /// Asks the job to save and stop; `reason` is who asks and why. Returns the phase after it.
    pub fn drain(&self, reason: &str) -> Result<Phase, CoordinationError> {
        let mut stub = self.stub.clone();
        let request = v1::DrainRequest { epoch: 0, reason: reason.to_owned() };
        let response = self.call(async move { stub.request_drain(request).await })?;
        wire::phase_from(response.phase()).ok_or_else(|| self.unknown("a phase"))
    }

    /// Orders a checkpoint; `reason` is who asks and why. Returns the number of the order.
    pub fn checkpoint(&self, reason: &str) -> Result<u64, CoordinationError> {
        let mut stub = self.stub.clone();
        let request = v1::CheckpointRequest { epoch: 0, reason: reason.to_owned() };
        Ok(self.call(async move { stub.request_checkpoint(request).await })?.order)
    }

    fn call<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, CoordinationError> {
        let unreachable =
            |last: String| CoordinationError::Unreachable { addr: self.addr.clone(), waited: self.timeout, last };
        let answer = self.runtime.block_on(async { tokio::time::timeout(self.timeout, call).await });
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => {
                Err(wire::verdict_of(&self.addr, Epoch(0), &status).unwrap_or_else(|| unreachable(explain(&status))))
            }
            Err(_) => Err(unreachable("no answer".to_owned())),
        }
    }

    fn unknown(&self, what: &str) -> CoordinationError {
        let what = format!("it answered with {what} that this version does not know");
        CoordinationError::Protocol { addr: self.addr.clone(), what }
    }
}
