//! Device memory.

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::gpu::Gpu;
use crate::{Buffer, DeviceError, Element};

/// Owned memory of one GPU. Its address is a multiple of 256 bytes.
pub struct CudaBuffer<T: Element> {
    gpu: Arc<Gpu>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> CudaBuffer<T> {
    /// Memory of `len` zeroes; `what` names it if there is none left.
    pub(super) fn zeroed(gpu: &Arc<Gpu>, len: usize, what: &str) -> Result<Self, DeviceError> {
        let bytes = len * T::BYTES;
        let mut address = 0;
        if bytes > 0 {
            gpu.check()?;
            let made = gpu.context.bind_to_thread().and_then(|()| {
                // SAFETY: the memory is freed once, when this buffer is dropped, and the clearing has ended before anybody else has
                // the address.
                unsafe {
                    let address = result::malloc_sync(bytes)?;
                    result::memset_d8_sync(address, 0, bytes).and_then(|()| gpu.context.synchronize())?;
                    Ok(address)
                }
            });
            address = made.map_err(|error| match error.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => gpu.out_of_memory(bytes, what),
                _ => gpu.fault("cuMemAlloc", error),
            })?;
        }
        Ok(Self { gpu: Arc::clone(gpu), address, len, element: PhantomData })
    }

    /// Where it begins; 0 if it is empty.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl<T: Element> Buffer<T> for CudaBuffer<T> {
    fn len(&self) -> usize {
        self.len
    }
}

impl<T: Element> Drop for CudaBuffer<T> {
    fn drop(&mut self) {
        if self.address != 0 {
            let address = self.address;
            self.gpu.bound("cuMemFree", || {
                // SAFETY: this buffer alone owns the address, and cuMemFree waits for work that still uses it.
                unsafe { result::free_sync(address) }
            });
        }
    }
}
