//! Log lines: who speaks, how loudly, and in which form.
//!
//! Owns the set-up of `tracing`. Lines go to stderr and to a file of the run; each carries its rank. Rank 0 tells what happens,
//! the others only what is wrong, unless they are asked for more.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use super::console::{Console, LogLine};
use crate::exit::{Classified, ExitCode};

/// Logging that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `RUST_LOG` is not a filter.
    #[error("RUST_LOG={text}: {reason}; for example RUST_LOG=debug or RUST_LOG=moe_runtime=trace")]
    Filter {
        /// Its value.
        text: String,
        /// What is wrong.
        reason: String,
    },
    /// The log file cannot be opened.
    #[error("{}: cannot be opened: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        reason: io::Error,
    },
    /// It is set up already.
    #[error("logging is set up twice in one process")]
    Twice,
}

impl Classified for LogError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Filter { .. } => ExitCode::Usage,
            Self::File { .. } => ExitCode::Io,
            Self::Twice => ExitCode::Internal,
        }
    }
}

/// What `rank` logs: `rust_log`, the value of `RUST_LOG`, where it is set; otherwise information on rank 0 and warnings elsewhere,
/// one level more for each `-v`. Crates from outside stay at warnings until the third `-v`.
pub fn log_filter(rank: usize, verbosity: u8, rust_log: Option<&str>) -> String {
    if let Some(filter) = rust_log.filter(|filter| !filter.trim().is_empty()) {
        return filter.into();
    }
    let start = if rank == 0 { 1 } else { 0 };
    let level = ["warn", "info", "debug", "trace"][usize::from(verbosity).saturating_add(start).min(3)];
    let others = if verbosity >= 3 { "debug" } else { "warn" };
    let ours = ["moe_runtime", "moe_worker", "moe_launcher", "moe_launch", "moe_proto", "moe_kernels"];
    ours.iter().fold(others.to_owned(), |filter, name| format!("{filter},{name}={level}"))
}

/// Sets logging up for this process, once: lines of `filter` (see [`log_filter`]) to stderr through `console`, and details to
/// the file that the returned value is given once there is a run directory.
pub fn init_logs(rank: usize, filter: &str, console: &Console) -> Result<LogFile, LogError> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| LogError::Filter { text: filter.into(), reason: error.to_string() })?;
    let console = console.clone();
    let format = || RankFormat { rank, inner: Format::default() };
    let stderr = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(move || LogLine::new(console.clone()))
        .event_format(format())
        .with_filter(filter);
    let file = LogFile::default();
    let sink = file.clone();
    let file_layer = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(move || sink.clone())
        .event_format(format())
        .with_filter(EnvFilter::new(log_filter(0, 1, None)));
    tracing_subscriber::registry().with(stderr).with(file_layer).try_init().map_err(|_| LogError::Twice)?;
    Ok(file)
}

/// A log file that is named after logging began; lines before that are on stderr only. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LogFile(Arc<OnceLock<Mutex<File>>>);

impl LogFile {
    /// Appends all further lines to `path`. The first path stays.
    pub fn write_to(&self, path: &Path) -> Result<(), LogError> {
        let file = File::options().create(true).append(true).open(path);
        let file = file.map_err(|reason| LogError::File { path: path.into(), reason })?;
        // A second file is not an error: the first keeps the lines together.
        let _ = self.0.set(Mutex::new(file));
        Ok(())
    }
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.get() {
            None => Ok(bytes.len()),
            Some(file) => file.lock().unwrap_or_else(PoisonError::into_inner).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The usual format with the rank in front: on every thread, which a span would not be.
struct RankFormat {
    rank: usize,
    inner: Format,
}

impl<S, N> FormatEvent<S, N> for RankFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        write!(writer, "rank={} ", self.rank)?;
        self.inner.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_zero_tells_and_the_others_warn() {
        assert!(log_filter(0, 0, None).ends_with(
            "moe_runtime=info,moe_worker=info,moe_launcher=info,moe_launch=info,moe_proto=info,moe_kernels=info"
        ));
        assert!(log_filter(3, 0, Some(" ")).contains("moe_runtime=warn"));
        assert!(log_filter(3, 1, None).contains("moe_runtime=info"));
        assert!(log_filter(0, 200, None).starts_with("debug,moe_runtime=trace"));
        assert_eq!(log_filter(3, 0, Some("trace")), "trace");
        for verbosity in 0..5 {
            EnvFilter::try_new(log_filter(0, verbosity, None)).unwrap();
        }
    }

    #[test]
    fn a_filter_that_is_none_is_refused() {
        let error = init_logs(0, "moe_runtime=loud", &Console::new()).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Usage);
        assert!(error.to_string().starts_with("RUST_LOG=moe_runtime=loud: "), "{error}");
    }

    #[test]
    fn lines_reach_the_file_once_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut file) = (dir.path().join("rank.log"), LogFile::default());
        file.write_all(b"early").unwrap();
        file.write_to(&path).unwrap();
        file.write_all(b"late").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "late");
        let error = LogFile::default().write_to(&dir.path().join("no/such")).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Io);
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_carries_its_rank_on_every_thread() {
        let shared = Shared::default();
        let writer = shared.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .event_format(RankFormat { rank: 5, inner: Format::default() })
            .finish();
        let dispatch = tracing::Dispatch::new(subscriber);
        let work = move || tracing::dispatcher::with_default(&dispatch, || tracing::warn!(step = 7, "slow"));
        std::thread::spawn(work).join().unwrap();
        let text = String::from_utf8(shared.0.lock().unwrap().clone()).unwrap();
        assert!(text.starts_with("rank=5 ") && text.contains("WARN") && text.contains("slow step=7"), "{text}");
    }
}
