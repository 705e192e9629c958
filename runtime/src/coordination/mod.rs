//! Coordination: who is in the job, who still lives, and what everybody is told.
//!
//! One process hosts the coordinator ([`CoordinatorHandle`]); every rank holds a [`Session`] with it. The decisions are made by a pure
//! state machine ([`state::State`]); the gRPC server and the session carry its events in and its actions out. Nothing here moves
//! tensors, knows a model, reads configuration or environment: callers hand over addresses, tokens and callbacks.
//!
//! ```text
//!   training thread ──progress, reports──▶ Session thread ══gRPC══▶ Coordinator thread ──events──▶ State
//!                   ◀─orders, abort call── (heartbeats)   ◀════════                    ◀─actions──
//! ```
//!
//! A rank is a `u32` here, as on the wire; `rank = dp * ep + ep_index`.
//!
//! What holds, whatever is lost, delayed or repeated on the way (the property tests say so):
//! - at most one abort per epoch, and every rank that has not left hears of it, at the latest when it attaches again;
//! - a message of another epoch changes nothing;
//! - forming ends: all ranks are there, or the deadline names those that are not.

mod barriers;
mod client;
mod contact;
mod dial;
mod error;
mod event;
mod host;
mod job;
mod link;
mod server;
mod service;
mod session;
pub mod state;
mod status;
mod token;
mod wire;

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod simulation_tests;

pub use client::Operator;
pub use contact::{ContactError, ContactFile};
pub use error::CoordinationError;
pub use event::{
    Action, Activity, BarrierFailure, Command, Epoch, ErrorReport, Event, Phase, Progress, Refusal, Registration,
    SessionId, Verdict, Worker,
};
pub use job::{Grid, JobError, JobSpec};
pub use server::CoordinatorHandle;
pub use session::{Abort, AbortKind, Identity, OnAbort, Order, Peer, Reporter, Session, SessionConfig};
pub use status::{JobStatus, RankState, RankStatus};
pub use token::{BadToken, JoinToken};
