//! `coordinator.json` in a run directory: how tools on this machine find the coordinator of a run.
//!
//! Owns writing it so that no one else can read the token and no one ever sees half a file. It never connects.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::token::JoinToken;
use crate::exit::{Classified, ExitCode};

/// Who coordinates a run, and how to be let in.
#[derive(Debug, Clone)]
pub struct ContactFile {
    /// `HOST:PORT` of the coordinator, as workers and operators reach it.
    pub addr: String,
    /// The join token.
    pub token: JoinToken,
    /// Process id of the host of the coordinator.
    pub pid: u32,
}

/// A contact file that cannot be written or used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContactError {
    /// There is none.
    #[error("{path} does not exist; is this the directory of a run that was started, and does it still run?")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {doing} {path}: {reason}")]
    Io {
        /// "read", "write"…
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// It holds something else.
    #[error("{path} is not a contact file: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never its content.
        reason: String,
    },
}

impl Classified for ContactError {
    fn exit_code(&self) -> ExitCode {
        if matches!(self, Self::Malformed { .. }) { ExitCode::BadData } else { ExitCode::Io }
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    addr: String,
    token: String,
    pid: u32,
}

impl ContactFile {
    /// The file's name in the run directory.
    pub const NAME: &'static str = "coordinator.json";

    /// Writes the file into `run_dir`, readable by its owner only (mode 0600), replacing an earlier one as a whole. Returns its path.
    pub fn write(&self, run_dir: &Path) -> Result<PathBuf, ContactError> {
        let path = run_dir.join(Self::NAME);
        let text = Text { addr: self.addr.clone(), token: self.token.expose(), pid: self.pid };
        let bytes = serde_json::to_vec_pretty(&text)
            .map_err(|error| ContactError::Malformed { path: path.clone(), reason: error.to_string() })?;
        let temporary = run_dir.join(format!(".{}.{}", Self::NAME, std::process::id()));
        let written = replace(&temporary, &path, &bytes);
        if written.is_err() {
            // The reason for the failure is worth more than that of the clean-up.
            let _ = std::fs::remove_file(&temporary);
        }
        written.map_err(|error| ContactError::Io { doing: "write", path: path.clone(), reason: error.to_string() })?;
        Ok(path)
    }

    /// Reads the file of a run.
    pub fn read(run_dir: &Path) -> Result<Self, ContactError> {
        let path = run_dir.join(Self::NAME);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ContactError::Missing { path }),
            Err(error) => return Err(ContactError::Io { doing: "read", path, reason: error.to_string() }),
        };
        // serde_json's text may quote a value, which may be the token: only the place is told.
        let text: Text = serde_json::from_slice(&bytes).map_err(|error| ContactError::Malformed {
            path: path.clone(),
            reason: format!("line {}, column {}: expected the keys addr, token and pid", error.line(), error.column()),
        })?;
        let token = text
            .token
            .parse()
            .map_err(|error: super::token::BadToken| ContactError::Malformed { path, reason: error.to_string() })?;
        Ok(Self { addr: text.addr, token, pid: text.pid })
    }
}

fn replace(temporary: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    // A leftover of a process with this id is no one's any more; create_new makes sure that the mode below is the file's.
    match std::fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_contact_file_is_private_whole_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        for pid in [1, 2] {
            let contact = ContactFile { addr: "node07:7400".to_owned(), token: JoinToken::generate(), pid };
            let path = contact.write(dir.path()).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            let again = ContactFile::read(dir.path()).unwrap();
            assert!(again.token.matches(&contact.token));
            assert_eq!((again.addr, again.pid), (contact.addr, pid));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing but the file stays");
    }

    #[test]
    fn each_way_a_contact_file_can_be_wrong_has_its_message_and_none_repeats_the_token() {
        let dir = tempfile::tempdir().unwrap();
        let missing = ContactFile::read(dir.path()).unwrap_err();
        assert!(matches!(missing, ContactError::Missing { .. }) && missing.exit_code() == ExitCode::Io);
        let secret = "00112233445566778899aabbccddee";
        let table = [
            ("{".to_owned(), "line 1"),
            (format!("{{\"addr\": \"a:1\", \"token\": \"{secret}\", \"pid\": 1}}"), "30 characters"),
            (format!("{{\"addr\": \"a:1\", \"token\": [\"{secret}\"], \"pid\": 1}}"), "expected the keys"),
            ("{\"addr\": \"a:1\"}".to_owned(), "expected the keys"),
        ];
        for (text, expected) in table {
            std::fs::write(dir.path().join(ContactFile::NAME), &text).unwrap();
            let error = ContactFile::read(dir.path()).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::BadData);
            let message = error.to_string();
            assert!(message.contains(expected) && !message.contains(secret), "{message}");
        }
        let nowhere = dir.path().join("absent");
        let contact = ContactFile { addr: String::new(), token: JoinToken::generate(), pid: 1 };
        assert!(matches!(contact.write(&nowhere).unwrap_err(), ContactError::Io { doing: "write", .. }));
    }
}
