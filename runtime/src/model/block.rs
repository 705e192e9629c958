//! One block: attention and feed-forward around the residual stream, with their norms.
//!
//! Owns the residual sums of a block and the norms before its halves. It knows neither the blocks beside it nor a loss.

use moe_kernels::{Accumulate, Backend, Device, DeviceError, NormDims, View, ViewMut};

use super::attention::{Attention, AttentionBackward, AttentionPass, AttentionScratch, RotaryTables};
use super::config::{BlockNorm, ModelConfig};
use super::feed_forward::DenseFeedForward;
use super::layout::{BlockTensors, FeedForward, MoeTensors, TensorId};
use super::moe::{MoeBackward, MoeLayer, MoePass, MoeScratch};
use super::parameters::{Gradients, Weights};
use crate::collectives::Communicator;
use crate::memory::{Kind, Slot, Tally};
use crate::pass_error::PassError;
use crate::routing::{Balance, RoutePass, RouterLosses};
use crate::stages::{Stage, StageClock};

/// An RMSNorm over the residual stream, with what its backward pass needs.
pub(super) struct Norm<B: Backend> {
    weight: TensorId,
    rstd: Slot<B, f32>,
    /// `[T, H]`: the normed activations of the last forward pass.
    pub out: Slot<B, B::Act>,
}

pub(super) enum Second<B: Backend> {
    Dense(DenseFeedForward<B>),
    Moe(Box<MoeLayer<B>>),
}

pub(super) struct Block<B: Backend> {
    tensors: BlockTensors,
    first_norm: Norm<B>,
    attention: Attention<B>,
    /// The residual stream between the block's halves.
    middle: Slot<B, B::Act>,
    second_norm: Norm<B>,
    /// The residual stream before a norm at the block's end.
    end: Slot<B, B::Act>,
    /// The feed-forward half.
    pub second: Second<B>,
}

/// Gradients of the residual stream and what layers share.
pub(super) struct Scratch<B: Backend> {
    /// Attention's.
    pub attention: AttentionScratch<B>,
    /// The MoE layers'.
    pub moe: MoeScratch<B>,
    /// Gradient of the residual stream.
    pub dstream: Slot<B, B::Act>,
    /// Gradient of a branch's input.
    pub dbranch: Slot<B, B::Act>,
}

/// What a block works with in a pass.
pub(super) struct BlockContext<'a, B: Backend, C> {
    /// The queue.
    pub device: &'a B,
    /// Sizes.
    pub config: &'a ModelConfig,
    /// Weights of the model.
    pub weights: Weights<'a, B>,
    /// Rotary tables.
    pub rotary: &'a RotaryTables<B>,
    /// The expert group.
    pub group: &'a C,
    /// The pass.
    pub route: RoutePass<'a>,
    /// `[B, S]`: the first position that each of its tokens sees; None: the sequence's.
    pub starts: Option<View<'a, B, i32>>,
}

impl<'a, B: Backend, C> BlockContext<'a, B, C> {
    fn attention(&self, tensors: &'a BlockTensors) -> AttentionPass<'a, B> {
        let (seq, starts) = (self.route.sequence_length, self.starts);
        AttentionPass {
            batch: self.route.tokens / seq,
            seq,
            starts,
            weights: self.weights,
            tensors,
            rotary: self.rotary,
        }
    }

    fn moe(&self, tensors: MoeTensors) -> MoePass<'_, B, C> {
        MoePass { device: self.device, group: self.group, route: self.route, weights: self.weights, tensors }
    }
}

impl<B: Backend> Block<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.middle.bytes(), self.end.bytes()]);
        self.first_norm.tally(tally);
        self.attention.tally(tally);
        self.second_norm.tally(tally);
        match &self.second {
            Second::Dense(dense) => dense.tally(tally),
            Second::Moe(moe) => moe.tally(tally),
        }
    }

    /// A block with these tensors and this second half.
    pub(super) fn new(
        device: &B,
        config: &ModelConfig,
        tensors: BlockTensors,
        second: Second<B>,
    ) -> Result<Self, DeviceError> {
        Ok(Self {
            tensors,
            first_norm: Norm::new(device, tensors.attention_norm)?,
            attention: Attention::new(device, config)?,
            middle: Slot::new(device, "residual stream between the halves of a block")?,
            second_norm: Norm::new(device, tensors.feed_forward_norm)?,
            end: Slot::new(device, "residual stream before the norm at the end of a block")?,
            second,
        })
    }

    /// `y = m + second(norm(m))`, `m = x + attention(norm(x))`; or, with the norms behind, `y = norm(m + second(m))`, `m = norm(x + attention(x))`.
    pub(super) fn forward<C: Communicator<B>>(
        &mut self,
        context: &BlockContext<'_, B, C>,
        balance: &mut Balance<B>,
        scratch: &mut MoeScratch<B>,
        clock: &mut StageClock<B>,
        (x, mut y): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        let (device, n, config, weights) = (context.device, x.len(), context.config, context.weights);
        let behind = config.block_norm == BlockNorm::Post;
        clock.enter(Stage::Attention);
        self.middle.reserve(device, n)?;
        let tensors = self.tensors;
        let pass = context.attention(&tensors);
        if !behind {
            self.first_norm.forward(device, config, weights, x)?;
        }
        let input = if behind { x } else { self.first_norm.out.view(n) };
        self.attention.forward(device, pass, input, self.middle.view_mut(n))?;
        device.add(x, self.middle.view_mut(n));
        if behind {
            self.first_norm.forward(device, config, weights, self.middle.view(n))?;
            self.end.reserve(device, n)?;
        } else {
            self.second_norm.forward(device, config, weights, self.middle.view(n))?;
        }
        // What the second half sees, where its sum goes, and what is added to that.
        let (input, mut sum, residual) = if behind {
            let middle = self.first_norm.out.view(n);
            (middle, self.end.view_mut(n), middle)
        } else {
            (self.second_norm.out.view(n), y.reborrow(), self.middle.view(n))
        };
        match (&mut self.second, self.tensors.feed_forward) {
            (Second::Dense(dense), FeedForward::Dense(tensors)) => {
                clock.enter(Stage::Aggregate);
                dense.forward(device, weights, tensors, input, sum.reborrow())?;
            }
            (Second::Moe(moe), FeedForward::Moe(tensors)) => {
                moe.forward(&context.moe(tensors), balance, scratch, clock, (input, sum.reborrow()))?;
            }
            _ => unreachable!("a block is built from its tensors"),
        }
        device.add(residual, sum);
        if behind {
            self.second_norm.forward(device, config, weights, self.end.view(n))?;
            device.copy(self.second_norm.out.view(n), y);
        }
        Ok(())
    }

    /// Turns the gradient of the block's output, in `scratch.dstream`, into that of its input. `between` is called when the second half's
    /// shuffle has been issued and the first half's work has not: what it issues delays no rows.
    pub(super) fn backward<C: Communicator<B>>(
        &mut self,
        context: &BlockContext<'_, B, C>,
        gradients: &mut Gradients<'_, B>,
        losses: RouterLosses<'_, B>,
        scratch: &mut Scratch<B>,
        clock: &mut StageClock<B>,
        (x, between): (View<'_, B, B::Act>, &mut BetweenHalves<'_, B>),
    ) -> Result<(), PassError> {
        let (device, n, weights, config) = (context.device, x.len(), context.weights, context.config);
        let behind = config.block_norm == BlockNorm::Post;
        clock.enter(Stage::Aggregate);
        if behind {
            // The sum's gradient, which both its parts get.
            let through = (self.end.view(n), scratch.dstream.view(n), scratch.dbranch.view_mut(n));
            self.second_norm.backward(device, config, (weights, gradients), through, Accumulate::Overwrite);
            std::mem::swap(&mut scratch.dstream, &mut scratch.dbranch);
        }
        let input = if behind { self.first_norm.out.view(n) } else { self.second_norm.out.view(n) };
        let (dout, dinput) = (scratch.dstream.view(n), scratch.dbranch.view_mut(n));
        match (&mut self.second, self.tensors.feed_forward) {
            (Second::Dense(dense), FeedForward::Dense(tensors)) => {
                dense.backward(device, (weights, &mut *gradients), tensors, input, dout)?;
                dense.grad_input(device, weights, tensors, dinput, Accumulate::Overwrite);
            }
            (Second::Moe(moe), FeedForward::Moe(tensors)) => {
                let rows = MoeBackward { x_TH: input, dout_TH: dout, dx_TH: dinput };
                moe.backward(&context.moe(tensors), gradients, losses, &mut scratch.moe, clock, rows)?;
            }
            _ => unreachable!("a block is built from its tensors"),
        }
        between(gradients)?;
        clock.enter(Stage::Attention);
        if behind {
            device.add(scratch.dbranch.view(n), scratch.dstream.view_mut(n));
            let through = (self.middle.view(n), scratch.dstream.view(n), scratch.dbranch.view_mut(n));
            self.first_norm.backward(device, config, (weights, gradients), through, Accumulate::Overwrite);
            std::mem::swap(&mut scratch.dstream, &mut scratch.dbranch);
        } else {
            let through = (self.middle.view(n), scratch.dbranch.view(n), scratch.dstream.view_mut(n));
            self.second_norm.backward(device, config, (weights, gradients), through, Accumulate::Add);
        }
        let tensors = self.tensors;
        let rows = AttentionBackward {
            x_TH: if behind { x } else { self.first_norm.out.view(n) },
            dy_TH: scratch.dstream.view(n),
            dx_TH: scratch.dbranch.view_mut(n),
        };
        self.attention.backward(device, context.attention(&tensors), gradients, &mut scratch.attention, rows)?;
        if behind {
            device.add(scratch.dbranch.view(n), scratch.dstream.view_mut(n));
        } else {
            let through = (x, scratch.dbranch.view(n), scratch.dstream.view_mut(n));
            self.first_norm.backward(device, config, (weights, gradients), through, Accumulate::Add);
        }
        Ok(())
    }
}

/// Called between the halves of a block's backward pass.
pub(super) type BetweenHalves<'a, B> = dyn FnMut(&mut Gradients<'_, B>) -> Result<(), PassError> + 'a;

/// A backward pass's way through a layer: the forward pass's input, the output's gradient, the input's gradient.
type Through<'a, B> =
    (View<'a, B, <B as Device>::Act>, View<'a, B, <B as Device>::Act>, ViewMut<'a, B, <B as Device>::Act>);

impl<B: Backend> Norm<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.rstd.bytes(), self.out.bytes()]);
    }

    pub(super) fn new(device: &B, weight: TensorId) -> Result<Self, DeviceError> {
        Ok(Self { weight, rstd: Slot::new(device, "norm statistics")?, out: Slot::new(device, "normed activations")? })
    }

    fn dims(config: &ModelConfig, elements: usize) -> NormDims {
        let width = config.hidden_size;
        NormDims { tokens: elements / width, groups: 1, width, token_stride: width, eps: config.norm_eps }
    }

    pub(super) fn forward(
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
    pub(super) fn backward(
        &self,
        device: &B,
        config: &ModelConfig,
        (weights, gradients): (Weights<'_, B>, &mut Gradients<'_, B>),
        through: Through<'_, B>,
        accumulate: Accumulate,
    ) {
        let (x, dy, dx) = through;
        let dims = Self::dims(config, x.len());
        let (weight, dweight) = (weights.get(self.weight), gradients.get(self.weight));
        device.rms_norm_grad(dims, dy, x, weight, self.rstd.view(dims.tokens), dx, dweight, accumulate);
    }
}
