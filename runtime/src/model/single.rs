//! One MoE layer by itself, with parameters of its own: what is measured when a layer is.
//!
//! Owns nothing that a model does not: it is a model's layer, called as a block calls it.

use moe_kernels::{Backend, DeviceError, ShuffleDims, View, ViewMut};

use super::config::{ModelConfig, Recompute};
use super::layout::{FeedForward, Layout, MoeTensors};
use super::moe::{MoeBackward, MoeLayer, MoePass, MoeScratch, MoeShape};
use super::parameters::Parameters;
use crate::collectives::{Communicator, Groups};
use crate::dispatch::Room;
use crate::pass_error::PassError;
use crate::routing::{Balance, BatchShare, RoutePass, RouterConfig, RouterLosses, RouterShape};
use crate::stages::StageClock;
use crate::topology::{Grid, Rank};

/// An MoE layer: router, dispatch, experts, combine.
pub struct SingleMoe<B: Backend> {
    device: B,
    parameters: Parameters<B>,
    tensors: MoeTensors,
    layer: MoeLayer<B>,
    balance: Balance<B>,
    scratch: MoeScratch<B>,
    hidden_size: usize,
    /// Parts that a token is routed in.
    parts: usize,
    /// Tokens, for gates that look at them.
    ids: Vec<i32>,
}

impl<B: Backend> SingleMoe<B> {
    /// The first block's layer of a model of `config`, which must be an MoE block, with initial weights, for passes of at most `tokens`
    /// tokens in `chunks` parts, stored straight into other ranks' memory where that can be if `direct`; None: it is dense.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(
        device: B,
        config: &ModelConfig,
        router: &RouterConfig,
        (grid, rank): (&Grid, Rank),
        (tokens, chunks, direct): (usize, usize, bool),
    ) -> Result<Option<Self>, DeviceError> {
        let layout = Layout::new(config, router, grid.local_experts(rank));
        let Some(FeedForward::Moe(tensors)) = layout.blocks.first().map(|block| block.feed_forward) else {
            return Ok(None);
        };
        let (hidden_size, experts, top_k) = (config.routed_width(), config.experts_in(0), config.top_k);
        let shape = RouterShape { hidden_size, experts, top_k, config: router.clone(), gate: None };
        let ranks = grid.ep();
        let room = Room::planned(
            Room::HEADROOM,
            ShuffleDims { tokens: (tokens * config.sub_tokens).div_ceil(chunks), top_k, experts, ranks },
        );
        let place = MoeShape { ranks, chunks, seed: 0, recompute: Recompute::None, room };
        let mut parameters = Parameters::new(&device, layout)?;
        parameters.initialize(&device, 0);
        Ok(Some(Self {
            parameters,
            tensors,
            layer: MoeLayer::new(&device, config, shape, &place, (0, 0))?,
            balance: Balance::new(&device, router, vec![experts], 1)?,
            scratch: MoeScratch::new(&device, direct)?,
            hidden_size: config.hidden_size,
            parts: config.sub_tokens,
            ids: (0..tokens as i32).collect(),
            device,
        }))
    }

    /// Forward: `out_TH` from `x_TH`, as in training.
    ///
    /// # Errors
    /// The device's or a collective's.
    pub fn forward<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        (x_TH, out_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        let route = route(&self.ids[..x_TH.len() / self.hidden_size]);
        self.balance.begin_pass(route.split(self.parts));
        let weights = self.parameters.weights();
        let pass = MoePass { device: &self.device, group: &groups.expert, route, weights, tensors: self.tensors };
        let clock = &mut StageClock::default();
        self.layer.forward(&pass, &mut self.balance, &mut self.scratch, clock, (x_TH, out_TH))
    }

    /// Backward of the last forward pass: `dx_TH` from `dout_TH`; the weights' gradients as in the first pass of a step, so that the
    /// experts' are replaced.
    ///
    /// # Errors
    /// The device's or a collective's.
    pub fn backward<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        x_TH: View<'_, B, B::Act>,
        (dout_TH, dx_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        let route = route(&self.ids[..x_TH.len() / self.hidden_size]);
        let all = route.tokens * self.parts * groups.world.size();
        let share = BatchShare { global_tokens: all, tokens_so_far: all, pass_tokens: all };
        self.balance.form(&self.device, &groups.world, route.split(self.parts), share)?;
        let (weights, mut gradients) = self.parameters.split();
        let losses = RouterLosses { balance: self.balance.coefficients(0), tokens: self.balance.token_losses(share) };
        let pass = MoePass { device: &self.device, group: &groups.expert, route, weights, tensors: self.tensors };
        let rows = MoeBackward { x_TH, dout_TH, dx_TH };
        let clock = &mut StageClock::default();
        self.layer.begin_step();
        self.layer.backward(&pass, &mut gradients, losses, &mut self.scratch, clock, rows)
    }
}

/// A training pass over the tokens `ids`, one sequence.
fn route(ids: &[i32]) -> RoutePass<'_> {
    let tokens = ids.len();
    RoutePass { tokens, sequence_length: tokens, first_token: 0, training: true, step: 0, ids, tags: &[] }
}
