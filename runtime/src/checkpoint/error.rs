//! What can be wrong with a model on disk: one variant for each way.
//!
//! Owns the wording and the class of each error. It decides nothing.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use moe_kernels::DeviceError;

use super::tensor_file::READABLE;
use crate::collectives::CollectiveError;
use crate::exit::{Classified, ExitCode};
use crate::invalid::InvalidValue;
use crate::topology::Rank;

/// How a run goes on without its newest checkpoint.
pub const GO_BACK: &str =
    "bring the file back, or start moe-worker with --resume last-good to go on from the newest that is whole";

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
    /// A folder that should hold a model does not.
    #[error("no model in {}: {reason}", dir.display())]
    NoModel {
        /// The folder.
        dir: PathBuf,
        /// What is not there.
        reason: String,
    },
    /// A file that should be in the safetensors format is not.
    #[error("{}: not a safetensors file: {reason}", path.display())]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is longer or shorter than it says of itself.
    #[error("{}: {found_bytes} bytes long where {expected_bytes} were expected", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length by its own header or by the manifest.
        expected_bytes: u64,
        /// Its length.
        found_bytes: u64,
    },
    /// A tensor has a type that the safetensors format does not have.
    #[error("{}: {tensor} is of the unknown type {found}; accepted: {READABLE}", path.display())]
    UnknownDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type as written.
        found: String,
    },
    /// An index or a manifest names a file that cannot be used.
    #[error("{}: names the file {name:?}: {reason}", path.display())]
    FileName {
        /// The index or manifest.
        path: PathBuf,
        /// What it names.
        name: String,
        /// Why that is no file of the folder.
        reason: &'static str,
    },
    /// The tensors in the files are not those of the model.
    #[error("{}: {faults}", dir.display())]
    Tensors {
        /// The folder.
        dir: PathBuf,
        /// Each tensor that is wrong.
        faults: TensorFaults,
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
    /// A directory that should be a checkpoint has no manifest, so it was never completed.
    #[error("{} is no checkpoint: it has no manifest.json", dir.display())]
    NoCheckpoint {
        /// The directory.
        dir: PathBuf,
    },
    /// A checkpoint was written by a later version of this program.
    #[error("{}: format {found}; this version reads formats up to {known}: use a later one", path.display())]
    FutureFormat {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The newest that is read.
        known: u64,
    },
    /// A file is not what was written.
    #[error("{}: damaged: its sha256 is {found}, {expected} was written", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// The hash of what was written.
        expected: String,
        /// The hash of what is there.
        found: String,
    },
    /// The newest checkpoint of a run is damaged.
    #[error("{fault}; {}", older_one(older.as_deref()))]
    NewestDamaged {
        /// What is wrong with it.
        fault: Box<CheckpointError>,
        /// The directory of the one before it.
        older: Option<PathBuf>,
    },
    /// No checkpoint of a run is whole.
    #[error("{}: none of its {count} checkpoints is whole; the newest: {newest}", dir.display())]
    NoneGood {
        /// The directory of the checkpoints.
        dir: PathBuf,
        /// Checkpoints there are.
        count: usize,
        /// What is wrong with the newest.
        newest: Box<CheckpointError>,
    },
    /// A checkpoint is of another model than the run.
    #[error("{} is of another model: {}", dir.display(), listed(differences, "differences"))]
    OtherModel {
        /// The checkpoint.
        dir: PathBuf,
        /// Each key that differs, with both values.
        differences: Vec<String>,
    },
    /// The run directory is not on storage that all ranks see.
    #[error(
        "{} is not the same directory on all ranks: what rank 0 writes there is not seen by {}; use storage that all share",
        dir.display(), listed(ranks, "ranks")
    )]
    NotShared {
        /// The directory.
        dir: PathBuf,
        /// The ranks that do not see it, ascending.
        ranks: Vec<Rank>,
    },
    /// No Hugging Face class of the family computes what the model does.
    #[error("as {family} the model cannot be written: {}; {advice}", listed(reasons, "reasons"))]
    NotExpressible {
        /// The family, by its `model_type`.
        family: &'static str,
        /// Each key that stands against it.
        reasons: Vec<String>,
        /// What could be done.
        advice: String,
    },
    /// A place to write to holds something already.
    #[error("{} is there already; remove it or give another folder", path.display())]
    Exists {
        /// The place.
        path: PathBuf,
    },
    /// What was read back is not what was to be written.
    #[error("{} was not written as it should be, and is removed: {}", dir.display(), listed(differences, "differences"))]
    NotAsRead {
        /// The folder.
        dir: PathBuf,
        /// Each tensor that differs.
        differences: Vec<String>,
    },
    /// A conversion was asked for that cannot be.
    #[error(transparent)]
    Asked(#[from] InvalidValue),
    /// Another rank failed.
    #[error("rank {rank}: {message}")]
    Peer {
        /// World rank.
        rank: Rank,
        /// The class of its error.
        exit_code: u8,
        /// Its error.
        message: String,
    },
    /// Ranks of one world do not understand each other's reports.
    #[error("ranks cannot read each other's reports; are all of the same version? {0}")]
    Exchange(serde_json::Error),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Another rank or the way to it failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The sizes of a config.json do not fit each other.
    #[error("{}: {source}", path.display())]
    ConfigSizes {
        /// The config.json.
        path: PathBuf,
        /// The size, by our name for it.
        source: InvalidValue,
    },
}

impl Classified for CheckpointError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::NoModel { .. }
            | Self::NoCheckpoint { .. }
            | Self::OtherModel { .. }
            | Self::NotShared { .. }
            | Self::NotExpressible { .. }
            | Self::Exists { .. }
            | Self::Asked(_) => ExitCode::Usage,
            Self::Peer { exit_code, .. } => ExitCode::of_number(*exit_code),
            Self::Exchange(_) | Self::Device(_) => ExitCode::Internal,
            Self::Collective(error) => error.exit_code(),
            Self::FutureFormat { .. }
            | Self::Hash { .. }
            | Self::Json { .. }
            | Self::NotSafetensors { .. }
            | Self::Length { .. }
            | Self::UnknownDtype { .. }
            | Self::FileName { .. }
            | Self::Tensors { .. }
            | Self::Config { .. }
            | Self::NewestDamaged { .. }
            | Self::NoneGood { .. }
            | Self::ConfigSizes { .. } => ExitCode::BadData,
            Self::Io { .. } | Self::NotAsRead { .. } => ExitCode::Io,
        }
    }
}

impl CheckpointError {
    /// Whether it says that a checkpoint is not as it was written: a file that is missing, cut off or changed.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::NoCheckpoint { .. }
            | Self::Hash { .. }
            | Self::Json { .. }
            | Self::Length { .. }
            | Self::FileName { .. }
            | Self::NewestDamaged { .. } => true,
            Self::Peer { exit_code, .. } => *exit_code == ExitCode::BadData.number(),
            _ => false,
        }
    }

    /// For `map_err`: the system's refusal to `action` on `path`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// What is wrong with one tensor on disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorFault {
    /// The model has it, the files do not.
    #[error("{name} {expected:?} is missing{}", promised.as_ref().map_or(String::new(), |file| format!(" (the index says it is in {file})")))]
    Missing {
        /// The tensor.
        name: String,
        /// The shape it would have.
        expected: Vec<usize>,
        /// The file that an index names for it.
        promised: Option<String>,
    },
    /// A file has it, the model does not.
    #[error("{name} {shape:?} in {file} is no tensor of this model")]
    Extra {
        /// The tensor.
        name: String,
        /// The file that has it.
        file: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Its shape is not the model's.
    #[error("{name} in {file} has the shape {found:?}, the model needs {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// The file that has it.
        file: String,
        /// The shape on disk.
        found: Vec<usize>,
        /// The shape that the configuration gives it.
        expected: Vec<usize>,
    },
    /// Its type cannot be read.
    #[error("{name} in {file} is of the type {found}; accepted: {READABLE}")]
    Dtype {
        /// The tensor.
        name: String,
        /// The file that has it.
        file: String,
        /// The type on disk.
        found: String,
    },
    /// It should be the embedding's own matrix.
    #[error(
        "{name} in {file} differs from model.embed_tokens.weight, though config.json says tie_word_embeddings = true"
    )]
    Untied {
        /// The tensor.
        name: String,
        /// The file that has it.
        file: String,
    },
    /// Two files have it.
    #[error("{name} is in two files, {} and {}", files[0], files[1])]
    Twice {
        /// The tensor.
        name: String,
        /// The first two files that have it.
        files: [String; 2],
    },
}

/// What to do where the newest checkpoint is damaged.
fn older_one(older: Option<&Path>) -> String {
    match older {
        Some(older) => format!("the one before it is {}: {GO_BACK}", older.display()),
        None => "there is no older one: bring the file back, or begin a new run".to_owned(),
    }
}

/// All tensors that are wrong. Its text lists the first ones and counts the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorFaults(pub Vec<TensorFault>);

/// The most entries that one message lists; a folder of another model would fill the screen.
const MOST_LISTED: usize = 12;

impl fmt::Display for TensorFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&listed(&self.0, "tensors that are wrong"))
    }
}

/// The first entries, and how many more there are.
fn listed<T: ToString>(list: &[T], what: &str) -> String {
    let mut shown: Vec<String> = list.iter().take(MOST_LISTED).map(T::to_string).collect();
    if list.len() > shown.len() {
        shown.push(format!("and {} more {what}", list.len() - shown.len()));
    }
    shown.join("; ")
}
