//! The gRPC face of the coordinator: one method a call of the contract.
//!
//! Translates calls to events and decisions to answers. It never decides.

use std::sync::Arc;

use moe_proto::v1;
use moe_proto::v1::coordinator_server::Coordinator;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Interceptor;
use tonic::{Request, Response, Status, Streaming};

use super::event::{Action, BarrierFailure, Epoch, Event, SessionId};
use super::host::{Down, Shared};
use super::token::JoinToken;
use super::wire;

/// Lets calls through that carry the join token.
#[derive(Clone)]
pub(super) struct RequireToken(pub(super) JoinToken);

impl Interceptor for RequireToken {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let shown = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let token = shown.and_then(|value| value.strip_prefix("Bearer ")).and_then(|text| text.parse().ok());
        match token {
            Some(token) if self.0.matches(&token) => Ok(request),
            Some(_) => Err(Status::unauthenticated("the join token is not that of this job")),
            None => {
                Err(Status::unauthenticated("metadata `authorization: Bearer <join token>` is missing or malformed"))
            }
        }
    }
}

/// The service.
#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Shared>);

impl Service {
    /// Takes an event; a refusal becomes the call's status.
    fn apply(&self, event: Event) -> Result<Vec<Action>, Status> {
        self.0.apply(event).map_err(|refusal| wire::refusal(&refusal))
    }

    fn check_epoch(&self, epoch: u64) -> Result<(), Status> {
        let ours = self.0.lock().state().spec().epoch;
        match wire::known(epoch) {
            Some(theirs) if theirs != ours => Err(wire::refusal(&super::event::Refusal::StaleEpoch { theirs, ours })),
            _ => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = ReceiverStream<Down>;

    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        use v1::register_response::Membership;
        let registration = wire::registration(request.into_inner());
        let rank = registration.rank;
        let answers = self.apply(Event::Register(registration))?;
        let missing_ranks = answers.into_iter().find_map(|answer| match answer {
            Action::Registered { missing, .. } => Some(missing),
            _ => None,
        });
        let missing_ranks = missing_ranks.ok_or_else(|| Status::internal("registered without an answer"))?;
        let host = self.0.lock();
        let spec = host.state().spec();
        let lease = v1::Lease {
            epoch: spec.epoch.0,
            rank,
            heartbeat_interval_ms: wire::millis(spec.heartbeat),
            lease_duration_ms: wire::millis(spec.lease),
            forming_remaining_ms: wire::millis(host.state().forming_remaining(host.now())),
            grid: Some(wire::grid(spec.grid())),
        };
        let membership = if missing_ranks.is_empty() {
            Membership::Welcome(v1::Welcome { peers: host.peers() })
        } else {
            Membership::Waiting(v1::Waiting { missing_ranks })
        };
        Ok(Response::new(v1::RegisterResponse { lease: Some(lease), membership: Some(membership) }))
    }

    async fn session(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut up = request.into_inner();
        let lease = self.0.lock().state().spec().lease;
        let first = tokio::time::timeout(lease, up.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no message came on the session stream"))??;
        let Some(v1::WorkerMessage { epoch, rank, body: Some(v1::worker_message::Body::Attach(attach)) }) = first
        else {
            return Err(Status::out_of_range("the first message of a session must be `attach`"));
        };
        let opened = self.0.lock().open_session(rank, Epoch(epoch), attach.instance);
        let (session, down) = opened.map_err(|refusal| wire::refusal(&refusal))?;
        tracing::debug!(rank, epoch, "session opened");
        tokio::spawn(read_session(self.clone(), up, rank, session));
        Ok(Response::new(ReceiverStream::new(down)))
    }

    async fn barrier(&self, request: Request<v1::BarrierRequest>) -> Result<Response<v1::BarrierResponse>, Status> {
        let request = request.into_inner();
        let (epoch, name) = (request.epoch, request.name.clone());
        let entered = self.0.lock().enter_barrier(request);
        match entered.map_err(|refusal| wire::refusal(&refusal))?.await {
            Ok(Ok(payloads)) => Ok(Response::new(v1::BarrierResponse { epoch, payloads: payloads.to_vec() })),
            Ok(Err(BarrierFailure::Deadline { missing })) => Err(wire::barrier_deadline(&name, &missing)),
            Ok(Err(BarrierFailure::Aborted(verdict))) => Err(wire::aborted(&verdict)),
            Err(_) => Err(Status::unavailable("the coordinator is stopping")),
        }
    }

    async fn request_drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let v1::DrainRequest { epoch, reason } = request.into_inner();
        self.apply(Event::DrainRequested { epoch: wire::known(epoch), reason })?;
        let host = self.0.lock();
        let (epoch, phase) = (host.state().spec().epoch, host.state().phase());
        Ok(Response::new(v1::DrainResponse { epoch: epoch.0, phase: wire::phase(phase).into() }))
    }

    async fn request_checkpoint(
        &self,
        request: Request<v1::CheckpointRequest>,
    ) -> Result<Response<v1::CheckpointResponse>, Status> {
        let v1::CheckpointRequest { epoch, reason } = request.into_inner();
        let answers = self.apply(Event::CheckpointRequested { epoch: wire::known(epoch), reason })?;
        let order = answers.into_iter().find_map(|answer| match answer {
            Action::CheckpointOrdered { order } => Some(order),
            _ => None,
        });
        let order = order.ok_or_else(|| Status::internal("ordered without a number"))?;
        let epoch = self.0.lock().state().spec().epoch.0;
        Ok(Response::new(v1::CheckpointResponse { epoch, order }))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        self.check_epoch(request.into_inner().epoch)?;
        let host = self.0.lock();
        Ok(Response::new(wire::status(host.state().status(host.now()))))
    }
}

/// Reads what a worker says until it leaves, breaks off, or says what is refused.
async fn read_session(service: Service, mut up: Streaming<v1::WorkerMessage>, rank: u32, session: SessionId) {
    let status = loop {
        let message = match up.message().await {
            Ok(Some(message)) if message.rank != rank => {
                break Some(Status::out_of_range(format!("rank {} spoke in the session of rank {rank}", message.rank)));
            }
            Ok(Some(message)) => message,
            Ok(None) | Err(_) => {
                tracing::debug!(rank, "session broke");
                // Losing a session is never refused.
                let _ = service.0.apply(Event::SessionLost { rank, session });
                break None;
            }
        };
        // What a newer worker may say and this version does not know is still a sign of life.
        let heartbeat = Event::Heartbeat { rank, epoch: Epoch(message.epoch) };
        let event = wire::event(message).unwrap_or(heartbeat);
        let leaves = matches!(event, Event::Leave { .. });
        match service.apply(event) {
            Err(status) => break Some(status),
            Ok(_) if leaves => break None,
            Ok(_) => {}
        }
    };
    service.0.lock().close_session(rank, session, status);
}
