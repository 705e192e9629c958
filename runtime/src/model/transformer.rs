//! The whole model: embedding, blocks, final norm, head; forward and backward over one pass of one rank.
//!
//! Owns the order of layers and the residual stream. It accumulates gradients and sums; reducing them over ranks and updating
//! parameters is `training`'s.

use moe_kernels::{Accumulate, Activation, Backend, DeviceError, NormDims, View, ViewMut};

use super::ModelError;
use super::attention::{Attention, AttentionBackward, AttentionPass, AttentionScratch, RotaryTables};
use super::config::ModelConfig;
use super::feed_forward::DenseFeedForward;
use super::head::Head;
use super::layout::{BlockTensors, FeedForward, Layout, TensorId};
use super::moe::{MoeBackward, MoeLayer, MoePass, MoeScratch, MoeShape};
use super::parameters::{Gradients, Parameters, Weights};
use crate::collectives::{Communicator, Groups};
use crate::memory::Slot;
use crate::routing::{Balance, BalanceReport, BatchShare, RoutePass, RouterConfig, RouterLosses, RouterShape};
use crate::stages::{Stage, StageClock};
use crate::topology::Grid;

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
    pub rank: crate::topology::Rank,
    /// Seed of initial weights and of gates that draw.
    pub seed: u64,
    /// Chunks of tokens that an MoE layer runs in.
    pub chunks: usize,
    /// The most sequences of a pass.
    pub max_sequences: usize,
    /// Their length.
    pub sequence_length: usize,
}

/// The tokens of one pass of one rank.
#[derive(Clone, Copy, Debug)]
pub struct PassTokens<'a> {
    /// `[B, S]`.
    pub inputs: &'a [i32],
    /// `[B, S]`: the token to predict at each place; −1: none.
    pub targets: &'a [i32],
    /// S.
    pub sequence_length: usize,
    /// Place of the first token in the data: sample number · S.
    pub first_token: u64,
}

impl PassTokens<'_> {
    fn route(&self, training: bool) -> RoutePass {
        RoutePass {
            tokens: self.inputs.len(),
            sequence_length: self.sequence_length,
            first_token: self.first_token,
            training,
        }
    }
}

/// Sums over the passes of a step on this rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepSums {
    /// Σ of token losses, in nats.
    pub loss: f64,
    /// Choices that capacity dropped, over all layers.
    pub dropped: f64,
    /// Balance losses and loads.
    pub balance: BalanceReport,
}

/// An RMSNorm over the residual stream, with what its backward pass needs.
struct Norm<B: Backend> {
    weight: TensorId,
    rstd: Slot<B, f32>,
    out: Slot<B, B::Act>,
}

enum Second<B: Backend> {
    Dense(DenseFeedForward<B>),
    Moe(Box<MoeLayer<B>>),
}

struct Block<B: Backend> {
    tensors: BlockTensors,
    first_norm: Norm<B>,
    attention: Attention<B>,
    /// The residual stream between the block's halves.
    middle: Slot<B, B::Act>,
    second_norm: Norm<B>,
    second: Second<B>,
}

/// Gradients of the residual stream and what layers share.
struct Scratch<B: Backend> {
    attention: AttentionScratch<B>,
    moe: MoeScratch<B>,
    dstream: Slot<B, B::Act>,
    dbranch: Slot<B, B::Act>,
}

/// A model on one rank.
pub struct Transformer<B: Backend> {
    device: B,
    setup: ModelSetup,
    parameters: Parameters<B>,
    rotary: RotaryTables<B>,
    ids: Slot<B, i32>,
    /// The residual stream before each block, and after the last.
    stream: Vec<Slot<B, B::Act>>,
    blocks: Vec<Block<B>>,
    final_norm: Norm<B>,
    head: Head<B>,
    balance: Balance<B>,
    scratch: Scratch<B>,
    /// `[2]`: Σ losses, dropped choices.
    totals: Slot<B, f64>,
}

const LOSS: std::ops::Range<usize> = 0..1;
const DROPPED: std::ops::Range<usize> = 1..2;

impl<B: Backend> Transformer<B> {
    /// A model whose parameters are initialised from the seed. `setup` must be valid.
    pub fn new(device: B, setup: ModelSetup) -> Result<Self, DeviceError> {
        let c = &setup.model;
        let layout = Layout::new(c, &setup.router, setup.grid.local_experts(setup.rank));
        let blocks = build_blocks(&device, &setup, &layout)?;
        let moe_layers = c.moe_layers().count();
        let slot = |_| Slot::new(&device, "residual stream");
        let mut totals = Slot::new(&device, "loss")?;
        totals.reserve(&device, 2)?;
        let mut model = Self {
            rotary: RotaryTables::new(&device, c, setup.sequence_length)?,
            ids: Slot::new(&device, "token ids")?,
            stream: (0..=c.layers).map(slot).collect::<Result<_, _>>()?,
            blocks,
            final_norm: Norm::new(&device, layout.final_norm)?,
            head: Head::new(&device, c.vocab_size, c.hidden_size, layout.head)?,
            balance: Balance::new(&device, &setup.router, moe_layers, c.experts, setup.max_sequences)?,
            scratch: Scratch {
                attention: AttentionScratch::new(&device)?,
                moe: MoeScratch::new(&device)?,
                dstream: Slot::new(&device, "residual gradients")?,
                dbranch: Slot::new(&device, "branch gradients")?,
            },
            totals,
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

    /// Forgets the sums of the last step. Gradients are cleared by the optimizer.
    pub fn begin_step(&mut self) {
        self.device.fill(self.totals.view_mut(2), 0.0);
        self.balance.begin_step(&self.device);
    }

    /// Forward and backward over one pass: adds to gradients and to the step's sums. `scale` is 1 over the targets of the global
    /// batch. All ranks of the world make the same passes, some perhaps without tokens.
    pub fn train_pass<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        clock: &mut StageClock,
        tokens: PassTokens<'_>,
        batch: BatchShare,
        scale: f32,
    ) -> Result<(), ModelError> {
        let route = tokens.route(true);
        self.forward(groups, clock, tokens.inputs, route)?;
        self.form_losses(groups, route, batch)?;
        clock.lap(Stage::Route);
        self.head_backward(tokens.targets, scale)?;
        clock.lap(Stage::Head);
        for index in (0..self.blocks.len()).rev() {
            self.block_backward(index, groups, clock, route, batch)?;
        }
        let (h, t) = (self.setup.model.hidden_size, route.tokens);
        let embedding = self.parameters.layout().embedding;
        let (_, mut gradients) = self.parameters.split();
        let dstream = self.scratch.dstream.view(t * h);
        self.device.embedding_grad(h, self.ids.view(t), dstream, gradients.get(embedding));
        if let Some(token) = self.setup.model.padding_token {
            self.device.fill(gradients.get(embedding).slice(token * h..(token + 1) * h), 0.0);
        }
        clock.lap(Stage::Embedding);
        Ok(())
    }

    /// Σ losses of one pass in evaluation mode, in nats. All ranks of the expert group call this together.
    pub fn evaluate_pass<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        tokens: PassTokens<'_>,
    ) -> Result<f64, ModelError> {
        self.forward(groups, &mut StageClock::default(), tokens.inputs, tokens.route(false))?;
        self.device.fill(self.totals.view_mut(2).slice(LOSS), 0.0);
        let x = self.final_norm.out.view(tokens.inputs.len() * self.setup.model.hidden_size);
        let total = self.totals.view_mut(2).slice(LOSS);
        self.head.loss(&self.device, self.parameters.weights(), tokens.targets, x, total)?;
        let mut loss = [0.0];
        self.device.read_to_host(self.totals.view(2).slice(LOSS), &mut loss)?;
        Ok(loss[0])
    }

    /// Logits `[rows, V]` of the tokens of one pass in evaluation mode: of all of them, or of the last of each sequence.
    pub fn read_logits<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        inputs: &[i32],
        sequence_length: usize,
        which: LogitsOf,
    ) -> Result<Vec<f32>, ModelError> {
        let tokens = PassTokens { inputs, targets: &[], sequence_length, first_token: 0 };
        self.forward(groups, &mut StageClock::default(), inputs, tokens.route(false))?;
        let h = self.setup.model.hidden_size;
        let x = self.final_norm.out.view(inputs.len() * h);
        let mut logits = Vec::new();
        let rows = match which {
            LogitsOf::All => vec![0..inputs.len()],
            LogitsOf::Last => (sequence_length..=inputs.len()).step_by(sequence_length).map(|n| n - 1..n).collect(),
        };
        for range in rows {
            let x = x.slice(range.start * h..range.end * h);
            logits.extend(self.head.read_logits(&self.device, self.parameters.weights(), x)?);
        }
        Ok(logits.into_iter().map(B::Act::to_f32).collect())
    }

    /// Reads back the sums of the step's passes on this rank.
    pub fn step_sums(&self) -> Result<StepSums, ModelError> {
        let mut totals = [0.0; 2];
        self.device.read_to_host(self.totals.view(2), &mut totals)?;
        Ok(StepSums { loss: totals[0], dropped: totals[1], balance: self.balance.report(&self.device)? })
    }

    /// Whether the loads of [`StepSums`] are already sums over ranks.
    pub fn loads_are_global(&self) -> bool {
        self.balance.loads_are_global()
    }

    /// The selection biases of the MoE layers whose gate has one: (block, bias `[E]`).
    pub fn selection_biases(&self) -> Result<Vec<(usize, Vec<f32>)>, ModelError> {
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
        clock: &mut StageClock,
        inputs: &[i32],
        route: RoutePass,
    ) -> Result<(), ModelError> {
        let Self { device, parameters, setup, .. } = self;
        let (t, h) = (inputs.len(), setup.model.hidden_size);
        clock.start();
        self.balance.begin_pass(route);
        self.ids.reserve(device, t)?;
        device.upload(inputs, self.ids.view_mut(t));
        for slot in &mut self.stream {
            slot.reserve(device, t * h)?;
        }
        let weights = parameters.weights();
        let table = weights.get(parameters.layout().embedding);
        device.embedding(h, self.ids.view(t), table, self.stream[0].view_mut(t * h));
        clock.lap(Stage::Embedding);
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let (before, after) = self.stream.split_at_mut(index + 1);
            let (x, y) = (before[index].view(t * h), after[0].view_mut(t * h));
            let context = BlockContext { device, setup, weights, rotary: &self.rotary, group: &groups.expert, route };
            block.forward(&context, &mut self.balance, &mut self.scratch.moe, clock, (x, y))?;
            if let Second::Moe(moe) = &block.second {
                device.sum(moe.router.dropped(), self.totals.view_mut(2).slice(DROPPED));
            }
        }
        let last = self.stream[self.blocks.len()].view(t * h);
        self.final_norm.forward(device, &setup.model, weights, last)?;
        clock.lap(Stage::Head);
        Ok(())
    }

    fn form_losses<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        route: RoutePass,
        batch: BatchShare,
    ) -> Result<(), ModelError> {
        if self.setup.model.moe_layers().next().is_none() {
            return Ok(());
        }
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
        let total = self.totals.view_mut(2).slice(LOSS);
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
        clock: &mut StageClock,
        route: RoutePass,
        batch: BatchShare,
    ) -> Result<(), ModelError> {
        let Self { device, parameters, setup, .. } = self;
        let (weights, mut gradients) = parameters.split();
        let context = BlockContext { device, setup, weights, rotary: &self.rotary, group: &groups.expert, route };
        let x = self.stream[index].view(route.tokens * setup.model.hidden_size);
        let moe_index = setup.model.moe_layers().take_while(|&layer| layer < index).count();
        let balance = setup.model.is_moe(index).then(|| self.balance.coefficients(moe_index)).flatten();
        let losses = RouterLosses { balance, z_scale: self.balance.z_scale(batch) };
        self.blocks[index].backward(&context, &mut gradients, losses, &mut self.scratch, clock, x)
    }
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
    let shape = MoeShape { ranks: setup.grid.ep(), chunks: setup.chunks, seed: setup.seed };
    let router =
        RouterShape { hidden_size: c.hidden_size, experts: c.experts, top_k: c.top_k, config: setup.router.clone() };
    let mut moe_index = 0;
    let mut block = |(layer, tensors): (usize, &BlockTensors)| {
        let second = match tensors.feed_forward {
            FeedForward::Dense(_) => Second::Dense(DenseFeedForward::new(device, c.hidden_size, c.ffn_size)?),
            FeedForward::Moe(_) => {
                let at = (layer, moe_index);
                moe_index += 1;
                Second::Moe(Box::new(MoeLayer::new(device, c, router.clone(), &shape, at)?))
            }
        };
        Ok(Block {
            tensors: *tensors,
            first_norm: Norm::new(device, tensors.attention_norm)?,
            attention: Attention::new(device, c)?,
            middle: Slot::new(device, "residual stream between the halves of a block")?,
            second_norm: Norm::new(device, tensors.feed_forward_norm)?,
            second,
        })
    };
    layout.blocks.iter().enumerate().map(&mut block).collect()
}

/// What a block works with in a pass.
struct BlockContext<'a, B: Backend, C> {
    device: &'a B,
    setup: &'a ModelSetup,
    weights: Weights<'a, B>,
    rotary: &'a RotaryTables<B>,
    group: &'a C,
    route: RoutePass,
}

impl<'a, B: Backend, C> BlockContext<'a, B, C> {
    fn attention(&self, tensors: &'a BlockTensors) -> AttentionPass<'a, B> {
        let seq = self.route.sequence_length;
        AttentionPass { batch: self.route.tokens / seq, seq, weights: self.weights, tensors, rotary: self.rotary }
    }

    fn moe(&self, tensors: super::layout::MoeTensors) -> MoePass<'_, B, C> {
        MoePass { device: self.device, group: self.group, route: self.route, weights: self.weights, tensors }
    }
}

impl<B: Backend> Block<B> {
    /// `y = m + second(norm(m))`, `m = x + attention(norm(x))`.
    fn forward<C: Communicator<B>>(
        &mut self,
        context: &BlockContext<'_, B, C>,
        balance: &mut Balance<B>,
        scratch: &mut MoeScratch<B>,
        clock: &mut StageClock,
        (x, mut y): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), ModelError> {
        let (device, n) = (context.device, x.len());
        self.middle.reserve(device, n)?;
        self.first_norm.forward(device, &context.setup.model, context.weights, x)?;
        let tensors = self.tensors;
        let pass = context.attention(&tensors);
        self.attention.forward(device, pass, self.first_norm.out.view(n), self.middle.view_mut(n))?;
        device.add(x, self.middle.view_mut(n));
        let middle = self.middle.view(n);
        self.second_norm.forward(device, &context.setup.model, context.weights, middle)?;
        clock.lap(Stage::Attention);
        let normed = self.second_norm.out.view(n);
        match (&mut self.second, self.tensors.feed_forward) {
            (Second::Dense(dense), FeedForward::Dense(tensors)) => {
                dense.forward(device, context.weights, tensors, normed, y.reborrow())?;
            }
            (Second::Moe(moe), FeedForward::Moe(tensors)) => {
                moe.forward(&context.moe(tensors), balance, scratch, clock, (normed, y.reborrow()))?;
            }
            _ => unreachable!("a block is built from its tensors"),
        }
        device.add(middle, y);
        clock.lap(Stage::Aggregate);
        Ok(())
    }

    /// Turns the gradient of the block's output, in `scratch.dstream`, into that of its input.
    fn backward<C: Communicator<B>>(
        &mut self,
        context: &BlockContext<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        losses: RouterLosses<'_, B>,
        scratch: &mut Scratch<B>,
        clock: &mut StageClock,
        x: View<'_, B, B::Act>,
    ) -> Result<(), ModelError> {
        let (device, n, weights) = (context.device, x.len(), context.weights);
        let normed = self.second_norm.out.view(n);
        let (dout, dnormed) = (scratch.dstream.view(n), scratch.dbranch.view_mut(n));
        match (&mut self.second, self.tensors.feed_forward) {
            (Second::Dense(dense), FeedForward::Dense(tensors)) => {
                let parameters = (weights, &mut *gradients);
                dense.backward(device, parameters, tensors, normed, dout, dnormed, Accumulate::Overwrite)?;
            }
            (Second::Moe(moe), FeedForward::Moe(tensors)) => {
                let rows = MoeBackward { x_TH: normed, dout_TH: dout, dx_TH: dnormed };
                moe.backward(&context.moe(tensors), gradients, losses, &mut scratch.moe, clock, rows)?;
            }
            _ => unreachable!("a block is built from its tensors"),
        }
        let config = &context.setup.model;
        let through = (self.middle.view(n), scratch.dbranch.view(n), scratch.dstream.view_mut(n));
        self.second_norm.backward(device, config, (weights, gradients), through, Accumulate::Add);
        clock.lap(Stage::Aggregate);
        let tensors = self.tensors;
        let rows = AttentionBackward {
            x_TH: self.first_norm.out.view(n),
            dy_TH: scratch.dstream.view(n),
            dx_TH: scratch.dbranch.view_mut(n),
        };
        self.attention.backward(device, context.attention(&tensors), gradients, &mut scratch.attention, rows)?;
        let through = (x, scratch.dbranch.view(n), scratch.dstream.view_mut(n));
        self.first_norm.backward(device, config, (weights, gradients), through, Accumulate::Add);
        clock.lap(Stage::Attention);
        Ok(())
    }
}

impl<B: Backend> Norm<B> {
    fn new(device: &B, weight: TensorId) -> Result<Self, DeviceError> {
        Ok(Self { weight, rstd: Slot::new(device, "norm statistics")?, out: Slot::new(device, "normed activations")? })
    }

    fn dims(config: &ModelConfig, elements: usize) -> NormDims {
        let width = config.hidden_size;
        NormDims { tokens: elements / width, groups: 1, width, token_stride: width, eps: config.norm_eps }
    }

    fn forward(
        &mut self,
        device: &B,
        config: &ModelConfig,
        weights: Weights<'_, B>,
        x: View<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let dims = Self::dims(config, x.len());
        self.rstd.reserve(device, dims.tokens)?;
        self.out.reserve(device, x.len())?;
        let (out, rstd) = (self.out.view_mut(x.len()), self.rstd.view_mut(dims.tokens));
        device.rms_norm(dims, x, weights.get(self.weight), out, rstd);
        Ok(())
    }

    /// `dx (+)= …` from the forward pass's `x` and the gradient `dy` of its output.
    fn backward(
        &self,
        device: &B,
        config: &ModelConfig,
        (weights, gradients): (Weights<'_, B>, &mut Gradients<'_, B>),
        (x, dy, dx): (View<'_, B, B::Act>, View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
        accumulate: Accumulate,
    ) {
        let dims = Self::dims(config, x.len());
        let (weight, dweight) = (weights.get(self.weight), gradients.get(self.weight));
        device.rms_norm_grad(dims, dy, x, weight, self.rstd.view(dims.tokens), dx, dweight, accumulate);
    }
}
