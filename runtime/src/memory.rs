//! Buffers that grow to what a step needs and then stay, and the count of what they hold.
//!
//! Owns growth and the kinds of memory. After the first steps nothing here allocates. Whoever owns buffers tells a [`Tally`] what
//! each is for; the plan's figures are held to these counts.

use moe_kernels::{Buffer, Device, DeviceError, Element, View, ViewMut};
use serde::{Deserialize, Serialize};

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the layers compute with, and its f32 master where there is one.
    Parameters,
    /// Sums of gradients.
    Gradients,
    /// The optimizer's moments.
    Optimizer,
    /// What the forward pass keeps and the backward pass works on.
    Activations,
    /// Rows under way, their lists, slices of sharded sums, messages.
    Communication,
}

/// Bytes of buffers by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// See [`Kind::Parameters`].
    pub parameters: u64,
    /// See [`Kind::Gradients`].
    pub gradients: u64,
    /// See [`Kind::Optimizer`].
    pub optimizer: u64,
    /// See [`Kind::Activations`].
    pub activations: u64,
    /// See [`Kind::Communication`].
    pub communication: u64,
}

impl Tally {
    /// Counts `bytes` of buffers.
    pub fn add(&mut self, kind: Kind, bytes: impl IntoIterator<Item = u64>) {
        let sum = match kind {
            Kind::Parameters => &mut self.parameters,
            Kind::Gradients => &mut self.gradients,
            Kind::Optimizer => &mut self.optimizer,
            Kind::Activations => &mut self.activations,
            Kind::Communication => &mut self.communication,
        };
        *sum += bytes.into_iter().sum::<u64>();
    }

    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.activations + self.communication
    }
}

/// Bytes of a buffer.
pub fn bytes_of<D: Device, T: Element>(buffer: &D::Buffer<T>) -> u64 {
    (buffer.len() * T::BYTES) as u64
}

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

    /// A slot with room for `len` elements.
    pub fn sized(device: &B, what: &'static str, len: usize) -> Result<Self, DeviceError> {
        Ok(Self { buffer: device.alloc(len, what)?, what })
    }

    /// Makes room for `len` elements. Grows by at least a quarter, so that a slowly rising need settles.
    pub fn reserve(&mut self, device: &B, len: usize) -> Result<(), DeviceError> {
        self.reserve_pages(device, len, 1)
    }

    /// As [`Slot::reserve`], in whole pages of `page` bytes.
    pub fn reserve_pages(&mut self, device: &B, len: usize, page: usize) -> Result<(), DeviceError> {
        if self.buffer.len() < len {
            let len = if self.buffer.is_empty() { len } else { len.max(self.buffer.len() * 5 / 4) };
            let len = len.next_multiple_of((page / T::BYTES).max(1));
            // The old one goes first: both at once would be the peak of a run's memory.
            self.buffer = device.alloc(0, self.what)?;
            self.buffer = device.alloc(len, self.what)?;
        }
        Ok(())
    }

    /// The whole of it.
    pub fn all(&self) -> View<'_, B, T> {
        View::of(&self.buffer)
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        bytes_of::<B, T>(&self.buffer)
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
