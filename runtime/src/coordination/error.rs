//! What can go wrong between a worker or an operator and the coordinator, and which exit code it deserves.

use std::time::Duration;

use super::contact::ContactError;
use super::job::JobError;
use super::session::Abort;
use super::token::BadToken;
use crate::exit::{Classified, ExitCode};

/// Each text says what failed, where, and what can be done about it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CoordinationError {
    /// The job cannot be hosted as described.
    #[error("the coordinator cannot host this job: {0}")]
    Job(#[from] JobError),
    /// The text was not a join token.
    #[error(transparent)]
    Token(#[from] BadToken),
    /// The contact file of a run.
    #[error(transparent)]
    Contact(#[from] ContactError),
    /// The address is none.
    #[error("{addr:?} is not an address of a coordinator ({reason}); give HOST:PORT, as node07:7400 or [::1]:7400")]
    BadAddress {
        /// What was given.
        addr: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// The coordinator could not be started here, or a thread could not.
    #[error("cannot start {what}: {reason}")]
    Start {
        /// The coordinator or a session, and where.
        what: String,
        /// The system's reason.
        reason: String,
    },
    /// Nobody answered.
    #[error(
        "no coordinator answered at {addr} within {waited:?} (last: {last}); check that the run still lives and that the port can be reached from here"
    )]
    Unreachable {
        /// Where.
        addr: String,
        /// For how long it was tried.
        waited: Duration,
        /// The last failure.
        last: String,
    },
    /// The join token was wrong.
    #[error(
        "the coordinator at {addr} refused the join token; take it from this run (MOE_JOIN_TOKEN or coordinator.json)"
    )]
    Unauthenticated {
        /// Where.
        addr: String,
    },
    /// This process does not fit the job: rank, world size, configuration or version.
    #[error("the coordinator at {addr} refused this worker: {reason}")]
    Refused {
        /// Where.
        addr: String,
        /// The coordinator's reason, with both values.
        reason: String,
    },
    /// A stale epoch, or a request that the job's phase does not allow.
    #[error("the coordinator at {addr} says: {reason}")]
    Precondition {
        /// Where.
        addr: String,
        /// The coordinator's reason.
        reason: String,
    },
    /// The epoch was given up, or the coordinator was lost.
    #[error("{0}")]
    Aborted(Abort),
    /// A barrier did not open in time.
    #[error("barrier {name:?} did not open within {waited:?}; ranks that had not arrived: {missing:?}")]
    BarrierTimeout {
        /// The barrier.
        name: String,
        /// How long this rank waited.
        waited: Duration,
        /// Who was missing; empty when not even the coordinator answered.
        missing: Vec<u32>,
    },
    /// The coordinator was not seen to take note that this worker leaves.
    #[error("the coordinator at {addr} did not confirm within {waited:?} that rank {rank} leaves")]
    LeaveUnconfirmed {
        /// Where.
        addr: String,
        /// This rank.
        rank: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// The other side did what the contract does not allow.
    #[error("the coordinator at {addr} broke the protocol: {what}; are both sides of one version?")]
    Protocol {
        /// Where.
        addr: String,
        /// What it did.
        what: String,
    },
}

impl Classified for CoordinationError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Job(_) | Self::Token(_) | Self::BadAddress { .. } | Self::Refused { .. } => ExitCode::Usage,
            Self::Contact(error) => error.exit_code(),
            Self::Start { .. } => ExitCode::Io,
            Self::Unreachable { .. }
            | Self::Precondition { .. }
            | Self::Aborted(_)
            | Self::BarrierTimeout { .. }
            | Self::LeaveUnconfirmed { .. } => ExitCode::Temporary,
            Self::Unauthenticated { .. } => ExitCode::Refused,
            Self::Protocol { .. } => ExitCode::Internal,
        }
    }
}
