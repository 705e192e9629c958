//! What can go wrong, in NCCL's own words where it has any.

use std::ffi::c_int;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::Version;

/// Why NCCL cannot be used on this machine.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LoadError {
    /// No file of any known name could be opened.
    #[error(
        "no NCCL: {}; install NCCL {needed} or later, or put the folder of its libnccl.so.2 on LD_LIBRARY_PATH",
        refusals.join("; ")
    )]
    NotFound {
        /// What the loader said about each name, in the order tried.
        refusals: Vec<String>,
        /// The oldest version that would do.
        needed: Version,
    },
    /// The file lacks a function: it is too old, or no NCCL.
    #[error("{library} has no {symbol}: it is older than NCCL {needed}, or no NCCL", library = library.display())]
    NoSymbol {
        /// The file, as it was asked for.
        library: PathBuf,
        /// The missing function.
        symbol: &'static str,
        /// The oldest version that would do.
        needed: Version,
    },
    /// The file's version is too old.
    #[error("{library} is NCCL {found}: {needed} or later is needed", library = library.display())]
    TooOld {
        /// The file, as it was asked for.
        library: PathBuf,
        /// Its version.
        found: Version,
        /// The oldest version that would do.
        needed: Version,
    },
    /// The library would not say its version.
    #[error("{library} does not tell its version: {code}", library = library.display())]
    NoVersion {
        /// The file, as it was asked for.
        library: PathBuf,
        /// What it answered.
        code: Code,
    },
}

/// What an NCCL function returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code(c_int);

impl Code {
    /// `ncclSuccess`.
    pub const SUCCESS: Self = Self(0);
    /// `ncclUnhandledCudaError`.
    pub const CUDA: Self = Self(1);
    /// `ncclSystemError`.
    pub const SYSTEM: Self = Self(2);
    /// `ncclInternalError`.
    pub const INTERNAL: Self = Self(3);
    /// `ncclInvalidArgument`.
    pub const INVALID_ARGUMENT: Self = Self(4);
    /// `ncclInvalidUsage`.
    pub const INVALID_USAGE: Self = Self(5);
    /// `ncclRemoteError`: a peer has failed or left.
    pub const REMOTE: Self = Self(6);
    /// `ncclInProgress`: not an error, see [`crate::Progress`].
    pub const IN_PROGRESS: Self = Self(7);
    /// `ncclTimeout`.
    pub const TIMEOUT: Self = Self(8);

    /// The code as it came.
    pub(crate) fn new(code: c_int) -> Self {
        Self(code)
    }

    /// The number, for what has no name here.
    pub fn number(self) -> c_int {
        self.0
    }

    /// NCCL's name for it, where it is known.
    pub fn name(self) -> Option<&'static str> {
        let names = [
            "ncclSuccess",
            "ncclUnhandledCudaError",
            "ncclSystemError",
            "ncclInternalError",
            "ncclInvalidArgument",
            "ncclInvalidUsage",
            "ncclRemoteError",
            "ncclInProgress",
            "ncclTimeout",
        ];
        usize::try_from(self.0).ok().and_then(|index| names.get(index).copied())
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "NCCL code {}", self.0),
        }
    }
}

/// Why a call did not do what it should.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// NCCL refused or failed.
    #[error("{call}: {text} ({code}){}", after_colon(last))]
    Nccl {
        /// The function.
        call: &'static str,
        /// What it returned, or what the communicator found later.
        code: Code,
        /// NCCL's text of the code.
        text: String,
        /// NCCL's last message about this communicator or thread; empty where there is none.
        last: String,
    },
    /// What a call began did not finish in time: a peer has not made the same call.
    #[error("{call} was not done within {waited:?}: not all ranks of the communicator have come this far")]
    Deadline {
        /// The function.
        call: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The communicator was aborted, by this process.
    #[error("{call}: the communicator was aborted")]
    Aborted {
        /// The function that was not called any more.
        call: &'static str,
    },
    /// A call that must not be made between the start and the end of a group on the same thread.
    #[error("{call} inside of a group: end the group first")]
    InsideGroup {
        /// The function that was not called.
        call: &'static str,
    },
    /// A rank that the communicator does not have.
    #[error("{call}: there is no rank {rank} among {size}")]
    NoSuchRank {
        /// The function that was not called.
        call: &'static str,
        /// The rank that was named.
        rank: usize,
        /// Ranks of the communicator.
        size: usize,
    },
    /// Buffers whose lengths cannot be right.
    #[error("{call}: {what} has {found} elements, not {due}")]
    Length {
        /// The function that was not called.
        call: &'static str,
        /// Which buffer or list.
        what: &'static str,
        /// Its length.
        found: usize,
        /// What it must be, or must be at least.
        due: usize,
    },
    /// More ranks, a larger color or key than NCCL counts.
    #[error("{call}: {what} {found} is more than NCCL counts")]
    TooLarge {
        /// The function that was not called.
        call: &'static str,
        /// What is too large.
        what: &'static str,
        /// Its value.
        found: usize,
    },
    /// Bytes that are no unique id.
    #[error("an NCCL unique id has {due} bytes, not {found}")]
    IdLength {
        /// Bytes that came.
        found: usize,
        /// Bytes it has.
        due: usize,
    },
}

impl Error {
    /// Whether a later attempt may do better: a peer was slow or is lost, nothing is wrong here.
    pub fn is_peers(&self) -> bool {
        match self {
            Self::Deadline { .. } | Self::Aborted { .. } => true,
            Self::Nccl { code, .. } => [Code::REMOTE, Code::TIMEOUT, Code::SYSTEM].contains(code),
            _ => false,
        }
    }
}

fn after_colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_of_a_later_nccl_keeps_its_number() {
        assert_eq!(Code::new(6).to_string(), "ncclRemoteError");
        assert_eq!(Code::new(99).to_string(), "NCCL code 99");
        assert_eq!(Code::new(-1).name(), None);
    }

    #[test]
    fn nccls_last_message_follows_its_text() {
        let error = |last: &str| Error::Nccl {
            call: "ncclAllReduce",
            code: Code::REMOTE,
            text: "remote process exited or there was a network error".into(),
            last: last.into(),
        };
        let text = "ncclAllReduce: remote process exited or there was a network error (ncclRemoteError)";
        assert_eq!(error("").to_string(), text);
        assert_eq!(error("socket closed").to_string(), format!("{text}: socket closed"));
    }
}
