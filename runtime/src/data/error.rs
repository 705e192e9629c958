//! What can be wrong with data: one variant for each way.
//!
//! Owns the wording and the class of each error. It decides nothing.

use std::io;
use std::path::PathBuf;

use super::inputs::{COMPRESSED_EXTENSIONS, RECORD_EXTENSIONS, SHARD_EXTENSION, TEXT_EXTENSIONS};
use super::megatron::MegatronFault;
use super::shard::ShardFault;
use super::tokenizer::TOKENIZERS;
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
        reason: io::Error,
    },
    /// A file or folder could not be written.
    #[error("{}: cannot be written: {reason}", path.display())]
    Unwritable {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        reason: io::Error,
    },
    /// Neither a file nor a folder.
    #[error("{}: is neither a regular file nor a directory", path.display())]
    NotRegular {
        /// What was given.
        path: PathBuf,
    },
    /// A pattern that matches nothing.
    #[error("{pattern}: no file matches this pattern")]
    NoMatch {
        /// The pattern.
        pattern: String,
    },
    /// A pattern that is none.
    #[error("{pattern}: is no pattern: {reason}; * ? [a-z] and ** (any depth of directories) are known")]
    BadPattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file is not UTF-8.
    #[error("{}: byte {offset} (line {line}) is 0x{byte:02x}, which is not UTF-8; data must be UTF-8 text", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first byte that is not, from 0, in the text after any decompression.
        offset: u64,
        /// Its line, from 1.
        line: u64,
        /// The byte.
        byte: u8,
    },
    /// Compressed data that cannot be decompressed.
    #[error("{}: line {line}: the {format} data is damaged or cut off: {reason}", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// The line, from 1, of the text at which it broke.
        line: u64,
        /// `gzip` or `zstd`.
        format: &'static str,
        /// The decoder's reason.
        reason: io::Error,
    },
    /// A line that is not a JSON object as expected.
    #[error("{}:{line}:{column}: not a JSON object as expected: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The column in bytes, from 1.
        column: usize,
        /// The parser's reason.
        reason: String,
    },
    /// A record without text.
    #[error(
        "{}:{line}: has neither the field {field:?} (data.text_field) nor \"prompt\" and \"completion\"; its fields are {found:?}",
        path.display()
    )]
    NoField {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The field that was looked for.
        field: String,
        /// The fields there are.
        found: Vec<String>,
    },
    /// A file that was named holds nothing.
    #[error("{}: is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// All of a file are prompts, which are not predicted.
    #[error("{}: every completion is empty: there is nothing to learn from prompts alone", path.display())]
    NothingToLearn {
        /// The file.
        path: PathBuf,
    },
    /// A folder holds no data.
    #[error(
        "{}: holds no text; files in a directory are read when they end in {}, {}, {SHARD_EXTENSION} or idx (with its bin), \
         text also with a further {}",
        path.display(), TEXT_EXTENSIONS.join(" "), RECORD_EXTENSIONS.join(" "), COMPRESSED_EXTENSIONS.join(" or ")
    )]
    NoText {
        /// The folder.
        path: PathBuf,
    },
    /// The text is too short to train or evaluate on.
    #[error("{part} is {tokens} tokens long, but {what} needs {needed}: {remedy}")]
    TooShort {
        /// Which part of the text.
        part: String,
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
    #[error("{name:?} is no tokenizer; there are {} and paths of tokenizer.json files", TOKENIZERS.join(", "))]
    UnknownTokenizer {
        /// The name.
        name: String,
    },
    /// A file is no tokenizer.
    #[error("{}: is not a Hugging Face tokenizer.json: {reason}", path.display())]
    NotATokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer makes tokens that the model does not have.
    #[error(
        "{tokenizer}: makes {tokens} different tokens, but model.vocab_size = {vocab_size}; set model.vocab_size to {tokens} or \
         more, or give the model's own tokenizer"
    )]
    Vocabulary {
        /// The tokenizer.
        tokenizer: String,
        /// Its vocabulary.
        tokens: usize,
        /// The model's.
        vocab_size: usize,
    },
    /// Text that a tokenizer has no tokens for.
    #[error("{tokenizer}: cannot encode the text: {reason}")]
    Encoding {
        /// The tokenizer.
        tokenizer: String,
        /// Its reason.
        reason: String,
    },
    /// The token that should end documents does not exist.
    #[error("data.end_of_document = {token:?}: {tokenizer} has no such token; give one it has, \"auto\" or \"none\"")]
    NoEndToken {
        /// The token.
        token: String,
        /// The tokenizer.
        tokenizer: String,
    },
    /// A token shard that cannot be used.
    #[error("{}: {fault}", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: ShardFault,
    },
    /// A Megatron data set that cannot be used.
    #[error("{}: {fault}", path.display())]
    Megatron {
        /// The index or the data.
        path: PathBuf,
        /// What is wrong with it.
        fault: MegatronFault,
    },
    /// A token that the model does not have.
    #[error("{}: token {position} is {id}, but the vocabulary has the tokens 0 to {}: set model.vocab_size to more than {id}, or \
             prepare the data with the model's tokenizer", path.display(), vocab_size - 1)]
    BeyondVocabulary {
        /// The file.
        path: PathBuf,
        /// Which token of the file, from 0.
        position: usize,
        /// Its id.
        id: i64,
        /// The model's vocabulary.
        vocab_size: usize,
    },
    /// This rank sees another file than rank 0.
    #[error("{}: is not the file that rank 0 sees under this path; token shards must be on storage that all ranks share", path.display())]
    Different {
        /// The file.
        path: PathBuf,
    },
    /// A folder of shards that are not all there.
    #[error("{}: {present} of {shards} shards are there: run the same `moe-launch data prepare` again to finish them", path.display())]
    Unfinished {
        /// The folder.
        path: PathBuf,
        /// Shards that are there.
        present: usize,
        /// Shards there should be.
        shards: usize,
    },
    /// Shards of something else are in the way.
    #[error("{}: {reason}; give another folder, or remove this one", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What is in the way.
        reason: String,
    },
    /// What is asked for cannot be done with this input.
    #[error("{}: {reason}", path.display())]
    Unsuitable {
        /// The input.
        path: PathBuf,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// A tokenizer could not be trained.
    #[error("the tokenizer cannot be trained: {reason}")]
    Training {
        /// Why, and what to do.
        reason: String,
    },
    /// A corpus arrived damaged.
    #[error("the corpus shared out by rank 0 arrived damaged: {reason}")]
    Damaged {
        /// What does not fit.
        reason: &'static str,
    },
}

impl DataError {
    /// For `map_err`: `path` could not be read.
    pub(super) fn unreadable(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |reason| Self::Unreadable { path, reason }
    }

    /// For `map_err`: `path` could not be written.
    pub(super) fn unwritable(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |reason| Self::Unwritable { path, reason }
    }
}

impl Classified for DataError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Unreadable { .. } | Self::Unwritable { .. } | Self::NoMatch { .. } | Self::Different { .. } => {
                ExitCode::Io
            }
            Self::UnknownTokenizer { .. }
            | Self::BadPattern { .. }
            | Self::NoEndToken { .. }
            | Self::Occupied { .. }
            | Self::Training { .. }
            | Self::Unsuitable { .. } => ExitCode::Usage,
            Self::Damaged { .. } => ExitCode::Internal,
            _ => ExitCode::BadData,
        }
    }
}
