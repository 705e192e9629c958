//! Elements, reductions, and what device memory and streams are called here.

use std::ffi::c_void;
use std::marker::PhantomData;

use cudarc::nccl::sys::{self, ncclDataType_t, ncclRedOp_t};

/// A type that NCCL moves and adds.
pub trait Element: Copy + Send + Sync + sealed::Sealed + 'static {
    #[doc(hidden)]
    const TYPE: ncclDataType_t;
}

mod sealed {
    /// Keeps [`super::Element`] to types whose layout is NCCL's.
    pub trait Sealed {}
}

macro_rules! elements {
    ($($type:ty => $name:ident),+ $(,)?) => {
        $(
            impl sealed::Sealed for $type {}
            impl Element for $type {
                const TYPE: ncclDataType_t = ncclDataType_t::$name;
            }
        )+
    };
}
elements!(
    i8 => ncclInt8,
    u8 => ncclUint8,
    i32 => ncclInt32,
    u32 => ncclUint32,
    i64 => ncclInt64,
    u64 => ncclUint64,
    half::f16 => ncclFloat16,
    half::bf16 => ncclBfloat16,
    f32 => ncclFloat32,
    f64 => ncclFloat64,
);

/// How values of several ranks become one. The order in which they are added is NCCL's own; it is the same on all ranks, and for
/// one communicator and size the same in every run. What becomes of NaN under `Max` and `Min` is not defined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The product.
    Product,
    /// The largest.
    Max,
    /// The smallest.
    Min,
    /// The sum, divided by the number of ranks.
    Mean,
}

impl ReduceOp {
    pub(crate) fn raw(self) -> ncclRedOp_t {
        match self {
            Self::Sum => ncclRedOp_t::ncclSum,
            Self::Product => ncclRedOp_t::ncclProd,
            Self::Max => ncclRedOp_t::ncclMax,
            Self::Min => ncclRedOp_t::ncclMin,
            Self::Mean => ncclRedOp_t::ncclAvg,
        }
    }
}

/// `len` elements of device memory that a collective reads.
#[derive(Debug)]
pub struct DeviceSlice<T> {
    address: u64,
    len: usize,
    element: PhantomData<*const T>,
}

impl<T> Clone for DeviceSlice<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for DeviceSlice<T> {}

impl<T: Element> DeviceSlice<T> {
    /// `len` elements from `address` on; an empty one may have any address.
    ///
    /// # Safety
    /// The memory is on the communicator's GPU, or can be read from there, and aligned for `T`. It lives, and nobody writes to it, from
    /// the moment a stream reaches a collective it is given to until the stream has passed it.
    pub unsafe fn new(address: u64, len: usize) -> Self {
        Self { address, len, element: PhantomData }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` elements of it from element `start` on, which the caller has compared with its length.
    pub(crate) fn part(self, start: usize, len: usize) -> Self {
        Self { address: self.address + (start * size_of::<T>()) as u64, len, element: PhantomData }
    }

    pub(crate) fn pointer(self) -> *const c_void {
        self.address as usize as *const c_void
    }
}

/// `len` elements of device memory that a collective writes.
#[derive(Debug)]
pub struct DeviceSliceMut<T> {
    address: u64,
    len: usize,
    element: PhantomData<*mut T>,
}

impl<T: Element> DeviceSliceMut<T> {
    /// `len` elements from `address` on; an empty one may have any address.
    ///
    /// # Safety
    /// As [`DeviceSlice::new`]; moreover nobody else reads it meanwhile, and it overlaps no other slice of the collective, unless the
    /// collective says that it works in place.
    pub unsafe fn new(address: u64, len: usize) -> Self {
        Self { address, len, element: PhantomData }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// As [`DeviceSlice::part`].
    pub(crate) fn part(&mut self, start: usize, len: usize) -> Self {
        Self { address: self.address + (start * size_of::<T>()) as u64, len, element: PhantomData }
    }

    pub(crate) fn pointer(&self) -> *mut c_void {
        self.address as usize as *mut c_void
    }
}

/// A CUDA stream that collectives are issued to.
#[derive(Debug, Clone, Copy)]
pub struct Stream(sys::cudaStream_t);

impl Stream {
    /// The stream with the driver's or runtime's handle `raw`; null is the default stream.
    ///
    /// # Safety
    /// The stream belongs to the GPU of every communicator it is given to, and lives until what was issued to it has run.
    pub unsafe fn from_raw(raw: *mut c_void) -> Self {
        Self(raw.cast())
    }

    pub(crate) fn raw(self) -> sys::cudaStream_t {
        self.0
    }
}
