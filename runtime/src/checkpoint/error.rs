//! What can be wrong with a model on disk: one variant for each way.
//!
//! Owns the wording and the class of each error. It decides nothing.

use std::io;
use std::path::{Path, PathBuf};

use crate::invalid::InvalidValue;

/// Why a model could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb: "read", "write"…
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that should hold JSON of a known form does not.
    #[error("{}: not valid: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A config.json asks for what does not exist here, or is not of the form it should have.
    #[error("{}: {key} = {value}: {reason}", path.display())]
    Config {
        /// The config.json.
        path: PathBuf,
        /// The key; dotted where it is nested.
        key: String,
        /// What it says; "absent" where it is not there.
        value: String,
        /// Why not, and what is accepted.
        reason: String,
    },
    /// The sizes of a config.json do not fit each other.
    #[error("{}: {source}", path.display())]
    ConfigSizes {
        /// The config.json.
        path: PathBuf,
        /// The size, by our name for it.
        source: InvalidValue,
    },
}

impl CheckpointError {
    /// The exit code of a process that ends with this error: 64 wrong usage, 65 bad input data, 74 input or output failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io { .. } => 74,
            Self::Json { .. } | Self::Config { .. } | Self::ConfigSizes { .. } => 65,
        }
    }

    /// For `map_err`: the system's refusal to `action` on `path`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}
