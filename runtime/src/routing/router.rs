//! Stage 1 of an MoE layer: which experts each token goes to, with which weight, and the gate's backward pass.
//!
//! Owns the saved tensors of one layer's routing. It never moves a token and never talks to another rank; `balance` reduces
//! the statistics it leaves behind.

use std::sync::Arc;

use moe_kernels::{
    Accumulate, Backend, BalanceGrad, Capacity, CapacityPolicy, Choice, DeviceError, Enough, GateDims, GateSpec,
    GemmDims, Places, Random, TokenLosses, View, ViewMut,
};

use super::config::{Overflow, RouterConfig, RouterKind};
use super::gates::GateForm;
use super::logits::{LogitsPath, RouterRanges, RouterWeights};
use super::noise::{Purpose, hash, stream};
use super::own::{Gate, GatePass, OwnGate};
use super::pass::RoutePass;
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
    /// The gate of `router.kind = "custom"`.
    pub gate: Option<Arc<dyn Gate>>,
}

/// Losses that reach a router beside the weights' gradient.
pub struct RouterLosses<'a, B: Backend> {
    /// `[G, E]`: ∂loss/∂probability, from `balance`.
    pub balance: Option<View<'a, B, f32>>,
    /// The tokens' own.
    pub tokens: TokenLosses,
}

/// Gradients of a router's backward pass.
pub struct RouterGradients<'a, B: Backend> {
    /// `[T, k]`, in: of the gate weights (the importance loss is added to it).
    pub dweights: ViewMut<'a, B, f32>,
    /// `[T, H]`, added to.
    pub dx_TH: ViewMut<'a, B, B::Act>,
    /// The flat gradient buffer, added to.
    pub flat: ViewMut<'a, B, f32>,
    /// Where the weights lie in it.
    pub ranges: RouterRanges,
}

/// One layer's router with what its backward pass needs.
pub struct Router<B: Backend> {
    shape: RouterShape,
    form: GateForm,
    /// Streams of random numbers: noise on logits, who goes to a second expert, which experts can't be chosen.
    gate_noise: u64,
    second: u64,
    dropout: u64,
    path: LogitsPath<B>,
    own: Option<OwnGate<B>>,
    clean: Slot<B, f32>,
    raw: Slot<B, f32>,
    noise: Slot<B, f32>,
    noisy: Slot<B, f32>,
    uniform: Slot<B, f32>,
    scores: Slot<B, f32>,
    chosen: Slot<B, i32>,
    routed: Slot<B, i32>,
    /// The choices before dropped ones got other experts.
    first: Slot<B, i32>,
    /// Whether any did in the last pass.
    rerouted: bool,
    kept: Slot<B, i32>,
    weights: Slot<B, f32>,
    dlogits: Slot<B, f32>,
    dclean: Slot<B, f32>,
    draw: Slot<B, f32>,
    /// `[E]`: what follows the load from step to step, or evens out one pass.
    selection_bias: Slot<B, f32>,
    /// `[E]`: the same, and far below for experts that can't be chosen in this step.
    masked_bias: Slot<B, f32>,
    /// `[T, k]` zeros, for gates whose weights' gradient is their own affair.
    no_dweights: Slot<B, f32>,
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
                self.first.bytes(),
                self.kept.bytes(),
                self.weights.bytes(),
                self.dlogits.bytes(),
                self.dclean.bytes(),
                self.draw.bytes(),
                self.selection_bias.bytes(),
                self.masked_bias.bytes(),
                self.no_dweights.bytes(),
                self.path.bytes(),
                self.own.as_ref().map_or(0, OwnGate::bytes),
            ],
        );
        let RouterStatistics { sums, dropped, importance, dimportance, load, dload } = &self.statistics;
        tally.add(Kind::Activations, [sums, dropped, importance, dimportance, load, dload].map(Slot::bytes));
    }

    /// The router of MoE layer `layer`.
    pub fn new(device: &B, shape: RouterShape, seed: u64, layer: usize) -> Result<Self, DeviceError> {
        let e = shape.experts;
        let own = shape.gate.clone().filter(|_| shape.config.kind == RouterKind::Custom);
        let own = own.map(|gate| OwnGate::new(device, gate));
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
            gate_noise: stream(seed, layer, Purpose::Noise),
            second: stream(seed, layer, Purpose::SecondExpert),
            dropout: stream(seed, layer, Purpose::Experts),
            path: LogitsPath::new(device, &shape, seed, layer)?,
            own: own.transpose()?,
            clean: Slot::new(device, "router logits")?,
            raw: Slot::new(device, "router noise scales")?,
            noise: Slot::new(device, "router noise")?,
            noisy: Slot::new(device, "noisy router logits")?,
            uniform: Slot::new(device, "router uniforms")?,
            scores: Slot::new(device, "router scores")?,
            chosen: Slot::new(device, "chosen experts")?,
            routed: Slot::new(device, "routed experts")?,
            first: Slot::new(device, "experts first chosen")?,
            rerouted: false,
            kept: Slot::new(device, "kept experts")?,
            weights: Slot::new(device, "gate weights")?,
            dlogits: Slot::new(device, "router logit gradients")?,
            dclean: Slot::new(device, "router clean logit gradients")?,
            draw: Slot::new(device, "router noise scale gradients")?,
            selection_bias: expert_slot("router selection bias")?,
            masked_bias: Slot::new(device, "router selection bias with dropped experts")?,
            no_dweights: Slot::new(device, "no gate weight gradients")?,
            statistics,
            shape,
        })
    }

    /// The gate.
    pub fn form(&self) -> GateForm {
        self.form
    }

    fn dims(&self, tokens: usize) -> GateDims {
        GateDims { tokens, experts: self.shape.experts, top_k: self.slots() }
    }

    /// Places for choices that a token has.
    fn slots(&self) -> usize {
        self.shape.config.slots(self.shape.top_k, self.shape.experts)
    }

    fn spec(&self, pass: RoutePass<'_>) -> GateSpec {
        let GateForm { score, renormalize, scale, choice, experts_choose, .. } = self.form;
        // Where experts do not choose among them, a token's k highest of all that have a place.
        let k_highest = Enough { mass: 0.0, least: self.shape.top_k };
        let choice =
            if experts_choose && !pass.training { Choice { enough: Some(k_highest), ..choice } } else { choice };
        GateSpec { dims: self.dims(pass.tokens), score, renormalize, scale, choice }
    }

    fn gemm(&self, tokens: usize) -> GemmDims {
        GemmDims { m: tokens, n: self.shape.experts, k: self.shape.hidden_size }
    }

    fn reserve(&mut self, device: &B, tokens: usize) -> Result<(), DeviceError> {
        let (te, tk) = (tokens * self.shape.experts, tokens * self.slots());
        for slot in [&mut self.clean, &mut self.scores, &mut self.dlogits] {
            slot.reserve(device, te)?;
        }
        if self.form.noisy {
            for slot in [&mut self.raw, &mut self.noise, &mut self.noisy, &mut self.dclean, &mut self.draw] {
                slot.reserve(device, te)?;
            }
        }
        self.chosen.reserve(device, tk)?;
        if self.shape.config.overflow == Overflow::Reroute {
            self.first.reserve(device, tk)?;
        }
        self.routed.reserve(device, tk)?;
        self.kept.reserve(device, tk)?;
        self.weights.reserve(device, tk)?;
        self.uniform.reserve(device, tokens)
    }

    /// Routes `x_TH`: fills the choices and weights. Statistics come with [`Router::take_statistics`].
    pub fn forward(
        &mut self,
        device: &B,
        pass: RoutePass<'_>,
        x_TH: View<'_, B, B::Act>,
        weights: &RouterWeights<'_, B>,
    ) -> Result<(), DeviceError> {
        let t = pass.tokens;
        self.reserve(device, t)?;
        let (dims, spec) = (self.dims(t), self.spec(pass));
        let (te, tk, e) = (t * self.shape.experts, t * self.slots(), self.shape.experts);
        self.path.forward(device, pass, x_TH, weights, self.clean.view_mut(te))?;
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
        let biased = self.form.selection_bias || evened;
        let masked = self.mask(device, pass, biased)?;
        let bias = match masked {
            true => Some(self.masked_bias.view(e)),
            false => biased.then(|| self.selection_bias.view(e)),
        };
        let logits = if self.form.noisy { self.noisy.view(te) } else { self.clean.view(te) };
        let (scores, chosen) = (self.scores.view_mut(te), self.chosen.view_mut(tk));
        device.gate(spec, logits, bias, scores, chosen, self.weights.view_mut(tk));
        if let Some(own) = &mut self.own {
            let choices = (self.chosen.view_mut(tk), self.weights.view_mut(tk));
            own.choose(device, gate_pass(dims, pass), self.clean.view(te), choices)?;
        }
        self.keep(device, pass);
        Ok(())
    }

    /// The statistics of what [`Router::forward`] has routed: `counts`, `prob_sums` `[G, E]` of this layer are overwritten. Nothing on
    /// the tokens' way needs them, so they can be taken while tokens travel.
    pub fn take_statistics(
        &mut self,
        device: &B,
        pass: RoutePass<'_>,
        counts: ViewMut<'_, B, f32>,
        prob_sums: ViewMut<'_, B, f32>,
    ) {
        let (t, e) = (pass.tokens, self.shape.experts);
        let (dims, spec, te, tk) = (self.dims(t), self.spec(pass), t * e, t * self.slots());
        let counted = if self.form.experts_choose {
            // What experts have taken is all that was chosen where they choose.
            self.kept.view(tk)
        } else if self.rerouted {
            self.first.view(tk)
        } else {
            self.chosen.view(tk)
        };
        let logits = if self.form.noisy { self.noisy.view(te) } else { self.clean.view(te) };
        let (scores, sums) = (self.scores.view(te), self.statistics.sums.view_mut(2));
        let (group, _) = pass.groups(self.shape.config.balance_scope);
        device.gate_statistics(spec, group, logits, scores, counted, counts, prob_sums, sums);
        if self.form.noisy {
            let importance = self.statistics.importance.view_mut(e);
            device.importance(dims, self.chosen.view(tk), self.weights.view(tk), importance);
        }
    }

    /// Puts experts that can't be chosen in this step far down, the same on all ranks and in all passes; false: there are none. At least k
    /// experts stay.
    fn mask(&mut self, device: &B, pass: RoutePass<'_>, biased: bool) -> Result<bool, DeviceError> {
        const FAR_DOWN: f32 = -1e9;
        let (e, probability) = (self.shape.experts, self.shape.config.expert_dropout);
        if probability == 0.0 || !pass.training {
            return Ok(false);
        }
        let draw = |expert: usize| (hash(self.dropout, [pass.step, expert as u64]) >> 11) as f64 / (1u64 << 53) as f64;
        let mut draws: Vec<(f64, usize)> = (0..e).map(|expert| (draw(expert), expert)).collect();
        draws.sort_by(|a, b| a.0.total_cmp(&b.0));
        draws.truncate(e - self.shape.top_k);
        let mut mask = vec![0.0; e];
        draws.iter().filter(|(draw, _)| *draw < f64::from(probability)).for_each(|(_, e)| mask[*e] = FAR_DOWN);
        self.masked_bias.reserve(device, e)?;
        device.upload(&mask, self.masked_bias.view_mut(e));
        if biased {
            device.add_f32(self.selection_bias.view(e), self.masked_bias.view_mut(e));
        }
        Ok(true)
    }

    /// Decides which choices are carried out: random second expert, then capacity, then other experts for what it dropped.
    fn keep(&mut self, device: &B, pass: RoutePass<'_>) {
        let t = pass.tokens;
        let (tk, dims) = (t * self.slots(), self.dims(t));
        self.rerouted = false;
        let draws = self.form.random_second && pass.training;
        if draws {
            device.copy(self.chosen.view(tk), self.routed.view_mut(tk));
            let places = Places { seed: self.second, first: pass.first_token };
            device.random_numbers(Random::Uniform, places, self.uniform.view_mut(t));
            device.drop_second(dims, self.uniform.view(t), self.weights.view(tk), self.routed.view_mut(tk));
        }
        let routed = if draws { self.routed.view(tk) } else { self.chosen.view(tk) };
        let (e, k) = (self.shape.experts, self.shape.top_k);
        let capacity = if self.form.experts_choose {
            let fair = Capacity { per_expert: (k * t).div_ceil(e), policy: CapacityPolicy::Probability };
            pass.training.then_some(fair)
        } else {
            let config = &self.shape.config;
            // In evaluation nothing that comes later decides.
            let policy = if pass.training { config.overflow.into() } else { CapacityPolicy::Position };
            config.capacity(t, (k, e), pass.training_step()).map(|per_expert| Capacity { per_expert, policy })
        };
        let Some(capacity) = capacity else {
            device.fill(self.statistics.dropped.view_mut(e), 0.0);
            device.copy(routed, self.kept.view_mut(tk));
            return;
        };
        let weights = self.weights.view(tk);
        let (kept, dropped) = (self.kept.view_mut(tk), self.statistics.dropped.view_mut(e));
        device.apply_capacity(dims, capacity, routed, weights, kept, dropped);
        if self.form.experts_choose {
            // Tokens that an expert did not take are not dropped: nobody chose it for them.
            device.fill(self.statistics.dropped.view_mut(e), 0.0);
        }
        if self.shape.config.overflow == Overflow::Reroute && pass.training {
            self.reroute(device, pass, capacity.per_expert);
        }
    }

    /// Finds other experts for choices that capacity dropped.
    fn reroute(&mut self, device: &B, pass: RoutePass<'_>, per_expert: usize) {
        /// Of asking: few choices are left after two where capacity is for all of them.
        const ROUNDS: usize = 4;
        let t = pass.tokens;
        let (te, tk, e, dims) = (t * self.shape.experts, t * self.slots(), self.shape.experts, self.dims(t));
        device.copy(self.chosen.view(tk), self.first.view_mut(tk));
        self.rerouted = true;
        let (chosen, kept) = (self.chosen.view_mut(tk), self.kept.view_mut(tk));
        let dropped = self.statistics.dropped.view_mut(e);
        device.reroute(dims, per_expert, ROUNDS, self.scores.view(te), chosen, kept, dropped);
        device.weigh(self.spec(pass), self.scores.view(te), self.chosen.view(tk), self.weights.view_mut(tk));
    }

    fn draw_noise(&mut self, device: &B, pass: RoutePass<'_>) {
        let (e, te) = (self.shape.experts, pass.tokens * self.shape.experts);
        if pass.training {
            let places = Places { seed: self.gate_noise, first: pass.first_token * e as u64 };
            let random = Random::Normal { deviation: self.shape.config.noise_at(pass.step) };
            device.random_numbers(random, places, self.noise.view_mut(te));
        } else {
            device.fill(self.noise.view_mut(te), 0.0);
        }
    }

    /// Backward of [`Router::forward`]: from the weights' gradient `[T, k]` and the losses' to `dx_TH` (added) and the routers'
    /// weight gradients (added).
    pub fn backward(
        &mut self,
        device: &B,
        pass: RoutePass<'_>,
        x_TH: View<'_, B, B::Act>,
        weights: &RouterWeights<'_, B>,
        losses: RouterLosses<'_, B>,
        gradients: RouterGradients<'_, B>,
    ) -> Result<(), DeviceError> {
        let t = pass.tokens;
        let (te, tk, e) = (t * self.shape.experts, t * self.slots(), self.shape.experts);
        let RouterGradients { mut dweights, mut dx_TH, mut flat, ranges } = gradients;
        if weights.router.is_none() {
            // Nothing was learned, so nothing learns.
            return Ok(());
        }
        if self.form.noisy {
            let (chosen, dimportance) = (self.chosen.view(tk), self.statistics.dimportance.view(e));
            device.importance_grad(self.dims(t), chosen, dimportance, dweights.reborrow());
        }
        let logits = if self.form.noisy { self.noisy.view(te) } else { self.clean.view(te) };
        if self.own.is_some() {
            // The gate's own is added below: here only what losses make of the probabilities.
            self.no_dweights.reserve(device, tk)?;
            device.fill(self.no_dweights.view_mut(tk), 0.0);
        }
        let through_scores = if self.own.is_some() { self.no_dweights.view(tk) } else { dweights.as_view() };
        let (tokens_per_group, _) = pass.groups(self.shape.config.balance_scope);
        let balance = losses.balance.map(|coefficients| BalanceGrad { coefficients, tokens_per_group });
        device.gate_grad(
            self.spec(pass),
            logits,
            self.scores.view(te),
            self.chosen.view(tk),
            through_scores,
            balance,
            losses.tokens,
            self.dlogits.view_mut(te),
        );
        let dims = self.dims(t);
        if let Some(own) = &mut self.own {
            own.choose_grad(device, gate_pass(dims, pass), dweights.as_view(), self.dlogits.view_mut(te))?;
        }
        let gemm = self.gemm(t);
        if let Some((noise_weight, noise)) = weights.noise.zip(ranges.noise.clone()).filter(|_| self.form.noisy) {
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
            let (dw, dx) = (flat.reborrow().slice(noise), (dx_TH.reborrow(), Accumulate::Add));
            device.linear_f32_grads(gemm, self.draw.view(te), (x_TH, noise_weight), dw, dx);
        }
        let dlogits = if self.form.noisy { self.dclean.view(te) } else { self.dlogits.view(te) };
        self.path.backward(device, pass, x_TH, weights, dlogits, (flat, &ranges), dx_TH)
    }

    /// The choices that are carried out, `[T, k]`, −1: dropped.
    pub fn kept(&self, tokens: usize) -> View<'_, B, i32> {
        self.kept.view(tokens * self.slots())
    }

    /// The weights of all choices, `[T, k]`.
    pub fn weights(&self, tokens: usize) -> View<'_, B, f32> {
        self.weights.view(tokens * self.slots())
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

/// What an own gate is told of a pass.
fn gate_pass(dims: GateDims, pass: RoutePass<'_>) -> GatePass {
    GatePass { dims, training: pass.training, step: pass.step, first_token: pass.first_token }
}
