//! The shared expert: a feed-forward that every token of a layer meets, on the token's own rank.
//!
//! Each pass has two parts: the work, which needs nobody's rows and runs while rows travel, and what it adds to what came home.

use moe_kernels::{Accumulate, Backend, DeviceError, GemmDims, View, ViewMut};

use super::MoePass;
use crate::memory::{Kind, Slot, Tally};
use crate::model::config::ModelConfig;
use crate::model::feed_forward::DenseFeedForward;
use crate::model::parameters::Gradients;

/// The shared expert, with the logits of its gate where it has one.
pub(super) struct SharedExpert<B: Backend> {
    feed_forward: DenseFeedForward<B>,
    out: Slot<B, B::Act>,
    gate: Slot<B, f32>,
    dout: Slot<B, B::Act>,
    dgate: Slot<B, f32>,
}

impl<B: Backend> SharedExpert<B> {
    /// That of a model of `config`, which has one.
    pub(super) fn new(device: &B, config: &ModelConfig) -> Result<Self, DeviceError> {
        Ok(Self {
            feed_forward: DenseFeedForward::new(device, config.hidden_size, config.shared_expert_ffn_size)?,
            out: Slot::new(device, "shared expert outputs")?,
            gate: Slot::new(device, "shared expert gates")?,
            dout: Slot::new(device, "shared expert output gradients")?,
            dgate: Slot::new(device, "shared expert gate gradients")?,
        })
    }

    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.out.bytes(), self.gate.bytes(), self.dout.bytes(), self.dgate.bytes()]);
        self.feed_forward.tally(tally);
    }

    /// The shared expert's output of `x_TH`, and its gate's logits.
    pub(super) fn forward<C>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        h: usize,
        x_TH: View<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let Some(tensors) = pass.tensors.shared else { return Ok(()) };
        let (device, t) = (pass.device, pass.route.tokens);
        self.out.reserve(device, t * h)?;
        self.feed_forward.forward(device, pass.weights, tensors, x_TH, self.out.view_mut(t * h))?;
        if let Some(gate) = pass.tensors.shared_router {
            self.gate.reserve(device, t)?;
            let dims = GemmDims { m: t, n: 1, k: h };
            device.linear_f32(dims, x_TH, pass.weights.get(gate), self.gate.view_mut(t));
        }
        Ok(())
    }

    /// Adds the output, gated, to `out_TH`.
    pub(super) fn add<C>(&self, pass: &MoePass<'_, B, C>, h: usize, out_TH: ViewMut<'_, B, B::Act>) {
        let (device, t) = (pass.device, pass.route.tokens);
        let out = self.out.view(t * h);
        match pass.tensors.shared_router {
            None => device.add(out, out_TH),
            Some(_) => device.sigmoid_gate(h, self.gate.view(t), out, out_TH),
        }
    }

    /// The gradients of its weights, and of its gate's logits.
    pub(super) fn backward<C>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        h: usize,
        (x_TH, dout_TH): (View<'_, B, B::Act>, View<'_, B, B::Act>),
    ) -> Result<(), DeviceError> {
        let Some(tensors) = pass.tensors.shared else { return Ok(()) };
        let (device, t) = (pass.device, pass.route.tokens);
        let dout = if pass.tensors.shared_router.is_some() {
            self.dout.reserve(device, t * h)?;
            self.dgate.reserve(device, t)?;
            let (logits, out) = (self.gate.view(t), self.out.view(t * h));
            device.sigmoid_gate_grad(h, dout_TH, logits, out, self.dout.view_mut(t * h), self.dgate.view_mut(t));
            self.dout.view(t * h)
        } else {
            dout_TH
        };
        self.feed_forward.backward(device, (pass.weights, gradients), tensors, x_TH, dout)
    }

    /// Adds its part to `dx_TH`, and forms the gradient of its gate.
    pub(super) fn add_grad<C>(
        &self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        h: usize,
        (x_TH, mut dx_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) {
        let Some(tensors) = pass.tensors.shared else { return };
        let (device, t) = (pass.device, pass.route.tokens);
        if let Some(gate) = pass.tensors.shared_router {
            let dims = GemmDims { m: t, n: 1, k: h };
            let (dgate, weight) = (self.dgate.view(t), pass.weights.get(gate));
            let dx = (dx_TH.reborrow(), Accumulate::Add);
            device.linear_f32_grads(dims, dgate, (x_TH, weight), gradients.get(gate), dx);
        }
        self.feed_forward.grad_input(device, pass.weights, tensors, dx_TH, Accumulate::Add);
    }
}
