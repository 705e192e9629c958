//! Stage 1 of an MoE layer: which experts each token goes to, with which weight, and the gate's backward pass.
//!
//! Owns the saved tensors of one layer's routing. It never moves a token and never talks to another rank; `balance` reduces
//! the statistics it leaves behind.

use std::ops::Range;

use moe_kernels::{
    Accumulate, Backend, BalanceGrad, Capacity, DeviceError, GateDims, GateSpec, GemmDims, View, ViewMut,
};

use super::config::{BalanceScope, RouterConfig};
use super::gates::GateForm;
use super::noise::GateNoise;
use crate::memory::{Kind, Slot, Tally};

/// Sizes and settings that all layers' routers share.
#[derive(Clone, Debug)]
pub struct RouterShape {
    /// H.
    pub hidden_size: usize,
    /// E.
    pub experts: usize,
    /// k.
    pub top_k: usize,
    /// Settings.
    pub config: RouterConfig,
}

/// A router's weights: `[E, H]` each.
pub struct RouterWeights<'a, B: Backend> {
    /// Logits.
    pub router: View<'a, B, B::Act>,
    /// Noise scales, where the gate has them.
    pub noise: Option<View<'a, B, B::Act>>,
}

/// Where in the data and in training a pass stands.
#[derive(Clone, Copy, Debug)]
pub struct RoutePass {
    /// T of this rank and pass.
    pub tokens: usize,
    /// S.
    pub sequence_length: usize,
    /// Place of the first token in the data: sample number · S.
    pub first_token: u64,
    /// Training adds noise and random choices; evaluation does not.
    pub training: bool,
}

impl RoutePass {
    /// Tokens over which balance statistics are formed, and how many such groups there are (at least 1).
    pub fn groups(&self, scope: BalanceScope) -> (usize, usize) {
        match scope {
            BalanceScope::Sequence => (self.sequence_length, self.tokens.div_ceil(self.sequence_length).max(1)),
            BalanceScope::MicroBatch | BalanceScope::Global => (self.tokens.max(1), 1),
        }
    }
}

/// Losses that reach a router beside the weights' gradient.
pub struct RouterLosses<'a, B: Backend> {
    /// `[G, E]`: ∂loss/∂probability, from `balance`.
    pub balance: Option<View<'a, B, f32>>,
    /// Factor of Σ_t lse².
    pub z_scale: f32,
}

/// Gradients of a router's backward pass.
pub struct RouterGradients<'a, B: Backend> {
    /// `[T, k]`, in: of the gate weights (the importance loss is added to it).
    pub dweights: ViewMut<'a, B, f32>,
    /// `[T, H]`, added to.
    pub dx_TH: ViewMut<'a, B, B::Act>,
    /// The flat gradient buffer, added to.
    pub flat: ViewMut<'a, B, f32>,
    /// Where the router's weight lies in it.
    pub router: Range<usize>,
    /// Where the noise scales' weight lies in it, where the gate is noisy.
    pub noise: Option<Range<usize>>,
}

/// One layer's router with what its backward pass needs.
pub struct Router<B: Backend> {
    shape: RouterShape,
    form: GateForm,
    gate_noise: GateNoise,
    clean: Slot<B, f32>,
    raw: Slot<B, f32>,
    noise: Slot<B, f32>,
    noisy: Slot<B, f32>,
    uniform: Slot<B, f32>,
    scores: Slot<B, f32>,
    chosen: Slot<B, i32>,
    routed: Slot<B, i32>,
    kept: Slot<B, i32>,
    weights: Slot<B, f32>,
    dlogits: Slot<B, f32>,
    dclean: Slot<B, f32>,
    draw: Slot<B, f32>,
    /// `[E]`: what follows the load from step to step, or evens out one pass.
    selection_bias: Slot<B, f32>,
    host_noise: Vec<f32>,
    /// What the balance losses and metrics are formed from.
    pub statistics: RouterStatistics<B>,
}

/// What a pass leaves for the balance losses.
pub struct RouterStatistics<B: Backend> {
    /// `[2]`: Σ_t lse², and Σ_t of the probabilities' entropy.
    pub sums: Slot<B, f32>,
    /// `[E]`: choices of each expert that capacity dropped.
    pub dropped: Slot<B, f32>,
    /// `[E]`: noisy gates: summed weights, and their gradient.
    pub importance: Slot<B, f32>,
    /// `[E]`: gradient of the importance loss.
    pub dimportance: Slot<B, f32>,
    /// `[E]`: noisy gates: smooth counts.
    pub load: Slot<B, f32>,
    /// `[E]`: gradient of the load loss.
    pub dload: Slot<B, f32>,
}

impl<B: Backend> Router<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(
            Kind::Activations,
            [
                self.clean.bytes(),
                self.raw.bytes(),
                self.noise.bytes(),
                self.noisy.bytes(),
                self.uniform.bytes(),
                self.scores.bytes(),
                self.chosen.bytes(),
                self.routed.bytes(),
                self.kept.bytes(),
                self.weights.bytes(),
                self.dlogits.bytes(),
                self.dclean.bytes(),
                self.draw.bytes(),
                self.selection_bias.bytes(),
            ],
        );
        let RouterStatistics { sums, dropped, importance, dimportance, load, dload } = &self.statistics;
        tally.add(Kind::Activations, [sums, dropped, importance, dimportance, load, dload].map(Slot::bytes));
    }

    /// The router of MoE layer `layer`.
    pub fn new(device: &B, shape: RouterShape, seed: u64, layer: usize) -> Result<Self, DeviceError> {
        let e = shape.experts;
        let expert_slot = |what| Slot::sized(device, what, e.max(2));
        let statistics = RouterStatistics {
            sums: expert_slot("router statistics")?,
            dropped: expert_slot("dropped choices")?,
            importance: expert_slot("gate importance")?,
            dimportance: expert_slot("gate importance gradient")?,
            load: expert_slot("gate load")?,
            dload: expert_slot("gate load gradient")?,
        };
        Ok(Self {
            form: GateForm::of(&shape.config),
            gate_noise: GateNoise::new(seed, layer),
            clean: Slot::new(device, "router logits")?,
            raw: Slot::new(device, "router noise scales")?,
            noise: Slot::new(device, "router noise")?,
            noisy: Slot::new(device, "noisy router logits")?,
            uniform: Slot::new(device, "router uniforms")?,
            scores: Slot::new(device, "router scores")?,
            chosen: Slot::new(device, "chosen experts")?,
            routed: Slot::new(device, "routed experts")?,
            kept: Slot::new(device, "kept experts")?,
            weights: Slot::new(device, "gate weights")?,
            dlogits: Slot::new(device, "router logit gradients")?,
            dclean: Slot::new(device, "router clean logit gradients")?,
            draw: Slot::new(device, "router noise scale gradients")?,
            selection_bias: expert_slot("router selection bias")?,
            host_noise: Vec::new(),
            statistics,
            shape,
        })
    }

    /// The gate.
    pub fn form(&self) -> GateForm {
        self.form
    }

    fn dims(&self, tokens: usize) -> GateDims {
        GateDims { tokens, experts: self.shape.experts, top_k: self.shape.top_k }
    }

    fn spec(&self, tokens: usize) -> GateSpec {
        let GateForm { score, renormalize, scale, choice, .. } = self.form;
        GateSpec { dims: self.dims(tokens), score, renormalize, scale, choice }
    }

    fn gemm(&self, tokens: usize) -> GemmDims {
        GemmDims { m: tokens, n: self.shape.experts, k: self.shape.hidden_size }
    }

    fn reserve(&mut self, device: &B, tokens: usize) -> Result<(), DeviceError> {
        let (te, tk) = (tokens * self.shape.experts, tokens * self.shape.top_k);
        for slot in [&mut self.clean, &mut self.scores, &mut self.dlogits] {
            slot.reserve(device, te)?;
        }
        if self.form.noisy {
            for slot in [&mut self.raw, &mut self.noise, &mut self.noisy, &mut self.dclean, &mut self.draw] {
                slot.reserve(device, te)?;
            }
        }
        self.chosen.reserve(device, tk)?;
        self.routed.reserve(device, tk)?;
        self.kept.reserve(device, tk)?;
        self.weights.reserve(device, tk)?;
        self.uniform.reserve(device, tokens)
    }

    /// Routes `x_TH`: fills the choices, weights and statistics. `counts`, `prob_sums` `[G, E]` of this layer are overwritten.
    pub fn forward(
        &mut self,
        device: &B,
        pass: RoutePass,
        x_TH: View<'_, B, B::Act>,
        weights: &RouterWeights<'_, B>,
        counts: ViewMut<'_, B, f32>,
        prob_sums: ViewMut<'_, B, f32>,
    ) -> Result<(), DeviceError> {
        let t = pass.tokens;
        self.reserve(device, t)?;
        let (dims, spec) = (self.dims(t), self.spec(t));
        let (te, tk, e) = (t * self.shape.experts, t * self.shape.top_k, self.shape.experts);
        device.linear_f32(self.gemm(t), x_TH, weights.router, self.clean.view_mut(te));
        if let Some(noise_weight) = weights.noise.filter(|_| self.form.noisy) {
            device.linear_f32(self.gemm(t), x_TH, noise_weight, self.raw.view_mut(te));
            self.draw_noise(device, pass);
            let (clean, raw, noise) = (self.clean.view(te), self.raw.view(te), self.noise.view(te));
            let load = self.statistics.load.view_mut(e);
            device.noisy_logits(dims, clean, raw, noise, self.noisy.view_mut(te), load);
        }
        let logits = if self.form.noisy { self.noisy.view(te) } else { self.clean.view(te) };
        let evened = self.form.sinkhorn_iterations > 0 && pass.training;
        if evened {
            device.sinkhorn_bias(dims, self.form.sinkhorn_iterations, logits, self.selection_bias.view_mut(e));
        }
        let bias = (self.form.selection_bias || evened).then(|| self.selection_bias.view(e));
        let (scores, chosen) = (self.scores.view_mut(te), self.chosen.view_mut(tk));
        device.gate(spec, logits, bias, scores, chosen, self.weights.view_mut(tk));
        if self.form.noisy {
            let importance = self.statistics.importance.view_mut(e);
            device.importance(dims, self.chosen.view(tk), self.weights.view(tk), importance);
        }
        let (scores, chosen, sums) = (self.scores.view(te), self.chosen.view(tk), self.statistics.sums.view_mut(2));
        let (group, _) = pass.groups(self.shape.config.balance_scope);
        device.gate_statistics(spec, group, logits, scores, chosen, counts, prob_sums, sums);
        self.keep(device, pass);
        Ok(())
    }

    /// Decides which choices are carried out: random second expert, then capacity.
    fn keep(&mut self, device: &B, pass: RoutePass) {
        let t = pass.tokens;
        let (tk, dims) = (t * self.shape.top_k, self.dims(t));
        device.copy(self.chosen.view(tk), self.routed.view_mut(tk));
        if self.form.random_second && pass.training {
            self.host_noise.resize(t, 0.0);
            self.gate_noise.uniforms(pass.first_token, &mut self.host_noise);
            device.upload(&self.host_noise, self.uniform.view_mut(t));
            device.drop_second(dims, self.uniform.view(t), self.weights.view(tk), self.routed.view_mut(tk));
        }
        device.fill(self.statistics.dropped.view_mut(self.shape.experts), 0.0);
        match self.shape.config.capacity(t, self.shape.top_k, self.shape.experts) {
            None => device.copy(self.routed.view(tk), self.kept.view_mut(tk)),
            Some(per_expert) => {
                let capacity = Capacity { per_expert, policy: self.shape.config.overflow.into() };
                let (routed, weights) = (self.routed.view(tk), self.weights.view(tk));
                let (kept, dropped) = (self.kept.view_mut(tk), self.statistics.dropped.view_mut(dims.experts));
                device.apply_capacity(dims, capacity, routed, weights, kept, dropped);
            }
        }
    }

    fn draw_noise(&mut self, device: &B, pass: RoutePass) {
        let te = pass.tokens * self.shape.experts;
        if pass.training {
            self.host_noise.resize(te, 0.0);
            self.gate_noise.normals(pass.first_token, self.shape.experts, &mut self.host_noise);
            device.upload(&self.host_noise, self.noise.view_mut(te));
        } else {
            device.fill(self.noise.view_mut(te), 0.0);
        }
    }

    /// Backward of [`Router::forward`]: from the weights' gradient `[T, k]` and the losses' to `dx_TH` (added) and the routers'
    /// weight gradients (added).
    pub fn backward(
        &mut self,
        device: &B,
        pass: RoutePass,
        x_TH: View<'_, B, B::Act>,
        weights: &RouterWeights<'_, B>,
        losses: RouterLosses<'_, B>,
        gradients: RouterGradients<'_, B>,
    ) {
        let t = pass.tokens;
        let (te, tk, e) = (t * self.shape.experts, t * self.shape.top_k, self.shape.experts);
        let RouterGradients { mut dweights, mut dx_TH, mut flat, router, noise } = gradients;
        if self.form.noisy {
            let (chosen, dimportance) = (self.chosen.view(tk), self.statistics.dimportance.view(e));
            device.importance_grad(self.dims(t), chosen, dimportance, dweights.reborrow());
        }
        let logits = if self.form.noisy { self.noisy.view(te) } else { self.clean.view(te) };
        let (tokens_per_group, _) = pass.groups(self.shape.config.balance_scope);
        let balance = losses.balance.map(|coefficients| BalanceGrad { coefficients, tokens_per_group });
        device.gate_grad(
            self.spec(t),
            logits,
            self.scores.view(te),
            self.chosen.view(tk),
            dweights.as_view(),
            balance,
            losses.z_scale,
            self.dlogits.view_mut(te),
        );
        let gemm = self.gemm(t);
        if let Some((noise_weight, noise)) = weights.noise.zip(noise).filter(|_| self.form.noisy) {
            device.noisy_logits_grad(
                self.dims(t),
                self.clean.view(te),
                self.raw.view(te),
                self.noise.view(te),
                self.noisy.view(te),
                self.dlogits.view(te),
                self.statistics.dload.view(e),
                self.dclean.view_mut(te),
                self.draw.view_mut(te),
            );
            device.linear_f32_grad_input(gemm, self.draw.view(te), noise_weight, dx_TH.reborrow(), Accumulate::Add);
            device.linear_f32_grad_weight(gemm, self.draw.view(te), x_TH, flat.reborrow().slice(noise));
        }
        let dlogits = if self.form.noisy { self.dclean.view(te) } else { self.dlogits.view(te) };
        device.linear_f32_grad_input(gemm, dlogits, weights.router, dx_TH, Accumulate::Add);
        device.linear_f32_grad_weight(gemm, dlogits, x_TH, flat.slice(router));
    }

    /// The choices that are carried out, `[T, k]`, −1: dropped.
    pub fn kept(&self, tokens: usize) -> View<'_, B, i32> {
        self.kept.view(tokens * self.shape.top_k)
    }

    /// The weights of all choices, `[T, k]`.
    pub fn weights(&self, tokens: usize) -> View<'_, B, f32> {
        self.weights.view(tokens * self.shape.top_k)
    }

    /// The selection bias that lasts from step to step, `[E]`, where the gate has one.
    pub fn selection_bias(&self) -> Option<View<'_, B, f32>> {
        self.form.selection_bias.then(|| self.selection_bias.view(self.shape.experts))
    }

    /// Replaces the selection bias.
    pub fn set_selection_bias(&mut self, device: &B, bias: &[f32]) {
        device.upload(bias, self.selection_bias.view_mut(self.shape.experts));
    }
}
