//! Ranks as MPI processes: start, end, and the carrying of messages.
//!
//! Owns MPI: nothing else in the program calls it, which is why the world communicator is used without a duplicate. It never
//! uses MPI's own collectives after the start, since they can neither time out nor say who is missing.
//!
//! # Threads
//! MPI is initialised with MPI_THREAD_SERIALIZED: any thread may call it, one at a time. The one transport of the process
//! lives behind the worker's lock, and every call goes through it, so communicators are `Send` and `Sync` and threads that use
//! different groups take turns.
//!
//! # Leaving
//! MPI_Finalize waits for every rank, so it is called only by a rank whose run went well. One that failed leaves with its exit
//! code by [`MpiWorld::abandon`]. Open MPI's mpirun then ends the other ranks (TERM, then KILL) and returns the first exit code
//! that was not zero; when all ranks exit 75, mpirun returns 75. A rank that exits 0 without MPI_Finalize counts as crashed.

use std::ffi::{c_char, c_int, c_void};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mpi::environment::Universe;
use mpi::ffi;
use mpi::topology::Communicator as _;
use mpi::{Threading, initialize_with_threading};

use super::exchange::{Worker, lock};
use super::transport::{Parcel, Pool, Tag, Ticket, Transport, TransportError};
use super::{CollectiveError, Context, HostCommunicator, LauncherFacts};

/// What can be chosen when MPI starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MpiOptions {
    /// Longer messages are carried in pieces of this size. At most, and by default, `i32::MAX`, since MPI counts in C ints.
    pub chunk_bytes: usize,
}

impl Default for MpiOptions {
    fn default() -> Self {
        Self { chunk_bytes: c_int::MAX as usize }
    }
}

/// How far MPI's end has come.
#[derive(Default)]
struct End {
    /// No call may be made any more.
    ended: AtomicBool,
    /// Messages were given up, so that peers may be in any state: ending MPI might wait for ever.
    given_up: AtomicBool,
}

/// MPI, from its start to its end on this process. Ends it when dropped, unless the run failed.
pub struct MpiWorld {
    universe: Option<Universe>,
    worker: Arc<Worker>,
    end: Arc<End>,
    /// MPI ends on the thread it began on.
    not_send: PhantomData<*const ()>,
}

impl std::fmt::Debug for MpiWorld {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MpiWorld").finish_non_exhaustive()
    }
}

impl MpiWorld {
    /// Starts MPI; once per process, and only where [`super::launcher`] finds that one started it. Returns the group of all
    /// ranks beside the value that ends MPI.
    ///
    /// # Errors
    /// [`CollectiveError::Mpi`] if MPI runs already or ran before, cannot be called from threads, or sees another number of
    /// ranks than the launcher started: then the program is linked with another MPI than the launcher's.
    pub fn init(
        facts: &LauncherFacts,
        context: Context,
        options: MpiOptions,
    ) -> Result<(Self, HostCommunicator), CollectiveError> {
        let failed = |text: String| CollectiveError::Mpi(text);
        let (universe, threading) = initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| failed("it is running already, or was ended, in this process".into()))?;
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        let refusal = if threading < Threading::Serialized {
            Some(format!("it grants {threading:?} threading, and Serialized is needed"))
        } else if (rank, size) != (facts.rank, facts.size) {
            let LauncherFacts { rank: launched, size: of, .. } = facts;
            Some(format!(
                "the launcher started rank {launched} of {of}, but MPI sees rank {rank} of {size}: this program is linked with \
                 another MPI than the launcher's"
            ))
        } else if largest_tag() < Tag::MAX {
            Some(format!("its largest tag is {}, and {} is needed", largest_tag(), Tag::MAX))
        } else {
            // SAFETY: MPI is initialised, and the constants are handles that it predefines.
            check(unsafe { ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN) }).err()
        };
        if let Some(text) = refusal {
            // Peers may have got further: ending MPI would wait for them.
            std::mem::forget(universe);
            return Err(failed(text));
        }

        let end = Arc::new(End::default());
        let chunk_bytes = options.chunk_bytes.clamp(1, c_int::MAX as usize);
        let carrier = Carrier { chunk_bytes, end: Arc::clone(&end), slots: Vec::new() };
        let worker = Arc::new(Worker::new(Box::new(carrier), context));
        let communicator = HostCommunicator::world(Arc::clone(&worker), rank, size);
        Ok((Self { universe: Some(universe), worker, end, not_send: PhantomData }, communicator))
    }

    /// Leaves the process with `exit_code` and without a word to the peers, who may be dead or waiting elsewhere. Destructors of
    /// the caller do not run: flush what must be kept first.
    pub fn abandon(self, exit_code: i32) -> ! {
        // Not dropped on the way: `exit` does not return.
        std::process::exit(exit_code)
    }
}

impl Drop for MpiWorld {
    fn drop(&mut self) {
        // No collective can be under way while the lock is held, and none begins once it has been marked.
        let _engine = lock(&self.worker.engine);
        self.end.ended.store(true, Ordering::Relaxed);
        let given_up = self.end.given_up.load(Ordering::Relaxed);
        let universe = self.universe.take();
        if given_up || std::thread::panicking() || self.worker.context.aborted().is_some() {
            // Ending MPI would wait for peers that this rank has given up.
            std::mem::forget(universe);
        }
    }
}

/// The largest tag MPI takes; the least that the standard promises where it does not say.
fn largest_tag() -> u32 {
    let mut value: *mut c_void = std::ptr::null_mut();
    let mut found: c_int = 0;
    let key = ffi::MPI_TAG_UB as c_int;
    // SAFETY: MPI is initialised; the attribute is predefined, and its value is a pointer to an int that MPI owns, written to
    // `value` as the C interface has it.
    let status = unsafe { ffi::MPI_Comm_get_attr(ffi::RSMPI_COMM_WORLD, key, (&raw mut value).cast(), &raw mut found) };
    if status != ffi::MPI_SUCCESS as c_int || found == 0 || value.is_null() {
        return 32_767;
    }
    // SAFETY: found, so `value` points to a live int.
    u32::try_from(unsafe { *value.cast::<c_int>() }).unwrap_or(0)
}

/// Carries messages by MPI_Isend and MPI_Irecv on the world communicator.
struct Carrier {
    chunk_bytes: usize,
    end: Arc<End>,
    /// By ticket.
    slots: Vec<Slot>,
}

/// A message under way, or a free place for one.
#[derive(Default)]
struct Slot {
    /// One a piece; null once carried.
    requests: Vec<ffi::MPI_Request>,
    /// Bytes that have come, of a receive.
    received: usize,
    is_receive: bool,
    /// The memory that MPI reads or writes; none in a free place.
    parcel: Option<Arc<Parcel>>,
}

// SAFETY: the requests are handles that any thread may use as long as calls do not overlap (MPI_THREAD_SERIALIZED was granted),
// and all calls are made through `&mut self`, of which there is one: a process makes one `Carrier`.
unsafe impl Send for Carrier {}

impl Carrier {
    /// Starts a message of one request a piece. `start` issues one piece.
    fn start(
        &mut self,
        parcel: Arc<Parcel>,
        is_receive: bool,
        start: impl Fn(Range<usize>, &mut ffi::MPI_Request) -> c_int,
    ) -> Result<Ticket, TransportError> {
        if self.end.ended.load(Ordering::Relaxed) {
            return Err(TransportError::Failed("MPI has ended in this process".into()));
        }
        let free = self.slots.iter().position(|slot| slot.parcel.is_none());
        let index = free.unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.requests.clear();
        (slot.received, slot.is_receive) = (0, is_receive);
        let len = parcel.bytes().len();
        slot.parcel = Some(parcel);
        for piece in pieces(len, self.chunk_bytes) {
            // SAFETY: reads a constant handle.
            let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
            if let Err(text) = check(start(piece, &mut request)) {
                self.abandon(Ticket(index));
                return Err(TransportError::Failed(text));
            }
            self.slots[index].requests.push(request);
        }
        Ok(Ticket(index))
    }
}

/// The pieces of a message of `len` bytes. An empty message is one empty piece: the peer waits for it all the same.
fn pieces(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(most).max(1)).map(move |index| index * most..((index + 1) * most).min(len))
}

impl Transport for Carrier {
    fn send(&mut self, to: usize, tag: Tag, parcel: Arc<Parcel>) -> Result<Ticket, TransportError> {
        let bytes = parcel.bytes().as_ptr();
        self.start(parcel, false, |piece, request| {
            // SAFETY: the piece lies inside the parcel, which the slot keeps until the request is done (or for ever), and
            // nobody writes to: others hold it shared at most.
            unsafe {
                let at = bytes.add(piece.start).cast::<c_void>();
                let (count, to, tag) = (piece.len() as c_int, to as c_int, tag.value() as c_int);
                ffi::MPI_Isend(at, count, ffi::RSMPI_UINT8_T, to, tag, ffi::RSMPI_COMM_WORLD, request)
            }
        })
    }

    fn receive(&mut self, from: usize, tag: Tag, len: usize, pool: &mut Pool) -> Result<Ticket, TransportError> {
        let mut parcel = pool.take(len);
        let bytes = Arc::make_mut(&mut parcel).bytes_mut().as_mut_ptr();
        self.start(parcel, true, |piece, request| {
            // SAFETY: the piece lies inside the parcel, which the slot alone holds until the request is done (or for ever);
            // moving the `Arc` into the slot does not move the bytes, and nobody looks at them before that.
            unsafe {
                let at = bytes.add(piece.start).cast::<c_void>();
                let (count, from, tag) = (piece.len() as c_int, from as c_int, tag.value() as c_int);
                ffi::MPI_Irecv(at, count, ffi::RSMPI_UINT8_T, from, tag, ffi::RSMPI_COMM_WORLD, request)
            }
        })
    }

    fn poll(&mut self, ticket: Ticket) -> Result<Option<Arc<Parcel>>, TransportError> {
        let slot = &mut self.slots[ticket.0];
        let mut done = true;
        for request in &mut slot.requests {
            match test(request) {
                Ok(Some(bytes)) => slot.received += bytes,
                Ok(None) => done = false,
                Err(error) => {
                    self.abandon(ticket);
                    return Err(error);
                }
            }
        }
        if !done {
            return Ok(None);
        }
        let mut parcel = slot.parcel.take();
        if let Some(parcel) = parcel.as_mut().filter(|_| slot.is_receive) {
            // A shorter message than was asked for; the algorithms find out by its length.
            Arc::make_mut(parcel).shorten(slot.received);
        }
        Ok(parcel)
    }

    fn abandon(&mut self, ticket: Ticket) {
        self.end.given_up.store(true, Ordering::Relaxed);
        let slot = &mut self.slots[ticket.0];
        for request in &mut slot.requests {
            // SAFETY: a live request of this process, or null. Only receives can be cancelled in Open MPI.
            unsafe {
                if *request != ffi::RSMPI_REQUEST_NULL && slot.is_receive {
                    ffi::MPI_Cancel(request);
                }
            }
            // Completes a receive that could be cancelled; its errors do not matter any more.
            let _ = test(request);
        }
        // SAFETY: reads a constant handle.
        let null = unsafe { ffi::RSMPI_REQUEST_NULL };
        if slot.requests.iter().any(|request| *request != null) {
            // The peer may have begun to take or fill this memory: it belongs to MPI for the rest of the process.
            std::mem::forget(slot.parcel.take());
        }
        slot.parcel = None;
        slot.requests.clear();
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        // Messages that a panic left under way.
        for slot in &mut self.slots {
            std::mem::forget(slot.parcel.take());
        }
    }
}

/// Whether `request` is done, and then the bytes that came with it (0 for a send and for one that was done before).
fn test(request: &mut ffi::MPI_Request) -> Result<Option<usize>, TransportError> {
    let mut done: c_int = 0;
    let mut status = MaybeUninit::<ffi::MPI_Status>::zeroed();
    // SAFETY: `request` is a live request or null, and calls do not overlap (see `Carrier`). A null request yields an empty
    // status with a count of 0.
    let result = unsafe { ffi::MPI_Test(request, &raw mut done, status.as_mut_ptr()) };
    if error_class(result) == ffi::MPI_ERR_TRUNCATE as c_int {
        return Err(TransportError::TooLong);
    }
    check(result).map_err(TransportError::Failed)?;
    if done == 0 {
        return Ok(None);
    }
    let mut bytes: c_int = 0;
    // SAFETY: MPI_Test filled the status, as it said it was done; zeroes are a valid status anyway.
    check(unsafe { ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &raw mut bytes) })
        .map_err(TransportError::Failed)?;
    Ok(Some(usize::try_from(bytes).unwrap_or(0)))
}

fn error_class(result: c_int) -> c_int {
    if result == ffi::MPI_SUCCESS as c_int {
        return result;
    }
    let mut class: c_int = 0;
    // SAFETY: writes one int; may be called with any code that MPI returned.
    unsafe { ffi::MPI_Error_class(result, &raw mut class) };
    class
}

/// MPI's own words for a result that is not success.
fn check(result: c_int) -> Result<(), String> {
    if result == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0_u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len: c_int = 0;
    // SAFETY: the buffer has the length that the standard asks for.
    unsafe { ffi::MPI_Error_string(result, text.as_mut_ptr().cast::<c_char>(), &raw mut len) };
    let len = usize::try_from(len).unwrap_or(0).min(text.len());
    Err(String::from_utf8_lossy(&text[..len]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_longer_than_a_c_int_can_count_go_in_pieces() {
        for (len, limit, expected) in [
            (0, 8, "[0..0]"),
            (8, 8, "[0..8]"),
            (9, 8, "[0..8, 8..9]"),
            (20, 8, "[0..8, 8..16, 16..20]"),
            (4_294_967_295, c_int::MAX as usize, "[0..2147483647, 2147483647..4294967294, 4294967294..4294967295]"),
        ] {
            assert_eq!(format!("{:?}", pieces(len, limit).collect::<Vec<_>>()), expected, "{len} by {limit}");
        }
    }
}
