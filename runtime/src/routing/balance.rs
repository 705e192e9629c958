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
use crate::memory::{Kind, Slot, Tally};

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
    /// `[L, E]`: probabilities, summed over tokens.
    pub mass: Vec<f64>,
    /// `[L, E]`: choices that capacity dropped.
    pub dropped: Vec<f64>,
    /// `[L]`: entropy of the probabilities in nats, summed over tokens.
    pub entropy: Vec<f64>,
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
    /// `[L, max_groups, E]`: probabilities of the step's passes so far.
    step_probs: Slot<B, f32>,
    /// `[L, E]`: dropped choices of the step's passes so far.
    step_dropped: Slot<B, f32>,
    /// `[L]`: entropies of the step's passes so far.
    step_entropy: Slot<B, f64>,
    coefficients: Slot<B, f32>,
    /// `[3]`: balance loss, cv² losses, Σ lse².
    losses: Slot<B, f64>,
}

const BALANCE: usize = 0;
const NOISY: usize = 1;
const Z: usize = 2;

impl<B: Backend> Balance<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(
            Kind::Activations,
            [
                self.counts.bytes(),
                self.prob_sums.bytes(),
                self.step_counts.bytes(),
                self.step_probs.bytes(),
                self.step_dropped.bytes(),
                self.step_entropy.bytes(),
                self.coefficients.bytes(),
                self.losses.bytes(),
            ],
        );
    }

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
        Ok(Self {
            config: config.clone(),
            layers,
            experts,
            max_groups,
            groups: 1,
            counts: Slot::sized(device, "balance counts", len)?,
            prob_sums: Slot::sized(device, "balance probabilities", len)?,
            step_counts: Slot::sized(device, "balance counts of a step", len)?,
            step_probs: Slot::sized(device, "balance probabilities of a step", len)?,
            step_dropped: Slot::sized(device, "dropped choices of a step", layers * experts)?,
            step_entropy: Slot::sized(device, "gate entropies of a step", layers)?,
            coefficients: Slot::sized(device, "balance coefficients", len)?,
            losses: Slot::sized(device, "balance losses", 3)?,
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
        let len = self.layers * self.max_groups * self.experts;
        device.fill(self.step_counts.view_mut(len), 0.0);
        device.fill(self.step_probs.view_mut(len), 0.0);
        device.fill(self.step_dropped.view_mut(self.layers * self.experts), 0.0);
        device.fill(self.step_entropy.view_mut(self.layers), 0.0);
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
            for (of_pass, of_step) in [(&self.counts, &mut self.step_counts), (&self.prob_sums, &mut self.step_probs)] {
                let total = of_step.view_mut(start + range.len()).slice(start..start + range.len());
                device.add_f32(of_pass.view(len).slice(range.clone()), total);
            }
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

    /// Adds what MoE layer `index` counted by itself to the report: Σ lse², entropy, dropped choices.
    pub fn add(&mut self, device: &B, index: usize, statistics: &RouterStatistics<B>) {
        let sums = statistics.sums.view(2);
        device.sum(sums.slice(0..1), self.losses.view_mut(3).slice(Z..Z + 1));
        device.sum(sums.slice(1..2), self.step_entropy.view_mut(self.layers).slice(index..index + 1));
        let dropped = self.step_dropped.view_mut(self.layers * self.experts);
        device.add_f32(
            statistics.dropped.view(self.experts),
            dropped.slice(index * self.experts..(index + 1) * self.experts),
        );
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
        let mut dropped = vec![0.0; self.layers * self.experts];
        device.read_to_host(self.step_dropped.view(dropped.len()), &mut dropped)?;
        let mut entropy = vec![0.0; self.layers];
        device.read_to_host(self.step_entropy.view(self.layers), &mut entropy)?;
        let reported_layers = if self.config.balance_pooled { 1 } else { self.layers.max(1) } as f64;
        Ok(BalanceReport {
            balance_loss: losses[BALANCE] / reported_layers,
            noisy_loss: losses[NOISY],
            z_sum: losses[Z],
            loads: self.over_groups(device, &self.step_counts)?,
            mass: self.over_groups(device, &self.step_probs)?,
            dropped: dropped.into_iter().map(f64::from).collect(),
            entropy,
        })
    }

    /// `[L, E]` of `[L, max_groups, E]`.
    fn over_groups(&self, device: &B, sums: &Slot<B, f32>) -> Result<Vec<f64>, DeviceError> {
        let mut all = vec![0.0f32; self.layers * self.max_groups * self.experts];
        device.read_to_host(sums.view(all.len()), &mut all)?;
        let mut totals = vec![0.0; self.layers * self.experts];
        let layers = all.chunks_exact(self.max_groups * self.experts).zip(totals.chunks_exact_mut(self.experts));
        for (groups, totals) in layers {
            for group in groups.chunks_exact(self.experts) {
                totals.iter_mut().zip(group).for_each(|(total, &sum)| *total += f64::from(sum));
            }
        }
        Ok(totals)
    }
}
