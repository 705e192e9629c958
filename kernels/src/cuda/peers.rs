//! Memory that GPUs of several processes of one machine share, and the kernel that stores rows into it: `push.cu`.
//!
//! Owns the mapping of other ranks' buffers into this process and the word by which the host ends a wait on the device. It never decides
//! who shares what, nor when: who pushes and who has freed is the caller's to agree on.

use std::ffi::{c_char, c_void};
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cudarc::driver::{DriverError, result, sys};

use super::gpu::Gpu;
use super::launch::{Grid, launch};
use super::rows::{MOST_SLOTS, names, packs};
use super::shape::{PACK_BYTES, holds, packed};
use super::{Cuda, CudaAct, pointer, pointer_or_null};
use crate::{DeviceError, Element, Leaving, View};

/// The most ranks that store into each other's memory.
pub const MOST_PEERS: usize = 16;
/// Threads of a block.
const THREADS: u32 = 512;
/// Blocks of a push that runs beside something else: stores over NVLink need few (docs/benchmarks.md).
const BLOCKS_BESIDE: usize = 32;

/// What another process of this machine needs to map a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// The driver's handle of the allocation.
    pub handle: Vec<u8>,
    /// Where the view begins in it, in bytes.
    pub offset: u64,
    /// Where the view begins for the process that owns it.
    pub address: u64,
}

/// A buffer of another rank, mapped as long as this lives.
pub struct Mapped {
    gpu: Arc<Gpu>,
    /// What was mapped; None: it is this process's own memory.
    base: Option<u64>,
    address: u64,
}

impl Mapped {
    /// Where it begins for kernels of this GPU.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Some(base) = self.base {
            self.gpu.bound("cuIpcCloseMemHandle", || {
                // SAFETY: it was mapped once, for this value; the owner of a value has waited for kernels that use it, or ends with a
                // failure.
                unsafe { sys::cuIpcCloseMemHandle(base) }.result()
            });
        }
    }
}

/// A word of the host's memory that kernels look at while they wait for peers.
pub struct Halt {
    gpu: Arc<Gpu>,
    word: NonNull<AtomicU32>,
}

// SAFETY: the word is an atomic in memory that lives as long as this.
unsafe impl Send for Halt {}
// SAFETY: as above.
unsafe impl Sync for Halt {}

impl Halt {
    /// Ends all waits, those to come too.
    pub fn set(&self) {
        // SAFETY: the memory is this value's, and was cleared before there was one.
        unsafe { self.word.as_ref() }.store(1, Ordering::Release);
    }

    fn address(&self) -> u64 {
        self.word.as_ptr() as u64
    }
}

impl Drop for Halt {
    fn drop(&mut self) {
        let word = self.word.as_ptr().cast::<c_void>();
        self.gpu.bound("cuMemFreeHost", || {
            // SAFETY: the memory was allocated once, for this value, which goes after kernels that look at it have ended (or were given up
            // with the process).
            unsafe { sys::cuMemFreeHost(word) }.result()
        });
    }
}

/// Where a peer wants what goes to it; addresses for kernels of this GPU, 0: nothing of the kind goes there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// The first row that comes from here.
    pub rows: u64,
    /// Its experts.
    pub ids: u64,
    /// Its weights.
    pub weights: u64,
    /// `[ranks]` u32: what each rank has told it.
    pub marks: u64,
}

/// Which rows leave for whom.
pub struct Pushed<'a, A: CudaAct> {
    /// Elements of a row.
    pub width: usize,
    /// What they are.
    pub what: Leaving<'a, Cuda<A>>,
    /// `[ranks]`: the rows for each peer, one after another from 0 to N.
    pub rows: &'a [Range<usize>],
    /// Whether something else computes meanwhile.
    pub beside: bool,
}

/// A push that was given to a queue.
#[derive(Clone, Copy, Debug)]
pub struct Issued {
    /// What the queue's pushes share.
    desk: u64,
    turn: u32,
}

/// As `push.cu` has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Peers {
    rows: [u64; MOST_PEERS],
    ids: [u64; MOST_PEERS],
    weights: [u64; MOST_PEERS],
    marks: [u64; MOST_PEERS],
    starts: [i32; MOST_PEERS + 1],
    ranks: i32,
    me: i32,
    mark: u32,
    turn: u32,
}

impl<A: CudaAct> Cuda<A> {
    /// Offers the memory of a view to other processes of this machine.
    ///
    /// # Errors
    /// The driver's, where it cannot.
    pub fn share<T: Element>(&self, view: View<'_, Self, T>) -> Result<Shared, DeviceError> {
        let address = pointer(view);
        let offer = || {
            self.gpu.context.bind_to_thread()?;
            let (mut base, mut bytes) = (0, 0);
            // SAFETY: the driver writes two numbers; the address is that of a live buffer.
            unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut bytes, address) }.result()?;
            let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
            // SAFETY: as above; the driver writes a handle.
            unsafe { sys::cuIpcGetMemHandle(&mut handle, base) }.result()?;
            Ok(Shared { handle: handle.reserved.map(|byte| byte as u8).to_vec(), offset: address - base, address })
        };
        offer().map_err(|error| self.gpu.fault("cuIpcGetMemHandle", error))
    }

    /// Maps what another process of this machine offers. It must not free the buffer before this one has dropped what it gets here.
    ///
    /// # Errors
    /// The driver's: GPUs that do not reach each other, processes that do not see each other's GPUs.
    pub fn map(&self, shared: &Shared) -> Result<Mapped, DeviceError> {
        let open = || {
            self.gpu.context.bind_to_thread()?;
            let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
            for (to, from) in handle.reserved.iter_mut().zip(&shared.handle) {
                *to = *from as c_char;
            }
            let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
            let mut base = 0;
            // SAFETY: the driver checks the handle and writes an address.
            unsafe { sys::cuIpcOpenMemHandle_v2(&mut base, handle, flags) }.result()?;
            Ok(base)
        };
        let base = open().map_err(|error| self.gpu.fault("cuIpcOpenMemHandle", error))?;
        Ok(Mapped { gpu: Arc::clone(&self.gpu), base: Some(base), address: base + shared.offset })
    }

    /// As [`Cuda::map`], of a buffer that another thread of this process has on GPU number `ordinal`.
    ///
    /// # Errors
    /// The driver's: GPUs that do not reach each other.
    pub fn map_own(&self, shared: &Shared, ordinal: usize) -> Result<Mapped, DeviceError> {
        let reach = || {
            self.gpu.context.bind_to_thread()?;
            let device = result::device::get(ordinal as i32)?;
            if device == self.gpu.context.cu_device() {
                return Ok(());
            }
            // SAFETY: the device exists; its primary context is in use by the thread that offers the buffer, so it stays.
            let context = unsafe { result::primary_ctx::retain(device) }?;
            // SAFETY: both contexts are live.
            let reached = unsafe { sys::cuCtxEnablePeerAccess(context, 0) }.result();
            // SAFETY: it was retained above.
            unsafe { result::primary_ctx::release(device) }?;
            match reached {
                Err(DriverError(sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED)) => Ok(()),
                other => other,
            }
        };
        reach().map_err(|error| self.gpu.fault("cuCtxEnablePeerAccess", error))?;
        Ok(Mapped { gpu: Arc::clone(&self.gpu), base: None, address: shared.address })
    }

    /// A word by which the host ends waits on the device.
    ///
    /// # Errors
    /// The driver's.
    pub fn halt(&self) -> Result<Halt, DeviceError> {
        let word = || {
            self.gpu.context.bind_to_thread()?;
            let mut word = ptr::null_mut();
            let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
            // SAFETY: the driver writes an address.
            unsafe { sys::cuMemHostAlloc(&mut word, size_of::<AtomicU32>(), flags) }.result()?;
            let word = word.cast::<AtomicU32>();
            // SAFETY: the memory was just allocated, for more than one number, and nobody else has it.
            unsafe { word.write(AtomicU32::new(0)) };
            NonNull::new(word).ok_or(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY))
        };
        let word = word().map_err(|error| self.gpu.fault("cuMemHostAlloc", error))?;
        Ok(Halt { gpu: Arc::clone(&self.gpu), word })
    }

    /// Stores rows where `peers` want them, tells them `mark`, and is through when all have told `mark` or a later one. Marks of a
    /// group count up from 1, the same on all ranks; with 0 nobody is told or waited for. Once `halt` is set it is through at once.
    /// `me` is this rank's number in `peers`. None: it was not issued, and the fault is remembered.
    ///
    /// # Safety
    /// Each peer's memory is mapped until this has run, holds what goes there, and is not used by the peer meanwhile; its marks are
    /// `[ranks]`.
    pub unsafe fn push(
        &self,
        (peers, me): (&[Destination], usize),
        pushed: &Pushed<'_, A>,
        (mark, halt): (u32, &Halt),
    ) -> Option<Issued> {
        let Pushed { width, what, rows, beside } = *pushed;
        let n = rows.last().map_or(0, |last| last.end);
        let desk = self.counters()?;
        let turn = self.memory.pushes.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let issued = Issued { desk: desk.at(0), turn };
        let to = Peers::new(peers, me, rows, (mark, turn));
        let most = if beside { BLOCKS_BESIDE } else { 2 * self.gpu.facts.multiprocessors };
        let grid = Grid::new(n.div_ceil(THREADS as usize / 32).clamp(1, most), THREADS);
        match what {
            Leaving::Rows { index, from, k, ids, weights } => {
                match index {
                    Some(index) => holds("index", index.len(), n),
                    None => holds("from", from.len(), n * width),
                }
                for (name, len) in
                    [("ids", ids.map(|ids| ids.len())), ("weights", weights.map(|weights| weights.len()))]
                {
                    holds(name, len.unwrap_or(n * k), n * k);
                }
                assert!(k <= MOST_SLOTS, "{k} numbers with a row, at most {MOST_SLOTS}");
                let from = pointer(from);
                let wide = packed::<A>(&[width], &to.ends(from)) == 1;
                let (name, pack) = if wide { ("push_rows_wide", PACK_BYTES) } else { ("push_rows", 2) };
                launch!(
                    self, name, grid;
                    to, (width * A::BYTES / pack) as i32, pointer_or_null(index), from, k as i32, pointer_or_null(ids),
                    pointer_or_null(weights), desk.at(0), halt.address()
                );
            }
            Leaving::Sums { k, slots, weights, y, along } => {
                holds("along", along.map_or(n * k, |along| along.len()), n * k);
                holds("slots", slots.len(), n * k);
                holds("weights", weights.map_or(n * k, |weights| weights.len()), n * k);
                assert!(k <= MOST_SLOTS, "{k} slots of a row, at most {MOST_SLOTS}");
                let y = pointer(y);
                let name = packs::<A>(names!("push_sums"), width, &to.ends(y));
                launch!(
                    self, name, grid;
                    to, width as i32, k as i32, pointer(slots), pointer_or_null(weights), y, pointer_or_null(along), desk.at(0),
                    halt.address()
                );
            }
        }
        Some(issued)
    }

    /// Lets a push of another queue have its multiprocessors before what this queue is given next: waits until it has begun, at most for
    /// `patience`.
    pub fn give_way(&self, push: Issued, patience: Duration) {
        launch!(self, "give_way", Grid::new(1, 1); push.desk, push.turn, patience.as_nanos() as u64);
    }
}

impl Peers {
    fn new(peers: &[Destination], me: usize, rows: &[Range<usize>], (mark, turn): (u32, u32)) -> Self {
        let ranks = peers.len();
        assert!(
            ranks <= MOST_PEERS && me < ranks && rows.len() == ranks,
            "rank {me} of {ranks}, {} ranges",
            rows.len()
        );
        let n = rows.last().map_or(0, |last| last.end);
        let mut starts = [n as i32; MOST_PEERS + 1];
        let mut end = 0;
        for (start, rows) in starts.iter_mut().zip(rows) {
            assert!(rows.start == end && rows.end >= end, "rows for ranks {rows:?}, not one after another");
            (*start, end) = (rows.start as i32, rows.end);
        }
        let each = |of: fn(&Destination) -> u64| std::array::from_fn(|peer| peers.get(peer).map_or(0, of));
        Self {
            rows: each(|peer| peer.rows),
            ids: each(|peer| peer.ids),
            weights: each(|peer| peer.weights),
            marks: each(|peer| peer.marks),
            starts,
            ranks: ranks as i32,
            me: me as i32,
            mark,
            turn,
        }
    }

    /// Where rows come from and go to.
    fn ends(&self, from: u64) -> [u64; MOST_PEERS + 1] {
        std::array::from_fn(|end| self.rows.get(end).copied().unwrap_or(from))
    }
}
