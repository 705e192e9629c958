//! Exit codes: what mpirun, Slurm and Kubernetes are told about how a worker ended.
//!
//! Owns the classes and the way an error names its own. It decides no policy and prints nothing: what retries a job reads the
//! number.

use std::error::Error;
use std::fmt;

use crate::invalid::InvalidValue;

/// How a program ended; the numbers are those of `sysexits.h` and stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitCode {
    /// All that was asked for is done.
    Done = 0,
    /// Wrong usage or configuration: the same command fails again, never retry it.
    Usage = 64,
    /// Input data that cannot be used as asked.
    BadData = 65,
    /// An internal error: a fault of this program.
    Internal = 70,
    /// An input or output error: a missing file, a full disk.
    Io = 74,
    /// A temporary failure, retry: a lost peer, or preempted after a checkpoint was written.
    Temporary = 75,
    /// Refused: a join token or certificate that does not fit.
    Refused = 77,
}

impl ExitCode {
    /// The number the process ends with.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The code with this number, as another rank told it; an unknown one is an internal error.
    pub fn of_number(number: u8) -> Self {
        let all = [Self::Done, Self::Usage, Self::BadData, Self::Io, Self::Temporary, Self::Refused];
        all.into_iter().find(|code| code.number() == number).unwrap_or(Self::Internal)
    }

    /// Whether starting the same command again can help.
    pub fn is_retryable(self) -> bool {
        self == Self::Temporary
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.number())
    }
}

/// An error that knows its class. Every error type that can end a program implements it, next to its definition.
pub trait Classified: Error {
    /// The code the program ends with when this error ends it.
    fn exit_code(&self) -> ExitCode;
}

impl Classified for InvalidValue {
    fn exit_code(&self) -> ExitCode {
        ExitCode::Usage
    }
}

/// Any classified error on its way to `main`: `?` turns one into it, as with `anyhow`, and the class is kept.
///
/// It is no [`Error`] itself, so that the conversion below cannot overlap with itself.
pub struct Failure {
    code: ExitCode,
    error: Box<dyn Error + Send + Sync>,
    told_elsewhere: bool,
}

impl Failure {
    /// A failure of class `code`, where no error type stands behind it.
    pub fn new(code: ExitCode, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code, error: error.into(), told_elsewhere: false }
    }

    /// A failure that another rank met and tells the user about: this one only leaves with the same code.
    pub fn of_another_rank(number: u8) -> Self {
        let code = ExitCode::of_number(number);
        Self { code, error: "another rank could not go on".into(), told_elsewhere: true }
    }

    /// Whether another rank tells the user.
    pub fn is_told_elsewhere(&self) -> bool {
        self.told_elsewhere
    }

    /// The code to end with.
    pub fn exit_code(&self) -> ExitCode {
        self.code
    }

    /// The error itself.
    pub fn error(&self) -> &(dyn Error + Send + Sync + 'static) {
        self.error.as_ref()
    }
}

impl<E: Classified + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error.exit_code(), error)
    }
}

/// Does `work`, and makes a panic in it, which has said its reason by then, an internal failure. Nothing that `work` has touched may
/// be used after that: the caller ends the process.
pub fn caught<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Failure::new(ExitCode::Internal, "a fault of this program, described above; please report it"))
    })
}

/// The message with its causes, on one line: causes that a message already contains are not said twice.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.error.to_string();
        f.write_str(&said)?;
        let mut cause = self.error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} (exit {})", self.code.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_that_job_managers_act_on() {
        use ExitCode::*;
        let numbers = [Done, Usage, BadData, Internal, Io, Temporary, Refused].map(ExitCode::number);
        assert_eq!(numbers, [0, 64, 65, 70, 74, 75, 77]);
        assert!([Done, Usage, BadData, Internal, Io, Refused].iter().all(|code| !code.is_retryable()));
    }

    #[test]
    fn an_error_keeps_its_class_and_message_on_the_way_up() {
        fn fails() -> Result<(), Failure> {
            Err(InvalidValue::new("model.top_k", 9, "too many"))?;
            Ok(())
        }
        let failure = fails().unwrap_err();
        assert_eq!(failure.exit_code(), ExitCode::Usage);
        assert_eq!(failure.to_string(), "model.top_k = 9: too many");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read a")]
    struct Outer(#[source] std::io::Error);

    impl Classified for Outer {
        fn exit_code(&self) -> ExitCode {
            ExitCode::Io
        }
    }

    #[test]
    fn a_panic_is_an_internal_error() {
        assert_eq!(caught(|| Ok(3)).unwrap(), 3);
        let failure = caught::<()>(|| panic!("on purpose")).unwrap_err();
        assert_eq!(failure.exit_code(), ExitCode::Internal);
    }

    #[test]
    fn causes_are_told_once() {
        let failure = Failure::from(Outer(std::io::Error::other("no space")));
        assert_eq!(failure.to_string(), "cannot read a: no space");
    }
}
