//! The MoE layer: route → dispatch → experts → combine → aggregate, each a stage with its own backward.
//!
//! Owns the order of the stages and the chunks of tokens they run in; each stage is a module of its own. It never names a
//! transport: it is given the expert group's communicator.
//!
//! A chunk's tokens leave before the experts begin with those of the chunk before it, and its results before they begin with the next: so
//! each chunk's shuffle runs beside another's experts, forward and backward, and only the first journey and the last are waited for. A
//! shared expert works while the first rows travel. The experts work on one chunk after another; the first replaces their gradients in a
//! step's first pass, the others add.

mod chunk;
mod pass;
mod shared;
mod sub_tokens;

use std::ops::Range;

use moe_kernels::{Accumulate, Backend, DeviceError, ShuffleDims, View, ViewMut};

use super::config::{ModelConfig, Recompute};
use super::layout::{RouterTensors, TensorId};
use super::parameters::Gradients;
use crate::collectives::Communicator;
use crate::dispatch::{Room, RoutedTokens, Shuffle, ShuffleScratch, ShuffledRows};
use crate::experts::{ExpertBackward, ExpertScratch, ExpertShape, Experts};
use crate::memory::{Kind, Slot, Tally};
use crate::pass_error::PassError;
use crate::routing::{
    Balance, BatchShare, RoutePass, Router, RouterGradients, RouterLosses, RouterRanges, RouterShape,
};
use crate::stages::{Stage, StageClock};
use crate::topology::share;
use chunk::Chunk;
pub(super) use pass::MoePass;
use shared::SharedExpert;
use sub_tokens::{SubTokenScratch, SubTokens};

/// Rows and gradients under way, shared by all layers.
pub(super) struct MoeScratch<B: Backend> {
    shuffle: ShuffleScratch<B>,
    experts: ExpertScratch<B>,
    dweights: Slot<B, f32>,
    /// Taken out by a backward pass that works on it.
    sub_tokens: Option<SubTokenScratch<B>>,
}

impl<B: Backend> MoeScratch<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.dweights.bytes()]);
        self.shuffle.tally(tally);
        self.experts.tally(tally);
        self.sub_tokens.iter().for_each(|scratch| scratch.tally(tally));
    }

    /// Empty scratch; `direct` as for [`ShuffleScratch::new`].
    pub(super) fn new(device: &B, direct: bool) -> Result<Self, DeviceError> {
        Ok(Self {
            shuffle: ShuffleScratch::new(device, direct)?,
            experts: ExpertScratch::new(device)?,
            dweights: Slot::new(device, "gate weight gradients")?,
            sub_tokens: Some(SubTokenScratch::new(device)?),
        })
    }
}

/// One MoE layer with what its backward pass needs.
pub(super) struct MoeLayer<B: Backend> {
    /// Stage 1.
    pub router: Router<B>,
    index: usize,
    hidden_size: usize,
    /// Places for choices that a token has.
    slots: usize,
    /// k.
    top_k: usize,
    /// E.
    experts: usize,
    chunks: Vec<Chunk<B>>,
    shared: Option<SharedExpert<B>>,
    /// What cuts tokens into parts, taken out by a pass that works on it.
    sub_tokens: Option<SubTokens<B>>,
    /// Parts of a token.
    parts: usize,
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
    /// What a chunk may bring at a time.
    pub room: Room,
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
        self.sub_tokens.iter().for_each(|sub_tokens| sub_tokens.tally(tally));
    }

    /// The layer at `layer`, number `index` of the MoE layers.
    pub(super) fn new(
        device: &B,
        config: &ModelConfig,
        router: RouterShape,
        shape: &MoeShape,
        (layer, index): (usize, usize),
    ) -> Result<Self, DeviceError> {
        let slots = router.config.slots(config.top_k, router.experts);
        let dims = ShuffleDims { tokens: 0, top_k: slots, experts: router.experts, ranks: shape.ranks };
        let experts = ExpertShape {
            experts: dims.local_experts(),
            hidden_size: config.routed_width(),
            ffn_size: config.expert_ffn_size,
            activation: config.expert_activation,
        };
        let chunk = |_| {
            let shuffle = Shuffle::new(device, dims, config.routed_width(), shape.room)?;
            let experts = match shape.recompute {
                Recompute::None => Experts::keeping(device, experts)?,
                Recompute::Experts => Experts::recomputing(experts),
            };
            Ok(Chunk::new(shuffle, experts))
        };
        let shared = (config.shared_expert_ffn_size > 0).then(|| SharedExpert::new(device, config));
        Ok(Self {
            router: Router::new(device, router, shape.seed, layer)?,
            index,
            hidden_size: config.routed_width(),
            slots,
            top_k: config.top_k,
            experts: dims.experts,
            chunks: (0..shape.chunks).map(chunk).collect::<Result<_, DeviceError>>()?,
            shared: shared.transpose()?,
            sub_tokens: (config.sub_tokens > 1).then(|| SubTokens::new(device, config.hidden_size)).transpose()?,
            parts: config.sub_tokens,
            accumulate: Accumulate::Add,
        })
    }

    /// The experts' gradients are zero: the next backward pass may replace them.
    pub(super) fn begin_step(&mut self) {
        self.accumulate = Accumulate::Overwrite;
    }

    /// Rows exchanged with other ranks so far.
    pub(super) fn shuffled_rows(&self) -> ShuffledRows {
        let mut rows = ShuffledRows::default();
        for chunk in &self.chunks {
            rows += chunk.shuffle.shuffled_rows();
        }
        rows
    }

    /// Rounds that chunks needed on this rank beyond their first, so far.
    pub(super) fn extra_rounds(&self) -> u64 {
        self.chunks.iter().map(|chunk| chunk.shuffle.extra_rounds()).sum()
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
        (x_TH, out_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        let Some(((split, merge), mut sub_tokens)) = pass.tensors.parts.zip(self.sub_tokens.take()) else {
            return self.forward_rows(pass, balance, scratch, clock, (x_TH, out_TH));
        };
        clock.enter(Stage::Aggregate);
        let parts = sub_tokens.split(pass.device, (pass.weights, split), x_TH)?;
        self.forward_rows(&pass.split(self.parts), balance, scratch, clock, parts)?;
        clock.enter(Stage::Aggregate);
        sub_tokens.merge(pass.device, (pass.weights, merge), out_TH);
        self.sub_tokens = Some(sub_tokens);
        Ok(())
    }

    /// [`MoeLayer::forward`] of what is routed by itself: tokens, or parts of them.
    fn forward_rows<C: Communicator<B>>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        balance: &mut Balance<B>,
        scratch: &mut MoeScratch<B>,
        clock: &mut StageClock<B>,
        (x_TH, mut out_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        let (device, t, h) = (pass.device, pass.route.tokens, self.hidden_size);
        let weights = pass.router_weights();
        clock.enter(Stage::Route);
        self.router.forward(device, pass.route, x_TH, &weights)?;
        let (chunks, k) = (self.chunks.len(), self.slots);
        clock.enter(Stage::Dispatch);
        for index in 0..chunks {
            let routed = routed(&self.router, x_TH, t, self.chunk_tokens(t, index));
            if self.slots > self.top_k {
                // Experts take ⌈k · T / E⌉ tokens each, tokens k experts.
                self.chunks[index].shuffle.bound_choices(t * self.top_k + self.experts);
            }
            self.chunks[index].shuffle.plan(device, &mut scratch.shuffle, (index, chunks), routed)?;
        }
        scratch.shuffle.settle(device, pass.group, self.chunks.iter_mut().map(|chunk| &mut chunk.shuffle))?;
        self.send_tokens(pass, scratch, 0, x_TH)?;
        if let Some(shared) = &mut self.shared {
            clock.enter(Stage::Aggregate);
            shared.forward(pass, h, x_TH)?;
        }
        clock.enter(Stage::Route);
        let (counts, prob_sums) = balance.layer_mut(self.index);
        self.router.take_statistics(device, pass.route, counts, prob_sums);
        for index in 0..chunks {
            clock.enter(Stage::Dispatch);
            self.send_tokens(pass, scratch, index + 1, x_TH)?;
            let tokens = self.chunk_tokens(t, index);
            let (rows, choices) = (tokens.start * h..tokens.end * h, tokens.start * k..tokens.end * k);
            let chunk = &mut self.chunks[index];
            let x = x_TH.slice(rows.clone());
            chunk.experts.keep(chunk.shuffle.is_kept());
            for round in 0..chunk.shuffle.rounds() {
                clock.enter(Stage::Dispatch);
                if round > 0 {
                    chunk.shuffle.send_tokens(device, pass.group, &mut scratch.shuffle, (round, false), x)?;
                }
                chunk.shuffle.receive_tokens(device, round, routed(&self.router, x_TH, t, tokens.clone()))?;
                if chunk.shuffle.computes(round) {
                    chunk.expand(device, &mut scratch.experts, (round, h), x)?;
                    clock.enter(Stage::Experts);
                    let grouped = chunk.shuffle.grouped(round);
                    chunk.experts.forward(device, &mut scratch.experts, grouped, pass.expert_weights())?;
                }
                clock.enter(Stage::Combine);
                let shuffle = &mut chunk.shuffle;
                let grouped = shuffle.grouped(round);
                let weights = self.router.weights(t).slice(choices.clone());
                let tensors = (scratch.experts.rows(grouped, h), out_TH.reborrow().slice(rows.clone()));
                shuffle.send_results(device, pass.group, &mut scratch.shuffle, round, weights, tensors)?;
            }
        }
        for index in 0..chunks {
            let tokens = self.chunk_tokens(t, index);
            let out = out_TH.reborrow().slice(tokens.start * h..tokens.end * h);
            self.chunks[index].shuffle.receive_results(device, &scratch.shuffle, out);
        }
        clock.enter(Stage::Aggregate);
        if let Some(shared) = &self.shared {
            shared.add(pass, h, out_TH);
        }
        Ok(())
    }

    /// Sends the tokens of a chunk's first round, if there is such a chunk.
    fn send_tokens<C: Communicator<B>>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        scratch: &mut MoeScratch<B>,
        index: usize,
        x_TH: View<'_, B, B::Act>,
    ) -> Result<(), PassError> {
        if index == self.chunks.len() {
            return Ok(());
        }
        let tokens = self.chunk_tokens(pass.route.tokens, index);
        let x = x_TH.slice(tokens.start * self.hidden_size..tokens.end * self.hidden_size);
        // The chunk before computes meanwhile, or the shared expert.
        let beside = index > 0 || self.shared.is_some();
        let shuffle = &mut self.chunks[index].shuffle;
        shuffle.send_tokens(pass.device, pass.group, &mut scratch.shuffle, (0, beside), x)
    }

    /// As [`MoeLayer::send_tokens`], of the backward pass.
    fn send_gradients<C: Communicator<B>>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        scratch: &mut MoeScratch<B>,
        index: usize,
        (x_TH, dout_TH): (View<'_, B, B::Act>, View<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        if index == self.chunks.len() {
            return Ok(());
        }
        let tokens = self.chunk_tokens(pass.route.tokens, index);
        let rows = tokens.start * self.hidden_size..tokens.end * self.hidden_size;
        let tensors = (x_TH.slice(rows.clone()), dout_TH.slice(rows));
        let chunk = &mut self.chunks[index];
        // The chunk before computes meanwhile, or the shared expert, or this chunk's tokens are expanded again.
        let beside = index > 0 || self.shared.is_some() || !chunk.is_expanded(&scratch.experts, 0);
        chunk.shuffle.send_gradients(pass.device, pass.group, &mut scratch.shuffle, (0, beside), tensors)
    }

    /// Forms the losses of a noisy gate; others have none beside the balance loss.
    pub(super) fn form_noisy_losses<C: Communicator<B>>(
        &mut self,
        device: &B,
        world: &C,
        balance: &mut Balance<B>,
        pass: RoutePass<'_>,
        batch: BatchShare,
    ) -> Result<(), PassError> {
        balance.add(device, self.index, &self.router.statistics);
        if self.router.form().noisy {
            balance.form_noisy(device, world, (self.index, &mut self.router.statistics), pass, batch)?;
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
    ) -> Result<(), PassError> {
        let taken = |ids| Some((ids, self.sub_tokens.take()?, scratch.sub_tokens.take()?));
        let Some(((split, merge), sub_tokens, mut of_parts)) = pass.tensors.parts.and_then(taken) else {
            return self.backward_rows(pass, gradients, losses, scratch, clock, tensors);
        };
        let MoeBackward { x_TH, dout_TH, dx_TH } = tensors;
        clock.enter(Stage::Aggregate);
        let parts = sub_tokens.merge_backward(pass, gradients, merge, &mut of_parts, dout_TH)?;
        self.backward_rows(&pass.split(self.parts), gradients, losses, scratch, clock, parts)?;
        clock.enter(Stage::Aggregate);
        sub_tokens.split_backward(pass, gradients, split, &of_parts, (x_TH, dx_TH));
        (self.sub_tokens, scratch.sub_tokens) = (Some(sub_tokens), Some(of_parts));
        Ok(())
    }

    /// [`MoeLayer::backward`] of what is routed by itself.
    fn backward_rows<C: Communicator<B>>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        losses: RouterLosses<'_, B>,
        scratch: &mut MoeScratch<B>,
        clock: &mut StageClock<B>,
        tensors: MoeBackward<'_, B>,
    ) -> Result<(), PassError> {
        let MoeBackward { x_TH, dout_TH, mut dx_TH } = tensors;
        let (device, t, h, k) = (pass.device, pass.route.tokens, self.hidden_size, self.slots);
        scratch.dweights.reserve(device, t * k)?;
        clock.enter(Stage::Combine);
        self.send_gradients(pass, scratch, 0, (x_TH, dout_TH))?;
        if let Some(shared) = &mut self.shared {
            clock.enter(Stage::Aggregate);
            shared.backward(pass, gradients, h, (x_TH, dout_TH))?;
        }
        for index in 0..self.chunks.len() {
            clock.enter(Stage::Combine);
            self.send_gradients(pass, scratch, index + 1, (x_TH, dout_TH))?;
            let tokens = self.chunk_tokens(t, index);
            let (rows, choices) = (tokens.start * h..tokens.end * h, tokens.start * k..tokens.end * k);
            let (x, dout) = (x_TH.slice(rows.clone()), dout_TH.slice(rows.clone()));
            for round in 0..self.chunks[index].shuffle.rounds() {
                let chunk = &mut self.chunks[index];
                let (tensors, weights) = (pass.tensors.experts, pass.expert_weights());
                clock.enter(Stage::Combine);
                if round > 0 {
                    chunk.shuffle.send_gradients(
                        device,
                        pass.group,
                        &mut scratch.shuffle,
                        (round, false),
                        (x, dout),
                    )?;
                }
                let (computes, kept) = (chunk.shuffle.computes(round), chunk.shuffle.is_kept());
                if computes && kept {
                    // While the gradients travel.
                    chunk.expand_again(device, &mut scratch.experts, (round, h), x)?;
                }
                chunk.shuffle.receive_gradients(device, round, routed(&self.router, x_TH, t, tokens.clone()))?;
                if computes && !kept {
                    // Its rows came with the gradients.
                    chunk.expand_again(device, &mut scratch.experts, (round, h), x)?;
                }
                let accumulate =
                    if computes { std::mem::replace(&mut self.accumulate, Accumulate::Add) } else { self.accumulate };
                if computes {
                    if chunk.experts.recomputes() {
                        clock.enter(Stage::Experts);
                        let grouped = chunk.shuffle.grouped(round);
                        chunk.experts.project(device, &mut scratch.experts, grouped, weights.gate_up)?;
                    }
                    clock.enter(Stage::Combine);
                    let Chunk { shuffle, experts, .. } = chunk;
                    let grouped = shuffle.grouped(round);
                    let dy = scratch.experts.rows_mut(device, grouped, h)?;
                    shuffle.gradients(device, &scratch.shuffle, round, (dout, dy));
                    let dweights = scratch.dweights.view_mut(t * k).slice(choices.clone());
                    let row_weights = self.router.weights(t).slice(choices.clone());
                    let gated = shuffle.gated(device, &mut scratch.shuffle, round, row_weights, dweights);
                    clock.enter(Stage::Experts);
                    let grad_down = gradients.get(tensors.down);
                    let tensors = ExpertBackward { gated, weights, grad_down, accumulate };
                    experts.backward(device, &mut scratch.experts, grouped, tensors)?;
                }
                clock.enter(Stage::Dispatch);
                let shuffle = &mut chunk.shuffle;
                let sent = (scratch.experts.rows(shuffle.grouped(round), h), dx_TH.reborrow().slice(rows.clone()));
                shuffle.send_input_gradients(device, pass.group, &mut scratch.shuffle, round, sent)?;
                if computes {
                    clock.enter(Stage::Experts);
                    let gradient = (gradients.get(tensors.gate_up), accumulate);
                    let Chunk { shuffle, experts, .. } = chunk;
                    experts.grad_gate_up(device, &mut scratch.experts, shuffle.grouped(round), gradient);
                }
            }
        }
        clock.enter(Stage::Dispatch);
        for index in 0..self.chunks.len() {
            let tokens = self.chunk_tokens(t, index);
            let dweights = scratch.dweights.view_mut(t * k).slice(tokens.start * k..tokens.end * k);
            let dx = dx_TH.reborrow().slice(tokens.start * h..tokens.end * h);
            self.chunks[index].shuffle.receive_input_gradients(device, &scratch.shuffle, dweights, dx);
        }
        if let Some(shared) = &self.shared {
            clock.enter(Stage::Aggregate);
            shared.add_grad(pass, gradients, h, (x_TH, dx_TH.reborrow()));
        }
        clock.enter(Stage::Route);
        self.route_backward(pass, gradients, losses, scratch.dweights.view_mut(t * k), (x_TH, dx_TH))
    }

    fn route_backward<C>(
        &mut self,
        pass: &MoePass<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        losses: RouterLosses<'_, B>,
        dweights: ViewMut<'_, B, f32>,
        (x_TH, dx_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        let RouterTensors { matrix, noise, hidden } = pass.tensors.router;
        let range = |id: TensorId| gradients.range(id);
        let ranges =
            RouterRanges { router: matrix.map(range), noise: noise.map(range), hidden: hidden.map(|id| id.map(range)) };
        let gradients = RouterGradients { dweights, dx_TH, flat: gradients.flat(), ranges };
        Ok(self.router.backward(pass.device, pass.route, x_TH, &pass.router_weights(), losses, gradients)?)
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

/// Tensors of [`MoeLayer::backward`].
pub(super) struct MoeBackward<'a, B: Backend> {
    /// The forward pass's input.
    pub x_TH: View<'a, B, B::Act>,
    /// Gradient of the output.
    pub dout_TH: View<'a, B, B::Act>,
    /// Gradient of the input, overwritten.
    pub dx_TH: ViewMut<'a, B, B::Act>,
}
