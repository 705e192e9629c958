//! What commands print: stdout, for as long as someone reads it.
//!
//! Owns what becomes of a command whose reader goes away, as `head` does: it ends as other programs do, by SIGPIPE and without a word.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Stdout, Write};

use moe_runtime::exit::{ExitCode, Failure};
use signal_hook::consts::SIGPIPE;
use signal_hook::low_level::emulate_default_handler;

/// Stdout, which ends the process where its reader has gone.
pub(crate) struct Out(Stdout);

/// The [`Out`] of this process.
pub(crate) fn stdout() -> Out {
    Out(io::stdout())
}

impl Out {
    fn still_read<T>(written: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &written
            && error.kind() == ErrorKind::BrokenPipe
        {
            // Does not return. Where it were refused, the error is told like any other.
            emulate_default_handler(SIGPIPE)?;
        }
        written
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::still_read(self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Self::still_read(self.0.flush())
    }
}

/// Prints text as it stands.
pub(crate) fn print(text: Arguments<'_>) -> Result<(), Failure> {
    let mut out = stdout();
    let written = out.write_fmt(text).and_then(|()| out.flush());
    written.map_err(|error| Failure::new(ExitCode::Io, format!("cannot write to stdout: {error}")))
}

/// `say!("format", …)?`: prints a line.
macro_rules! say {
    ($($line:tt)+) => {
        $crate::out::print(format_args!("{}\n", format_args!($($line)+)))
    };
}

pub(crate) use say;
