//! Between the domain's values and the messages of the contract.
//!
//! Owns every conversion, the metadata keys and the meaning of status codes. It never decides anything.

use std::time::Duration;

use moe_proto::v1;
use tonic::{Code, Status};

use super::error::CoordinationError;
use super::event::{
    Activity, Command, Epoch, ErrorReport, Event, Phase, Progress, Refusal, Registration, Verdict, Worker,
};
use super::job::Grid;
use super::session::{Abort, AbortKind, Peer};
use super::status::{JobStatus, RankState, RankStatus};

/// Metadata of an ABORTED status: the rank to blame.
pub(super) const CULPRIT: &str = "moe-culprit";
/// Metadata of a barrier's DEADLINE_EXCEEDED: the ranks that had not arrived, "1,5".
pub(super) const MISSING: &str = "moe-missing-ranks";

/// Milliseconds as the contract counts them; longer than 49 days is as good as that.
pub(super) fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// On requests, zero means "not known".
pub(super) fn known(epoch: u64) -> Option<Epoch> {
    (epoch != 0).then_some(Epoch(epoch))
}

// ---- statuses -------------------------------------------------------------------------------------------------------------------

/// The status that answers a refused event.
pub(super) fn refusal(refusal: &Refusal) -> Status {
    let text = refusal.to_string();
    match refusal {
        Refusal::StaleEpoch { .. } | Refusal::WrongPhase { .. } => Status::failed_precondition(text),
        Refusal::RankOutOfRange { .. }
        | Refusal::WrongWorldSize { .. }
        | Refusal::WrongFingerprint { .. }
        | Refusal::WrongVersion { .. } => Status::invalid_argument(text),
        Refusal::RankTaken { .. } => Status::already_exists(text),
        Refusal::NotRegistered { .. } | Refusal::HasLeft { .. } => Status::not_found(text),
        Refusal::Aborted(verdict) => aborted(verdict),
        Refusal::BarrierOutOfOrder { .. } => Status::out_of_range(text),
    }
}

/// The status of a call that the end of the epoch cut off.
pub(super) fn aborted(verdict: &Verdict) -> Status {
    let mut status = Status::aborted(verdict.reason.clone());
    if let Some(rank) = verdict.culprit {
        status.metadata_mut().insert(CULPRIT, rank.into());
    }
    status
}

/// The status of a barrier whose deadline passed.
pub(super) fn barrier_deadline(name: &str, missing: &[u32]) -> Status {
    let mut status = Status::deadline_exceeded(format!("barrier {name:?}: ranks {missing:?} had not arrived"));
    let list: Vec<String> = missing.iter().map(u32::to_string).collect();
    if let Ok(value) = list.join(",").parse() {
        status.metadata_mut().insert(MISSING, value);
    }
    status
}

/// The ranks that a barrier's status names.
pub(super) fn missing_ranks(status: &Status) -> Vec<u32> {
    let list = status.metadata().get(MISSING).and_then(|value| value.to_str().ok()).unwrap_or_default();
    list.split(',').filter_map(|rank| rank.parse().ok()).collect()
}

/// What a status means to the caller, or `None` when it tells of the connection only and the call may be tried again.
pub(super) fn verdict_of(addr: &str, epoch: Epoch, status: &Status) -> Option<CoordinationError> {
    let addr = addr.to_owned();
    let reason = status.message().to_owned();
    Some(match status.code() {
        Code::Unauthenticated => CoordinationError::Unauthenticated { addr },
        Code::InvalidArgument | Code::AlreadyExists => CoordinationError::Refused { addr, reason },
        Code::FailedPrecondition | Code::NotFound => CoordinationError::Precondition { addr, reason },
        Code::Aborted => {
            let culprit = status.metadata().get(CULPRIT).and_then(|value| value.to_str().ok()?.parse().ok());
            CoordinationError::Aborted(Abort { epoch, culprit, reason, kind: AbortKind::Ordered })
        }
        Code::OutOfRange | Code::Unimplemented | Code::PermissionDenied | Code::DataLoss => {
            CoordinationError::Protocol { addr, what: format!("{}: {reason}", status.code()) }
        }
        _ => return None,
    })
}

// ---- workers to coordinator -----------------------------------------------------------------------------------------------------

/// A registration as it came in.
pub(super) fn registration(request: v1::RegisterRequest) -> Registration {
    Registration {
        rank: request.rank,
        world_size: request.world_size,
        epoch: known(request.epoch),
        worker: Worker { host: request.host, pid: request.pid, instance: request.instance, version: request.version },
        config_fingerprint: request.config_fingerprint,
    }
}

/// The event that a message on a session stream stands for; `None` for an empty message or a second `attach`.
pub(super) fn event(message: v1::WorkerMessage) -> Option<Event> {
    use v1::worker_message::Body;
    let (rank, epoch) = (message.rank, Epoch(message.epoch));
    Some(match message.body? {
        Body::Attach(_) => return None,
        Body::Heartbeat(_) => Event::Heartbeat { rank, epoch },
        Body::Progress(progress) => Event::Progress { rank, epoch, progress: progress_from(&progress) },
        Body::Error(report) => Event::ErrorReport { rank, epoch, report: report_from(report) },
        Body::Leave(leave) => Event::Leave { rank, epoch, exit_code: leave.exit_code },
    })
}

fn report_from(report: v1::ErrorReport) -> ErrorReport {
    let v1::ErrorReport { step, collective, message, missing_ranks: missing } = report;
    ErrorReport { step, collective, message, missing }
}

/// The message for a report.
pub(super) fn report(report: ErrorReport) -> v1::ErrorReport {
    let ErrorReport { step, collective, message, missing } = report;
    v1::ErrorReport { step, collective, message, missing_ranks: missing }
}

/// The message for progress.
pub(super) fn progress(progress: Progress) -> v1::Progress {
    let activity = match progress.activity {
        Activity::Starting => v1::Activity::Starting,
        Activity::Training => v1::Activity::Training,
        Activity::Evaluating => v1::Activity::Evaluating,
        Activity::Checkpointing => v1::Activity::Checkpointing,
        Activity::Finishing => v1::Activity::Finishing,
    };
    v1::Progress {
        step: progress.step,
        loss: progress.loss,
        tokens_per_s: progress.tokens_per_s,
        activity: activity.into(),
    }
}

fn progress_from(progress: &v1::Progress) -> Progress {
    let activity = match progress.activity() {
        v1::Activity::Unspecified | v1::Activity::Starting => Activity::Starting,
        v1::Activity::Training => Activity::Training,
        v1::Activity::Evaluating => Activity::Evaluating,
        v1::Activity::Checkpointing => Activity::Checkpointing,
        v1::Activity::Finishing => Activity::Finishing,
    };
    Progress { step: progress.step, loss: progress.loss, tokens_per_s: progress.tokens_per_s, activity }
}

// ---- coordinator to workers -----------------------------------------------------------------------------------------------------

/// The message for a command. `peers` are sent with a welcome.
pub(super) fn command(epoch: Epoch, command: Command, peers: impl FnOnce() -> Vec<v1::Peer>) -> v1::CoordinatorMessage {
    use v1::coordinator_message::Body;
    let body = match command {
        Command::Welcome => Body::Welcome(v1::Welcome { peers: peers() }),
        Command::Abort(Verdict { culprit, reason }) => Body::Abort(v1::Abort { culprit, reason }),
        Command::Drain { reason } => Body::Drain(v1::Drain { reason }),
        Command::Checkpoint { order, reason } => Body::Checkpoint(v1::Checkpoint { order, reason }),
    };
    v1::CoordinatorMessage { epoch: epoch.0, body: Some(body) }
}

/// The message for a worker in the list of peers.
pub(super) fn peer((rank, worker): (u32, &Worker)) -> v1::Peer {
    v1::Peer { rank, host: worker.host.clone(), pid: worker.pid }
}

/// The peers of a welcome.
pub(super) fn peers(welcome: v1::Welcome) -> Vec<Peer> {
    welcome.peers.into_iter().map(|peer| Peer { rank: peer.rank, host: peer.host, pid: peer.pid }).collect()
}

/// The message for a grid.
pub(super) fn grid(grid: Grid) -> v1::Grid {
    let groups = |lists: Vec<Vec<u32>>| lists.into_iter().map(|ranks| v1::Group { ranks }).collect();
    v1::Grid {
        ep_size: grid.ep_size,
        dp_size: grid.dp_size,
        expert_groups: groups(grid.expert_groups),
        replica_groups: groups(grid.replica_groups),
    }
}

/// A grid as it came in.
pub(super) fn grid_from(grid: v1::Grid) -> Grid {
    let lists = |groups: Vec<v1::Group>| groups.into_iter().map(|group| group.ranks).collect();
    Grid {
        ep_size: grid.ep_size,
        dp_size: grid.dp_size,
        expert_groups: lists(grid.expert_groups),
        replica_groups: lists(grid.replica_groups),
    }
}

// ---- status ---------------------------------------------------------------------------------------------------------------------

/// The message for a phase.
pub(super) fn phase(phase: Phase) -> v1::Phase {
    match phase {
        Phase::Forming => v1::Phase::Forming,
        Phase::Running => v1::Phase::Running,
        Phase::Draining => v1::Phase::Draining,
        Phase::Done => v1::Phase::Done,
        Phase::Aborted => v1::Phase::Aborted,
    }
}

/// A phase as it came in; `None` for one that this version does not know.
pub(super) fn phase_from(phase: v1::Phase) -> Option<Phase> {
    Some(match phase {
        v1::Phase::Unspecified => return None,
        v1::Phase::Forming => Phase::Forming,
        v1::Phase::Running => Phase::Running,
        v1::Phase::Draining => Phase::Draining,
        v1::Phase::Done => Phase::Done,
        v1::Phase::Aborted => Phase::Aborted,
    })
}

/// The message for a job's status.
pub(super) fn status(status: JobStatus) -> v1::StatusResponse {
    v1::StatusResponse {
        epoch: status.epoch.0,
        phase: phase(status.phase).into(),
        reason: status.reason,
        culprit: status.culprit,
        step: status.step,
        ep_size: status.ep_size,
        dp_size: status.dp_size,
        ranks: status.ranks.into_iter().map(rank_status).collect(),
    }
}

fn rank_status(rank: RankStatus) -> v1::RankStatus {
    let state = match rank.state {
        RankState::Awaited => v1::RankState::Awaited,
        RankState::Live => v1::RankState::Live,
        RankState::Detached => v1::RankState::Detached,
        RankState::Lost => v1::RankState::Lost,
        RankState::Left => v1::RankState::Left,
    };
    v1::RankStatus {
        rank: rank.rank,
        state: state.into(),
        host: rank.host,
        pid: rank.pid,
        version: rank.version,
        progress: rank.progress.map(progress),
        heartbeat_age_ms: rank.heartbeat_age_ms,
        exit_code: rank.exit_code,
    }
}

/// A job's status as it came in; `None` when it holds words that this version does not know.
pub(super) fn status_from(status: v1::StatusResponse) -> Option<JobStatus> {
    Some(JobStatus {
        epoch: Epoch(status.epoch),
        phase: phase_from(status.phase())?,
        reason: status.reason,
        culprit: status.culprit,
        step: status.step,
        ep_size: status.ep_size,
        dp_size: status.dp_size,
        ranks: status.ranks.into_iter().map(rank_status_from).collect::<Option<_>>()?,
    })
}

fn rank_status_from(rank: v1::RankStatus) -> Option<RankStatus> {
    let state = match rank.state() {
        v1::RankState::Unspecified => return None,
        v1::RankState::Awaited => RankState::Awaited,
        v1::RankState::Live => RankState::Live,
        v1::RankState::Detached => RankState::Detached,
        v1::RankState::Lost => RankState::Lost,
        v1::RankState::Left => RankState::Left,
    };
    Some(RankStatus {
        rank: rank.rank,
        state,
        host: rank.host,
        pid: rank.pid,
        version: rank.version,
        progress: rank.progress.as_ref().map(progress_from),
        heartbeat_age_ms: rank.heartbeat_age_ms,
        exit_code: rank.exit_code,
    })
}
