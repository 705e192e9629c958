//! A communicator's life: connect, split, look, abort, end.

use std::cell::Cell;
use std::ffi::c_int;
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use cudarc::nccl::sys;

use crate::config::Role;
use crate::{Code, CommConfig, Error, Group, Nccl, UniqueId};

/// `NCCL_SPLIT_NOCOLOR`: the rank takes part in a split and gets no communicator.
const NO_COLOR: c_int = -1;
/// How long the end of a communicator may take before it is aborted instead.
const FAREWELL: Duration = Duration::from_secs(2);

/// How far a call has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "what is in progress must be waited for before anything else is issued"]
pub enum Progress {
    /// It is on its stream.
    Done,
    /// It is still being set up: see [`Communicator::wait_ready`].
    InProgress,
}

/// One rank's end of a group of ranks. It may be used by several threads, one at a time: calls wait for each other.
///
/// NCCL has two handles of it, which share their resources: the one that connects, splits and aborts returns from each call at once,
/// the other issues collectives on the calling thread. The first exchange with a peer connects to it in there and waits for it, for as
/// long as no other thread aborts.
///
/// Dropping it ends it in order where it has finished its work, and aborts it where it has not within 2 s.
pub struct Communicator {
    shared: Arc<Shared>,
}

/// Ends all waits of one communicator, from any thread. It does not keep the communicator alive.
#[derive(Clone)]
pub struct AbortHandle(std::sync::Weak<Shared>);

/// One of NCCL's handles.
pub(crate) struct Shared {
    pub(crate) nccl: Nccl,
    /// The handle that this one was split from and shares its resources with, if this is the one that issues.
    control: Option<Arc<Shared>>,
    slot: Mutex<Slot>,
    aborted: AtomicBool,
    rank: usize,
    size: usize,
}

/// NCCL's handle; null once it is gone.
struct Slot(sys::ncclComm_t);

// SAFETY: NCCL asks that one thread at a time uses a communicator, not that it is always the same; the mutex around the slot sees to it.
unsafe impl Send for Slot {}

thread_local! {
    /// Whether this thread is between the start and the end of a group.
    static IN_GROUP: Cell<bool> = const { Cell::new(false) };
}

/// A communicator's handle while this thread alone has it.
pub(crate) struct Held<'a> {
    slot: MutexGuard<'a, Slot>,
    shared: &'a Shared,
}

impl Held<'_> {
    pub(crate) fn comm(&self) -> sys::ncclComm_t {
        self.slot.0
    }

    pub(crate) fn nccl(&self) -> &Nccl {
        &self.shared.nccl
    }

    pub(crate) fn size(&self) -> usize {
        self.shared.size
    }

    /// What the code of a call on this communicator means.
    pub(crate) fn progress(&self, call: &'static str, code: c_int) -> Result<Progress, Error> {
        match Code::new(code) {
            Code::SUCCESS => Ok(Progress::Done),
            Code::IN_PROGRESS => Ok(Progress::InProgress),
            code => Err(self.nccl().error(call, code, self.comm())),
        }
    }

    /// Aborts the communicator for good. Returns at once; NCCL ends what runs in a thread of its own.
    pub(crate) fn abort(&mut self) -> Result<(), Error> {
        self.shared.aborted.store(true, Ordering::Release);
        let comm = std::mem::replace(&mut self.slot.0, ptr::null_mut());
        if comm.is_null() {
            return Ok(());
        }
        // SAFETY: the handle was alive, and with the slot empty nobody uses it after this.
        let code = unsafe { (self.nccl().symbols().abort)(comm) };
        match Code::new(code) {
            Code::SUCCESS | Code::IN_PROGRESS => Ok(()),
            code => Err(self.nccl().error("ncclCommAbort", code, ptr::null_mut())),
        }
    }
}

impl Shared {
    fn new(nccl: &Nccl, comm: sys::ncclComm_t, control: Option<&Arc<Self>>) -> Result<Arc<Self>, Error> {
        let mut shared = Self {
            nccl: nccl.clone(),
            control: control.cloned(),
            slot: Mutex::new(Slot(comm)),
            aborted: AtomicBool::new(false),
            rank: 0,
            size: 1,
        };
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator is ready, and the pointers are to live numbers.
        unsafe {
            nccl.done("ncclCommUserRank", (nccl.symbols().user_rank)(comm, &raw mut rank), comm)?;
            nccl.done("ncclCommCount", (nccl.symbols().count)(comm, &raw mut size), comm)?;
        }
        (shared.rank, shared.size) = (rank as usize, size as usize);
        Ok(Arc::new(shared))
    }

    fn lock(&self) -> Held<'_> {
        Held { slot: self.slot.lock().unwrap_or_else(PoisonError::into_inner), shared: self }
    }

    /// The communicator for `call`, which must not be made inside of a group.
    pub(crate) fn hold(&self, call: &'static str) -> Result<Held<'_>, Error> {
        if IN_GROUP.get() {
            return Err(Error::InsideGroup { call });
        }
        let held = self.lock();
        if held.slot.0.is_null() { Err(Error::Aborted { call }) } else { Ok(held) }
    }

    /// Calls `release` with the handle, unless it is gone.
    pub(crate) fn while_alive(&self, release: impl FnOnce(&Nccl, sys::ncclComm_t)) {
        let held = self.lock();
        if !held.slot.0.is_null() {
            release(&self.nccl, held.slot.0);
        }
    }

    /// What has become of what was issued.
    fn state(&self, call: &'static str) -> Result<Progress, Error> {
        let held = self.hold(call)?;
        let mut code = 0;
        // SAFETY: the communicator is alive while it is held, and the pointer is to a live number.
        let answer = unsafe { (self.nccl.symbols().get_async_error)(held.comm(), &raw mut code) };
        self.nccl.done("ncclCommGetAsyncError", answer, held.comm())?;
        held.progress(call, code)
    }

    fn wait(&self, call: &'static str, deadline: Duration) -> Result<(), Error> {
        wait_until(call, deadline, || Ok(self.state(call)? == Progress::Done))
    }

    /// The handle that connects, splits and aborts.
    fn control(&self) -> &Self {
        self.control.as_deref().unwrap_or(self)
    }

    /// Ranks that give the same `color` get a handle for `role`.
    fn split(
        self: &Arc<Self>,
        role: Role,
        (color, key): (Option<usize>, usize),
        config: &CommConfig,
        deadline: Duration,
    ) -> Result<Option<Arc<Self>>, Error> {
        const CALL: &str = "ncclCommSplit";
        let raw_color = color.map_or(Ok(NO_COLOR), |color| counted(CALL, "the color", color))?;
        let key = counted(CALL, "the key", key)?;
        let nccl = &self.nccl;
        let mut config = config.to_raw(nccl.version(), role);
        let awaited = Awaited::new();
        let begun = {
            let held = self.hold(CALL)?;
            // SAFETY: as in `connect`; the parent is alive while it is held.
            let code =
                unsafe { (nccl.symbols().split)(held.comm(), raw_color, key, awaited.place(), &raw mut config.raw) };
            held.progress(CALL, code)
        };
        let child = begun.and_then(|_| {
            wait_until(CALL, deadline, || {
                let done = self.state(CALL)? == Progress::Done;
                Ok(done && (color.is_none() || !awaited.get().is_null()))
            })
        });
        let control = (role == Role::Issue).then_some(self);
        let child = child.and_then(|()| color.map(|_| Self::new(nccl, awaited.get(), control)).transpose());
        child.inspect_err(|_| awaited.leak())
    }

    /// Ends the handle in order where it has finished its work by then, and aborts it otherwise.
    fn end(&self, comm: sys::ncclComm_t) {
        let symbols = self.nccl.symbols();
        // SAFETY: the handle is alive, and this is its last user.
        let finalizing = Code::new(unsafe { (symbols.finalize)(comm) });
        let flushed = wait_until("ncclCommFinalize", FAREWELL, || {
            let mut code = 0;
            // SAFETY: as above; the pointer is to a live number.
            let answer = unsafe { (symbols.get_async_error)(comm, &raw mut code) };
            self.nccl.done("ncclCommGetAsyncError", answer, comm)?;
            match Code::new(code) {
                Code::IN_PROGRESS => Ok(false),
                code => self.nccl.done("ncclCommFinalize", code.number(), comm).map(|()| true),
            }
        });
        let in_order = flushed.is_ok()
            && [Code::SUCCESS, Code::IN_PROGRESS].contains(&finalizing)
            && !self.control().aborted.load(Ordering::Acquire);
        // SAFETY: as above; nobody uses the handle after this. Nobody is left to hear of a failure.
        let _ = unsafe { if in_order { (symbols.destroy)(comm) } else { (symbols.abort)(comm) } };
    }
}

/// Notes that this thread has begun or ended a group.
pub(crate) fn set_in_group(inside: bool) {
    IN_GROUP.set(inside);
}

/// Looks until `done`, at most for `deadline`: at first without a pause, since most waits are of microseconds.
fn wait_until(
    call: &'static str,
    deadline: Duration,
    mut done: impl FnMut() -> Result<bool, Error>,
) -> Result<(), Error> {
    const SPIN: Duration = Duration::from_micros(200);
    const NAP: Duration = Duration::from_micros(100);
    let start = Instant::now();
    while !done()? {
        let waited = start.elapsed();
        if waited >= deadline {
            return Err(Error::Deadline { call, waited });
        }
        if waited < SPIN { std::thread::yield_now() } else { std::thread::sleep(NAP) }
    }
    Ok(())
}

/// Where NCCL puts the handle of a new communicator, perhaps long after the call: it stays allocated until that has happened.
struct Awaited(Box<AtomicPtr<sys::ncclComm>>);

impl Awaited {
    fn new() -> Self {
        Self(Box::default())
    }

    fn place(&self) -> *mut sys::ncclComm_t {
        self.0.as_ptr()
    }

    fn get(&self) -> sys::ncclComm_t {
        self.0.load(Ordering::Acquire)
    }

    /// For a call that was given up: NCCL may still write.
    fn leak(self) {
        let _ = Box::leak(self.0);
    }
}

fn counted(call: &'static str, what: &'static str, found: usize) -> Result<c_int, Error> {
    c_int::try_from(found).map_err(|_| Error::TooLarge { call, what, found })
}

impl Communicator {
    /// Joins the ranks that have the same `id` as rank `rank` of `size`; all of them call this. The thread's current GPU becomes the
    /// communicator's, and no two ranks may have the same.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`], [`Error::TooLarge`]; [`Error::Deadline`] where a rank does not come; NCCL's own.
    pub fn connect(
        nccl: &Nccl,
        config: &CommConfig,
        id: &UniqueId,
        (rank, size): (usize, usize),
        deadline: Duration,
    ) -> Result<Self, Error> {
        const CALL: &str = "ncclCommInitRankConfig";
        if rank >= size {
            return Err(Error::NoSuchRank { call: CALL, rank, size });
        }
        if IN_GROUP.get() {
            return Err(Error::InsideGroup { call: CALL });
        }
        let ranks = counted(CALL, "the number of ranks", size)?;
        let began = Instant::now();
        let mut raw = config.to_raw(nccl.version(), Role::Control);
        let symbols = nccl.symbols();
        let awaited = Awaited::new();
        // SAFETY: the configuration and the place of the handle are live; NCCL copies the configuration, and the place stays until it
        // has been written.
        let code =
            unsafe { (symbols.init_rank_config)(awaited.place(), ranks, id.to_raw(), rank as c_int, &raw mut raw.raw) };
        let comm = awaited.get();
        let ready = || {
            let mut code = code;
            if Code::new(code) == Code::IN_PROGRESS {
                // SAFETY: NCCL gave the handle out, and this thread alone has it.
                let answer = unsafe { (symbols.get_async_error)(comm, &raw mut code) };
                nccl.done("ncclCommGetAsyncError", answer, comm)?;
            }
            match Code::new(code) {
                Code::SUCCESS => Ok(true),
                Code::IN_PROGRESS => Ok(false),
                code => Err(nccl.error(CALL, code, comm)),
            }
        };
        match wait_until(CALL, deadline, ready).and_then(|()| Shared::new(nccl, comm, None)) {
            Ok(control) => Self::issuing(&control, config, deadline.saturating_sub(began.elapsed())),
            Err(error) => {
                if !comm.is_null() {
                    // SAFETY: as above; nobody uses the handle after this. That it fails changes nothing for the caller.
                    let _ = unsafe { (symbols.abort)(comm) };
                }
                awaited.leak();
                Err(error)
            }
        }
    }

    /// Splits the handle that issues from `control`.
    fn issuing(control: &Arc<Shared>, config: &CommConfig, deadline: Duration) -> Result<Self, Error> {
        let issue = control.split(Role::Issue, (Some(0), control.rank), config, deadline)?;
        // A rank that gives a color has a handle.
        Ok(Self { shared: issue.unwrap_or_else(|| Arc::clone(control)) })
    }

    /// Ranks that give the same `color` get a communicator of their own, ordered by `key` and then by their rank here; those that give
    /// none get none. All ranks call this, with nothing in progress. After an error the communicator is of no more use.
    ///
    /// # Errors
    /// [`Error::Deadline`] where a rank does not come; [`Error::TooLarge`]; NCCL's own.
    pub fn split(
        &self,
        color: Option<usize>,
        key: usize,
        config: &CommConfig,
        deadline: Duration,
    ) -> Result<Option<Self>, Error> {
        let began = Instant::now();
        let control = self.shared.control.as_ref().unwrap_or(&self.shared);
        let child = control.split(Role::Control, (color, key), config, deadline)?;
        child.map(|child| Self::issuing(&child, config, deadline.saturating_sub(began.elapsed()))).transpose()
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// Ranks of the communicator.
    pub fn size(&self) -> usize {
        self.shared.size
    }

    /// The library.
    pub fn nccl(&self) -> &Nccl {
        &self.shared.nccl
    }

    /// Begins a group: what is issued to it is started together when it ends. A collective by itself is a group of one.
    ///
    /// # Errors
    /// [`Error::InsideGroup`] where this thread has begun one already, of whichever communicator; [`Error::Aborted`].
    pub fn group(&self) -> Result<Group<'_>, Error> {
        Group::begin(&self.shared)
    }

    /// Whether something is in progress, or has failed since: asks NCCL and does not wait. Errors of peers and of the network come out
    /// here, also those of collectives that are on the GPU already.
    ///
    /// # Errors
    /// What was found, as of `call`; [`Error::Aborted`].
    pub fn state(&self, call: &'static str) -> Result<Progress, Error> {
        self.shared.control().state(call)
    }

    /// Waits until what was issued by `call` is on its stream. A group says so itself, unless the variable `NCCL_COMM_BLOCKING` has NCCL
    /// launch it on another thread.
    ///
    /// # Errors
    /// [`Error::Deadline`]; NCCL's own; [`Error::Aborted`] where another thread aborted meanwhile.
    pub fn wait_ready(&self, call: &'static str, deadline: Duration) -> Result<(), Error> {
        self.shared.wait(call, deadline)
    }

    /// For other threads.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(Arc::downgrade(&self.shared))
    }

    /// Whether it was aborted: then what its collectives received is not to be trusted.
    pub fn is_aborted(&self) -> bool {
        [&*self.shared, self.shared.control()].iter().any(|handle| handle.aborted.load(Ordering::Acquire))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.rank())
            .field("size", &self.size())
            .field("aborted", &self.is_aborted())
            .finish_non_exhaustive()
    }
}

impl AbortHandle {
    /// Ends what the communicator does, on the GPU too, and every wait for it; it is of no more use. Peers are not told: they wait on
    /// until they abort as well. Again, or after the communicator's end, it does nothing.
    ///
    /// # Errors
    /// NCCL's; the communicator is given up all the same.
    pub fn abort(&self) -> Result<(), Error> {
        let Some(shared) = self.0.upgrade() else { return Ok(()) };
        // A call that waits for a peer keeps the handle that issues; it comes back once the other is aborted.
        let aborted = shared.control().lock().abort();
        aborted.and(shared.lock().abort())
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AbortHandle")
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let comm = self.slot.get_mut().unwrap_or_else(PoisonError::into_inner).0;
        if comm.is_null() {
            return;
        }
        let Some(control) = self.control.clone() else { return self.end(comm) };
        // The end of a handle that issues waits for its work, and only the abort of the other ends that.
        let (over, ended) = mpsc::channel::<()>();
        let watch = std::thread::Builder::new().name("nccl-farewell".into()).spawn(move || {
            if ended.recv_timeout(FAREWELL) == Err(RecvTimeoutError::Timeout) {
                // Nobody is left to hear of a failure.
                let _ = control.lock().abort();
            }
        });
        self.end(comm);
        drop(over);
        if let Ok(watch) = watch {
            // A panic was printed by its thread.
            let _ = watch.join();
        }
    }
}

#[cfg(test)]
#[path = "communicator_tests.rs"]
mod tests;
