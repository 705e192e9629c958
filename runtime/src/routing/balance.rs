//! The losses that keep experts evenly loaded: formed after the last layer's forward pass, before any backward pass.
//!
//! Owns the statistics of all layers and the reduction of what is global. The sums themselves are the devices'.
//!
//! Scales: probabilities are always divided by the tokens of the global batch (times the layers, if pooled), so that summing over
//! ranks and passes gives the mean loss whatever the layout; loads are divided by the tokens they were counted over.

use std::ops::Range;

use moe_kernels::{Backend, BalanceFactors, BalanceSpec, DeviceError, TokenLosses, View, ViewMut};

use super::config::{BalanceScope, RouterConfig};
use super::pass::RoutePass;
use super::router::RouterStatistics;
use crate::collectives::{Communicator, ReduceOp};
use crate::memory::{Kind, Slot, Tally};
use crate::pass_error::PassError;

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

impl BatchShare {
    /// The same with each token as `parts` tokens.
    pub fn split(self, parts: usize) -> Self {
        let Self { global_tokens, tokens_so_far, pass_tokens } = self;
        Self {
            global_tokens: global_tokens * parts,
            tokens_so_far: tokens_so_far * parts,
            pass_tokens: pass_tokens * parts,
        }
    }
}

/// Balance losses before their coefficients: means over the global batch, averaged over layers unless these are pooled.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BalanceLosses {
    /// Switch's: k where the load is even.
    pub balance: f64,
    /// DeepSeekMoE's over groups of experts: k where their load is even.
    pub device: f64,
    /// cv² of the importance.
    pub importance: f64,
    /// cv² of a noisy gate's load.
    pub load: f64,
    /// Σ (usage − importance)².
    pub difference: f64,
    /// What the entropy of the mean probabilities lacks, in nats.
    pub batch_entropy: f64,
}

impl BalanceLosses {
    /// All of them, to be summed over ranks.
    pub fn each_mut(&mut self) -> [&mut f64; 6] {
        let Self { balance, device, importance, load, difference, batch_entropy } = self;
        [balance, device, importance, load, difference, batch_entropy]
    }
}

/// What a step's balance came to, on this rank: sums over its passes, to be summed over ranks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BalanceReport {
    /// The losses.
    pub losses: BalanceLosses,
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
    /// E of each layer.
    experts: Vec<usize>,
    /// The most of them: what a layer's statistics have room for.
    most: usize,
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
    /// Those of [`BalanceSpec`], cv² of a noisy gate's importance and load, Σ lse².
    losses: Slot<B, f64>,
}

const NOISY_IMPORTANCE: usize = BalanceSpec::LOSSES;
const NOISY_LOAD: usize = NOISY_IMPORTANCE + 1;
const Z: usize = NOISY_LOAD + 1;
const SUMS: usize = Z + 1;

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

    /// Room for MoE layers of `experts` experts each and passes of at most `max_sequences` sequences.
    pub fn new(
        device: &B,
        config: &RouterConfig,
        experts: Vec<usize>,
        max_sequences: usize,
    ) -> Result<Self, DeviceError> {
        let max_groups = if config.balance_scope == BalanceScope::Sequence { max_sequences.max(1) } else { 1 };
        let (layers, most) = (experts.len(), experts.iter().copied().max().unwrap_or(0));
        let len = layers * max_groups * most;
        Ok(Self {
            config: config.clone(),
            layers,
            most,
            max_groups,
            groups: 1,
            counts: Slot::sized(device, "balance counts", len)?,
            prob_sums: Slot::sized(device, "balance probabilities", len)?,
            step_counts: Slot::sized(device, "balance counts of a step", len)?,
            step_probs: Slot::sized(device, "balance probabilities of a step", len)?,
            step_dropped: Slot::sized(device, "dropped choices of a step", layers * most)?,
            step_entropy: Slot::sized(device, "gate entropies of a step", layers)?,
            coefficients: Slot::sized(device, "balance coefficients", len)?,
            losses: Slot::sized(device, "balance losses", SUMS)?,
            experts,
        })
    }

    fn len(&self) -> usize {
        self.layers * self.groups * self.most
    }

    /// Whether all layers have as many experts.
    fn is_even(&self) -> bool {
        self.experts.iter().all(|&experts| experts == self.most)
    }

    /// The range of MoE layer `index` in `[L, G, E]` statistics; what a layer of fewer experts leaves is behind it.
    fn layer_range(&self, index: usize) -> Range<usize> {
        let start = index * self.groups * self.most;
        start..start + self.groups * self.experts[index]
    }

    /// Whether [`BalanceReport::loads`] are sums over all ranks.
    pub fn loads_are_global(&self) -> bool {
        self.config.balance_scope == BalanceScope::Global
    }

    /// Forgets the last step.
    pub fn begin_step(&mut self, device: &B) {
        device.fill(self.losses.view_mut(SUMS), 0.0);
        let len = self.layers * self.max_groups * self.most;
        if !self.is_even() {
            // What no expert writes is summed over ranks all the same.
            device.fill(self.counts.view_mut(len), 0.0);
            device.fill(self.prob_sums.view_mut(len), 0.0);
        }
        device.fill(self.step_counts.view_mut(len), 0.0);
        device.fill(self.step_probs.view_mut(len), 0.0);
        device.fill(self.step_dropped.view_mut(self.layers * self.most), 0.0);
        device.fill(self.step_entropy.view_mut(self.layers), 0.0);
    }

    /// Sets the number of groups to the pass's.
    pub fn begin_pass(&mut self, pass: RoutePass<'_>) {
        self.groups = pass.groups(self.config.balance_scope).1;
        assert!(self.groups <= self.max_groups, "{} sequences in a pass of {}", self.groups, self.max_groups);
    }

    /// Where MoE layer `index` puts its `counts` and `prob_sums`.
    pub fn layer_mut(&mut self, index: usize) -> (ViewMut<'_, B, f32>, ViewMut<'_, B, f32>) {
        let (range, len) = (self.layer_range(index), self.len());
        (self.counts.view_mut(len).slice(range.clone()), self.prob_sums.view_mut(len).slice(range))
    }

    /// Factors of the losses in the objective. A noisy gate's importance is that of its weights, which is formed apart.
    fn factors(&self) -> BalanceFactors {
        let c = &self.config;
        BalanceFactors {
            switch: c.balance_coefficient,
            devices: c.device_coefficient,
            importance: if c.is_noisy() { 0.0 } else { c.importance() },
            difference: c.difference_coefficient,
            entropy: c.batch_entropy_coefficient,
        }
    }

    /// Forms the balance losses of all layers and their coefficients, once every layer has left its statistics.
    pub fn form<C: Communicator<B>>(
        &mut self,
        device: &B,
        world: &C,
        pass: RoutePass<'_>,
        share: BatchShare,
    ) -> Result<(), PassError> {
        let len = self.len();
        if self.loads_are_global() {
            device.wait(&world.all_reduce(device, self.counts.view_mut(len), ReduceOp::Sum)?);
        }
        for layer in 0..self.layers {
            let start = layer * self.max_groups * self.most;
            let range = self.layer_range(layer);
            for (of_pass, of_step) in [(&self.counts, &mut self.step_counts), (&self.prob_sums, &mut self.step_probs)] {
                let total = of_step.view_mut(start + range.len()).slice(start..start + range.len());
                device.add_f32(of_pass.view(len).slice(range.clone()), total);
            }
        }
        let factors = self.factors();
        // A loss that is no sum over tokens needs the probabilities of all of them; then all ranks form the same losses.
        let of_means = factors.importance + factors.difference + factors.entropy > 0.0;
        let mut loss_scale = 1.0;
        if self.loads_are_global() && of_means {
            device.wait(&world.all_reduce(device, self.prob_sums.view_mut(len), ReduceOp::Sum)?);
            loss_scale = 1.0 / world.size() as f32;
        }
        let counted = match self.config.balance_scope {
            BalanceScope::Sequence => pass.sequence_length,
            BalanceScope::MicroBatch => pass.tokens,
            BalanceScope::Global => share.tokens_so_far,
        };
        let pooled_layers = if self.config.balance_pooled { self.layers } else { 1 };
        let one_over = |n: usize| if n == 0 { 0.0 } else { 1.0 / (n * pooled_layers) as f32 };
        let spec = |layers: usize, experts: usize| BalanceSpec {
            layers,
            groups: self.groups,
            experts,
            pooled: self.config.balance_pooled,
            f_scale: one_over(counted),
            p_scale: one_over(share.global_tokens),
            loss_scale,
            factors,
            devices: self.config.device_groups,
            least_entropy: self.config.batch_entropy_target.unwrap_or((experts as f32).ln()),
        };
        let specs: Vec<_> = if self.is_even() {
            vec![(spec(self.layers, self.most), 0..len)]
        } else {
            (0..self.layers).map(|layer| (spec(1, self.experts[layer]), self.layer_range(layer))).collect()
        };
        for (spec, range) in specs {
            let counts = if self.loads_are_global() { self.step_counts.view(len) } else { self.counts.view(len) };
            let (counts, probs) = (counts.slice(range.clone()), self.prob_sums.view(len).slice(range.clone()));
            let losses = self.losses.view_mut(SUMS).slice(0..BalanceSpec::LOSSES);
            device.balance_loss(spec, counts, probs, losses, self.coefficients.view_mut(len).slice(range));
        }
        Ok(())
    }

    /// Forms the importance and load losses of one noisy gate and their gradients.
    pub fn form_noisy<C: Communicator<B>>(
        &mut self,
        device: &B,
        world: &C,
        (index, statistics): (usize, &mut RouterStatistics<B>),
        pass: RoutePass<'_>,
        share: BatchShare,
    ) -> Result<(), PassError> {
        let e = self.experts[index];
        let (tokens, ranks) = if self.loads_are_global() {
            device.wait(&world.all_reduce(device, statistics.importance.view_mut(e), ReduceOp::Sum)?);
            device.wait(&world.all_reduce(device, statistics.load.view_mut(e), ReduceOp::Sum)?);
            (share.pass_tokens, world.size() as f32)
        } else {
            (pass.tokens, 1.0)
        };
        // Ranks that form the same losses report a part each, and have the whole gradient.
        let weight = tokens as f32 / (share.global_tokens.max(1) as f32 * ranks);
        let RouterStatistics { importance, dimportance, load, dload, .. } = statistics;
        for (place, coefficient, x, dx) in [
            (NOISY_IMPORTANCE, self.config.importance(), importance, dimportance),
            (NOISY_LOAD, self.config.load_coefficient, load, dload),
        ] {
            let loss = self.losses.view_mut(SUMS).slice(place..place + 1);
            device.cv_squared(weight, coefficient * ranks, x.view(e), loss, dx.view_mut(e));
        }
        Ok(())
    }

    /// Adds what MoE layer `index` counted by itself to the report: Σ lse², entropy, dropped choices.
    pub fn add(&mut self, device: &B, index: usize, statistics: &RouterStatistics<B>) {
        let sums = statistics.sums.view(2);
        device.sum(sums.slice(0..1), self.losses.view_mut(SUMS).slice(Z..Z + 1));
        device.sum(sums.slice(1..2), self.step_entropy.view_mut(self.layers).slice(index..index + 1));
        let (dropped, e) = (self.step_dropped.view_mut(self.layers * self.most), self.experts[index]);
        let start = index * self.most;
        device.add_f32(statistics.dropped.view(e), dropped.slice(start..start + e));
    }

    /// `[G, E]` of MoE layer `index`: the balance losses' gradient; None: they are switched off.
    pub fn coefficients(&self, index: usize) -> Option<View<'_, B, f32>> {
        (self.factors() != BalanceFactors::default())
            .then(|| self.coefficients.view(self.len()).slice(self.layer_range(index)))
    }

    /// Factors of the tokens' own losses in the objective: means over the global batch.
    pub fn token_losses(&self, share: BatchShare) -> TokenLosses {
        let mean = |coefficient: f32| coefficient / share.global_tokens.max(1) as f32;
        TokenLosses { z_scale: mean(self.config.z_coefficient), entropy_scale: mean(self.config.entropy_coefficient) }
    }

    /// Reads the step's sums back.
    pub fn report(&self, device: &B) -> Result<BalanceReport, DeviceError> {
        if self.layers == 0 {
            return Ok(BalanceReport::default());
        }
        let mut losses = [0.0; SUMS];
        device.read_to_host(self.losses.view(SUMS), &mut losses)?;
        let mut dropped = vec![0.0; self.layers * self.most];
        device.read_to_host(self.step_dropped.view(dropped.len()), &mut dropped)?;
        let mut entropy = vec![0.0; self.layers];
        device.read_to_host(self.step_entropy.view(self.layers), &mut entropy)?;
        let reported_layers = if self.config.balance_pooled { 1 } else { self.layers.max(1) } as f64;
        let noisy = self.config.is_noisy();
        // Those of a noisy gate are never pooled.
        let [of_noisy_importance, load] = [NOISY_IMPORTANCE, NOISY_LOAD].map(|at| losses[at] / self.layers as f64);
        let [balance, device_loss, importance, difference, batch_entropy] =
            [0, 1, 2, 3, 4].map(|at| losses[at] / reported_layers);
        let importance = if noisy { of_noisy_importance } else { importance };
        let formed = BalanceLosses { balance, device: device_loss, importance, load, difference, batch_entropy };
        Ok(BalanceReport {
            losses: formed,
            z_sum: losses[Z],
            loads: self.over_groups(device, &self.step_counts)?,
            mass: self.over_groups(device, &self.step_probs)?,
            dropped: dropped.into_iter().map(f64::from).collect(),
            entropy,
        })
    }

    /// `[L, E]` of `[L, max_groups, E]`, with zeros for experts that a layer does not have.
    fn over_groups(&self, device: &B, sums: &Slot<B, f32>) -> Result<Vec<f64>, DeviceError> {
        let mut all = vec![0.0f32; self.layers * self.max_groups * self.most];
        device.read_to_host(sums.view(all.len()), &mut all)?;
        let mut totals = vec![0.0; self.layers * self.most];
        let layers = all.chunks_exact(self.max_groups * self.most).zip(totals.chunks_exact_mut(self.most));
        for ((groups, totals), &experts) in layers.zip(&self.experts) {
            for group in groups[..self.max_groups * experts].chunks_exact(experts) {
                totals.iter_mut().zip(group).for_each(|(total, &sum)| *total += f64::from(sum));
            }
        }
        Ok(totals)
    }
}
