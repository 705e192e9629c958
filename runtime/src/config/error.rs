//! What is wrong with a configuration, and who said it.

use std::fmt;
use std::path::PathBuf;

use super::Difference;
use crate::exit::{Classified, ExitCode};
use crate::invalid::InvalidValue;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A preset, by name.
    Preset(String),
    /// The configuration of the run that is resumed.
    Run(PathBuf),
    /// A model folder.
    Model(PathBuf),
    /// The configuration file.
    File(PathBuf),
    /// `--set`.
    Set,
    /// A flag of its own, such as `--steps`.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Preset(name) => write!(f, "preset {name}"),
            Self::Run(path) | Self::Model(path) | Self::File(path) => write!(f, "{}", path.display()),
            Self::Set => f.write_str("--set"),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// A configuration that cannot be used. Each message is one line that says where, which key, which value, why and what would
/// do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: cannot be read: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        reason: std::io::Error,
    },
    /// The file is not UTF-8.
    #[error("{}: byte {offset} is not UTF-8; a configuration is UTF-8 text in TOML", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first byte that is not, from 0.
        offset: usize,
    },
    /// The file is not TOML.
    #[error("{}:{line}:{column}: not TOML: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// The parser's reason.
        reason: String,
    },
    /// An argument of `--set` that is no assignment.
    #[error("--set {text}: {reason}; write --set section.key=value, for example --set train.steps=100")]
    Assignment {
        /// The argument.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A preset that does not exist.
    #[error("{origin}: preset = {name:?}: there is no such preset; {advice}")]
    UnknownPreset {
        /// Who named it.
        origin: Origin,
        /// The name.
        name: String,
        /// The nearest name, or all of them.
        advice: String,
    },
    /// A key or section that does not exist.
    #[error("{origin}: {key} = {value}: there is no such key; {advice}")]
    UnknownKey {
        /// Who set it.
        origin: Origin,
        /// The key, dotted.
        key: String,
        /// Its value.
        value: String,
        /// The nearest key, or where to look.
        advice: String,
    },
    /// A value of the wrong type, out of range, or at odds with another.
    #[error("{origin}: {invalid}")]
    Value {
        /// Who set it.
        origin: Origin,
        /// Key, value, why it cannot be and what would do.
        invalid: InvalidValue,
    },
    /// A resumed run was started with other settings.
    #[error(
        "{}: the run was started with other settings: {}; only where the text lies, train.steps, train.precision, train.recompute, parallel.*, run.* and how often things are \
         logged, evaluated and saved may change", path.display(), list(differences)
    )]
    NotResumable {
        /// The configuration of the run.
        path: PathBuf,
        /// What differs.
        differences: Vec<Difference>,
    },
    /// A value that TOML cannot hold, such as a path that is not UTF-8.
    #[error("the configuration cannot be written as TOML: {reason}")]
    NotToml {
        /// The writer's reason.
        reason: String,
    },
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join(", ")
}

impl Classified for ConfigError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Unreadable { .. } => ExitCode::Io,
            _ => ExitCode::Usage,
        }
    }
}
