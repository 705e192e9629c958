//! The whole model: embedding, blocks, final norm, head; forward and backward over one pass of one rank.
//!
//! Owns the order of layers and the residual stream. It accumulates gradients and sums; reducing them over ranks and updating
//! parameters is `training`'s.

use std::ops::Range;
use std::sync::Arc;

use moe_kernels::{Accumulate, Activation, Backend, DeviceError, ShuffleDims, ViewMut};

use super::attention::{AttentionScratch, RotaryTables};
use super::block::{Block, BlockContext, Norm, Scratch, Second};
use super::config::{ModelConfig, Recompute};
use super::feed_forward::DenseFeedForward;
use super::head::Head;
use super::layout::{BlockTensors, FeedForward, Layout, Ownership};
use super::moe::{MoeLayer, MoeScratch, MoeShape};
use super::parameters::{Gradients, Parameters};
use super::pass::PassTokens;
use crate::collectives::{CollectiveError, Communicator, Groups};
use crate::dispatch::{Room, ShuffledRows};
use crate::memory::{Kind, Slot, Tally};
use crate::pass_error::PassError;
use crate::routing::{Balance, BalanceReport, BatchShare, Gate, RoutePass, RouterConfig, RouterLosses, RouterShape};
use crate::stages::{Stage, StageClock};
use crate::topology::{Grid, Rank};

/// What a rank builds its model from.
#[derive(Clone, Debug)]
pub struct ModelSetup {
    /// Sizes.
    pub model: ModelConfig,
    /// Routing.
    pub router: RouterConfig,
    /// Where this rank stands: its experts follow from it.
    pub grid: Grid,
    /// This rank.
    pub rank: Rank,
    /// Seed of initial weights and of gates that draw.
    pub seed: u64,
    /// Chunks of tokens that an MoE layer runs in.
    pub chunks: usize,
    /// Room for rows from other ranks, as a multiple of what is expected.
    pub receive_headroom: f64,
    /// Whether rows are stored straight into other ranks' memory where that can be.
    pub direct: bool,
    /// The most sequences of a pass.
    pub max_sequences: usize,
    /// Their length.
    pub sequence_length: usize,
    /// What the backward pass computes again instead of what the forward pass would keep.
    pub recompute: Recompute,
    /// The gate of `router.kind = "custom"`.
    pub gate: Option<Arc<dyn Gate>>,
}

/// Sums over the passes of a step on this rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepSums {
    /// Σ of token losses, in nats.
    pub loss: f64,
    /// Rounds beyond the first that this rank's rows needed, over all layers and chunks.
    pub extra_rounds: f64,
    /// Balance losses and loads.
    pub balance: BalanceReport,
}

/// A model on one rank.
pub struct Transformer<B: Backend> {
    device: B,
    setup: ModelSetup,
    parameters: Parameters<B>,
    rotary: RotaryTables<B>,
    ids: Slot<B, i32>,
    /// `[T]`: the first position that each token sees; unused where documents are not kept apart.
    starts: Slot<B, i32>,
    /// The residual stream before each block, and after the last.
    stream: Vec<Slot<B, B::Act>>,
    blocks: Vec<Block<B>>,
    final_norm: Norm<B>,
    head: Head<B>,
    balance: Balance<B>,
    scratch: Scratch<B>,
    /// `[1]`: Σ losses.
    total: Slot<B, f64>,
    /// `[H]`: the padding token's gradient before the embedding adds its share.
    padding_grad: Slot<B, f32>,
    /// [`Transformer::extra_rounds`] when the step began.
    rounds_before: u64,
}

impl<B: Backend> Transformer<B> {
    /// A model whose parameters are initialised from the seed. `setup` must be valid.
    pub fn new(device: B, setup: ModelSetup) -> Result<Self, DeviceError> {
        let c = &setup.model;
        let layout = Layout::new(c, &setup.router, setup.grid.local_experts(setup.rank));
        let blocks = build_blocks(&device, &setup, &layout)?;
        let slot = |_| Slot::new(&device, "residual stream");
        let mut model = Self {
            rotary: RotaryTables::new(&device, c, setup.sequence_length)?,
            ids: Slot::new(&device, "token ids")?,
            starts: Slot::new(&device, "starts of documents")?,
            stream: (0..=c.layers).map(slot).collect::<Result<_, _>>()?,
            blocks,
            final_norm: Norm::new(&device, layout.final_norm)?,
            head: Head::new(&device, c.vocab_size, c.hidden_size, layout.head)?,
            balance: Balance::new(&device, &setup.router, c.layer_experts(), setup.max_sequences)?,
            scratch: Scratch {
                attention: AttentionScratch::new(&device)?,
                moe: MoeScratch::new(&device, setup.direct)?,
                dstream: Slot::new(&device, "residual gradients")?,
                dbranch: Slot::new(&device, "branch gradients")?,
            },
            total: Slot::sized(&device, "loss", 1)?,
            padding_grad: Slot::new(&device, "gradient of the padding token")?,
            rounds_before: 0,
            parameters: Parameters::new(&device, layout)?,
            setup,
            device,
        };
        model.parameters.initialize(&model.device, model.setup.seed);
        Ok(model)
    }

    /// The queue the model computes on.
    pub fn device(&self) -> &B {
        &self.device
    }

    /// What it was built from.
    pub fn setup(&self) -> &ModelSetup {
        &self.setup
    }

    /// Values and gradients.
    pub fn parameters(&self) -> &Parameters<B> {
        &self.parameters
    }

    /// Values and gradients, to update or load.
    pub fn parameters_mut(&mut self) -> &mut Parameters<B> {
        &mut self.parameters
    }

    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        self.parameters.tally(tally);
        self.rotary.tally(tally);
        let [ids, starts] = [&self.ids, &self.starts].map(Slot::bytes);
        tally.add(Kind::Activations, [ids, starts, self.total.bytes(), self.padding_grad.bytes()]);
        tally.add(Kind::Activations, self.stream.iter().map(Slot::bytes));
        for block in &self.blocks {
            block.tally(tally);
        }
        self.final_norm.tally(tally);
        self.head.tally(tally);
        self.balance.tally(tally);
        let Scratch { attention, moe, dstream, dbranch } = &self.scratch;
        attention.tally(tally);
        moe.tally(tally);
        tally.add(Kind::Activations, [dstream, dbranch].map(Slot::bytes));
    }

    /// Rows that left this rank for experts elsewhere, and that came from elsewhere, over all layers since the start: each counted
    /// once a forward pass.
    pub fn shuffled_rows(&self) -> ShuffledRows {
        let mut rows = ShuffledRows::default();
        for block in &self.blocks {
            if let Second::Moe(moe) = &block.second {
                rows += moe.shuffled_rows();
            }
        }
        rows
    }

    /// Rounds that this rank needed because more rows came than it has room for, over all layers since the start.
    pub fn extra_rounds(&self) -> u64 {
        let rounds = |block: &Block<B>| match &block.second {
            Second::Moe(moe) => moe.extra_rounds(),
            Second::Dense(_) => 0,
        };
        self.blocks.iter().map(rounds).sum()
    }

    /// Forgets the sums of the last step, the experts' gradients among them; others are cleared by the optimizer.
    pub fn begin_step(&mut self) {
        self.rounds_before = self.extra_rounds();
        for block in &mut self.blocks {
            if let Second::Moe(moe) = &mut block.second {
                moe.begin_step();
            }
        }
        self.device.fill(self.total.view_mut(1), 0.0);
        self.balance.begin_step(&self.device);
    }

    /// Forward and backward over one pass: adds to gradients and to the step's sums. `scale` is 1 over the targets of the global
    /// batch. All ranks of the world make the same passes, some perhaps without tokens.
    pub fn train_pass<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        clock: &mut StageClock<B>,
        tokens: PassTokens<'_>,
        batch: BatchShare,
        scale: f32,
    ) -> Result<(), PassError> {
        self.train_last_pass(groups, clock, tokens, (batch, scale), &mut |_, _, _| Ok(()))
    }

    /// As [`Transformer::train_pass`], and tells `complete` of stretches of the flat buffer whose gradients are complete with it, so that they can be
    /// summed over ranks beside the rest of the pass: of each block, while the one before it is under way, and of the head.
    pub fn train_last_pass<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        clock: &mut StageClock<B>,
        tokens: PassTokens<'_>,
        (batch, scale): (BatchShare, f32),
        complete: &mut Complete<'_, B>,
    ) -> Result<(), PassError> {
        let route = tokens.route(true);
        self.forward(groups, clock, tokens, route)?;
        clock.enter(Stage::Route);
        self.form_losses(groups, route, batch)?;
        clock.enter(Stage::Head);
        self.head_backward(tokens.targets, scale)?;
        for index in (0..self.blocks.len()).rev() {
            groups.expert.context().set_layer(Some(index));
            self.block_backward(index, groups, clock, (tokens, route, batch), complete)?;
        }
        groups.expert.context().set_layer(None);
        clock.enter(Stage::Embedding);
        let (h, t) = (self.setup.model.hidden_size, route.tokens);
        let embedding = self.parameters.layout().embedding;
        let (_, mut gradients) = self.parameters.split();
        let dstream = self.scratch.dstream.view(t * h);
        let padding = self.setup.model.padding_token.map(|token| token * h..(token + 1) * h);
        if let Some(row) = &padding {
            // Not zero where the head is tied: only the embedding's share is left out.
            self.padding_grad.reserve(&self.device, h)?;
            let row = gradients.get(embedding).slice(row.clone());
            self.device.copy(row.as_view(), self.padding_grad.view_mut(h));
        }
        self.device.embedding_grad(h, self.ids.view(t), dstream, gradients.get(embedding));
        if let Some(row) = padding {
            self.device.copy(self.padding_grad.view(h), gradients.get(embedding).slice(row));
        }
        clock.leave();
        Ok(())
    }

    /// Σ losses of one pass in evaluation mode, in nats. All ranks of the expert group call this together.
    pub fn evaluate_pass<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        tokens: PassTokens<'_>,
    ) -> Result<f64, PassError> {
        self.forward(groups, &mut StageClock::default(), tokens, tokens.route(false))?;
        self.device.fill(self.total.view_mut(1), 0.0);
        let x = self.final_norm.out.view(tokens.inputs.len() * self.setup.model.hidden_size);
        let total = self.total.view_mut(1);
        self.head.loss(&self.device, self.parameters.weights(), tokens.targets, x, total)?;
        let mut loss = [0.0];
        self.device.read_to_host(self.total.view(1), &mut loss)?;
        Ok(loss[0])
    }

    /// Logits `[rows, V]` of the tokens of one pass in evaluation mode: of all of them, or of the last of each sequence. Targets
    /// are not looked at.
    pub fn read_logits<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        tokens: PassTokens<'_>,
        which: LogitsOf,
    ) -> Result<Vec<f32>, PassError> {
        let PassTokens { inputs, sequence_length, .. } = tokens;
        self.forward(groups, &mut StageClock::default(), tokens, tokens.route(false))?;
        let h = self.setup.model.hidden_size;
        let x = self.final_norm.out.view(inputs.len() * h);
        let mut logits = Vec::new();
        let (first, rows) = match which {
            LogitsOf::All => (inputs.len(), inputs.len()),
            LogitsOf::Last => (sequence_length, 1),
        };
        for end in (first..=inputs.len()).step_by(first.max(1)) {
            let x = x.slice((end - rows) * h..end * h);
            logits.extend(self.head.read_logits(&self.device, self.parameters.weights(), x)?);
        }
        Ok(logits.into_iter().map(B::Act::to_f32).collect())
    }

    /// Reads back the sums of the step's passes on this rank.
    pub fn step_sums(&self) -> Result<StepSums, PassError> {
        let mut loss = [0.0];
        self.device.read_to_host(self.total.view(1), &mut loss)?;
        let extra_rounds = (self.extra_rounds() - self.rounds_before) as f64;
        Ok(StepSums { loss: loss[0], extra_rounds, balance: self.balance.report(&self.device)? })
    }

    /// Whether the loads of [`StepSums`] are already sums over ranks.
    pub fn loads_are_global(&self) -> bool {
        self.balance.loads_are_global()
    }

    /// The selection biases of the MoE layers whose gate has one: (block, bias `[E]`).
    pub fn selection_biases(&self) -> Result<Vec<(usize, Vec<f32>)>, PassError> {
        let mut biases = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            if let Second::Moe(moe) = &block.second
                && let Some(view) = moe.router.selection_bias()
            {
                let mut bias = vec![0.0; view.len()];
                self.device.read_to_host(view, &mut bias)?;
                biases.push((layer, bias));
            }
        }
        Ok(biases)
    }

    /// Replaces the selection bias of a block; false: its gate has none.
    pub fn set_selection_bias(&mut self, layer: usize, bias: &[f32]) -> bool {
        match self.blocks.get_mut(layer).map(|block| &mut block.second) {
            Some(Second::Moe(moe)) if moe.router.form().selection_bias => {
                moe.router.set_selection_bias(&self.device, bias);
                true
            }
            _ => false,
        }
    }

    fn forward<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        clock: &mut StageClock<B>,
        tokens: PassTokens<'_>,
        route: RoutePass<'_>,
    ) -> Result<(), PassError> {
        let Self { device, parameters, setup, .. } = self;
        let PassTokens { inputs, starts, .. } = tokens;
        let (t, h) = (inputs.len(), setup.model.hidden_size);
        clock.enter(Stage::Embedding);
        self.balance.begin_pass(route.split(setup.model.sub_tokens));
        self.ids.reserve(device, t)?;
        device.upload(inputs, self.ids.view_mut(t));
        if let Some(starts) = starts {
            self.starts.reserve(device, t)?;
            device.upload(starts, self.starts.view_mut(t));
        }
        let starts = starts.map(|_| self.starts.view(t));
        for slot in &mut self.stream {
            slot.reserve(device, t * h)?;
        }
        let weights = parameters.weights();
        let table = weights.get(parameters.layout().embedding);
        device.embedding(h, self.ids.view(t), table, self.stream[0].view_mut(t * h));
        for (index, block) in self.blocks.iter_mut().enumerate() {
            groups.expert.context().set_layer(Some(index));
            let (before, after) = self.stream.split_at_mut(index + 1);
            let (x, y) = (before[index].view(t * h), after[0].view_mut(t * h));
            let context = BlockContext {
                device,
                config: &setup.model,
                weights,
                rotary: &self.rotary,
                group: &groups.expert,
                route,
                starts,
            };
            block.forward(&context, &mut self.balance, &mut self.scratch.moe, clock, (x, y))?;
        }
        groups.expert.context().set_layer(None);
        clock.enter(Stage::Head);
        let last = self.stream[self.blocks.len()].view(t * h);
        self.final_norm.forward(device, &setup.model, weights, last)?;
        Ok(())
    }

    fn form_losses<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        route: RoutePass<'_>,
        batch: BatchShare,
    ) -> Result<(), PassError> {
        if self.setup.model.moe_layers().next().is_none() {
            return Ok(());
        }
        let parts = self.setup.model.sub_tokens;
        let (route, batch) = (route.split(parts), batch.split(parts));
        self.balance.form(&self.device, &groups.world, route, batch)?;
        for block in &mut self.blocks {
            if let Second::Moe(moe) = &mut block.second {
                moe.form_noisy_losses(&self.device, &groups.world, &mut self.balance, route, batch)?;
            }
        }
        Ok(())
    }

    /// Loss and gradients from the head down to the residual stream after the last block.
    fn head_backward(&mut self, targets: &[i32], scale: f32) -> Result<(), DeviceError> {
        let Self { device, parameters, setup, scratch, .. } = self;
        let n = targets.len() * setup.model.hidden_size;
        scratch.dstream.reserve(device, n)?;
        scratch.dbranch.reserve(device, n)?;
        let (weights, mut gradients) = parameters.split();
        let x = self.final_norm.out.view(n);
        let total = self.total.view_mut(1);
        let dx = scratch.dbranch.view_mut(n);
        self.head.loss_and_gradients(device, (weights, &mut gradients), (targets, scale), (x, dx), total)?;
        let (last, dnormed) = (self.stream[self.blocks.len()].view(n), scratch.dbranch.view(n));
        let dstream = scratch.dstream.view_mut(n);
        let norm = &self.final_norm;
        norm.backward(device, &setup.model, (weights, &mut gradients), (last, dnormed, dstream), Accumulate::Overwrite);
        Ok(())
    }

    fn block_backward<C: Communicator<B>>(
        &mut self,
        index: usize,
        groups: &Groups<C>,
        clock: &mut StageClock<B>,
        (tokens, route, batch): (PassTokens<'_>, RoutePass<'_>, BatchShare),
        complete: &mut Complete<'_, B>,
    ) -> Result<(), PassError> {
        let Self { device, parameters, setup, .. } = self;
        let done = complete_after(parameters.layout(), index);
        let (weights, mut gradients) = parameters.split();
        let mut between = |gradients: &mut Gradients<'_, B>| -> Result<(), PassError> {
            for (range, ownership) in &done {
                complete(gradients.stretch(range.clone()), range.clone(), *ownership)?;
            }
            Ok(())
        };
        let context = BlockContext {
            device,
            config: &setup.model,
            weights,
            rotary: &self.rotary,
            group: &groups.expert,
            route,
            starts: tokens.starts.map(|starts| self.starts.view(starts.len())),
        };
        let x = self.stream[index].view(route.tokens * setup.model.hidden_size);
        let moe_index = setup.model.moe_layers().take_while(|&layer| layer < index).count();
        let balance = setup.model.is_moe(index).then(|| self.balance.coefficients(moe_index)).flatten();
        let losses = RouterLosses { balance, tokens: self.balance.token_losses(batch.split(setup.model.sub_tokens)) };
        self.blocks[index].backward(&context, &mut gradients, losses, &mut self.scratch, clock, (x, &mut between))
    }
}

/// Told of gradients that are complete: them, where they lie in the flat buffer, and who holds the parameters.
pub type Complete<'a, B> = dyn FnMut(ViewMut<'_, B, f32>, Range<usize>, Ownership) -> Result<(), CollectiveError> + 'a;

/// What is complete when the backward pass has come to the middle of block `index`: the block after it, or the head.
pub(crate) fn complete_after(layout: &Layout, index: usize) -> Vec<(Range<usize>, Ownership)> {
    if index + 1 < layout.blocks.len() {
        return layout.block_matrices(index + 1).collect();
    }
    let tied = layout.head == layout.embedding;
    (!tied).then(|| (layout.range(layout.head), Ownership::Replicated)).into_iter().collect()
}

/// Which rows of logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsOf {
    /// Every token's.
    All,
    /// The last of each sequence.
    Last,
}

fn build_blocks<B: Backend>(device: &B, setup: &ModelSetup, layout: &Layout) -> Result<Vec<Block<B>>, DeviceError> {
    let c = &setup.model;
    let (ranks, chunks) = (setup.grid.ep(), setup.chunks);
    let tokens = (setup.max_sequences * setup.sequence_length * c.sub_tokens).div_ceil(chunks);
    let shape = |experts: usize| {
        let dims = ShuffleDims { tokens, top_k: c.top_k, experts, ranks };
        let room = Room::planned(setup.receive_headroom, dims);
        MoeShape { ranks, chunks, seed: setup.seed, recompute: setup.recompute, room }
    };
    let router = |experts: usize| RouterShape {
        hidden_size: c.routed_width(),
        experts,
        top_k: c.top_k,
        config: setup.router.clone(),
        gate: setup.gate.clone(),
    };
    let mut moe_index = 0;
    let block = |(layer, tensors): (usize, &BlockTensors)| {
        let second = match tensors.feed_forward {
            FeedForward::Dense(_) => Second::Dense(DenseFeedForward::new(device, c.hidden_size, c.ffn_size)?),
            FeedForward::Moe(_) => {
                let at = (layer, moe_index);
                moe_index += 1;
                let experts = c.experts_in(layer);
                Second::Moe(Box::new(MoeLayer::new(device, c, router(experts), &shape(experts), at)?))
            }
        };
        Block::new(device, c, *tensors, second)
    };
    layout.blocks.iter().enumerate().map(block).collect()
}
