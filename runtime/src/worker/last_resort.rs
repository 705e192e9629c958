//! The end of a process that does not end by itself after a failure.
//!
//! Owns the last deadline: waits of ours have theirs, a driver's do not. It frees memory when the GPU is idle, and what keeps that busy may
//! wait for a peer that is gone.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use signal_hook::low_level;

use crate::collectives::{CollectiveError, Context};
use crate::exit::Classified;

/// What the process has to end in order, from the moment that its collectives are given up. What it does first may be to finish a computation.
const GRACE: Duration = Duration::from_secs(30);
/// How often the watch looks.
const LOOK: Duration = Duration::from_millis(200);

/// The watch; nothing happens once it is dropped.
pub(super) struct LastResort {
    _over: Sender<()>,
}

impl LastResort {
    /// Ends the process of `who` with the abort's exit code if it is still there [`GRACE`] after `context` was aborted: without destructors,
    /// which may be what it hangs in.
    ///
    /// # Errors
    /// The system's, where it has no thread left.
    pub(super) fn watch(context: Context, who: String) -> io::Result<Self> {
        Self::watch_for(context, GRACE, move |error| {
            let seconds = GRACE.as_secs();
            // In one piece: ranks share the terminal.
            let line = format!("error: {who}{error}; this process has not ended by itself within {seconds} s\n");
            eprint!("{line}");
            low_level::exit(i32::from(error.exit_code().number()))
        })
    }

    fn watch_for(
        context: Context,
        grace: Duration,
        end: impl FnOnce(CollectiveError) + Send + 'static,
    ) -> io::Result<Self> {
        let (over, still) = mpsc::channel::<()>();
        let watch = move || {
            let goes_on = |time| still.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
            while goes_on(LOOK) {
                let Some(error) = context.aborted() else { continue };
                if goes_on(grace) {
                    end(error);
                }
                return;
            }
        };
        std::thread::Builder::new().name("last-resort".into()).spawn(watch)?;
        Ok(Self { _over: over })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Rank;

    /// What a process that goes on for `lives` after an abort is ended with, if it is.
    fn ended(aborts: bool, lives: Duration) -> Option<CollectiveError> {
        let context = Context::new(Duration::from_secs(60));
        let (tell, told) = mpsc::channel();
        let watch = LastResort::watch_for(context.clone(), Duration::from_millis(300), move |error| {
            // The test looks for as long as this may take.
            let _ = tell.send(error);
        });
        let watch = watch.expect("a thread");
        if aborts {
            context.abort_handle().abort(Some(Rank(3)), "lease expired");
        }
        let error = told.recv_timeout(lives).ok();
        drop(watch);
        error.or_else(|| told.recv_timeout(Duration::from_secs(2)).ok())
    }

    #[test]
    fn a_process_that_hangs_after_an_abort_is_ended_with_its_reason() {
        let error = ended(true, Duration::from_secs(20)).expect("an end");
        assert_eq!(error.to_string(), "collectives were aborted because of rank 3: lease expired");
        assert_eq!(error.exit_code().number(), 75);
    }

    #[test]
    fn a_process_that_ends_in_time_or_was_not_aborted_is_left_alone() {
        assert!(ended(true, Duration::ZERO).is_none());
        assert!(ended(false, Duration::from_secs(1)).is_none());
    }
}
