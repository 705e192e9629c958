//! What one queue needs beside the buffers of its caller: scratch inside an operation, cuBLASLt's workspace, and counters.
//!
//! Owns memory that grows to the largest need seen and is kept. Growing allocates, and freeing what was there waits for the device: it
//! happens in the first steps only, while operations meet their shapes for the first time.

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard};

use super::gpu::{Gpu, locked};
use super::memory::CudaBuffer;
use super::{Cuda, CudaAct};
use crate::Buffer;

/// Sizes are multiples of this, so that shapes which differ a little do not each grow the memory.
const STEP_BYTES: usize = 1 << 20;

/// The memory of one queue; every clone of the queue shares it, a fork has its own.
#[derive(Default)]
pub(super) struct QueueMemory {
    scratch: Slot,
    workspace: Slot,
    counters: Slot,
    /// Pushes that the queue was given.
    pub(super) pushes: AtomicU32,
}

type Slot = Mutex<Option<CudaBuffer<f32>>>;

/// Memory that belongs to one operation until this is dropped.
///
/// An operation takes it once, for all it needs, and holds it until its last kernel is issued: so two threads that issue to one queue
/// cannot put their kernels between each other's. It holds anything at first, and nothing of it outlives the operation: the next one of
/// the queue, which runs later, gets the same memory.
pub(super) struct Scratch<'a>(MutexGuard<'a, Option<CudaBuffer<f32>>>);

impl Scratch<'_> {
    /// The address of byte number `offset`; that of byte 0 is a multiple of 256.
    pub(super) fn at(&self, offset: usize) -> u64 {
        self.0.as_ref().map_or(0, |buffer| buffer.address() + offset as u64)
    }
}

impl<A: CudaAct> Cuda<A> {
    /// At least `bytes` of scratch for the operation that asks. None where the GPU has no memory left: the fault is remembered, and
    /// the operation has to be left out.
    pub(super) fn scratch(&self, bytes: usize) -> Option<Scratch<'_>> {
        lease(&self.gpu, &self.memory.scratch, bytes, "the scratch of a queue")
    }

    /// As [`Cuda::scratch`], apart from it: what a library's call works in.
    pub(super) fn workspace(&self, bytes: usize) -> Option<Scratch<'_>> {
        lease(&self.gpu, &self.memory.workspace, bytes, "the matrix workspace of a queue")
    }

    /// Two integers that blocks of a kernel count with: zero, and left as zero by the kernel. Behind them, the last push that has begun.
    pub(super) fn counters(&self) -> Option<Scratch<'_>> {
        lease(&self.gpu, &self.memory.counters, 3 * size_of::<i32>(), "the counters of a queue")
    }
}

fn lease<'a>(gpu: &Arc<Gpu>, slot: &'a Slot, bytes: usize, what: &str) -> Option<Scratch<'a>> {
    let mut held = locked(slot);
    if held.as_ref().is_none_or(|buffer| buffer.len() * size_of::<f32>() < bytes) {
        *held = None;
        let bytes = bytes.next_multiple_of(STEP_BYTES).max(STEP_BYTES);
        match CudaBuffer::zeroed(gpu, bytes / size_of::<f32>(), what) {
            Ok(buffer) => *held = Some(buffer),
            Err(fault) => {
                gpu.keep(fault);
                return None;
            }
        }
    }
    Some(Scratch(held))
}
