//! Signals: a graceful stop, and an immediate one.
//!
//! Owns the thread that hears them. SIGUSR1 and SIGINT ask for a stop after the step; a second one, or SIGTERM, ends every wait for
//! peers at once, so that the step is given up.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

use crate::collectives::AbortHandle;

/// What signals have asked so far.
#[derive(Clone, Debug, Default)]
pub(super) struct StopRequest {
    graceful: Arc<AtomicBool>,
    immediate: Arc<AtomicBool>,
}

impl StopRequest {
    /// Starts listening. An immediate stop breaks the waits of `abort`'s collectives.
    pub(super) fn listen(abort: AbortHandle) -> io::Result<Self> {
        let request = Self::default();
        let heard = request.clone();
        let mut signals = Signals::new([SIGUSR1, SIGINT, SIGTERM])?;
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                let again = heard.graceful.swap(true, Ordering::Relaxed);
                let name = signal_name(signal).unwrap_or("a signal");
                if again || signal == SIGTERM {
                    heard.immediate.store(true, Ordering::Relaxed);
                    abort.abort(None, format!("stopped by {name}"));
                } else {
                    tracing::info!(
                        "{name}: this step is finished and a checkpoint written; a second signal gives the step up"
                    );
                }
            }
        })?;
        Ok(request)
    }

    /// Whether to stop after the step.
    pub(super) fn graceful(&self) -> bool {
        self.graceful.load(Ordering::Relaxed)
    }

    /// Whether to stop without finishing it.
    pub(super) fn immediate(&self) -> bool {
        self.immediate.load(Ordering::Relaxed)
    }
}
