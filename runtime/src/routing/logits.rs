//! From a token to its experts' logits: a matrix with a row an expert, several folded into one, or a hash; and the way back.
//!
//! Owns what that way's backward pass needs. What comes before the matrix is `input`'s, what logits make of a token `router`'s.

use std::ops::Range;

use moe_kernels::{Accumulate, Backend, DeviceError, Fold, GemmDims, View, ViewMut};

use super::config::RouterConfig;
use super::gates::{GateForm, Logits, hash};
use super::input::RouterInput;
use super::noise::{Purpose, stream};
use super::pass::RoutePass;
use super::router::RouterShape;
use crate::memory::Slot;

/// A router's weights. H' is the width of its last hidden layer, or H.
pub struct RouterWeights<'a, B: Backend> {
    /// `[rows, H']`: logits, where the gate has a matrix.
    pub router: Option<View<'a, B, B::Act>>,
    /// `[E, H]`: noise scales, where the gate is noisy.
    pub noise: Option<View<'a, B, B::Act>>,
    /// `[M, H]`, `[M', M]`, …: hidden layers.
    pub hidden: [Option<View<'a, B, B::Act>>; RouterConfig::MOST_HIDDEN],
}

/// Where a router's weights lie in the flat buffer, as [`RouterWeights`].
#[derive(Clone, Debug, Default)]
pub struct RouterRanges {
    /// The matrix.
    pub router: Option<Range<usize>>,
    /// Noise scales.
    pub noise: Option<Range<usize>>,
    /// Hidden layers.
    pub hidden: [Option<Range<usize>>; RouterConfig::MOST_HIDDEN],
}

/// The logits of one layer's router, with what their backward pass needs.
pub(super) struct LogitsPath<B: Backend> {
    shape: RouterShape,
    logits: Logits,
    /// Of a token's hash.
    stream: u64,
    input: RouterInput<B>,
    raw: Slot<B, f32>,
    draw: Slot<B, f32>,
    /// `[T]`.
    tags: Slot<B, i32>,
    host_tags: Vec<i32>,
    host_logits: Vec<f32>,
}

impl<B: Backend> LogitsPath<B> {
    /// The path of MoE layer `layer` in a run of `seed`.
    pub(super) fn new(device: &B, shape: &RouterShape, seed: u64, layer: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            logits: GateForm::of(&shape.config).logits,
            // Of no run's seed: a model is read without its run as well.
            stream: stream(0, layer, Purpose::Hash),
            input: RouterInput::new(device, shape, seed, layer)?,
            raw: Slot::new(device, "router logits before they are folded")?,
            draw: Slot::new(device, "router logit gradients before they were folded")?,
            tags: Slot::new(device, "router tags")?,
            host_tags: Vec::new(),
            host_logits: Vec::new(),
            shape: shape.clone(),
        })
    }

    /// Bytes of its buffers.
    pub(super) fn bytes(&self) -> u64 {
        self.input.bytes() + self.raw.bytes() + self.draw.bytes() + self.tags.bytes()
    }

    fn dims(&self, tokens: usize) -> GemmDims {
        GemmDims { m: tokens, n: self.shape.config.rows(self.shape.experts), k: self.input.width() }
    }

    /// `logits[T, E]` (overwritten) of `x_TH`.
    pub(super) fn forward(
        &mut self,
        device: &B,
        pass: RoutePass<'_>,
        x_TH: View<'_, B, B::Act>,
        weights: &RouterWeights<'_, B>,
        logits: ViewMut<'_, B, f32>,
    ) -> Result<(), DeviceError> {
        let experts = self.shape.experts;
        let Some(router) = weights.router else {
            hash::logits(self.stream, pass.ids, (self.shape.top_k, experts), &mut self.host_logits);
            device.upload(&self.host_logits, logits);
            return Ok(());
        };
        self.input.forward(device, pass, x_TH, weights)?;
        let dims = self.dims(pass.tokens);
        let input = self.input.output(pass, x_TH);
        let Logits::Folded(fold) = self.logits else {
            device.linear_f32(dims, input, router, logits);
            return Ok(());
        };
        let n = dims.m * dims.n;
        self.raw.reserve(device, n)?;
        device.linear_f32(dims, input, router, self.raw.view_mut(n));
        if let Fold::Routers(_) = fold {
            pass.token_tags(&mut self.host_tags);
            self.tags.reserve(device, pass.tokens)?;
            device.upload(&self.host_tags, self.tags.view_mut(pass.tokens));
        }
        device.fold_logits(fold, experts, self.raw.view(n), self.tags_of(fold, pass), logits);
        Ok(())
    }

    fn tags_of(&self, fold: Fold, pass: RoutePass<'_>) -> Option<View<'_, B, i32>> {
        matches!(fold, Fold::Routers(_)).then(|| self.tags.view(pass.tokens))
    }

    /// From `dlogits[T, E]` to `dx_TH` (added) and the weights (added to `flat`).
    #[allow(clippy::too_many_arguments)] // the pass, what it saved, and where gradients come from and go
    pub(super) fn backward(
        &mut self,
        device: &B,
        pass: RoutePass<'_>,
        x_TH: View<'_, B, B::Act>,
        weights: &RouterWeights<'_, B>,
        dlogits: View<'_, B, f32>,
        (mut flat, ranges): (ViewMut<'_, B, f32>, &RouterRanges),
        dx_TH: ViewMut<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let (Some(router), Some(range)) = (weights.router, ranges.router.clone()) else { return Ok(()) };
        let dims = self.dims(pass.tokens);
        let draw = if let Logits::Folded(fold) = self.logits {
            let n = dims.m * dims.n;
            self.draw.reserve(device, n)?;
            let tags = matches!(fold, Fold::Routers(_)).then(|| self.tags.view(pass.tokens));
            device.fold_logits_grad(fold, self.shape.experts, self.raw.view(n), tags, dlogits, self.draw.view_mut(n));
            self.draw.view(n)
        } else {
            dlogits
        };
        if self.input.is_tokens(pass) {
            device.linear_f32_grads(dims, draw, (x_TH, router), flat.slice(range), (dx_TH, Accumulate::Add));
            return Ok(());
        }
        device.linear_f32_grad_weight(dims, draw, self.input.output(pass, x_TH), flat.reborrow().slice(range));
        let to = self.input.gradient(device, pass)?;
        device.linear_f32_grad_input(dims, draw, router, to, Accumulate::Overwrite);
        self.input.backward(device, pass, x_TH, weights, (flat, ranges), dx_TH);
        Ok(())
    }
}
