//! What a run has really used, to hold plans to.
//!
//! Owns the record of one rank, `logs/usage-00000.json` of a run directory, and the reading of this process's memory from `/proc`.
//! It judges nothing.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dispatch::ShuffledRows;
use crate::exit::{Classified, ExitCode};
use crate::memory::Tally;

/// Bytes sent in one collective of one group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// world, expert or replica.
    pub group: String,
    /// The collective.
    pub collective: String,
    /// Bytes to other ranks.
    pub bytes: u64,
}

/// What one rank has counted, from the first step of this start to the last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// The rank.
    pub rank: usize,
    /// W.
    pub world: usize,
    /// EP.
    pub ep: usize,
    /// Steps taken since the start.
    pub steps: u64,
    /// Resident memory before the model was built.
    pub start_bytes: u64,
    /// The most resident memory since the process began.
    pub peak_bytes: u64,
    /// Buffers by kind at the end.
    pub buffers: Tally,
    /// Rows of the steps' forward passes that crossed to and from other ranks.
    pub rows: ShuffledRows,
    /// Bytes sent in the steps, without evaluations and checkpoints.
    pub sent: Vec<Sent>,
}

/// A record that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The system refuses.
    #[error("{}: cannot be {action}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        #[source]
        reason: io::Error,
    },
    /// The file holds something else.
    #[error("{}: is no record of a rank's usage: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        reason: String,
    },
}

impl Classified for UsageError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Io { .. } => ExitCode::Io,
            Self::Malformed { .. } => ExitCode::BadData,
        }
    }
}

impl Usage {
    /// Where the record of `rank` is in the logs of a run.
    pub fn path(logs: &Path, rank: usize) -> PathBuf {
        logs.join(format!("usage-{rank:05}.json"))
    }

    /// Writes the record into `logs`.
    pub fn write(&self, logs: &Path) -> Result<(), UsageError> {
        let path = Self::path(logs, self.rank);
        let failed = |reason| UsageError::Io { path: path.clone(), action: "written", reason };
        let text = serde_json::to_string_pretty(self).map_err(|error| failed(error.into()))?;
        std::fs::write(&path, text + "\n").map_err(failed)
    }

    /// Reads the record of `rank`.
    pub fn read(logs: &Path, rank: usize) -> Result<Self, UsageError> {
        let path = Self::path(logs, rank);
        let text = std::fs::read_to_string(&path);
        let text = text.map_err(|reason| UsageError::Io { path: path.clone(), action: "read", reason })?;
        serde_json::from_str(&text).map_err(|error| UsageError::Malformed { path, reason: error.to_string() })
    }

    /// Bytes sent in one collective of one group.
    pub fn sent_in(&self, group: &str, collective: &str) -> u64 {
        let same = |sent: &&Sent| sent.group == group && sent.collective == collective;
        self.sent.iter().filter(same).map(|sent| sent.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_a_damaged_one_is_named() {
        let logs = tempfile::tempdir().unwrap();
        let sent = vec![Sent { group: "world".into(), collective: "all_reduce".into(), bytes: 7 }];
        let usage = Usage { rank: 3, steps: 2, sent, ..Usage::default() };
        usage.write(logs.path()).unwrap();
        assert_eq!(Usage::read(logs.path(), 3).unwrap(), usage);
        assert_eq!(usage.sent_in("world", "all_reduce"), 7);
        std::fs::write(Usage::path(logs.path(), 3), "{").unwrap();
        let error = Usage::read(logs.path(), 3).unwrap_err();
        assert!(error.to_string().contains("usage-00003.json") && error.exit_code() == ExitCode::BadData, "{error}");
        assert_eq!(Usage::read(logs.path(), 4).unwrap_err().exit_code(), ExitCode::Io);
    }
}
