//! The end of a process that does not end by itself after a failure.
//!
//! Owns the last deadline: waits of ours have theirs, a driver's do not. It frees memory when the GPU is idle, and what keeps that busy may
//! wait for a peer that is gone.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use signal_hook::low_level;

use crate::collectives::{CollectiveError, Context};
use crate::exit::ExitCode;

/// What the process has to end in order, from the moment that its collectives are given up. What it does first may be to finish a computation.
const GRACE: Duration = Duration::from_secs(30);
/// How often the watch looks.
const LOOK: Duration = Duration::from_millis(200);

/// The watch; nothing happens once it is dropped.
pub(super) struct LastResort {
    _over: Sender<()>,
    code: Arc<AtomicU8>,
}

impl LastResort {
    /// Ends the process of `who` if it is still there [`GRACE`] after `context` was aborted: without destructors,
    /// which may be what it hangs in.
    ///
    /// # Errors
    /// The system's, where it has no thread left.
    pub(super) fn watch(context: Context, who: String) -> io::Result<Self> {
        Self::watch_for(context, GRACE, move |code, error| {
            let seconds = GRACE.as_secs();
            // In one piece: ranks share the terminal.
            let line = format!("error: {who}{error}; this process has not ended by itself within {seconds} s\n");
            eprint!("{line}");
            low_level::exit(i32::from(code))
        })
    }

    /// The exit code of a failure of this rank's own, which comes before the abort that follows from it.
    pub(super) fn end_with(&self, code: ExitCode) {
        self.code.store(code.number(), Ordering::Release);
    }

    fn watch_for(
        context: Context,
        grace: Duration,
        end: impl FnOnce(u8, CollectiveError) + Send + 'static,
    ) -> io::Result<Self> {
        let (over, still) = mpsc::channel::<()>();
        // An abort by others may be tried again.
        let code = Arc::new(AtomicU8::new(ExitCode::Temporary.number()));
        let known = Arc::clone(&code);
        let watch = move || {
            let goes_on = |time| still.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
            while goes_on(LOOK) {
                let Some(error) = context.aborted() else { continue };
                if goes_on(grace) {
                    end(known.load(Ordering::Acquire), error);
                }
                return;
            }
        };
        std::thread::Builder::new().name("last-resort".into()).spawn(watch)?;
        Ok(Self { _over: over, code })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Rank;

    /// How a process is ended that goes on for `lives` after an abort and has `grace`.
    fn ended(aborts: bool, own: Option<ExitCode>, (grace, lives): (u64, u64)) -> Option<(u8, String)> {
        let (grace, lives) = (Duration::from_millis(grace), Duration::from_millis(lives));
        let context = Context::new(Duration::from_secs(60));
        let (tell, told) = mpsc::channel();
        let watch = LastResort::watch_for(context.clone(), grace, move |code, error| {
            // The test looks for as long as this may take.
            let _ = tell.send((code, error.to_string()));
        });
        let watch = watch.expect("a thread");
        own.into_iter().for_each(|code| watch.end_with(code));
        if aborts {
            context.abort_handle().abort(Some(Rank(3)), "lease expired");
        }
        let end = told.recv_timeout(lives).ok();
        drop(watch);
        // The thread ends, or has its say: the channel closes.
        end.or_else(|| told.recv_timeout(Duration::from_secs(20)).ok())
    }

    #[test]
    fn a_process_that_hangs_after_an_abort_is_ended_with_its_reason() {
        let reason = "collectives were aborted because of rank 3: lease expired".to_owned();
        assert_eq!(ended(true, None, (300, 20_000)), Some((75, reason.clone())));
        assert_eq!(ended(true, Some(ExitCode::Io), (300, 20_000)), Some((74, reason)));
    }

    #[test]
    fn a_process_that_ends_in_time_or_was_not_aborted_is_left_alone() {
        // The abort is seen, and the end comes long before the grace is over.
        assert_eq!(ended(true, None, (10_000, 1000)), None);
        assert_eq!(ended(false, None, (10, 1000)), None);
    }
}
