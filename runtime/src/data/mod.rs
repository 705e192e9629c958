//! Text in, batches out.
//!
//! Owns tokenizers, corpora and the order of samples. Reading is done once, by whoever calls (rank 0); from then on a batch is
//! arithmetic on tokens: a pure function of the seed and the sample's number. It knows no device, no transport and no model.

mod corpus;
mod default_corpus;
mod generated;
mod loader;
mod order;
mod tokenizer;

use std::fmt::Write;
use std::path::PathBuf;

pub use corpus::{Corpus, TEXT_EXTENSIONS, Tokens};
pub use default_corpus::{DEFAULT_CORPUS_LIMIT_BYTES, cargo_registry, default_corpus};
pub use generated::generated_corpus;
pub use loader::{Batch, Cursor, Loader, LoaderSpec};
pub use tokenizer::{ByteTokenizer, TOKENIZERS, Tokenizer, tokenizer};

use crate::exit::{Classified, ExitCode};

/// Data that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or folder could not be read.
    #[error("{}: cannot be read: {reason}", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        reason: std::io::Error,
    },
    /// Neither a file nor a folder.
    #[error("{}: is neither a regular file nor a directory", path.display())]
    NotRegular {
        /// What was given.
        path: PathBuf,
    },
    /// A file is not UTF-8.
    #[error("{}: byte {offset} (line {line}) is 0x{byte:02x}, which is not UTF-8; data must be UTF-8 text", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first byte that is not, from 0.
        offset: usize,
        /// Its line, from 1.
        line: usize,
        /// The byte.
        byte: u8,
    },
    /// A file that was named holds nothing.
    #[error("{}: is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A folder holds no text.
    #[error("{}: holds no text; files in a directory are read when they end in {}", path.display(), TEXT_EXTENSIONS.join(" "))]
    NoText {
        /// The folder.
        path: PathBuf,
    },
    /// The text is too short to train or evaluate on.
    #[error("{part} is {tokens} tokens long, but {what} needs {needed}: {remedy}")]
    TooShort {
        /// Which part of the text.
        part: &'static str,
        /// Its length.
        tokens: usize,
        /// What needs more.
        what: String,
        /// How much it needs.
        needed: usize,
        /// What to do.
        remedy: &'static str,
    },
    /// There is no such tokenizer.
    #[error("{name:?} is no tokenizer; there are {}", TOKENIZERS.join(", "))]
    UnknownTokenizer {
        /// The name.
        name: String,
    },
    /// A corpus arrived damaged.
    #[error("the corpus shared out by rank 0 arrived damaged: {reason}")]
    Damaged {
        /// What does not fit.
        reason: &'static str,
    },
}

impl Classified for DataError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Unreadable { .. } => ExitCode::Io,
            Self::UnknownTokenizer { .. } => ExitCode::Usage,
            Self::Damaged { .. } => ExitCode::Internal,
            _ => ExitCode::BadData,
        }
    }
}

/// Bytes in hexadecimal, as hashes are printed.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
