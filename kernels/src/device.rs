//! Buffers, views and the queue: what every operation is written against.
//!
//! Owns the vocabulary of memory and ordering. It never computes.

use std::ffi::CStr;
use std::fmt::Debug;
use std::ops::Range;
use std::time::Duration;

/// A number type that buffers hold.
pub trait Element: Copy + Default + PartialEq + Debug + Send + Sync + sealed::Sealed + 'static {
    /// Bytes of one element.
    const BYTES: usize;
    /// The name used in messages, as in safetensors headers.
    const NAME: &'static str;

    /// The elements as bytes in native order, for transports that move bytes.
    fn as_bytes(slice: &[Self]) -> &[u8];
    /// The elements as writable bytes in native order; every bit pattern is a valid element.
    fn as_bytes_mut(slice: &mut [Self]) -> &mut [u8];
}

mod sealed {
    /// Keeps [`super::Element`] to types that have no invalid bit pattern.
    pub trait Sealed {}
}

macro_rules! element {
    ($type:ty, $name:literal) => {
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const BYTES: usize = size_of::<$type>();
            const NAME: &'static str = $name;

            fn as_bytes(slice: &[Self]) -> &[u8] {
                // SAFETY: the pointer and length come from one live slice of a plain number type without padding, and u8 has
                // no alignment to violate; the borrow keeps the slice alive.
                unsafe { std::slice::from_raw_parts(slice.as_ptr().cast::<u8>(), size_of_val(slice)) }
            }

            fn as_bytes_mut(slice: &mut [Self]) -> &mut [u8] {
                // SAFETY: as above, and every byte pattern is a valid value of this number type, so writes cannot break it.
                unsafe { std::slice::from_raw_parts_mut(slice.as_mut_ptr().cast::<u8>(), size_of_val(slice)) }
            }
        }
    };
}
element!(half::bf16, "BF16");
element!(f32, "F32");
element!(f64, "F64");
element!(i32, "I32");

/// A number type that activations are computed in.
pub trait Activation: Element {
    /// Whether the type holds every f32, so that a compute copy can be its own master copy.
    const HOLDS_F32: bool;
    /// Rounds to the nearest value of this type.
    fn from_f32(value: f32) -> Self;
    /// The exact value.
    fn to_f32(self) -> f32;
}

impl Activation for f32 {
    const HOLDS_F32: bool = true;

    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Activation for half::bf16 {
    const HOLDS_F32: bool = false;

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// What a device reports when memory or a queued operation fails.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DeviceError {
    /// A buffer could not be allocated.
    #[error("out of memory on {device}: {bytes} bytes for {what}")]
    OutOfMemory {
        /// The device, in words.
        device: String,
        /// Size of the refused buffer.
        bytes: usize,
        /// What the buffer was for.
        what: String,
    },
    /// A queued operation failed; everything after it on the queue is void.
    #[error("{device} failed in {operation}: {reason}")]
    Fault {
        /// The device, in words.
        device: String,
        /// The first operation that is known to have failed.
        operation: String,
        /// The driver's own text.
        reason: String,
    },
}

/// Owned device memory of one element type.
pub trait Buffer<T: Element>: Send + Sync + Sized + 'static {
    /// Elements the buffer holds.
    fn len(&self) -> usize;
    /// Whether it holds none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A queue on a device: where operations are issued, and the memory they work on.
///
/// A value of the type *is* a queue; [`Device::fork`] makes another one on the same device. On a CPU a queue runs each
/// operation at once and events are empty.
pub trait Device: Clone + Send + Sync + Sized + 'static {
    /// Element type of activations and of the compute copy of parameters: f32 on CPUs; bf16, or f32 for parity, on GPUs.
    type Act: Activation;
    /// Owned memory.
    type Buffer<T: Element>: Buffer<T>;
    /// A point in a queue's order.
    type Event: Clone + Send + Sync;
    /// A moment of a queue, to measure time between.
    type Stamp: Send + Sync;

    /// The device, in words a user knows.
    fn describe(&self) -> String;
    /// Another queue on the same device.
    fn fork(&self) -> Self;
    /// A zeroed buffer of `len` elements; `what` names it if memory runs out.
    fn alloc<T: Element>(&self, len: usize, what: &str) -> Result<Self::Buffer<T>, DeviceError>;
    /// Copies host memory into a view of the same length. The host slice is free again when this returns.
    fn upload<T: Element>(&self, host: &[T], to: ViewMut<'_, Self, T>);
    /// Waits for this queue, then copies a view into host memory of the same length: the one call that returns device data.
    fn read_to_host<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<(), DeviceError>;
    /// Copies between two views of the same length.
    fn copy<T: Element>(&self, from: View<'_, Self, T>, to: ViewMut<'_, Self, T>);
    /// Sets every element.
    fn fill<T: Element>(&self, to: ViewMut<'_, Self, T>, value: T);
    /// Marks this point of the queue.
    fn record(&self) -> Self::Event;
    /// Makes what is issued to this queue from now on run after `event`; the host does not wait.
    fn wait(&self, event: &Self::Event);
    /// Waits until everything issued has run; returns the first fault.
    fn synchronize(&self) -> Result<(), DeviceError>;

    /// Notes the moment at which the queue gets here; the host does not wait.
    fn stamp(&self) -> Self::Stamp;
    /// The time between two moments of this queue, which has been waited for since.
    fn between(&self, from: &Self::Stamp, to: &Self::Stamp) -> Duration;

    /// Begins a named range of what this thread issues, for a profiler that watches; ranges nest. Free where none does.
    fn begin_range(&self, _name: &'static CStr) {}
    /// Ends the range that was begun last.
    fn end_range(&self) {}

    /// The elements of a view, where the host computes in the device's memory and a queue's operations have run when they return.
    /// None: they must be copied.
    fn host_view<T: Element>(_: View<'_, Self, T>) -> Option<&[T]> {
        None
    }
    /// As [`Device::host_view`], writable.
    fn host_view_mut<T: Element>(_: ViewMut<'_, Self, T>) -> Option<&mut [T]> {
        None
    }
}

/// A readable range of a buffer.
pub struct View<'a, D: Device, T: Element> {
    buffer: &'a D::Buffer<T>,
    offset: usize,
    len: usize,
}

impl<D: Device, T: Element> Clone for View<'_, D, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device, T: Element> Copy for View<'_, D, T> {}

impl<'a, D: Device, T: Element> View<'a, D, T> {
    /// The whole buffer.
    pub fn of(buffer: &'a D::Buffer<T>) -> Self {
        Self { buffer, offset: 0, len: buffer.len() }
    }

    /// A range of the buffer. Panics if it reaches beyond the end.
    pub fn range(buffer: &'a D::Buffer<T>, range: Range<usize>) -> Self {
        Self::of(buffer).slice(range)
    }

    /// A range of this view. Panics if it reaches beyond the end.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "view {range:?} of {} elements", self.len);
        Self { buffer: self.buffer, offset: self.offset + range.start, len: range.end - range.start }
    }

    /// Elements in view.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffer and the offset of the view's first element in it, for device implementations.
    pub fn parts(&self) -> (&'a D::Buffer<T>, usize) {
        (self.buffer, self.offset)
    }
}

/// A writable range of a buffer.
pub struct ViewMut<'a, D: Device, T: Element> {
    buffer: &'a mut D::Buffer<T>,
    offset: usize,
    len: usize,
}

impl<'a, D: Device, T: Element> ViewMut<'a, D, T> {
    /// The whole buffer.
    pub fn of(buffer: &'a mut D::Buffer<T>) -> Self {
        let len = buffer.len();
        Self { buffer, offset: 0, len }
    }

    /// A range of the buffer. Panics if it reaches beyond the end.
    pub fn range(buffer: &'a mut D::Buffer<T>, range: Range<usize>) -> Self {
        Self::of(buffer).slice(range)
    }

    /// A range of this view. Panics if it reaches beyond the end.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "view {range:?} of {} elements", self.len);
        Self { buffer: self.buffer, offset: self.offset + range.start, len: range.end - range.start }
    }

    /// The same view for a shorter time, so that it can be passed on and used again.
    pub fn reborrow(&mut self) -> ViewMut<'_, D, T> {
        ViewMut { buffer: self.buffer, offset: self.offset, len: self.len }
    }

    /// The same range, readable.
    pub fn as_view(&self) -> View<'_, D, T> {
        View { buffer: self.buffer, offset: self.offset, len: self.len }
    }

    /// Elements in view.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffer and the offset of the view's first element in it, for device implementations.
    pub fn into_parts(self) -> (&'a mut D::Buffer<T>, usize) {
        (self.buffer, self.offset)
    }
}
