//! The watch over a worker's collectives: a thread that gives up what does not finish.
//!
//! Owns the first failure of a worker and its consequences: it is noted before communicators are aborted, so whoever sees the
//! stream run on sees the failure too. It never decides that a peer is lost: it says for whom was waited, and the coordinator judges.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moe_kernels::DeviceError;
use moe_kernels::cuda::{Cuda, CudaAct, Event, Halt};

use super::Result;
use crate::collectives::exchange::lock;
use crate::collectives::{CollectiveError, Context, Place};
use crate::topology::Rank;

/// How often the watch looks: a fraction of the shortest deadline anybody would set.
const LOOK: Duration = Duration::from_millis(10);
/// How often it asks NCCL, whose answer takes a lock that issuing threads want.
const ASK: Duration = Duration::from_millis(200);
/// What communicators that were aborted are given to end.
pub(super) const FAREWELL: Duration = Duration::from_secs(3);

/// The first failure of a worker, and the communicators that it ends.
pub(super) struct Failures {
    context: Context,
    /// Ends the waits of kernels of ours.
    halt: Arc<Halt>,
    first: OnceLock<CollectiveError>,
    communicators: Mutex<Vec<Weak<nccl_rs::Communicator>>>,
    /// The threads that abort them.
    aborts: Mutex<Vec<JoinHandle<()>>>,
}

impl Drop for Failures {
    fn drop(&mut self) {
        // The process must not end inside of NCCL; nor must it wait for ever to end.
        let began = Instant::now();
        while began.elapsed() < FAREWELL && lock(&self.aborts).iter().any(|abort| !abort.is_finished()) {
            std::thread::sleep(LOOK);
        }
    }
}

impl Failures {
    pub(super) fn new(context: Context, halt: Arc<Halt>) -> Self {
        Self { context, halt, first: OnceLock::new(), communicators: Mutex::default(), aborts: Mutex::default() }
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn add(&self, communicator: &Arc<nccl_rs::Communicator>) {
        let mut communicators = lock(&self.communicators);
        communicators.retain(|known| known.strong_count() > 0);
        communicators.push(Arc::downgrade(communicator));
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.first.get() {
            Some(first) => Err(first.clone()),
            None => self.context.aborted().map_or(Ok(()), Err),
        }
    }

    /// Notes a failure, ends all communicators, and returns the first failure, which may be another.
    pub(super) fn fail(&self, error: CollectiveError) -> CollectiveError {
        let first = self.first.get_or_init(|| error).clone();
        self.halt.set();
        // What waits in host memory ends, too.
        self.context.abort_handle().abort(None, first.to_string());
        for communicator in self.alive() {
            self.abort(communicator);
        }
        first
    }

    /// Aborts a communicator, on a thread of its own: NCCL frees memory as it aborts, for which CUDA waits until the GPU is idle, and what
    /// keeps it busy may be the collective of a communicator that is yet to be aborted.
    fn abort(&self, communicator: Arc<nccl_rs::Communicator>) {
        let abort = move || {
            if let Err(error) = communicator.abort_handle().abort() {
                tracing::warn!(%error, "a communicator could not be aborted");
            }
        };
        match std::thread::Builder::new().name("nccl-abort".into()).spawn(abort) {
            Ok(thread) => lock(&self.aborts).push(thread),
            Err(error) => tracing::warn!(%error, "no thread to abort a communicator"),
        }
    }

    fn alive(&self) -> Vec<Arc<nccl_rs::Communicator>> {
        lock(&self.communicators).iter().filter_map(Weak::upgrade).collect()
    }

    /// What NCCL has found on its own: a peer's end, a broken network.
    fn found(&self) -> Option<nccl_rs::Error> {
        self.alive().into_iter().find_map(|communicator| communicator.state("ncclCommGetAsyncError").err())
    }
}

/// A collective under way.
pub(super) struct Entry {
    place: Place,
    others: Arc<[Rank]>,
    /// What must have run before it can begin.
    ready: Option<Event>,
    /// When the watch saw that it could.
    began: Option<Instant>,
    /// What has passed when it is over; none while it is being issued.
    done: Option<Event>,
}

impl Entry {
    pub(super) fn new(place: Place, others: Arc<[Rank]>, ready: Event) -> Self {
        Self { place, others, ready: Some(ready), began: None, done: None }
    }
}

/// The collectives under way, in their order on the stream, by number.
#[derive(Default)]
struct UnderWay {
    entries: VecDeque<(u64, Entry)>,
    next: u64,
    stopped: bool,
}

#[derive(Default)]
struct Board {
    under_way: Mutex<UnderWay>,
    stop: Condvar,
}

/// The thread and what it looks at.
pub(super) struct Watch {
    board: Arc<Board>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(super) fn start<A: CudaAct>(
        queue: Cuda<A>,
        failures: Arc<Failures>,
        on_failure: Box<dyn Fn(&CollectiveError) + Send>,
    ) -> Result<Self> {
        let board = Arc::new(Board::default());
        let watcher = Watcher { queue, failures, board: Arc::clone(&board), asked: Instant::now() };
        let spawned = std::thread::Builder::new().name("nccl-watch".into()).spawn(move || watcher.run(&*on_failure));
        let thread = spawned.map_err(|error| DeviceError::Fault {
            device: "this process".into(),
            operation: "the start of the thread that watches collectives".into(),
            reason: error.to_string(),
        })?;
        Ok(Self { board, thread: Some(thread) })
    }

    /// A collective is about to be issued; its number for what follows.
    pub(super) fn begin(&self, entry: Entry) -> u64 {
        let mut under_way = lock(&self.board.under_way);
        let number = under_way.next;
        under_way.next += 1;
        under_way.entries.push_back((number, entry));
        number
    }

    /// It is on the stream, before `done`.
    pub(super) fn issued(&self, number: u64, done: Event) {
        let mut under_way = lock(&self.board.under_way);
        if let Some((_, entry)) = under_way.entries.iter_mut().rev().find(|(known, _)| *known == number) {
            entry.done = Some(done);
        }
    }

    /// It could not be issued.
    pub(super) fn withdraw(&self, number: u64) {
        lock(&self.board.under_way).entries.retain(|(known, _)| *known != number);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&self.board.under_way).stopped = true;
        self.board.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic was printed by its thread.
            let _ = thread.join();
        }
    }
}

/// What the thread works with.
struct Watcher<A: CudaAct> {
    queue: Cuda<A>,
    failures: Arc<Failures>,
    board: Arc<Board>,
    asked: Instant,
}

impl<A: CudaAct> Watcher<A> {
    /// Looks until it is stopped or something has failed.
    fn run(mut self, on_failure: &dyn Fn(&CollectiveError)) {
        loop {
            {
                let under_way = lock(&self.board.under_way);
                let pause = if under_way.entries.is_empty() { ASK } else { LOOK };
                let waiting = self.board.stop.wait_timeout_while(under_way, pause, |under_way| !under_way.stopped);
                if waiting.unwrap_or_else(PoisonError::into_inner).0.stopped {
                    return;
                }
            }
            let Some(error) = self.look() else { continue };
            let first = self.failures.fail(error);
            on_failure(&first);
            return;
        }
    }

    /// What has failed, if anything has.
    fn look(&mut self) -> Option<CollectiveError> {
        let oldest = match self.oldest() {
            Ok(oldest) => oldest,
            Err(error) => return Some(error.into()),
        };
        if let Some(aborted) = self.failures.context.aborted() {
            return Some(match (aborted, oldest) {
                (CollectiveError::Aborted { culprit, reason }, Some((place, ..))) => {
                    CollectiveError::GivenUp { place: Box::new(place), culprit, reason }
                }
                (aborted, _) => aborted,
            });
        }
        if let Some((place, others, began)) = &oldest {
            let waited = began.elapsed();
            if waited >= self.failures.context.deadline() {
                let missing = others.to_vec();
                return Some(CollectiveError::Stalled { place: Box::new(place.clone()), waited, missing });
            }
        }
        if self.asked.elapsed() < ASK {
            return None;
        }
        self.asked = Instant::now();
        let found = self.failures.found()?;
        Some(match oldest {
            Some((place, others, _)) => {
                let missing = if found.is_peers() { others.to_vec() } else { Vec::new() };
                CollectiveError::Nccl { place: Box::new(place), reason: found.to_string(), missing }
            }
            None => CollectiveError::Aborted { culprit: None, reason: found.to_string() },
        })
    }

    /// Forgets what is over; the collective that the stream is at, and since when it could run.
    #[allow(clippy::type_complexity, reason = "the parts of an entry, copied so that the lock is not kept")]
    fn oldest(&self) -> std::result::Result<Option<(Place, Arc<[Rank]>, Instant)>, DeviceError> {
        let mut under_way = lock(&self.board.under_way);
        while let Some((_, entry)) = under_way.entries.front_mut() {
            if let Some(ready) = &entry.ready {
                if !self.queue.has_passed(ready)? {
                    return Ok(None);
                }
                entry.ready = None;
            }
            let began = *entry.began.get_or_insert_with(Instant::now);
            match &entry.done {
                Some(done) if self.queue.has_passed(done)? => under_way.entries.pop_front(),
                _ => return Ok(Some((entry.place.clone(), Arc::clone(&entry.others), began))),
            };
        }
        Ok(None)
    }
}
