//! The MoE layer: route → dispatch → experts → combine → aggregate, each a stage with its own backward.
//!
//! Owns the order of the stages and the chunks of tokens they run in; each stage is a module of its own. It never names a
//! transport: it is given the expert group's communicator.

use std::ops::Range;

use moe_kernels::{Accumulate, Backend, DeviceError, GemmDims, ShuffleDims, View, ViewMut};

use super::ModelError;
use super::config::{ModelConfig, Recompute};
use super::feed_forward::DenseFeedForward;
use super::layout::MoeTensors;
use super::parameters::{Gradients, Weights};
use crate::collectives::Communicator;
use crate::dispatch::{RoutedTokens, Shuffle, ShuffleScratch, ShuffledRows};
use crate::experts::{ExpertBackward, ExpertScratch, ExpertShape, ExpertWeights, Experts};
use crate::memory::{Kind, Slot, Tally};
use crate::routing::{
    Balance, BatchShare, RoutePass, Router, RouterGradients, RouterLosses, RouterShape, RouterWeights,
};
use crate::stages::{Stage, StageClock};
use crate::topology::share;

/// A shuffle and the experts' activations of one chunk of tokens.
struct Chunk<B: Backend> {
    shuffle: Shuffle<B>,
    experts: Experts<B>,
}

/// The shared expert, with the logits of its gate where it has one.
struct SharedExpert<B: Backend> {
    feed_forward: DenseFeedForward<B>,
    out: Slot<B, B::Act>,
    gate: Slot<B, f32>,
    dout: Slot<B, B::Act>,
    dgate: Slot<B, f32>,
}

/// Rows and gradients under way, shared by all layers.
pub(super) struct MoeScratch<B: Backend> {
    shuffle: ShuffleScratch<B>,
    experts: ExpertScratch<B>,
    dweights: Slot<B, f32>,
}

impl<B: Backend> MoeScratch<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.dweights.bytes()]);
        self.shuffle.tally(tally);
        self.experts.tally(tally);
    }

    /// Empty scratch.
    pub(super) fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            shuffle: ShuffleScratch::new(device)?,
            experts: ExpertScratch::new(device)?,
            dweights: Slot::new(device, "gate weight gradients")?,
        })
    }
}

/// One MoE layer with what its backward pass needs.
pub(super) struct MoeLayer<B: Backend> {
    /// Stage 1.
    pub router: Router<B>,
    index: usize,
    hidden_size: usize,
    top_k: usize,
    chunks: Vec<Chunk<B>>,
    shared: Option<SharedExpert<B>>,
    /// What the next backward pass does to the experts' gradients.
    accumulate: Accumulate,
}

/// How a rank's MoE layers are shaped beyond the model's configuration.
#[derive(Clone, Debug)]
pub(super) struct MoeShape {
    /// Ranks of the expert group.
    pub ranks: usize,
    /// Chunks of tokens a layer runs in, at least 1.
    pub chunks: usize,
    /// The run's seed, for gates that draw.
    pub seed: u64,
    /// What is computed again.
    pub recompute: Recompute,
}

/// What a layer works with in a pass.
pub(super) struct MoePass<'a, B: Backend, C> {
    /// The queue.
    pub device: &'a B,
    /// The expert group.
    pub group: &'a C,
    /// The pass.
    pub route: RoutePass,
    /// Weights of the model.
    pub weights: Weights<'a, B>,
    /// Which of them are this layer's.
    pub tensors: MoeTensors,
}

impl<B: Backend> MoeLayer<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        self.router.tally(tally);
        for chunk in &self.chunks {
            chunk.shuffle.tally(tally);
            chunk.experts.tally(tally);
        }
        if let Some(shared) = &self.shared {
            shared.tally(tally);
        }
    }

    /// The layer at `layer`, number `index` of the MoE layers.
    pub(super) fn new(
        device: &B,
        config: &ModelConfig,
        router: RouterShape,
        shape: &MoeShape,
        (layer, index): (usize, usize),
    ) -> Result<Self, DeviceError> {
        let dims = ShuffleDims { tokens: 0, top_k: config.top_k, experts: config.experts, ranks: shape.ranks };
        let experts = ExpertShape {
            experts: dims.local_experts(),
            hidden_size: config.hidden_size,
            ffn_size: config.expert_ffn_size,
        };
        let chunk = |_| {
            let shuffle = Shuffle::new(device, dims, config.hidden_size)?;
            let experts = match shape.recompute {
                Recompute::None => Experts::keeping(device, experts)?,
                Recompute::Experts => Experts::recomputing(experts),
            };
            Ok(Chunk { shuffle, experts })
        };
        let shared = (config.shared_expert_ffn_size > 0).then(|| {
            Ok::<_, DeviceError>(SharedExpert {
                feed_forward: DenseFeedForward::new(device, config.hidden_size, config.shared_expert_ffn_size)?,
                out: Slot::new(device, "shared expert outputs")?,
                gate: Slot::new(device, "shared expert gates")?,
                dout: Slot::new(device, "shared expert output gradients")?,
                dgate: Slot::new(device, "shared expert gate gradients")?,
            })
        });
        Ok(Self {
            router: Router::new(device, router, shape.seed, layer)?,
            index,
            hidden_size: config.hidden_size,
            top_k: config.top_k,
            chunks: (0..shape.chunks).map(chunk).collect::<Result<_, DeviceError>>()?,
            shared: shared.transpose()?,
            accumulate: Accumulate::Add,
        })
    }

    /// The experts' gradients are zero: the next backward pass may replace them.
    pub(super) fn begin_step(&mut self) {
        self.accumulate = Accumulate::Overwrite;
    }

    /// H.
    pub(super) fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Rows exchanged with other ranks so far.
    pub(super) fn shuffled_rows(&self) -> ShuffledRows {
        let mut rows = ShuffledRows::default();
        for chunk in &self.chunks {
            rows += chunk.shuffle.shuffled_rows();
        }
        rows
    }

    /// The tokens of a chunk.
    fn chunk_tokens(&self, tokens: usize, chunk: usize) -> Range<usize> {
        share(tokens, self.chunks.len(), chunk)
    }

    /// `out_TH` (overwritten) from the normed `x_TH`, and this layer's balance statistics.
    pub(super) fn forward<C: Communicator<B>>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        balance: &mut Balance<B>,
        scratch: &mut MoeScratch<B>,
        clock: &mut StageClock<B>,
        (x_TH, mut out_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), ModelError> {
        let (device, t, h) = (pass.device, pass.route.tokens, self.hidden_size);
        let (counts, prob_sums) = balance.layer_mut(self.index);
        let weights = router_weights(pass);
        clock.enter(Stage::Route);
        self.router.forward(device, pass.route, x_TH, &weights, counts, prob_sums)?;
        for index in 0..self.chunks.len() {
            let tokens = self.chunk_tokens(t, index);
            let Chunk { shuffle, experts } = &mut self.chunks[index];
            let routed = routed(&self.router, x_TH, t, tokens.clone());
            clock.enter(Stage::Dispatch);
            shuffle.dispatch(device, pass.group, &mut scratch.shuffle, routed)?;
            let (grouped, rows) = (shuffle.grouped(), &mut scratch.experts);
            let len = grouped.rows.bound * h;
            shuffle.expanded(device, routed.x_TH, rows.rows_mut(device, len)?);
            clock.enter(Stage::Experts);
            experts.forward(device, rows, grouped, expert_weights(pass))?;
            clock.enter(Stage::Combine);
            let tensors = (rows.rows(len), out_TH.reborrow().slice(tokens.start * h..tokens.end * h));
            shuffle.combine(device, pass.group, &mut scratch.shuffle, routed.weights, tensors)?;
        }
        clock.enter(Stage::Aggregate);
        if let Some(shared) = &mut self.shared {
            shared.forward(pass, h, x_TH, out_TH)?;
        }
        Ok(())
    }

    /// Forms the losses of a noisy gate; others have none beside the balance loss.
    pub(super) fn form_noisy_losses<C: Communicator<B>>(
        &mut self,
        device: &B,
        world: &C,
        balance: &mut Balance<B>,
        pass: RoutePass,
        batch: BatchShare,
    ) -> Result<(), ModelError> {
        balance.add(device, self.index, &self.router.statistics);
        if self.router.form().noisy {
            balance.form_noisy(device, world, &mut self.router.statistics, pass, batch)?;
        }
        Ok(())
    }

    /// Backward: `dx_TH` (overwritten) from `dout_TH` and the forward pass's `x_TH`.
    pub(super) fn backward<C: Communicator<B>>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        losses: RouterLosses<'_, B>,
        scratch: &mut MoeScratch<B>,
        clock: &mut StageClock<B>,
        tensors: MoeBackward<'_, B>,
    ) -> Result<(), ModelError> {
        let MoeBackward { x_TH, dout_TH, mut dx_TH } = tensors;
        let (device, t, h, k) = (pass.device, pass.route.tokens, self.hidden_size, self.top_k);
        scratch.dweights.reserve(device, t * k)?;
        for index in 0..self.chunks.len() {
            let tokens = self.chunk_tokens(t, index);
            let rows = tokens.start * h..tokens.end * h;
            let Chunk { shuffle, experts } = &mut self.chunks[index];
            let grouped = shuffle.grouped();
            let len = grouped.rows.bound * h;
            let (x, dout) = (x_TH.slice(rows.clone()), dout_TH.slice(rows.clone()));
            if experts.recomputes() {
                clock.enter(Stage::Experts);
                // Before the gradient comes into the rows: the input is expanded once more instead of into a buffer of its own.
                shuffle.expanded(device, x, scratch.experts.rows_mut(device, len)?);
                experts.project(device, &mut scratch.experts, grouped, expert_weights(pass).gate_up)?;
            }
            clock.enter(Stage::Combine);
            let dy = scratch.experts.rows_mut(device, len)?;
            shuffle.combine_backward(device, pass.group, &mut scratch.shuffle, (dout, dy))?;
            let mut dweights = scratch.dweights.view_mut(t * k).slice(tokens.start * k..tokens.end * k);
            let row_weights = self.router.weights(t).slice(tokens.start * k..tokens.end * k);
            let gated = shuffle.gated(device, &mut scratch.shuffle, row_weights, dweights.reborrow())?;
            clock.enter(Stage::Experts);
            let (flat, [gate_up, down]) = gradients.several([pass.tensors.experts.gate_up, pass.tensors.experts.down]);
            let accumulate = std::mem::replace(&mut self.accumulate, Accumulate::Add);
            let weights = expert_weights(pass);
            let tensors = ExpertBackward { gated, weights, gradients: flat, gate_up, down, accumulate };
            let expand = |to: ViewMut<'_, B, B::Act>| shuffle.expanded(device, x, to);
            experts.backward(device, &mut scratch.experts, grouped, tensors, expand)?;
            clock.enter(Stage::Combine);
            shuffle.dweights_home(device, pass.group, &mut scratch.shuffle, dweights)?;
            clock.enter(Stage::Dispatch);
            let tensors = (scratch.experts.rows(len), dx_TH.reborrow().slice(rows));
            shuffle.dispatch_backward(device, pass.group, &mut scratch.shuffle, tensors)?;
        }
        if let Some(shared) = &mut self.shared {
            clock.enter(Stage::Aggregate);
            let tensors = MoeBackward { x_TH, dout_TH, dx_TH: dx_TH.reborrow() };
            shared.backward(pass, gradients, h, tensors)?;
        }
        clock.enter(Stage::Route);
        self.route_backward(pass, gradients, losses, scratch.dweights.view_mut(t * k), (x_TH, dx_TH));
        Ok(())
    }

    fn route_backward<C>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        losses: RouterLosses<'_, B>,
        dweights: ViewMut<'_, B, f32>,
        (x_TH, dx_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) {
        let noise_tensor = pass.tensors.router_noise.unwrap_or(pass.tensors.router);
        let (flat, [router, noise]) = gradients.several([pass.tensors.router, noise_tensor]);
        let noise = pass.tensors.router_noise.map(|_| noise);
        let gradients = RouterGradients { dweights, dx_TH, flat, router, noise };
        self.router.backward(pass.device, pass.route, x_TH, &router_weights(pass), losses, gradients);
    }
}

fn router_weights<'a, B: Backend, C>(pass: &MoePass<'a, B, C>) -> RouterWeights<'a, B> {
    RouterWeights {
        router: pass.weights.get(pass.tensors.router),
        noise: pass.tensors.router_noise.map(|id| pass.weights.get(id)),
    }
}

/// The tokens of a chunk with their choices.
fn routed<'a, B: Backend>(
    router: &'a Router<B>,
    x_TH: View<'a, B, B::Act>,
    all_tokens: usize,
    tokens: Range<usize>,
) -> RoutedTokens<'a, B> {
    let choices = |k: usize| tokens.start * k..tokens.end * k;
    let (h, k) = (x_TH.len() / all_tokens.max(1), router.kept(all_tokens).len() / all_tokens.max(1));
    RoutedTokens {
        x_TH: x_TH.slice(choices(h)),
        kept: router.kept(all_tokens).slice(choices(k)),
        weights: router.weights(all_tokens).slice(choices(k)),
    }
}

fn expert_weights<'a, B: Backend, C>(pass: &MoePass<'a, B, C>) -> ExpertWeights<'a, B> {
    ExpertWeights {
        gate_up: pass.weights.get(pass.tensors.experts.gate_up),
        down: pass.weights.get(pass.tensors.experts.down),
    }
}

/// Tensors of [`MoeLayer::backward`].
pub(super) struct MoeBackward<'a, B: Backend> {
    /// The forward pass's input.
    pub x_TH: View<'a, B, B::Act>,
    /// Gradient of the output.
    pub dout_TH: View<'a, B, B::Act>,
    /// Gradient of the input, overwritten.
    pub dx_TH: ViewMut<'a, B, B::Act>,
}

impl<B: Backend> SharedExpert<B> {
    /// Counts its buffers.
    fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.out.bytes(), self.gate.bytes(), self.dout.bytes(), self.dgate.bytes()]);
        self.feed_forward.tally(tally);
    }

    /// Adds the shared expert's output to `out_TH`.
    fn forward<C>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        h: usize,
        x_TH: View<'_, B, B::Act>,
        out_TH: ViewMut<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let Some(tensors) = pass.tensors.shared else { return Ok(()) };
        let (device, t) = (pass.device, pass.route.tokens);
        self.out.reserve(device, t * h)?;
        self.feed_forward.forward(device, pass.weights, tensors, x_TH, self.out.view_mut(t * h))?;
        match pass.tensors.shared_router {
            None => device.add(self.out.view(t * h), out_TH),
            Some(gate) => {
                self.gate.reserve(device, t)?;
                let dims = GemmDims { m: t, n: 1, k: h };
                device.linear_f32(dims, x_TH, pass.weights.get(gate), self.gate.view_mut(t));
                device.sigmoid_gate(h, self.gate.view(t), self.out.view(t * h), out_TH);
            }
        }
        Ok(())
    }

    /// Adds the shared expert's part to `dx_TH`.
    fn backward<C>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        h: usize,
        tensors: MoeBackward<'_, B>,
    ) -> Result<(), DeviceError> {
        let MoeBackward { x_TH, dout_TH, mut dx_TH } = tensors;
        let Some(tensors) = pass.tensors.shared else { return Ok(()) };
        let (device, t) = (pass.device, pass.route.tokens);
        let dout = if let Some(gate) = pass.tensors.shared_router {
            self.dout.reserve(device, t * h)?;
            self.dgate.reserve(device, t)?;
            let (logits, out) = (self.gate.view(t), self.out.view(t * h));
            device.sigmoid_gate_grad(h, dout_TH, logits, out, self.dout.view_mut(t * h), self.dgate.view_mut(t));
            let dims = GemmDims { m: t, n: 1, k: h };
            let (dgate, weight) = (self.dgate.view(t), pass.weights.get(gate));
            device.linear_f32_grad_input(dims, dgate, weight, dx_TH.reborrow(), Accumulate::Add);
            device.linear_f32_grad_weight(dims, dgate, x_TH, gradients.get(gate));
            self.dout.view(t * h)
        } else {
            dout_TH
        };
        self.feed_forward.backward(device, (pass.weights, gradients), tensors, x_TH, dout, dx_TH, Accumulate::Add)
    }
}
