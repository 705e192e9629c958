//! An NCCL for tests: notes its calls, on this thread, and answers as it was told. No GPU, no peers.

#![allow(clippy::undocumented_unsafe_blocks, reason = "all write to what this crate passes: pointers to live values")]

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cudarc::nccl::sys;

use crate::library::Symbols;
use crate::{CommConfig, Communicator, LoadError, Nccl, UniqueId};

type Comm = sys::ncclComm_t;
type Type = sys::ncclDataType_t;
type Op = sys::ncclRedOp_t;
type Stream = sys::cudaStream_t;

/// A call that came, with what tests want to know of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Connect,
    Split(c_int),
    Finalize,
    Destroy,
    Abort,
    GroupStart,
    GroupEnd,
    /// Peer, address, elements.
    Send(c_int, usize, usize),
    Recv(c_int, usize, usize),
    AllReduce(usize),
    ReduceScatter(usize),
    AllGather(usize),
    Broadcast(c_int),
    MemAlloc(usize),
    MemFree,
    Register(usize),
    Deregister,
}

thread_local! {
    static CALLS: RefCell<Vec<Call>> = const { RefCell::new(Vec::new()) };
    static VERSION: Cell<c_int> = const { Cell::new(22_803) };
    static PLACE: Cell<(c_int, c_int)> = const { Cell::new((0, 1)) };
    /// How often a communicator says that something is in progress before it is done.
    static DELAY: Cell<usize> = const { Cell::new(0) };
    /// What it says in the end.
    static OUTCOME: Cell<c_int> = const { Cell::new(0) };
    /// What a group's end answers.
    static END: Cell<c_int> = const { Cell::new(0) };
    /// What a group's end waits for on this thread, and what an abort on this thread ends.
    static HANGS: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
    static ENDS: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
    /// What a send answers.
    static SEND: Cell<c_int> = const { Cell::new(0) };
}

/// What was called since the last time this was asked.
pub(crate) fn calls() -> Vec<Call> {
    CALLS.take()
}

/// What communicators answer when they are asked: `delay` times that something is in progress, then `outcome`.
pub(crate) fn answer(delay: usize, outcome: c_int) {
    DELAY.set(delay);
    OUTCOME.set(outcome);
}

/// What a group's end answers from now on.
pub(crate) fn answer_group_end(code: c_int) {
    END.set(code);
}

/// The next group's end on this thread returns once another thread, which was given what this returns, has aborted.
pub(crate) fn hang_group_end() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    HANGS.set(Some(Arc::clone(&ended)));
    ended
}

/// An abort on this thread ends what hangs.
pub(crate) fn aborts_end(ended: Arc<AtomicBool>) {
    ENDS.set(Some(ended));
}

/// What a send answers from now on.
pub(crate) fn answer_send(code: c_int) {
    SEND.set(code);
}

/// A library of this version.
pub(crate) fn library(version: c_int) -> Result<Nccl, LoadError> {
    VERSION.set(version);
    Nccl::of(symbols(), PathBuf::from("fake"))
}

/// A library that will do.
pub(crate) fn nccl() -> Nccl {
    library(22_803).unwrap()
}

/// Rank `rank` of `size`, after which no call is noted yet.
pub(crate) fn communicator(rank: usize, size: usize) -> Communicator {
    PLACE.set((rank as c_int, size as c_int));
    let id = UniqueId::from([0; UniqueId::BYTES]);
    let deadline = Duration::from_secs(1);
    let communicator = Communicator::connect(&nccl(), &CommConfig::default(), &id, (rank, size), deadline).unwrap();
    calls();
    communicator
}

fn note(call: Call) -> c_int {
    CALLS.with_borrow_mut(|calls| calls.push(call));
    0
}

/// A handle: its address is never looked at.
fn handle() -> Comm {
    ptr::without_provenance_mut(0x1000)
}

fn symbols() -> Symbols {
    Symbols {
        get_version,
        get_unique_id,
        get_error_string,
        get_last_error,
        init_rank_config,
        split,
        finalize,
        destroy,
        abort,
        get_async_error,
        count,
        user_rank,
        group_start,
        group_end,
        send,
        recv,
        all_reduce,
        reduce_scatter,
        all_gather,
        broadcast,
        mem_alloc,
        mem_free,
        register,
        deregister,
    }
}

unsafe extern "C" fn get_version(version: *mut c_int) -> c_int {
    unsafe { *version = VERSION.get() };
    0
}

unsafe extern "C" fn get_unique_id(id: *mut sys::ncclUniqueId) -> c_int {
    unsafe { (*id).internal = [7; UniqueId::BYTES] };
    0
}

unsafe extern "C" fn get_error_string(_: c_int) -> *const c_char {
    c"text of the code".as_ptr()
}

unsafe extern "C" fn get_last_error(_: Comm) -> *const c_char {
    c"last words\n".as_ptr()
}

unsafe extern "C" fn init_rank_config(
    comm: *mut Comm,
    _: c_int,
    _: sys::ncclUniqueId,
    _: c_int,
    config: *mut sys::ncclConfig_t,
) -> c_int {
    note(Call::Connect);
    assert_eq!(unsafe { (*config).blocking }, 0, "a wait for other ranks has a deadline");
    unsafe { *comm = handle() };
    7
}

unsafe extern "C" fn split(_: Comm, color: c_int, _: c_int, child: *mut Comm, _: *mut sys::ncclConfig_t) -> c_int {
    note(Call::Split(color));
    unsafe { *child = if color < 0 { ptr::null_mut() } else { handle() } };
    7
}

unsafe extern "C" fn finalize(_: Comm) -> c_int {
    note(Call::Finalize);
    7
}

unsafe extern "C" fn destroy(_: Comm) -> c_int {
    note(Call::Destroy)
}

unsafe extern "C" fn abort(_: Comm) -> c_int {
    if let Some(ended) = ENDS.take() {
        ended.store(true, Ordering::Release);
    }
    note(Call::Abort)
}

unsafe extern "C" fn get_async_error(_: Comm, code: *mut c_int) -> c_int {
    let left = DELAY.get();
    DELAY.set(left.saturating_sub(1));
    unsafe { *code = if left > 0 { 7 } else { OUTCOME.get() } };
    0
}

unsafe extern "C" fn count(_: Comm, count: *mut c_int) -> c_int {
    unsafe { *count = PLACE.get().1 };
    0
}

unsafe extern "C" fn user_rank(_: Comm, rank: *mut c_int) -> c_int {
    unsafe { *rank = PLACE.get().0 };
    0
}

unsafe extern "C" fn group_start() -> c_int {
    note(Call::GroupStart)
}

unsafe extern "C" fn group_end() -> c_int {
    note(Call::GroupEnd);
    if let Some(ended) = HANGS.take() {
        while !ended.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }
    END.get()
}

unsafe extern "C" fn send(at: *const c_void, len: usize, _: Type, peer: c_int, _: Comm, _: Stream) -> c_int {
    note(Call::Send(peer, at.addr(), len));
    SEND.get()
}

unsafe extern "C" fn recv(at: *mut c_void, len: usize, _: Type, peer: c_int, _: Comm, _: Stream) -> c_int {
    note(Call::Recv(peer, at.addr(), len))
}

unsafe extern "C" fn all_reduce(
    _: *const c_void,
    _: *mut c_void,
    len: usize,
    _: Type,
    _: Op,
    _: Comm,
    _: Stream,
) -> c_int {
    note(Call::AllReduce(len))
}

unsafe extern "C" fn reduce_scatter(
    _: *const c_void,
    _: *mut c_void,
    len: usize,
    _: Type,
    _: Op,
    _: Comm,
    _: Stream,
) -> c_int {
    note(Call::ReduceScatter(len))
}

unsafe extern "C" fn all_gather(_: *const c_void, _: *mut c_void, len: usize, _: Type, _: Comm, _: Stream) -> c_int {
    note(Call::AllGather(len))
}

unsafe extern "C" fn broadcast(
    _: *const c_void,
    _: *mut c_void,
    _: usize,
    _: Type,
    root: c_int,
    _: Comm,
    _: Stream,
) -> c_int {
    note(Call::Broadcast(root))
}

unsafe extern "C" fn mem_alloc(at: *mut *mut c_void, bytes: usize) -> c_int {
    unsafe { *at = ptr::without_provenance_mut(0x2000) };
    note(Call::MemAlloc(bytes))
}

unsafe extern "C" fn mem_free(_: *mut c_void) -> c_int {
    note(Call::MemFree)
}

unsafe extern "C" fn register(_: Comm, _: *mut c_void, bytes: usize, handle: *mut *mut c_void) -> c_int {
    unsafe { *handle = ptr::without_provenance_mut(0x3000) };
    note(Call::Register(bytes))
}

unsafe extern "C" fn deregister(_: Comm, _: *mut c_void) -> c_int {
    note(Call::Deregister)
}
