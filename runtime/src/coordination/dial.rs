//! Calls that are tried again until they are answered or too late: reaching the coordinator, meeting at a barrier.
//!
//! Owns the retries. It keeps nothing between calls; the session's thread does.

use std::time::Duration;

use moe_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::client::{self, Stub};
use super::error::CoordinationError;
use super::event::Epoch;
use super::session::Abort;
use super::wire;

/// First and longest pause between two attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// How much longer than the barrier's deadline its answer may take: the coordinator's word names the missing ranks.
const ANSWER_SLACK: Duration = Duration::from_millis(500);
/// Messages that may wait for a slow connection.
const STREAM_DEPTH: usize = 32;

/// Whom to reach, and as whom.
pub(super) struct Dial {
    pub(super) addr: String,
    pub(super) stub: Stub,
    pub(super) request: v1::RegisterRequest,
}

/// A lease and an open session stream.
pub(super) struct Connected {
    pub(super) lease: v1::Lease,
    pub(super) membership: Option<v1::register_response::Membership>,
    pub(super) line: Line,
}

/// An open session stream.
pub(super) struct Line {
    pub(super) up: mpsc::Sender<v1::WorkerMessage>,
    pub(super) down: Streaming<v1::CoordinatorMessage>,
}

/// Registers and opens a session stream; tries for `patience` while there is no answer.
///
/// Errors: [`CoordinationError::Unreachable`] after that; at once whatever the coordinator answers.
pub(super) async fn connect(mut dial: Dial, patience: Duration) -> Result<Connected, CoordinationError> {
    let started = Instant::now();
    let mut pause = PAUSES.0;
    loop {
        let remaining = patience.saturating_sub(started.elapsed());
        let last = match tokio::time::timeout(remaining, dial.attempt()).await {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(status)) => match wire::verdict_of(&dial.addr, Epoch(dial.request.epoch), &status) {
                Some(error) => return Err(error),
                None => client::explain(&status),
            },
            Err(_) => "no answer".to_owned(),
        };
        tokio::time::sleep(pause.min(patience.saturating_sub(started.elapsed()))).await;
        if started.elapsed() >= patience {
            return Err(CoordinationError::Unreachable { addr: dial.addr, waited: patience, last });
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

impl Dial {
    async fn attempt(&mut self) -> Result<Connected, Status> {
        let response = self.stub.register(self.request.clone()).await?.into_inner();
        let lease = response.lease.ok_or_else(|| Status::out_of_range("it registered this worker without a lease"))?;
        let (up, messages) = mpsc::channel(STREAM_DEPTH);
        let attach = v1::Attach { instance: self.request.instance };
        let body = Some(v1::worker_message::Body::Attach(attach));
        let attach = v1::WorkerMessage { epoch: lease.epoch, rank: self.request.rank, body };
        up.try_send(attach).map_err(|_| Status::unavailable("the stream is full"))?;
        let down = self.stub.session(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Connected { lease, membership: response.membership, line: Line { up, down } })
    }
}

/// Waits at a barrier; a broken connection is tried again until the request's timeout. Ends at once when the epoch does.
pub(super) async fn meet(
    mut stub: Stub,
    addr: String,
    mut request: v1::BarrierRequest,
    mut abort: watch::Receiver<Option<Abort>>,
) -> Result<Vec<Vec<u8>>, CoordinationError> {
    let started = Instant::now();
    let timeout = Duration::from_millis(request.timeout_ms.into());
    let name = request.name.clone();
    let too_late = |missing| CoordinationError::BarrierTimeout { name, waited: timeout, missing };
    loop {
        let remaining = timeout.saturating_sub(started.elapsed());
        request.timeout_ms = wire::millis(remaining);
        let answer = tokio::select! {
            answer = tokio::time::timeout(remaining + ANSWER_SLACK, stub.barrier(request.clone())) => answer,
            // The sender outlives every barrier; were it gone, the first branch still ends.
            Ok(abort) = abort.wait_for(Option::is_some) => match abort.clone() {
                Some(abort) => return Err(CoordinationError::Aborted(abort)),
                None => continue,
            },
        };
        let status = match answer {
            Ok(Ok(response)) => return Ok(response.into_inner().payloads),
            Ok(Err(status)) => status,
            Err(_) => return Err(too_late(Vec::new())),
        };
        if status.code() == Code::DeadlineExceeded {
            return Err(too_late(wire::missing_ranks(&status)));
        }
        if let Some(error) = wire::verdict_of(&addr, Epoch(request.epoch), &status) {
            return Err(error);
        }
        if started.elapsed() >= timeout {
            return Err(too_late(Vec::new()));
        }
        tokio::time::sleep(PAUSES.0).await;
    }
}
