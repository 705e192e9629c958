//! The CUDA implementation: bf16, or f32 for parity, with f32 accumulation.
//!
//! Owns device memory, queues and the launch of kernels; the op families are in the modules beside this one, their kernels in
//! `kernels/cuda`. An operation is issued and returns at once. What fails is remembered and comes out of the next
//! [`Device::synchronize`] or [`Device::read_to_host`].

mod attention;
mod blas;
mod dense;
mod expert;
mod gpu;
mod grouped;
mod launch;
mod logits;
mod loss;
mod memory;
mod norm;
mod optimizer;
mod peers;
mod routing;
mod rows;
mod scratch;
mod shape;
mod shuffle;
mod transport;

use std::ffi::CStr;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaEvent, CudaStream, result, sys};
use half::bf16;

pub use gpu::{Facts, OpenError, gpu_count};
pub use memory::CudaBuffer;
pub use peers::{Destination, Halt, Issued, MOST_PEERS, Mapped, Pushed, Shared};
pub use transport::{Fold, Staging, address, address_mut};

use crate::{Activation, Device, DeviceError, Element, View, ViewMut};
use gpu::Gpu;
use launch::{Grid, launch};
use scratch::QueueMemory;

/// An activation type that the kernels are compiled for.
pub trait CudaAct: Activation {
    /// Of the two names of a kernel, this type's.
    fn pick(f32_name: &'static str, bf16_name: &'static str) -> &'static str;
}

impl CudaAct for f32 {
    fn pick(f32_name: &'static str, _: &'static str) -> &'static str {
        f32_name
    }
}

impl CudaAct for bf16 {
    fn pick(_: &'static str, bf16_name: &'static str) -> &'static str {
        bf16_name
    }
}

/// A CUDA queue: one stream of one GPU.
#[derive(Clone)]
pub struct Cuda<A: CudaAct = bf16> {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    memory: Arc<QueueMemory>,
    act: PhantomData<A>,
}

/// A moment of a stream, with its time once the stream has come by.
pub struct Stamp(Option<CudaEvent>);

/// A point in a stream's order.
#[derive(Clone)]
pub struct Event(Option<Arc<CudaEvent>>);

impl<A: CudaAct> Cuda<A> {
    /// A queue on GPU number `ordinal` of those this process may see.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(ordinal: usize) -> Result<Self, OpenError> {
        let gpu = Arc::new(Gpu::open(ordinal)?);
        let stream = gpu.new_stream().map_err(OpenError::Driver)?;
        Ok(Self { gpu, stream, memory: Arc::default(), act: PhantomData })
    }

    /// What the GPU is.
    pub fn facts(&self) -> &Facts {
        &self.gpu.facts
    }

    /// The GPU's number among those that this process may see.
    pub fn ordinal(&self) -> usize {
        self.gpu.context.ordinal()
    }

    /// Bytes of device memory (free, in all).
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.gpu.context.mem_get_info().map_err(|error| self.gpu.fault("cuMemGetInfo", error))
    }

    /// Milliseconds that what `work` issues takes on the device. Waits for it.
    ///
    /// # Errors
    /// Any fault of the device so far.
    pub fn time(&self, work: impl FnOnce()) -> Result<f32, DeviceError> {
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let mark = || self.stream.record_event(timed).map_err(|error| self.gpu.fault("cuEventRecord", error));
        let start = mark()?;
        work();
        let end = mark()?;
        self.synchronize()?;
        start.elapsed_ms(&end).map_err(|error| self.gpu.fault("cuEventElapsedTime", error))
    }
}

impl<A: CudaAct> Device for Cuda<A> {
    type Act = A;
    type Buffer<T: Element> = CudaBuffer<T>;
    type Event = Event;
    type Stamp = Stamp;

    fn describe(&self) -> String {
        format!("{}, {}", self.gpu.facts.name, A::NAME.to_lowercase())
    }

    fn fork(&self) -> Self {
        let stream = self.gpu.new_stream().unwrap_or_else(|error| {
            self.gpu.remember("cuStreamCreate", error);
            Arc::clone(&self.stream)
        });
        Self { gpu: Arc::clone(&self.gpu), stream, memory: Arc::default(), act: PhantomData }
    }

    fn alloc<T: Element>(&self, len: usize, what: &str) -> Result<CudaBuffer<T>, DeviceError> {
        CudaBuffer::zeroed(&self.gpu, len, what)
    }

    fn upload<T: Element>(&self, host: &[T], to: ViewMut<'_, Self, T>) {
        assert_eq!(host.len(), to.len(), "upload: elements on the host, and on the device");
        if host.is_empty() {
            return;
        }
        let at = pointer_mut(to);
        self.gpu.bound("cuMemcpyHtoDAsync", || {
            // SAFETY: the destination holds as many elements as `host` (asserted) and lives as long as its view; a copy from
            // pageable memory has read the source when the call returns.
            unsafe { result::memcpy_htod_async(at, host, self.stream.cu_stream()) }
        });
    }

    fn read_to_host<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<(), DeviceError> {
        assert_eq!(host.len(), from.len(), "read_to_host: elements on the host, and on the device");
        if !host.is_empty() {
            // A copy to ordinary memory waits for the queue inside the driver, where it keeps out every other thread: the one, too, that would
            // abort a collective without which the queue gets no further.
            self.synchronize()?;
            let at = pointer(from);
            self.gpu.bound("cuMemcpyDtoHAsync", || {
                // SAFETY: the source holds as many elements as `host` (asserted); the wait below keeps the borrow of `host` until the
                // copy has ended.
                unsafe { result::memcpy_dtoh_async(host, at, self.stream.cu_stream()) }
            });
        }
        self.synchronize()
    }

    fn copy<T: Element>(&self, from: View<'_, Self, T>, to: ViewMut<'_, Self, T>) {
        assert_eq!(from.len(), to.len(), "copy: elements of source and destination");
        if from.is_empty() {
            return;
        }
        let (bytes, from, to) = (from.len() * T::BYTES, pointer(from), pointer_mut(to));
        self.gpu.bound("cuMemcpyDtoDAsync", || {
            // SAFETY: both views hold `bytes` bytes of live buffers; one is borrowed mutably, so they do not overlap.
            unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
        });
    }

    fn fill<T: Element>(&self, to: ViewMut<'_, Self, T>, value: T) {
        let n = to.len();
        if n == 0 {
            return;
        }
        let at = pointer_mut(to);
        let mut bits = [0; 8];
        bits[..T::BYTES].copy_from_slice(T::as_bytes(&[value]));
        let grid = Grid::cover(n, 256, &self.gpu.facts);
        match T::BYTES {
            2 => launch!(self, "fill_b16", grid; at, u16::from_ne_bytes([bits[0], bits[1]]), n as i64),
            4 => {
                launch!(self, "fill_b32", grid; at, u32::from_ne_bytes([bits[0], bits[1], bits[2], bits[3]]), n as i64)
            }
            _ => launch!(self, "fill_b64", grid; at, u64::from_ne_bytes(bits), n as i64),
        }
    }

    fn record(&self) -> Event {
        match self.stream.record_event(None) {
            Ok(event) => Event(Some(Arc::new(event))),
            Err(error) => {
                self.gpu.remember("cuEventRecord", error);
                Event(None)
            }
        }
    }

    fn wait(&self, event: &Event) {
        if let Some(Err(error)) = event.0.as_ref().map(|event| self.stream.wait(event)) {
            self.gpu.remember("cuStreamWaitEvent", error);
        }
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        if let Err(error) = self.stream.synchronize() {
            self.gpu.remember("a queued operation", error);
        }
        self.gpu.check()
    }

    fn stamp(&self) -> Stamp {
        let event = self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Stamp(event.map_err(|error| self.gpu.remember("cuEventRecord", error)).ok())
    }

    fn begin_range(&self, name: &'static CStr) {
        nvtx_sys::range_push_ascii(name);
    }

    fn end_range(&self) {
        nvtx_sys::range_pop();
    }

    fn between(&self, from: &Stamp, to: &Stamp) -> Duration {
        let (Some(from), Some(to)) = (&from.0, &to.0) else { return Duration::ZERO };
        match from.elapsed_ms(to) {
            Ok(ms) => Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3),
            Err(error) => {
                self.gpu.remember("cuEventElapsedTime", error);
                Duration::ZERO
            }
        }
    }
}

/// The address of a view's first element.
fn pointer<A: CudaAct, T: Element>(view: View<'_, Cuda<A>, T>) -> u64 {
    let (buffer, offset) = view.parts();
    buffer.address() + (offset * T::BYTES) as u64
}

/// The address of a writable view's first element.
fn pointer_mut<A: CudaAct, T: Element>(view: ViewMut<'_, Cuda<A>, T>) -> u64 {
    let (buffer, offset) = view.into_parts();
    buffer.address() + (offset * T::BYTES) as u64
}

/// As [`pointer`]; null where there is none.
fn pointer_or_null<A: CudaAct, T: Element>(view: Option<View<'_, Cuda<A>, T>>) -> u64 {
    view.map_or(0, pointer)
}
