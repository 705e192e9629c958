//! A configuration value that cannot be, named by its key.

/// A size that cannot be: the key, what it is, why not, and what would do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{key} = {value}: {reason}")]
pub struct InvalidValue {
    /// The configuration key, dotted.
    pub key: String,
    /// What was found.
    pub value: String,
    /// Why it cannot be and what would be accepted.
    pub reason: String,
}

impl InvalidValue {
    /// An error for `key`.
    pub fn new(key: &str, value: impl ToString, reason: impl Into<String>) -> Self {
        Self { key: key.into(), value: value.to_string(), reason: reason.into() }
    }
}
