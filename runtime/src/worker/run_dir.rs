//! The run directory: where it is, whose it is, what is in it.
//!
//! Owns its layout and its lock: `config.toml` as resolved, `metrics.jsonl`, `balance.jsonl`, `checkpoints/`, `logs/`, `tokenizer/`, `coordinator.json`.
//! Rank 0 makes it; the others are told its path.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use crate::config::{Config, ConfigBuilder, ConfigError};
use crate::data::{FileTokenizer, is_path};
use crate::exit::{Classified, ExitCode};

/// A run directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The system refuses.
    #[error("{}: cannot be {action}: {reason}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        #[source]
        reason: io::Error,
    },
    /// There is something else by that name.
    #[error("{}: is a file; a run needs a directory, which may not exist yet", path.display())]
    NotADirectory {
        /// What was named.
        path: PathBuf,
    },
    /// Another job holds the lock.
    #[error("{}: in use by another job; wait for it, stop it, or give another --run-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// It holds checkpoints, and what they were trained with is not known.
    #[error(
        "{}: {}, and without it a run would go on from {} with other settings; bring it back, or begin a new run",
        path.display(),
        if path.exists() { "is empty" } else { "is missing" },
        checkpoint.display()
    )]
    NoSettings {
        /// The configuration that should be there.
        path: PathBuf,
        /// The newest checkpoint.
        checkpoint: PathBuf,
    },
    /// It holds a run without checkpoints, and the last good one was asked for.
    #[error("{}: holds no checkpoint to go on from; leave out --resume last-good to begin the run again", path.display())]
    NothingToResume {
        /// Where checkpoints should be.
        path: PathBuf,
    },
    /// It holds a run, and resuming was switched off.
    #[error("{}: holds a run already; leave out --resume never to continue it, or give another --run-dir", path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
}

impl Classified for RunDirError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Io { .. } | Self::NotADirectory { .. } => ExitCode::Io,
            Self::InUse { .. } => ExitCode::Temporary,
            Self::NoSettings { .. } | Self::NothingToResume { .. } => ExitCode::BadData,
            Self::Occupied { .. } => ExitCode::Usage,
        }
    }
}

/// A run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Where runs without a directory of their own go.
    pub const PARENT: &'static str = "runs";

    /// The directory at `path`, which may not exist yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Makes a directory of a number that is not taken: `runs/run-0001`, `runs/run-0002`…
    pub fn fresh() -> Result<Self, RunDirError> {
        make(Path::new(Self::PARENT))?;
        for number in 1.. {
            let path = Path::new(Self::PARENT).join(format!("run-{number:04}"));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(reason) => return Err(RunDirError::Io { path, action: "made", reason }),
            }
        }
        unreachable!("numbers do not end")
    }

    /// Makes the directory and what is in it, and takes its lock, which is held until the returned file is dropped.
    pub fn claim(&self) -> Result<File, RunDirError> {
        for path in [self.path.clone(), self.checkpoints(), self.logs()] {
            make(&path)?;
        }
        let path = self.path.join("lock");
        let failed = |action, reason| RunDirError::Io { path: path.clone(), action, reason };
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|reason| failed("opened", reason))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(RunDirError::InUse { path: self.path.clone() }),
            Err(TryLockError::Error(reason)) => Err(failed("locked", reason)),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration as resolved.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// One JSON object a step.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// How experts were used, one JSON object every `run.balance_every` steps.
    pub fn balance(&self) -> PathBuf {
        self.path.join("balance.jsonl")
    }

    /// One directory a checkpoint.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// A copy of the tokenizer's files, where the run was not trained on bytes.
    pub fn tokenizer(&self) -> PathBuf {
        self.path.join("tokenizer")
    }

    /// Where the tokenizer called `name` is kept, which the run was configured with: None where there is no copy.
    pub fn kept_tokenizer(&self, name: &str) -> Option<PathBuf> {
        let copy = self.tokenizer().join(FileTokenizer::FILE);
        (is_path(name) && copy.is_file()).then_some(copy)
    }

    /// Event files, where `run.tensorboard` asks for them.
    pub fn tensorboard(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    /// One file a rank, added to by each start.
    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// The configuration of the run that is here, if there is one.
    pub fn saved_config(&self) -> Result<Option<Config>, ConfigError> {
        let path = self.config();
        // None is written empty: such a one is what a full disk or an accident left.
        if fs::metadata(&path).map_or(true, |file| file.len() == 0) {
            return Ok(None);
        }
        Ok(Some(ConfigBuilder::new().file(path).build()?.config))
    }

    /// Writes the configuration, as a whole or not at all.
    pub fn save_config(&self, config: &Config) -> Result<(), SaveError> {
        let text = config.to_toml()?;
        let (path, temporary) = (self.config(), self.path.join(".config.toml.new"));
        let written = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path));
        if let Err(reason) = written {
            // What cannot be removed is hidden, and replaced by the next start.
            let _ = fs::remove_file(&temporary);
            return Err(RunDirError::Io { path, action: "written", reason }.into());
        }
        Ok(())
    }
}

/// A configuration that could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It cannot be written as TOML.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file cannot be written.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
}

impl Classified for SaveError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(error) => error.exit_code(),
            Self::RunDir(error) => error.exit_code(),
        }
    }
}

fn make(path: &Path) -> Result<(), RunDirError> {
    if path.is_file() {
        return Err(RunDirError::NotADirectory { path: path.into() });
    }
    fs::create_dir_all(path).map_err(|reason| RunDirError::Io { path: path.into(), action: "made", reason })
}
