//! Signals on their way to the ranks.
//!
//! Owns the thread that hears them for the whole life of the command, whichever attempt is running: the first becomes SIGUSR1, which
//! the ranks answer with a checkpoint, the second another SIGUSR1, for which they give up the step, the third SIGTERM. Until all ranks
//! have arrived it is SIGTERM at once: mpirun loses what it cannot pass on yet, and there is no step to finish.

use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moe_runtime::exit::{ExitCode as Code, Failure};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

#[derive(Default)]
struct State {
    asked: u32,
    /// The starter process of the attempt under way. It is not reaped while it stands here.
    child: Option<Pid>,
    /// Whether ranks of that attempt are still awaited.
    forming: Option<Forming>,
}

/// Tells whether ranks are still awaited.
pub(super) type Forming = Box<dyn Fn() -> bool + Send>;

/// What signals have asked so far, and whom to tell.
#[derive(Clone, Default)]
pub(super) struct Stop {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Stop {
    /// Starts to listen.
    pub(super) fn listen() -> Result<Self, Failure> {
        let failed = |error: std::io::Error| Failure::new(Code::Io, format!("cannot listen to signals: {error}"));
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).map_err(failed)?;
        let stop = Self::default();
        let heard = stop.clone();
        let thread = std::thread::Builder::new().name("signals".into());
        thread.spawn(move || signals.forever().for_each(|_| heard.ask())).map_err(failed)?;
        Ok(stop)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self) {
        let mut state = self.state();
        state.asked += 1;
        // mpirun passes USR1 on and returns the ranks' own code; asked to end by TERM, it kills them after a second and returns 1.
        let forming = state.child.is_some() && state.forming.as_ref().is_some_and(|forming| forming());
        let (signal, told) = match state.asked {
            1 | 2 if forming => (Signal::TERM, "ending the ranks, which had not begun"),
            1 => (Signal::USR1, "stopping after this step with a checkpoint; once more gives up the step"),
            2 => (Signal::USR1, "giving up the step; once more kills the ranks"),
            _ => (Signal::TERM, "killing the ranks"),
        };
        eprintln!("moe-launch: {told}");
        if let Some(pid) = state.child {
            // The job may be over already.
            let _ = kill_process(pid, signal);
        }
        self.shared.1.notify_all();
    }

    /// Whether anyone asked the job to stop.
    pub(super) fn is_asked(&self) -> bool {
        self.state().asked > 0
    }

    /// Signals go to `child` from now on, one that came before it was started included.
    pub(super) fn watch(&self, child: &Child, forming: Option<Forming>) {
        let mut state = self.state();
        let pid = Pid::from_child(child);
        (state.child, state.forming) = (Some(pid), forming);
        if state.asked > 0 {
            // Too early for a checkpoint: there is no step to finish yet.
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// The child has ended.
    pub(super) fn unwatch(&self) {
        let mut state = self.state();
        (state.child, state.forming) = (None, None);
    }

    /// Waits for `time`, or until a stop is asked for; returns whether it is.
    pub(super) fn sleep(&self, time: Duration) -> bool {
        let waiting = self.shared.1.wait_timeout_while(self.state(), time, |state| state.asked == 0);
        waiting.unwrap_or_else(PoisonError::into_inner).0.asked > 0
    }
}
