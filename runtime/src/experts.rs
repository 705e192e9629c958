//! Stage 3 of an MoE layer: the local experts' feed-forward over rows grouped by expert, forward and backward.
//!
//! Owns the experts' activations. It knows nothing of where rows come from or go to.

use std::ops::Range;

use moe_kernels::{Backend, DeviceError, GroupedDims, Rows, View, ViewMut};

use crate::memory::{Kind, Slot, Tally};

/// Sizes of this rank's experts.
#[derive(Clone, Copy, Debug)]
pub struct ExpertShape {
    /// E_local.
    pub experts: usize,
    /// H.
    pub hidden_size: usize,
    /// F.
    pub ffn_size: usize,
}

/// `gate_up` `[E_local, 2F, H]`, `down` `[E_local, H, F]`.
#[derive(Clone, Copy)]
pub struct ExpertWeights<'a, B: Backend> {
    /// Gate rows, then up rows.
    pub gate_up: View<'a, B, B::Act>,
    /// Down projection.
    pub down: View<'a, B, B::Act>,
}

/// Activations of one chunk of one layer.
pub struct Experts<B: Backend> {
    shape: ExpertShape,
    h: Slot<B, B::Act>,
    a: Slot<B, B::Act>,
    /// `[N, H]`: the experts' outputs, which the weights' gradient needs.
    pub y: Slot<B, B::Act>,
}

/// Gradients of experts' activations, shared by all layers.
pub struct ExpertScratch<B: Backend> {
    da: Slot<B, B::Act>,
    dh: Slot<B, B::Act>,
}

impl<B: Backend> ExpertScratch<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.da.bytes(), self.dh.bytes()]);
    }

    /// Empty scratch.
    pub fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            da: Slot::new(device, "expert activation gradients")?,
            dh: Slot::new(device, "expert projection gradients")?,
        })
    }
}

/// The rows of one grouped pass: how many there are, and where each expert's begin.
pub struct GroupedRows<'a, B: Backend> {
    /// Upper bound and, on the device, the number of rows.
    pub rows: Rows<'a, B>,
    /// `[E_local + 1]`.
    pub offsets: View<'a, B, i32>,
}

impl<B: Backend> Clone for GroupedRows<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for GroupedRows<'_, B> {}

impl<B: Backend> Experts<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.h.bytes(), self.a.bytes(), self.y.bytes()]);
    }

    /// Empty activations.
    pub fn new(device: &B, shape: ExpertShape) -> Result<Self, DeviceError> {
        Ok(Self {
            shape,
            h: Slot::new(device, "expert projections")?,
            a: Slot::new(device, "expert activations")?,
            y: Slot::new(device, "expert outputs")?,
        })
    }

    fn up(&self) -> GroupedDims {
        GroupedDims { experts: self.shape.experts, n: 2 * self.shape.ffn_size, k: self.shape.hidden_size }
    }

    fn down(&self) -> GroupedDims {
        GroupedDims { experts: self.shape.experts, n: self.shape.hidden_size, k: self.shape.ffn_size }
    }

    /// `y[i] = down_e · swiglu(gate_up_e · x[i])` for the rows of each expert e.
    pub fn forward(
        &mut self,
        device: &B,
        grouped: GroupedRows<'_, B>,
        x_NH: View<'_, B, B::Act>,
        weights: ExpertWeights<'_, B>,
    ) -> Result<(), DeviceError> {
        let (n, f) = (grouped.rows.bound, self.shape.ffn_size);
        self.h.reserve(device, n * 2 * f)?;
        self.a.reserve(device, n * f)?;
        self.y.reserve(device, n * self.shape.hidden_size)?;
        let (up, down) = (self.up(), self.down());
        device.grouped_linear(up, grouped.offsets, x_NH, weights.gate_up, self.h.view_mut(n * 2 * f));
        device.swiglu(grouped.rows, f, self.h.view(n * 2 * f), self.a.view_mut(n * f));
        let y = self.y.view_mut(n * self.shape.hidden_size);
        device.grouped_linear(down, grouped.offsets, self.a.view(n * f), weights.down, y);
        Ok(())
    }

    /// Backward: `dx_NH` is overwritten, weight gradients are added to.
    pub fn backward(
        &mut self,
        device: &B,
        scratch: &mut ExpertScratch<B>,
        grouped: GroupedRows<'_, B>,
        tensors: ExpertBackward<'_, B>,
    ) -> Result<(), DeviceError> {
        let (n, f) = (grouped.rows.bound, self.shape.ffn_size);
        scratch.da.reserve(device, n * f)?;
        scratch.dh.reserve(device, n * 2 * f)?;
        let (up, down, offsets) = (self.up(), self.down(), grouped.offsets);
        let ExpertBackward { x_NH, dy_NH, dx_NH, weights, mut gradients, gate_up, down: down_range } = tensors;
        device.grouped_linear_grad_input(down, offsets, dy_NH, weights.down, scratch.da.view_mut(n * f));
        device.grouped_linear_grad_weight(
            down,
            offsets,
            dy_NH,
            self.a.view(n * f),
            gradients.reborrow().slice(down_range),
        );
        let (da, h) = (scratch.da.view(n * f), self.h.view(n * 2 * f));
        device.swiglu_grad(grouped.rows, f, da, h, scratch.dh.view_mut(n * 2 * f));
        let dh = scratch.dh.view(n * 2 * f);
        device.grouped_linear_grad_weight(up, offsets, dh, x_NH, gradients.slice(gate_up));
        device.grouped_linear_grad_input(up, offsets, dh, weights.gate_up, dx_NH);
        Ok(())
    }
}

/// Tensors of the experts' backward pass.
pub struct ExpertBackward<'a, B: Backend> {
    /// The forward pass's input.
    pub x_NH: View<'a, B, B::Act>,
    /// Gradient of the output.
    pub dy_NH: View<'a, B, B::Act>,
    /// Gradient of the input, overwritten.
    pub dx_NH: ViewMut<'a, B, B::Act>,
    /// The experts' weights.
    pub weights: ExpertWeights<'a, B>,
    /// The flat gradient buffer, added to.
    pub gradients: ViewMut<'a, B, f32>,
    /// Where `gate_up` lies in it.
    pub gate_up: Range<usize>,
    /// Where `down` lies in it.
    pub down: Range<usize>,
}
