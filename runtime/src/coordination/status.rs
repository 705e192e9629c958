//! What the coordinator knows, as values that people and tools read.

use super::event::{Epoch, Phase, Progress};

/// A job at one moment.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct JobStatus {
    /// The attempt.
    pub epoch: Epoch,
    /// Where it stands.
    pub phase: Phase,
    /// Why it stands there.
    pub reason: String,
    /// The rank to blame for an abort, if one is.
    pub culprit: Option<u32>,
    /// The step that all ranks have completed.
    pub step: u64,
    /// Expert-parallel size.
    pub ep_size: u32,
    /// Data-parallel size.
    pub dp_size: u32,
    /// One entry per rank, ascending.
    pub ranks: Vec<RankStatus>,
}

/// One rank at one moment.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct RankStatus {
    /// The rank.
    pub rank: u32,
    /// How it stands with the coordinator.
    pub state: RankState,
    /// Its machine; empty before it registered.
    pub host: String,
    /// Its process; 0 before it registered.
    pub pid: u32,
    /// Its program's version; empty before it registered.
    pub version: String,
    /// What it last said of its work.
    pub progress: Option<Progress>,
    /// Milliseconds since anything was heard of it.
    pub heartbeat_age_ms: Option<u64>,
    /// The code it left with.
    pub exit_code: Option<i32>,
}

impl RankStatus {
    /// A rank that has not registered.
    pub(super) fn awaited(rank: u32) -> Self {
        let (host, version) = (String::new(), String::new());
        let state = RankState::Awaited;
        Self { rank, state, host, pid: 0, version, progress: None, heartbeat_age_ms: None, exit_code: None }
    }
}

/// How a rank stands with the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RankState {
    /// Has not registered.
    Awaited,
    /// Registered and attached.
    Live,
    /// Registered; without a stream, within its lease.
    Detached,
    /// Its lease ran out.
    Lost,
    /// Said that it leaves.
    Left,
}

impl RankState {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Awaited => "awaited",
            Self::Live => "live",
            Self::Detached => "detached",
            Self::Lost => "lost",
            Self::Left => "left",
        }
    }
}
