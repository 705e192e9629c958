//! Multi-head mixture of experts (MH-MoE, Wu et al. 2024): a token is projected and cut into parts, each part is routed by itself, and a second
//! projection mixes what comes out of them.
//!
//! Owns the two projections. A token's parts lie one after the other, so that `[T, H]` and `[T · parts, H / parts]` are the same numbers.

use moe_kernels::{Accumulate, Backend, Device, DeviceError, GemmDims, View, ViewMut};

use super::{MoeBackward, MoePass};
use crate::memory::{Kind, Slot, Tally};
use crate::model::layout::TensorId;
use crate::model::parameters::{Gradients, Weights};

/// The projections of one layer, with what their backward pass needs.
pub(super) struct SubTokens<B: Backend> {
    hidden_size: usize,
    /// `[T, H]`: tokens in parts, and what the experts made of them.
    parts: Slot<B, B::Act>,
    outputs: Slot<B, B::Act>,
}

/// Gradients of parts, which all layers share.
pub(super) struct SubTokenScratch<B: Backend> {
    dparts: Slot<B, B::Act>,
    doutputs: Slot<B, B::Act>,
}

impl<B: Backend> SubTokenScratch<B> {
    /// Empty scratch.
    pub(super) fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            dparts: Slot::new(device, "gradients of parts of tokens")?,
            doutputs: Slot::new(device, "gradients of outputs of parts")?,
        })
    }

    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.dparts.bytes(), self.doutputs.bytes()]);
    }
}

/// The parts of tokens, and where the experts' outputs for them go.
type PartsAndOutputs<'a, B> = (View<'a, B, <B as Device>::Act>, ViewMut<'a, B, <B as Device>::Act>);

impl<B: Backend> SubTokens<B> {
    /// For tokens of `hidden_size`.
    pub(super) fn new(device: &B, hidden_size: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            hidden_size,
            parts: Slot::new(device, "parts of tokens")?,
            outputs: Slot::new(device, "outputs of parts")?,
        })
    }

    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.parts.bytes(), self.outputs.bytes()]);
    }

    fn dims(&self, elements: usize) -> GemmDims {
        GemmDims { m: elements / self.hidden_size, n: self.hidden_size, k: self.hidden_size }
    }

    /// The parts of `x_TH`, and where their outputs go.
    pub(super) fn split(
        &mut self,
        device: &B,
        (weights, split): (Weights<'_, B>, TensorId),
        x_TH: View<'_, B, B::Act>,
    ) -> Result<PartsAndOutputs<'_, B>, DeviceError> {
        let n = x_TH.len();
        self.parts.reserve(device, n)?;
        self.outputs.reserve(device, n)?;
        device.linear(self.dims(n), x_TH, weights.get(split), None, self.parts.view_mut(n));
        Ok((self.parts.view(n), self.outputs.view_mut(n)))
    }

    /// `out_TH` (overwritten) of the parts' outputs.
    pub(super) fn merge(
        &self,
        device: &B,
        (weights, merge): (Weights<'_, B>, TensorId),
        out_TH: ViewMut<'_, B, B::Act>,
    ) {
        let n = out_TH.len();
        device.linear(self.dims(n), self.outputs.view(n), weights.get(merge), None, out_TH);
    }

    /// The tensors of the parts' backward pass, from the gradient of what they were merged into.
    pub(super) fn merge_backward<'a, C>(
        &'a self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        merge: TensorId,
        scratch: &'a mut SubTokenScratch<B>,
        dout_TH: View<'_, B, B::Act>,
    ) -> Result<MoeBackward<'a, B>, DeviceError> {
        let (device, n) = (pass.device, dout_TH.len());
        let SubTokenScratch { dparts, doutputs } = scratch;
        dparts.reserve(device, n)?;
        doutputs.reserve(device, n)?;
        let (dims, to) = (self.dims(n), doutputs.view_mut(n));
        device.linear_grad_input(dims, dout_TH, pass.weights.get(merge), to, Accumulate::Overwrite);
        device.linear_grad_weight(dims, dout_TH, self.outputs.view(n), gradients.get(merge));
        Ok(MoeBackward { x_TH: self.parts.view(n), dout_TH: doutputs.view(n), dx_TH: dparts.view_mut(n) })
    }

    /// `dx_TH` (overwritten) from the parts' gradient that the backward pass between left in the scratch.
    pub(super) fn split_backward<C>(
        &self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        split: TensorId,
        scratch: &SubTokenScratch<B>,
        (x_TH, dx_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) {
        let (device, n) = (pass.device, x_TH.len());
        let (dims, dparts) = (self.dims(n), scratch.dparts.view(n));
        device.linear_grad_weight(dims, dparts, x_TH, gradients.get(split));
        device.linear_grad_input(dims, dparts, pass.weights.get(split), dx_TH, Accumulate::Overwrite);
    }
}
