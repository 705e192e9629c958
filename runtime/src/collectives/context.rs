//! What the groups of one worker share while they wait: deadline, step, and the abort that ends every wait.
//!
//! Owns the patience of a waiting rank. It never sends or receives, and never decides that a run is over: the coordination
//! thread does, through an [`AbortHandle`].

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::CollectiveError;
use crate::topology::Rank;

/// How long a collective waits for its peers unless told otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);

/// The waiting rules of one worker, shared by all its groups. Clones are the same context.
#[derive(Clone, Debug)]
pub struct Context(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    deadline_ns: AtomicU64,
    step: AtomicU64,
    layer: AtomicUsize,
    abort: OnceLock<Abort>,
}

/// What `layer` holds where there is none.
const NO_LAYER: usize = usize::MAX;

#[derive(Debug)]
struct Abort {
    culprit: Option<Rank>,
    reason: String,
}

impl Default for Context {
    fn default() -> Self {
        Self::new(DEFAULT_DEADLINE)
    }
}

impl Context {
    /// A context at step 0 whose collectives give up after `deadline`.
    pub fn new(deadline: Duration) -> Self {
        let shared = Shared {
            deadline_ns: AtomicU64::new(nanos(deadline)),
            step: AtomicU64::new(0),
            layer: AtomicUsize::new(NO_LAYER),
            abort: OnceLock::new(),
        };
        Self(Arc::new(shared))
    }

    /// How long one collective may take on this rank, from its call to its end.
    pub fn deadline(&self) -> Duration {
        Duration::from_nanos(self.0.deadline_ns.load(Ordering::Relaxed))
    }

    /// Changes the deadline for collectives that begin from now on, for a phase in which peers are known to be slow.
    pub fn set_deadline(&self, deadline: Duration) {
        self.0.deadline_ns.store(nanos(deadline), Ordering::Relaxed);
    }

    /// The step that errors will name.
    pub fn step(&self) -> u64 {
        self.0.step.load(Ordering::Relaxed)
    }

    /// Called by the training loop as it begins `step`.
    pub fn set_step(&self, step: u64) {
        self.0.step.store(step, Ordering::Relaxed);
    }

    /// The layer that errors will name, if any.
    pub fn layer(&self) -> Option<usize> {
        Some(self.0.layer.load(Ordering::Relaxed)).filter(|layer| *layer != NO_LAYER)
    }

    /// Called by whoever issues collectives for a layer, and with none after it.
    pub fn set_layer(&self, layer: Option<usize>) {
        self.0.layer.store(layer.unwrap_or(NO_LAYER), Ordering::Relaxed);
    }

    /// A handle that ends every wait of this worker, for another thread.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(Arc::clone(&self.0))
    }

    /// The abort, once there is one. After a device queue was synchronised, look here before trusting what arrived.
    pub fn aborted(&self) -> Option<CollectiveError> {
        let Abort { culprit, reason } = self.0.abort.get()?;
        Some(CollectiveError::Aborted { culprit: *culprit, reason: reason.clone() })
    }
}

/// Ends every present and future wait of one worker with [`CollectiveError::Aborted`]. There is no way back: a re-formed
/// topology gets a new [`Context`].
#[derive(Clone, Debug)]
pub struct AbortHandle(Arc<Shared>);

impl AbortHandle {
    /// Aborts. The first call wins: what follows is usually its consequence.
    pub fn abort(&self, culprit: Option<Rank>, reason: impl Into<String>) {
        // Losing the race is fine: the other abort is at least as good a reason.
        let _ = self.0.abort.set(Abort { culprit, reason: reason.into() });
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Time without progress during which a wait keeps its core: what a peer on its own core needs to answer.
const SPIN: Duration = Duration::from_micros(20);
/// Time after which a wait stops asking for its core at all; until then it offers it to whoever else is ready.
const YIELD: Duration = Duration::from_millis(1);
/// The longest nap between two looks; bounds what a late message costs.
const LONGEST_NAP: Duration = Duration::from_micros(100);

/// How a rank waits between two looks at its messages: spin, then yield, then nap ever longer.
///
/// With a core for each rank nearly all waits end in the first phase. With many ranks on a core, a spinning rank would hold
/// up the very peer it waits for, so the later phases let go of it.
pub(super) struct Patience {
    idle_since: Instant,
    nap: Duration,
}

impl Patience {
    pub(super) fn new() -> Self {
        Self { idle_since: Instant::now(), nap: Duration::from_micros(10) }
    }

    /// Something arrived: the next one is probably near.
    pub(super) fn progressed(&mut self) {
        *self = Self::new();
    }

    pub(super) fn pause(&mut self) {
        let idle = self.idle_since.elapsed();
        if idle < SPIN {
            std::hint::spin_loop();
        } else if idle < YIELD {
            std::thread::yield_now();
        } else {
            std::thread::sleep(self.nap);
            self.nap = (self.nap * 2).min(LONGEST_NAP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_abort_is_the_one_reported() {
        let context = Context::default();
        assert!(context.aborted().is_none());
        context.abort_handle().abort(Some(Rank(3)), "lease expired");
        context.clone().abort_handle().abort(None, "everybody leaves");
        let first = context.aborted().map(|error| error.to_string());
        assert_eq!(first.as_deref(), Some("collectives were aborted because of rank 3: lease expired"));
    }
}
