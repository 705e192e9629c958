//! What a transport between GPUs needs of a queue: handles, addresses, a stream that goes first, and the folding of what arrived.
//!
//! Owns no exchange: a transport issues it to the stream it gets here.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

use super::launch::{Grid, launch};
use super::scratch::Scratch;
use super::shape::holds;
use super::{Cuda, CudaAct, Event, pointer, pointer_mut};
use crate::{DeviceError, Element, View, ViewMut};

/// How values become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fold {
    /// The sum; integers wrap.
    Sum,
    /// The largest; NaN if any is NaN.
    Max,
    /// The smallest; NaN if any is NaN.
    Min,
}

impl Fold {
    /// The kernel for elements of a type. Panics for one that is not folded.
    fn kernel<T: Element>(self) -> &'static str {
        match (self, T::NAME) {
            (Self::Sum, "F32") => "fold_sum_f32",
            (Self::Sum, "F64") => "fold_sum_f64",
            (Self::Sum, "I32") => "fold_sum_i32",
            (Self::Max, "F32") => "fold_max_f32",
            (Self::Max, "F64") => "fold_max_f64",
            (Self::Max, "I32") => "fold_max_i32",
            (Self::Min, "F32") => "fold_min_f32",
            (Self::Min, "F64") => "fold_min_f64",
            (Self::Min, "I32") => "fold_min_i32",
            (_, name) => panic!("{name} is not folded"),
        }
    }
}

/// Memory of a queue that belongs to one operation until this is dropped, after its last kernel was issued. It holds anything at first.
pub struct Staging<'a> {
    memory: Scratch<'a>,
    bytes: usize,
}

impl Staging<'_> {
    /// Where it begins: a multiple of 256.
    pub fn address(&self) -> u64 {
        self.memory.at(0)
    }
}

impl<A: CudaAct> Cuda<A> {
    /// Another queue on the same GPU, whose kernels go before those of others that wait for the same multiprocessors.
    pub fn fork_urgent(&self) -> Self {
        let stream = self.gpu.new_urgent_stream().unwrap_or_else(|error| {
            self.gpu.remember("cuStreamCreateWithPriority", error);
            Arc::clone(&self.stream)
        });
        Self { gpu: Arc::clone(&self.gpu), stream, memory: Arc::default(), act: PhantomData }
    }

    /// The driver's handle of the stream, which lives as long as this queue or a clone of it.
    pub fn stream_handle(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Makes the GPU current on this thread, for libraries that ask the driver which one is.
    ///
    /// # Errors
    /// The driver's.
    pub fn make_current(&self) -> Result<(), DeviceError> {
        self.gpu.context.bind_to_thread().map_err(|error| self.gpu.fault("cuCtxSetCurrent", error))
    }

    /// Whether what was issued before `event` has run. Does not wait.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn has_passed(&self, event: &Event) -> Result<bool, DeviceError> {
        self.make_current()?;
        let Some(event) = &event.0 else { return self.gpu.check().map(|()| true) };
        event.try_is_complete().map_err(|error| self.gpu.fault("a queued operation", error))
    }

    /// `bytes` of the queue's scratch memory, which grows to the largest need and stays.
    ///
    /// # Errors
    /// Out of memory.
    pub fn staging(&self, bytes: usize) -> Result<Staging<'_>, DeviceError> {
        match self.scratch(bytes) {
            Some(memory) => Ok(Staging { memory, bytes }),
            None => {
                Err(self.gpu.check().err().unwrap_or_else(|| self.gpu.out_of_memory(bytes, "the scratch of a queue")))
            }
        }
    }

    /// `y[i] = x[0][i] op x[1][i] op …` of the `x [blocks, n]` that begins the staging memory, in ascending order: the bits of the host's
    /// reduction.
    pub fn fold_staged<T: Element>(&self, fold: Fold, staged: &Staging<'_>, blocks: usize, y: ViewMut<'_, Self, T>) {
        let n = y.len();
        if n == 0 {
            return;
        }
        holds("staging", staged.bytes, blocks * n * T::BYTES);
        let grid = Grid::cover(n, 256, &self.gpu.facts);
        launch!(self, fold.kernel::<T>(), grid; blocks as i32, n as i64, staged.address(), pointer_mut(y));
    }
}

/// The address of a view's first element, for a transport that reads it on a stream which is ordered after what wrote it. 0 or any
/// where the view is empty.
pub fn address<A: CudaAct, T: Element>(view: View<'_, Cuda<A>, T>) -> u64 {
    pointer(view)
}

/// As [`address`], of a view that a transport writes.
pub fn address_mut<A: CudaAct, T: Element>(view: ViewMut<'_, Cuda<A>, T>) -> u64 {
    pointer_mut(view)
}
