//! The losses that keep experts evenly loaded: formed after the last layer's forward pass, before any backward pass.
//!
//! Owns the statistics of all layers and the reduction of what is global. The sums themselves are the devices'.
//!
//! Scales: probabilities are always divided by the tokens of the global batch (times the layers, if pooled), so that summing over
//! ranks and passes gives the mean loss whatever the layout; loads are divided by the tokens they were counted over.

use std::ops::Range;

use moe_kernels::{Backend, BalanceSpec, DeviceError, View, ViewMut};

use super::config::{BalanceScope, RouterConfig};
use super::router::{RoutePass, RouterStatistics};
use crate::collectives::{CollectiveError, Communicator, ReduceOp};
use crate::memory::Slot;

/// Sizes of the batch that a pass is part of.
#[derive(Clone, Copy, Debug)]
pub struct BatchShare {
    /// Tokens of the global batch, over all ranks and passes.
    pub global_tokens: usize,
    /// Tokens of the passes up to and including this one, over all ranks.
    pub tokens_so_far: usize,
    /// Tokens of this pass, over all ranks.
    pub pass_tokens: usize,
}

/// Why losses could not be formed.
#[derive(Debug, thiserror::Error)]
pub enum BalanceError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Another rank or the way to it failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// What a step's balance came to, on this rank: sums over its passes, to be summed over ranks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BalanceReport {
    /// The balance loss before its coefficient: k where the load is even. Averaged over layers unless they are pooled.
    pub balance_loss: f64,
    /// cv² of importance and load of noisy gates, summed over layers and passes.
    pub noisy_loss: f64,
    /// Σ over tokens and layers of lse².
    pub z_sum: f64,
    /// `[L, E]`: choices before capacity. Already summed over ranks where [`Balance::loads_are_global`].
    pub loads: Vec<f64>,
}

/// Statistics and loss gradients of all MoE layers.
pub struct Balance<B: Backend> {
    config: RouterConfig,
    layers: usize,
    experts: usize,
    max_groups: usize,
    groups: usize,
    counts: Slot<B, f32>,
    prob_sums: Slot<B, f32>,
    /// `[L, max_groups, E]`: counts of the step's passes so far.
    step_counts: Slot<B, f32>,
    coefficients: Slot<B, f32>,
    /// `[3]`: balance loss, cv² losses, Σ lse².
    losses: Slot<B, f64>,
}

const BALANCE: usize = 0;
const NOISY: usize = 1;
const Z: usize = 2;

impl<B: Backend> Balance<B> {
    /// Room for `layers` MoE layers of `experts` experts and passes of at most `max_sequences` sequences.
    pub fn new(
        device: &B,
        config: &RouterConfig,
        layers: usize,
        experts: usize,
        max_sequences: usize,
    ) -> Result<Self, DeviceError> {
        let max_groups = if config.balance_scope == BalanceScope::Sequence { max_sequences.max(1) } else { 1 };
        let len = layers * max_groups * experts;
        let slot = |what| {
            let mut slot = Slot::new(device, what)?;
            slot.reserve(device, len)?;
            Ok(slot)
        };
        let mut losses = Slot::new(device, "balance losses")?;
        losses.reserve(device, 3)?;
        Ok(Self {
            config: config.clone(),
            layers,
            experts,
            max_groups,
            groups: 1,
            counts: slot("balance counts")?,
            prob_sums: slot("balance probabilities")?,
            step_counts: slot("balance counts of a step")?,
            coefficients: slot("balance coefficients")?,
            losses,
        })
    }

    fn len(&self) -> usize {
        self.layers * self.groups * self.experts
    }

    /// The range of MoE layer `index` in `[L, G, E]` statistics.
    fn layer_range(&self, index: usize) -> Range<usize> {
        let each = self.groups * self.experts;
        index * each..(index + 1) * each
    }

    /// Whether [`BalanceReport::loads`] are sums over all ranks.
    pub fn loads_are_global(&self) -> bool {
        self.config.balance_scope == BalanceScope::Global
    }

    /// Forgets the last step.
    pub fn begin_step(&mut self, device: &B) {
        device.fill(self.losses.view_mut(3), 0.0);
        device.fill(self.step_counts.view_mut(self.layers * self.max_groups * self.experts), 0.0);
    }

    /// Sets the number of groups to the pass's.
    pub fn begin_pass(&mut self, pass: RoutePass) {
        self.groups = pass.groups(self.config.balance_scope).1;
        assert!(self.groups <= self.max_groups, "{} sequences in a pass of {}", self.groups, self.max_groups);
    }

    /// Where MoE layer `index` puts its `counts` and `prob_sums`.
    pub fn layer_mut(&mut self, index: usize) -> (ViewMut<'_, B, f32>, ViewMut<'_, B, f32>) {
        let (range, len) = (self.layer_range(index), self.len());
        (self.counts.view_mut(len).slice(range.clone()), self.prob_sums.view_mut(len).slice(range))
    }

    /// Forms the balance loss of all layers and its coefficients, once every layer has left its statistics.
    pub fn form<C: Communicator<B>>(
        &mut self,
        device: &B,
        world: &C,
        pass: RoutePass,
        share: BatchShare,
    ) -> Result<(), BalanceError> {
        let len = self.len();
        if self.loads_are_global() {
            device.wait(&world.all_reduce(device, self.counts.view_mut(len), ReduceOp::Sum)?);
        }
        for layer in 0..self.layers {
            let start = layer * self.max_groups * self.experts;
            let range = self.layer_range(layer);
            let total = self.step_counts.view_mut(start + range.len()).slice(start..start + range.len());
            device.add_f32(self.counts.view(len).slice(range), total);
        }
        let counted = match self.config.balance_scope {
            BalanceScope::Sequence => pass.sequence_length,
            BalanceScope::MicroBatch => pass.tokens,
            BalanceScope::Global => share.tokens_so_far,
        };
        let pooled_layers = if self.config.balance_pooled { self.layers } else { 1 };
        let one_over = |n: usize| if n == 0 { 0.0 } else { 1.0 / (n * pooled_layers) as f32 };
        let spec = BalanceSpec {
            layers: self.layers,
            groups: self.groups,
            experts: self.experts,
            pooled: self.config.balance_pooled,
            f_scale: one_over(counted),
            p_scale: one_over(share.global_tokens),
            coefficient: self.config.balance_coefficient,
        };
        let counts = if self.loads_are_global() { self.step_counts.view(len) } else { self.counts.view(len) };
        let loss = self.losses.view_mut(3).slice(BALANCE..BALANCE + 1);
        device.balance_loss(spec, counts, self.prob_sums.view(len), loss, self.coefficients.view_mut(len));
        Ok(())
    }

    /// Forms the importance and load losses of one noisy gate and their gradients.
    pub fn form_noisy<C: Communicator<B>>(
        &mut self,
        device: &B,
        world: &C,
        statistics: &mut RouterStatistics<B>,
        pass: RoutePass,
        share: BatchShare,
    ) -> Result<(), BalanceError> {
        let e = self.experts;
        let tokens = if self.loads_are_global() {
            device.wait(&world.all_reduce(device, statistics.importance.view_mut(e), ReduceOp::Sum)?);
            device.wait(&world.all_reduce(device, statistics.load.view_mut(e), ReduceOp::Sum)?);
            share.pass_tokens
        } else {
            pass.tokens
        };
        let weight = tokens as f32 / share.global_tokens.max(1) as f32;
        let RouterStatistics { importance, dimportance, load, dload, .. } = statistics;
        for (coefficient, x, dx) in
            [(self.config.importance_coefficient, importance, dimportance), (self.config.load_coefficient, load, dload)]
        {
            let loss = self.losses.view_mut(3).slice(NOISY..NOISY + 1);
            device.cv_squared(coefficient * weight, x.view(e), loss, dx.view_mut(e));
        }
        Ok(())
    }

    /// Adds one layer's Σ lse² to the report.
    pub fn add_z(&mut self, device: &B, statistics: &RouterStatistics<B>) {
        device.sum(statistics.z_sum.view(1), self.losses.view_mut(3).slice(Z..Z + 1));
    }

    /// `[G, E]` of MoE layer `index`: the balance loss's gradient; None: the loss is switched off.
    pub fn coefficients(&self, index: usize) -> Option<View<'_, B, f32>> {
        (self.config.balance_coefficient > 0.0)
            .then(|| self.coefficients.view(self.len()).slice(self.layer_range(index)))
    }

    /// Factor of Σ_t lse² in the objective: the mean over the global batch.
    pub fn z_scale(&self, share: BatchShare) -> f32 {
        self.config.z_coefficient / share.global_tokens.max(1) as f32
    }

    /// Reads the step's sums back.
    pub fn report(&self, device: &B) -> Result<BalanceReport, DeviceError> {
        if self.layers == 0 {
            return Ok(BalanceReport::default());
        }
        let mut losses = [0.0; 3];
        device.read_to_host(self.losses.view(3), &mut losses)?;
        let mut counts = vec![0.0f32; self.layers * self.max_groups * self.experts];
        device.read_to_host(self.step_counts.view(counts.len()), &mut counts)?;
        let mut loads = vec![0.0; self.layers * self.experts];
        for (layer, groups) in counts.chunks_exact(self.max_groups * self.experts).enumerate() {
            for group in groups.chunks_exact(self.experts) {
                for (load, &count) in loads[layer * self.experts..].iter_mut().zip(group) {
                    *load += f64::from(count);
                }
            }
        }
        let reported_layers = if self.config.balance_pooled { 1 } else { self.layers.max(1) } as f64;
        Ok(BalanceReport {
            balance_loss: losses[BALANCE] / reported_layers,
            noisy_loss: losses[NOISY],
            z_sum: losses[Z],
            loads,
        })
    }
}
