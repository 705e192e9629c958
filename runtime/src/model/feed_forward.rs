//! A dense feed-forward: dense blocks and shared experts.
//!
//! Owns its saved activations. It never sees the residual stream.

use moe_kernels::{Accumulate, Backend, DeviceError, GemmDims, Rows, View, ViewMut};

use super::layout::FeedForwardTensors;
use super::parameters::{Gradients, Weights};
use crate::memory::{Kind, Slot, Tally};

/// SwiGLU feed-forward `down · (silu(gate · x) ∘ up · x)` with what its backward pass needs.
pub(super) struct DenseFeedForward<B: Backend> {
    hidden_size: usize,
    ffn_size: usize,
    h: Slot<B, B::Act>,
    a: Slot<B, B::Act>,
    da: Slot<B, B::Act>,
    dh: Slot<B, B::Act>,
}

impl<B: Backend> DenseFeedForward<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.h.bytes(), self.a.bytes(), self.da.bytes(), self.dh.bytes()]);
    }

    /// Empty activations for sizes H and F.
    pub(super) fn new(device: &B, hidden_size: usize, ffn_size: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            hidden_size,
            ffn_size,
            h: Slot::new(device, "feed-forward projections")?,
            a: Slot::new(device, "feed-forward activations")?,
            da: Slot::new(device, "feed-forward activation gradients")?,
            dh: Slot::new(device, "feed-forward projection gradients")?,
        })
    }

    fn gemms(&self, tokens: usize) -> (GemmDims, GemmDims) {
        let (h, f) = (self.hidden_size, self.ffn_size);
        (GemmDims { m: tokens, n: 2 * f, k: h }, GemmDims { m: tokens, n: h, k: f })
    }

    /// `y_TH` (overwritten) from `x_TH`.
    pub(super) fn forward(
        &mut self,
        device: &B,
        weights: Weights<'_, B>,
        tensors: FeedForwardTensors,
        x_TH: View<'_, B, B::Act>,
        y_TH: ViewMut<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let (t, f) = (x_TH.len() / self.hidden_size, self.ffn_size);
        self.h.reserve(device, t * 2 * f)?;
        self.a.reserve(device, t * f)?;
        let (up, down) = self.gemms(t);
        device.linear(up, x_TH, weights.get(tensors.gate_up), None, self.h.view_mut(t * 2 * f));
        device.swiglu(Rows::exactly(t), f, self.h.view(t * 2 * f), self.a.view_mut(t * f));
        device.linear(down, self.a.view(t * f), weights.get(tensors.down), None, y_TH);
        Ok(())
    }

    /// Backward but for the input's gradient: the weights' from `dy_TH` and the forward pass's `x_TH`.
    pub(super) fn backward(
        &mut self,
        device: &B,
        (weights, gradients): (Weights<'_, B>, &mut Gradients<'_, B>),
        tensors: FeedForwardTensors,
        x_TH: View<'_, B, B::Act>,
        dy_TH: View<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let (t, f) = (x_TH.len() / self.hidden_size, self.ffn_size);
        self.da.reserve(device, t * f)?;
        self.dh.reserve(device, t * 2 * f)?;
        let (up, down) = self.gemms(t);
        let (w_down, da) = (weights.get(tensors.down), self.da.view_mut(t * f));
        device.linear_grad_input(down, dy_TH, w_down, da, Accumulate::Overwrite);
        device.linear_grad_weight(down, dy_TH, self.a.view(t * f), gradients.get(tensors.down));
        let (da, h) = (self.da.view(t * f), self.h.view(t * 2 * f));
        device.swiglu_grad(Rows::exactly(t), f, da, h, self.dh.view_mut(t * 2 * f));
        let dh = self.dh.view(t * 2 * f);
        device.linear_grad_weight(up, dh, x_TH, gradients.get(tensors.gate_up));
        Ok(())
    }

    /// The input's gradient after [`DenseFeedForward::backward`]: `dx_TH` (+)= ….
    pub(super) fn grad_input(
        &self,
        device: &B,
        weights: Weights<'_, B>,
        tensors: FeedForwardTensors,
        dx_TH: ViewMut<'_, B, B::Act>,
        accumulate: Accumulate,
    ) {
        let t = dx_TH.len() / self.hidden_size;
        let (up, _) = self.gemms(t);
        let dh = self.dh.view(t * 2 * self.ffn_size);
        device.linear_grad_input(up, dh, weights.get(tensors.gate_up), dx_TH, accumulate);
    }
}
