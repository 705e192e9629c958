//! What all groups of a worker share: the stream of their collectives, its watch, the first failure.
//!
//! Owns the life of one collective on the host: ordered after the caller's queue, issued, its end marked.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use moe_kernels::cuda::{Cuda, CudaAct, Event, Halt, Staging};
use moe_kernels::{Device, DeviceError};
use nccl_rs::{CommConfig, Group, Progress, Stream};

use super::Result;
use super::watch::{Entry, FAREWELL, Failures, Watch};
use crate::collectives::exchange::lock;
use crate::collectives::{CollectiveError, Context, Place};
use crate::topology::Rank;

/// The stream of one worker's collectives.
pub(super) struct Plane<A: CudaAct> {
    /// Before the queue, so that its thread has ended when the queue goes.
    watch: Watch,
    queue: Cuda<A>,
    failures: Arc<Failures>,
    halt: Arc<Halt>,
    config: CommConfig,
    /// The most staging memory that was asked for.
    staged: AtomicU64,
    /// Whose turn it is: the order on the stream is the order of calls.
    turn: Mutex<()>,
}

/// One collective of one group, about to be issued.
pub(super) struct Call<'a, A: CudaAct> {
    pub(super) plane: &'a Plane<A>,
    pub(super) nccl: &'a nccl_rs::Communicator,
    pub(super) place: Place,
    pub(super) others: Arc<[Rank]>,
}

impl<A: CudaAct> Plane<A> {
    /// A stream on the GPU of `queue`. The first failure that its watch finds is passed to `on_failure`, on the watch's thread.
    pub(super) fn new(
        queue: &Cuda<A>,
        context: Context,
        config: CommConfig,
        on_failure: Box<dyn Fn(&CollectiveError) + Send>,
    ) -> Result<Self> {
        let queue = queue.fork_urgent();
        let halt = Arc::new(queue.halt()?);
        let failures = Arc::new(Failures::new(context, Arc::clone(&halt)));
        let watch = Watch::start(queue.clone(), Arc::clone(&failures), on_failure)?;
        Ok(Self { watch, queue, failures, halt, config, staged: AtomicU64::new(0), turn: Mutex::default() })
    }

    pub(super) fn context(&self) -> &Context {
        self.failures.context()
    }

    /// Whether nothing has failed so far.
    pub(super) fn check(&self) -> Result<()> {
        self.failures.check()
    }

    /// Ends everything because of a failure; returns the first one.
    pub(super) fn fail(&self, error: CollectiveError) -> CollectiveError {
        self.failures.fail(error)
    }

    /// Has a communicator watched, and aborted at the first failure.
    pub(super) fn watch(&self, nccl: &Arc<nccl_rs::Communicator>) {
        self.failures.add(nccl);
    }

    /// What ends the waits of kernels of ours.
    pub(super) fn halt(&self) -> &Halt {
        &self.halt
    }

    pub(super) fn queue(&self) -> &Cuda<A> {
        &self.queue
    }

    pub(super) fn staging(&self, bytes: usize) -> std::result::Result<Staging<'_>, DeviceError> {
        self.staged.fetch_max(bytes as u64, Ordering::Relaxed);
        self.queue.staging(bytes)
    }

    pub(super) fn staging_bytes(&self) -> u64 {
        self.staged.load(Ordering::Relaxed)
    }
}

impl<A: CudaAct> Drop for Plane<A> {
    fn drop(&mut self) {
        // No kernel may wait for peers when what it looks at is gone.
        self.halt.set();
        let (end, began) = (self.queue.record(), Instant::now());
        while began.elapsed() < FAREWELL && matches!(self.queue.has_passed(&end), Ok(false)) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl<A: CudaAct> Call<'_, A> {
    /// Issues the collective after what `queue` has been given, and returns its end. `work` issues to the plane's queue.
    pub(super) fn run(self, queue: &Cuda<A>, work: impl FnOnce(&Self) -> Result<()>) -> Result<Event> {
        let plane = self.plane;
        let _turn = lock(&plane.turn);
        plane.check()?;
        let ready = queue.record();
        plane.queue.wait(&ready);
        self.watched(ready, || work(&self))
    }

    /// Splits the group's communicator.
    pub(super) fn split(&self, color: Option<usize>, key: usize) -> Result<Option<nccl_rs::Communicator>> {
        let plane = self.plane;
        let _turn = lock(&plane.turn);
        plane.check()?;
        plane.queue.make_current()?;
        let deadline = plane.context().deadline();
        self.nccl.split(color, key, &plane.config, deadline).map_err(|error| self.failed(error))
    }

    /// Does `work` under the eyes of the watch, from the moment `ready` has passed until what was issued has.
    fn watched(&self, ready: Event, work: impl FnOnce() -> Result<()>) -> Result<Event> {
        let plane = self.plane;
        plane.queue.make_current()?;
        let entry = Entry::new(self.place.clone(), Arc::clone(&self.others), ready);
        let number = plane.watch.begin(entry);
        match work() {
            Ok(()) => {
                let done = plane.queue.record();
                plane.watch.issued(number, done.clone());
                Ok(done)
            }
            Err(error) => {
                plane.watch.withdraw(number);
                Err(plane.fail(error))
            }
        }
    }

    /// Issues one group of NCCL's calls and waits until it is on the stream.
    pub(super) fn group(
        &self,
        issue: impl FnOnce(&mut Group<'_>, Stream) -> std::result::Result<(), nccl_rs::Error>,
    ) -> Result<()> {
        // SAFETY: the stream is the plane's, on the GPU that its communicators are made with, and a group's link drops its communicator,
        // which waits for what it has issued, before the plane.
        let stream = unsafe { Stream::from_raw(self.plane.queue.stream_handle()) };
        let issued = || {
            let mut group = self.nccl.group()?;
            let queued = issue(&mut group, stream);
            let progress = group.end()?;
            queued?;
            match progress {
                Progress::Done => Ok(()),
                Progress::InProgress => self.nccl.wait_ready(self.place.collective, self.plane.context().deadline()),
            }
        };
        let began = Instant::now();
        issued().map_err(|error| match error {
            nccl_rs::Error::Deadline { .. } => CollectiveError::Stalled {
                place: Box::new(self.place.clone()),
                waited: began.elapsed(),
                missing: self.others.to_vec(),
            },
            error => self.failed(error),
        })
    }

    /// What a failure of NCCL means for this collective.
    fn failed(&self, error: nccl_rs::Error) -> CollectiveError {
        let plane = self.plane;
        if matches!(error, nccl_rs::Error::Aborted { .. })
            && let Err(known) = plane.check()
        {
            return known;
        }
        let missing = if error.is_peers() { self.others.to_vec() } else { Vec::new() };
        CollectiveError::Nccl { place: Box::new(self.place.clone()), reason: error.to_string(), missing }
    }
}
