//! Buffers that grow to what a step needs and then stay.
//!
//! Owns growth. After the first steps nothing here allocates.

use moe_kernels::{Buffer, Device, DeviceError, Element, View, ViewMut};

/// A buffer with a name that grows on demand. Growing loses the content.
pub struct Slot<B: Device, T: Element> {
    buffer: B::Buffer<T>,
    what: &'static str,
}

impl<B: Device, T: Element> Slot<B, T> {
    /// An empty slot; `what` names it if memory runs out.
    pub fn new(device: &B, what: &'static str) -> Result<Self, DeviceError> {
        Ok(Self { buffer: device.alloc(0, what)?, what })
    }

    /// Makes room for `len` elements. Grows by at least a quarter, so that a slowly rising need settles.
    pub fn reserve(&mut self, device: &B, len: usize) -> Result<(), DeviceError> {
        if self.buffer.len() < len {
            let len = if self.buffer.is_empty() { len } else { len.max(self.buffer.len() * 5 / 4) };
            self.buffer = device.alloc(len, self.what)?;
        }
        Ok(())
    }

    /// The first `len` elements.
    pub fn view(&self, len: usize) -> View<'_, B, T> {
        View::range(&self.buffer, 0..len)
    }

    /// The first `len` elements, writable.
    pub fn view_mut(&mut self, len: usize) -> ViewMut<'_, B, T> {
        ViewMut::range(&mut self.buffer, 0..len)
    }
}
