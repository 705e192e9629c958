//! What a router's last matrix sees of a token: its activations, with jitter, behind hidden layers.
//!
//! Owns the layers' activations and the way back through them. It knows no expert.

use moe_kernels::{Accumulate, ActivationKind, Backend, DeviceError, GemmDims, Places, RandomFactor, View, ViewMut};

use super::config::RouterConfig;
use super::logits::{RouterRanges, RouterWeights};
use super::noise::{Purpose, stream};
use super::pass::RoutePass;
use super::router::RouterShape;
use crate::memory::Slot;

/// One hidden layer: behind its activation, and behind its dropout.
struct Hidden<B: Backend> {
    width: usize,
    after: Slot<B, B::Act>,
    dropped: Slot<B, B::Act>,
}

/// The way from a token to the last matrix, with what its backward pass needs.
pub(super) struct RouterInput<B: Backend> {
    config: RouterConfig,
    hidden_size: usize,
    seed: u64,
    layer: usize,
    activation: ActivationKind,
    jittered: Slot<B, B::Act>,
    hidden: Vec<Hidden<B>>,
    /// Each hidden layer before its activation.
    before: Vec<Slot<B, B::Act>>,
    /// Gradient behind a layer, and before its activation.
    dafter: Slot<B, B::Act>,
    dbefore: Slot<B, B::Act>,
}

impl<B: Backend> RouterInput<B> {
    /// That of MoE layer `layer` in a run of `seed`.
    pub(super) fn new(device: &B, shape: &RouterShape, seed: u64, layer: usize) -> Result<Self, DeviceError> {
        let hidden = |&width: &usize| {
            Ok(Hidden {
                width,
                after: Slot::new(device, "router hidden activations")?,
                dropped: Slot::new(device, "router hidden activations after dropout")?,
            })
        };
        let before = |_| Slot::new(device, "router hidden layer");
        Ok(Self {
            before: shape.config.hidden_sizes.iter().map(before).collect::<Result<_, DeviceError>>()?,
            hidden_size: shape.hidden_size,
            seed,
            layer,
            activation: shape.config.hidden_activation.into(),
            jittered: Slot::new(device, "router inputs with jitter")?,
            hidden: shape.config.hidden_sizes.iter().map(hidden).collect::<Result<_, DeviceError>>()?,
            dafter: Slot::new(device, "router hidden activation gradients")?,
            dbefore: Slot::new(device, "router hidden layer gradients")?,
            config: shape.config.clone(),
        })
    }

    /// Bytes of its buffers.
    pub(super) fn bytes(&self) -> u64 {
        let layers: u64 = self.hidden.iter().map(|h| h.after.bytes() + h.dropped.bytes()).sum();
        let before: u64 = self.before.iter().map(Slot::bytes).sum();
        layers + before + self.jittered.bytes() + self.dafter.bytes() + self.dbefore.bytes()
    }

    /// Elements that the last matrix sees of a token.
    pub(super) fn width(&self) -> usize {
        self.hidden.last().map_or(self.hidden_size, |layer| layer.width)
    }

    /// What the input's elements are multiplied with in this pass.
    fn jitter(&self, pass: RoutePass<'_>) -> Option<RandomFactor> {
        let spread = self.config.input_jitter * self.config.noise_at(pass.step);
        (pass.training && spread > 0.0).then_some(RandomFactor::Around1 { spread })
    }

    /// What a hidden layer's elements are multiplied with.
    fn dropout(&self, pass: RoutePass<'_>) -> Option<RandomFactor> {
        let probability = self.config.dropout;
        (pass.training && probability > 0.0).then_some(RandomFactor::Dropout { probability })
    }

    /// The random numbers of a tensor with `width` elements a token.
    fn places(&self, pass: RoutePass<'_>, purpose: Purpose, width: usize) -> Places {
        Places { seed: stream(self.seed, self.layer, purpose), first: pass.first_token * width as u64 }
    }

    fn dims(&self, tokens: usize, layer: usize) -> GemmDims {
        let before = if layer == 0 { self.hidden_size } else { self.hidden[layer - 1].width };
        GemmDims { m: tokens, n: self.hidden[layer].width, k: before }
    }

    /// Works out what [`RouterInput::output`] gives.
    pub(super) fn forward(
        &mut self,
        device: &B,
        pass: RoutePass<'_>,
        x_TH: View<'_, B, B::Act>,
        weights: &RouterWeights<'_, B>,
    ) -> Result<(), DeviceError> {
        if let Some(factor) = self.jitter(pass) {
            let (n, places) = (x_TH.len(), self.places(pass, Purpose::Jitter, self.hidden_size));
            self.jittered.reserve(device, n)?;
            device.random_factors(factor, places, x_TH, self.jittered.view_mut(n), Accumulate::Overwrite);
        }
        let dropout = self.dropout(pass);
        // Apart from what they are worked out of.
        let mut befores = std::mem::take(&mut self.before);
        for (layer, weight) in (0..self.hidden.len()).zip(weights.hidden.iter().flatten()) {
            let dims = self.dims(pass.tokens, layer);
            let places = self.places(pass, Purpose::Hidden(layer), dims.n);
            let n = dims.m * dims.n;
            let before = &mut befores[layer];
            before.reserve(device, n)?;
            device.linear(dims, self.behind(layer, pass, x_TH), *weight, None, before.view_mut(n));
            let hidden = &mut self.hidden[layer];
            hidden.after.reserve(device, n)?;
            device.activation(self.activation, before.view(n), hidden.after.view_mut(n));
            if let Some(factor) = dropout {
                hidden.dropped.reserve(device, n)?;
                let (from, to) = (hidden.after.view(n), hidden.dropped.view_mut(n));
                device.random_factors(factor, places, from, to, Accumulate::Overwrite);
            }
        }
        self.before = befores;
        Ok(())
    }

    /// `[T, width]`: what the last matrix sees.
    pub(super) fn output<'a>(&'a self, pass: RoutePass<'_>, x_TH: View<'a, B, B::Act>) -> View<'a, B, B::Act> {
        self.behind(self.hidden.len(), pass, x_TH)
    }

    /// What comes out of the first `layers` hidden layers.
    fn behind<'a>(&'a self, layers: usize, pass: RoutePass<'_>, x_TH: View<'a, B, B::Act>) -> View<'a, B, B::Act> {
        match layers.checked_sub(1).map(|last| &self.hidden[last]) {
            Some(hidden) if self.dropout(pass).is_some() => hidden.dropped.view(pass.tokens * hidden.width),
            Some(hidden) => hidden.after.view(pass.tokens * hidden.width),
            None if self.jitter(pass).is_some() => self.jittered.view(x_TH.len()),
            None => x_TH,
        }
    }

    /// Whether the last matrix sees the tokens themselves, to whose gradient it adds its own.
    pub(super) fn is_tokens(&self, pass: RoutePass<'_>) -> bool {
        self.hidden.is_empty() && self.jitter(pass).is_none()
    }

    /// Where the last matrix puts the gradient of anything else that it saw, overwriting it.
    pub(super) fn gradient(&mut self, device: &B, pass: RoutePass<'_>) -> Result<ViewMut<'_, B, B::Act>, DeviceError> {
        let widest = self.hidden.iter().map(|layer| layer.width).fold(self.hidden_size, usize::max);
        self.dafter.reserve(device, pass.tokens * widest)?;
        self.dbefore.reserve(device, pass.tokens * widest)?;
        let n = pass.tokens * self.width();
        Ok(self.dafter.view_mut(n))
    }

    /// From [`RouterInput::gradient`] to `dx_TH` (added) and the hidden layers' weights (added to `flat`).
    pub(super) fn backward(
        &mut self,
        device: &B,
        pass: RoutePass<'_>,
        x_TH: View<'_, B, B::Act>,
        weights: &RouterWeights<'_, B>,
        (mut flat, ranges): (ViewMut<'_, B, f32>, &RouterRanges),
        mut dx_TH: ViewMut<'_, B, B::Act>,
    ) {
        let (jitter, dropout) = (self.jitter(pass), self.dropout(pass));
        for layer in (0..self.hidden.len()).rev() {
            let (Some(weight), Some(range)) = (weights.hidden[layer], ranges.hidden[layer].clone()) else { continue };
            let dims = self.dims(pass.tokens, layer);
            let n = dims.m * dims.n;
            if let Some(factor) = dropout {
                let places = self.places(pass, Purpose::Hidden(layer), dims.n);
                let (from, to) = (self.dafter.view(n), self.dbefore.view_mut(n));
                device.random_factors(factor, places, from, to, Accumulate::Overwrite);
                std::mem::swap(&mut self.dafter, &mut self.dbefore);
            }
            let before = self.before[layer].view(n);
            device.activation_grad(self.activation, before, self.dafter.view(n), self.dbefore.view_mut(n));
            let input = self.behind(layer, pass, x_TH);
            device.linear_grad_weight(dims, self.dbefore.view(n), input, flat.reborrow().slice(range));
            let dbefore = self.dbefore.view(n);
            if layer > 0 || jitter.is_some() {
                let to = self.dafter.view_mut(dims.m * dims.k);
                device.linear_grad_input(dims, dbefore, weight, to, Accumulate::Overwrite);
            } else {
                device.linear_grad_input(dims, dbefore, weight, dx_TH.reborrow(), Accumulate::Add);
            }
        }
        if let Some(factor) = jitter {
            let places = self.places(pass, Purpose::Jitter, self.hidden_size);
            device.random_factors(factor, places, self.dafter.view(x_TH.len()), dx_TH, Accumulate::Add);
        }
    }
}
