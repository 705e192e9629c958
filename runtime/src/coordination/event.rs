//! The words of the rendezvous state machine: what happens to it and what it decides.
//!
//! Plain values; no behaviour but their text.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Number of one attempt at running a job, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of one session stream, unique within a coordinator: tells a stream that broke late from the one that replaced it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub u64);

/// The process that holds a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// Name of its machine.
    pub host: String,
    /// Process id on that machine.
    pub pid: u32,
    /// Drawn at random by the process: containers often share one process id.
    pub instance: u64,
    /// Version of the program.
    pub version: String,
}

/// A process asks for a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// The rank it was launched as.
    pub rank: u32,
    /// The world size it was launched with.
    pub world_size: u32,
    /// The epoch of its lease if it has one already.
    pub epoch: Option<Epoch>,
    /// The process.
    pub worker: Worker,
    /// Hash of its resolved configuration.
    pub config_fingerprint: String,
}

/// What a worker is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// Loading, building, resuming.
    #[default]
    Starting,
    /// Taking steps.
    Training,
    /// Evaluating.
    Evaluating,
    /// Writing a checkpoint.
    Checkpointing,
    /// After the last step.
    Finishing,
}

impl Activity {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Training => "training",
            Self::Evaluating => "evaluating",
            Self::Checkpointing => "checkpointing",
            Self::Finishing => "finishing",
        }
    }
}

/// How far a worker is.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Progress {
    /// Steps completed.
    pub step: u64,
    /// Cross-entropy of that step, mean over the global batch, in nats.
    pub loss: f64,
    /// Tokens of the global batch per second of wall time.
    pub tokens_per_s: f64,
    /// What it does now.
    pub activity: Activity,
}

/// A worker could not go on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ErrorReport {
    /// Step in which it happened; 0: in none.
    pub step: u64,
    /// The collective that failed, as "dispatch of layer 3"; empty when it was none.
    pub collective: String,
    /// What happened.
    pub message: String,
    /// Peers that were waited for in vain; when empty, the reporter is the culprit.
    pub missing: Vec<u32>,
}

/// What happens to the state machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A process asks for a rank, for the first time or again.
    Register(Registration),
    /// A registered worker opened a session stream.
    Attached {
        /// Its rank.
        rank: u32,
        /// The epoch it holds a lease of.
        epoch: Epoch,
        /// The instance it registered as.
        instance: u64,
        /// The stream.
        session: SessionId,
    },
    /// A sign of life.
    Heartbeat {
        /// Sender.
        rank: u32,
        /// Sender's epoch.
        epoch: Epoch,
    },
    /// A sign of life with news.
    Progress {
        /// Sender.
        rank: u32,
        /// Sender's epoch.
        epoch: Epoch,
        /// The news.
        progress: Progress,
    },
    /// A worker could not go on.
    ErrorReport {
        /// Sender.
        rank: u32,
        /// Sender's epoch.
        epoch: Epoch,
        /// What went wrong.
        report: ErrorReport,
    },
    /// A session stream broke.
    SessionLost {
        /// Whose.
        rank: u32,
        /// Which.
        session: SessionId,
    },
    /// A rank entered a barrier.
    BarrierArrived {
        /// Sender.
        rank: u32,
        /// Sender's epoch.
        epoch: Epoch,
        /// The barrier.
        name: String,
        /// How often this rank has passed it before, plus one.
        generation: u64,
        /// How long it is willing to wait.
        timeout: Duration,
        /// What it brings for all.
        payload: Vec<u8>,
    },
    /// An operator wants the job to save and stop.
    DrainRequested {
        /// The epoch the operator means, if it said.
        epoch: Option<Epoch>,
        /// Who and why.
        reason: String,
    },
    /// An operator wants a checkpoint.
    CheckpointRequested {
        /// The epoch the operator means, if it said.
        epoch: Option<Epoch>,
        /// Who and why.
        reason: String,
    },
    /// A worker ends of its own will.
    Leave {
        /// Sender.
        rank: u32,
        /// Sender's epoch.
        epoch: Epoch,
        /// Its exit code.
        exit_code: i32,
    },
    /// Time passed.
    Tick,
}

/// Where the job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Ranks are still registering.
    Forming,
    /// All ranks are there.
    Running,
    /// Workers were asked to save and leave.
    Draining,
    /// Every rank has left with a good exit code.
    Done,
    /// The epoch was given up.
    Aborted,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forming => "forming",
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Done => "done",
            Self::Aborted => "aborted",
        })
    }
}

/// Why an epoch was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The rank to blame, if one is.
    pub culprit: Option<u32>,
    /// What happened, for people.
    pub reason: String,
}

/// What a worker is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// All ranks are there.
    Welcome,
    /// Give up and leave.
    Abort(Verdict),
    /// Finish the step, save, leave with exit code 75.
    Drain {
        /// Who asked and why.
        reason: String,
    },
    /// Save after the current step and go on.
    Checkpoint {
        /// Number of the order within the epoch, from 1.
        order: u64,
        /// Who asked and why.
        reason: String,
    },
}

/// Why a barrier did not open for a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BarrierFailure {
    /// The rank's deadline passed.
    Deadline {
        /// Ranks that had not arrived.
        missing: Vec<u32>,
    },
    /// The epoch was given up.
    Aborted(Verdict),
}

/// What the state machine decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Answer to a registration: the rank holds its lease.
    Registered {
        /// The rank.
        rank: u32,
        /// Ranks that have still to arrive; empty when the job runs.
        missing: Vec<u32>,
    },
    /// Answer to an event that changed nothing.
    Refused(Refusal),
    /// Tell a rank, if it has a session; what is not delivered is decided again when it attaches.
    Send {
        /// The receiver.
        rank: u32,
        /// What.
        command: Command,
    },
    /// The barrier opens for a rank.
    BarrierPassed {
        /// The barrier.
        name: String,
        /// Its generation.
        generation: u64,
        /// The rank.
        rank: u32,
        /// What each rank brought, ascending.
        payloads: Arc<[Vec<u8>]>,
    },
    /// The barrier fails for a rank; it counts as not arrived.
    BarrierFailed {
        /// The barrier.
        name: String,
        /// Its generation.
        generation: u64,
        /// The rank.
        rank: u32,
        /// Why.
        why: BarrierFailure,
    },
    /// A checkpoint was ordered.
    CheckpointOrdered {
        /// Number of the order.
        order: u64,
    },
    /// The job went from one phase to another.
    PhaseChanged {
        /// From.
        from: Phase,
        /// To.
        to: Phase,
        /// Why.
        reason: String,
    },
}

/// Why an event was refused. Each text says what was expected and what came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The sender belongs to another attempt at the job.
    #[error(
        "message of epoch {theirs}, but this job is in epoch {ours}; the sender belongs to another attempt and should leave"
    )]
    StaleEpoch {
        /// The sender's.
        theirs: Epoch,
        /// The coordinator's.
        ours: Epoch,
    },
    /// No such rank.
    #[error("rank {rank} does not exist in a job of {world_size} ranks")]
    RankOutOfRange {
        /// The claimed rank.
        rank: u32,
        /// Ranks of the job.
        world_size: u32,
    },
    /// Launched with another world size.
    #[error(
        "rank {rank} was launched for {theirs} ranks, but this job has {ours}; are two jobs using one coordinator?"
    )]
    WrongWorldSize {
        /// The sender.
        rank: u32,
        /// The sender's.
        theirs: u32,
        /// The job's.
        ours: u32,
    },
    /// Another configuration.
    #[error(
        "rank {rank} has configuration {theirs}, but this job runs {ours}; give every rank the same file and --set options"
    )]
    WrongFingerprint {
        /// The sender.
        rank: u32,
        /// The sender's.
        theirs: String,
        /// The job's.
        ours: String,
    },
    /// Another build.
    #[error("rank {rank} runs version {theirs}, but this job runs {ours}; install one version on all machines")]
    WrongVersion {
        /// The sender.
        rank: u32,
        /// The sender's.
        theirs: String,
        /// The job's.
        ours: String,
    },
    /// Another process holds the rank.
    #[error(
        "rank {rank} is held by process {pid} on {host}; two workers were launched as one rank, or two jobs use one coordinator"
    )]
    RankTaken {
        /// The claimed rank.
        rank: u32,
        /// Machine of the holder.
        host: String,
        /// Process of the holder.
        pid: u32,
    },
    /// The rank has not registered.
    #[error("rank {rank} has not registered")]
    NotRegistered {
        /// The sender.
        rank: u32,
    },
    /// The rank has left already.
    #[error("rank {rank} has left this epoch with exit code {exit_code}")]
    HasLeft {
        /// The sender.
        rank: u32,
        /// The code it left with.
        exit_code: i32,
    },
    /// The epoch was given up.
    #[error("the job was aborted: {}", .0.reason)]
    Aborted(Verdict),
    /// Not in this phase.
    #[error("{what} is not possible while the job is {phase}")]
    WrongPhase {
        /// What was asked.
        what: &'static str,
        /// The phase.
        phase: Phase,
    },
    /// A barrier was entered out of order.
    #[error("rank {rank} entered barrier {name:?} as number {theirs}, but number {expected} is next")]
    BarrierOutOfOrder {
        /// The barrier.
        name: String,
        /// The sender.
        rank: u32,
        /// The sender's generation.
        theirs: u64,
        /// The one that may be entered.
        expected: u64,
    },
}
