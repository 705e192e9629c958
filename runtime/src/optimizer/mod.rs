//! AdamW over the flat parameter buffers: moments, decay groups, clipping by the global norm.
//!
//! Owns the moments of the stretches that this rank updates, and the number of updates. It never talks to another rank: it is given
//! the global norm, and what it updates is handed on by `training`.

mod schedule;
mod shard;

use std::ops::Range;

use moe_kernels::{AdamW, Backend, DeviceError, ViewMut};

pub use schedule::Schedule;
pub use shard::{Cut, Shard, Span};

use crate::config::{DecayGroups, OptimizerConfig};
use crate::memory::{Kind, Slot, Tally, bytes_of};
use crate::model::Parameters;
use crate::model::layout::Regions;

/// The optimizer of one rank's parameters.
pub struct Optimizer<B: Backend> {
    config: OptimizerConfig,
    shard: Shard,
    m: B::Buffer<f32>,
    v: B::Buffer<f32>,
    updates: u64,
    /// Stretches of the flat buffer that stay as they are, ascending.
    frozen: Vec<Range<usize>>,
    /// `[2]`: Σ of squared gradients of replicated parameters and of experts.
    squares: Slot<B, f64>,
}

impl<B: Backend> Optimizer<B> {
    /// Zero moments for the stretches of `shard`.
    pub fn new(device: &B, config: &OptimizerConfig, shard: Shard) -> Result<Self, DeviceError> {
        let mut squares = Slot::new(device, "gradient norm")?;
        squares.reserve(device, 2)?;
        let len = shard.state_len();
        let (m, v) = (device.alloc(len, "first moments")?, device.alloc(len, "second moments")?);
        Ok(Self { config: config.clone(), shard, m, v, updates: 0, frozen: Vec::new(), squares })
    }

    /// Leaves these stretches of the flat buffer, ascending and apart, as they are: no norm, no update, no decay.
    pub fn freeze(&mut self, frozen: Vec<Range<usize>>) {
        self.frozen = frozen;
    }

    /// Clears the gradients of what is frozen, before they are summed over ranks.
    pub fn clear_frozen(&self, device: &B, parameters: &mut Parameters<B>) {
        for range in &self.frozen {
            device.fill(parameters.grads_mut().slice(range.clone()), 0.0);
        }
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Which parameters this rank updates.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Optimizer, [bytes_of::<B, f32>(&self.m), bytes_of::<B, f32>(&self.v), self.squares.bytes()]);
    }

    /// First and second moments, in the order of the shard's spans: in the parameters' layout where nothing is sharded.
    pub fn moments(&self) -> (&B::Buffer<f32>, &B::Buffer<f32>) {
        (&self.m, &self.v)
    }

    /// First and second moments, to load.
    pub fn moments_mut(&mut self) -> (&mut B::Buffer<f32>, &mut B::Buffer<f32>) {
        (&mut self.m, &mut self.v)
    }

    /// Sets the number of updates, when moments were loaded.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }

    /// Squared gradient norms `[2]` of the replicated parameters and of experts, of what this rank counts, left on the device: of
    /// all it holds, or where state is sharded of its own blocks, and the tails on the first rank of those that share them.
    pub fn squared_norms(&mut self, device: &B, parameters: &Parameters<B>) -> ViewMut<'_, B, f64> {
        device.fill(self.squares.view_mut(2), 0.0);
        for (index, cut) in [&self.shard.dense, &self.shard.experts].into_iter().enumerate() {
            let tail = if cut.counts_tail() { cut.tail() } else { 0..0 };
            for range in [cut.own(), tail] {
                let sum = self.squares.view_mut(2).slice(index..index + 1);
                device.sum_of_squares(parameters.grads().slice(range), sum);
            }
        }
        self.squares.view_mut(2)
    }

    /// The factor that brings a gradient of norm `norm` under the clipping bound, as PyTorch's `clip_grad_norm_`.
    pub fn clip_factor(&self, norm: f64) -> f64 {
        let bound = self.config.clip_grad_norm;
        if bound > 0.0 { (bound / (norm + 1e-6)).min(1.0) } else { 1.0 }
    }

    /// One update at learning rate `lr` with gradients scaled by `grad_scale`, of this rank's stretches, whose gradients are zero
    /// afterwards.
    pub fn update(&mut self, device: &B, parameters: &mut Parameters<B>, lr: f64, grad_scale: f64) {
        self.updates += 1;
        let settings = AdamW {
            lr,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            eps: self.config.eps,
            weight_decay: 0.0,
            step: self.updates,
            grad_scale,
        };
        for (region, weight_decay) in self.groups(&parameters.layout().regions) {
            let settings = AdamW { weight_decay, ..settings };
            let runs = outside(region, &self.frozen);
            for Span { flat, state } in runs.flat_map(|run| self.shard.spans().map(|span| span.within(&run))) {
                if flat.is_empty() {
                    continue;
                }
                let views = parameters.update_views(flat);
                let m = ViewMut::range(&mut self.m, state.clone());
                let v = ViewMut::range(&mut self.v, state);
                device.adamw(settings, views.grad, m, v, views.master, views.compute);
            }
        }
    }

    /// Regions of the flat buffer with their weight decay.
    fn groups(&self, regions: &Regions) -> [(Range<usize>, f64); 3] {
        let decay = self.config.weight_decay;
        let of_vectors = if self.config.decay == DecayGroups::All { decay } else { 0.0 };
        [
            (regions.replicated.clone(), decay),
            (regions.replicated_vectors.clone(), of_vectors),
            (regions.experts.clone(), self.config.expert_weight_decay.unwrap_or(decay)),
        ]
    }
}

/// The runs of `region` outside the ranges `cut`, which are ascending and apart.
fn outside(region: Range<usize>, cut: &[Range<usize>]) -> impl Iterator<Item = Range<usize>> {
    let mut start = region.start;
    let ends = cut.iter().cloned().chain(std::iter::once(region.end..region.end));
    ends.filter_map(move |cut| {
        let run = start..cut.start.clamp(start, region.end.max(start));
        start = start.max(cut.end);
        (!run.is_empty()).then_some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_outside_are_what_is_left() {
        // Ranges as [start, end].
        type Runs<'a> = &'a [[usize; 2]];
        let ranges = |runs: Runs<'_>| runs.iter().map(|&[start, end]| start..end).collect::<Vec<_>>();
        let table: [([usize; 2], Runs<'_>, Runs<'_>); 6] = [
            ([10, 20], &[], &[[10, 20]]),
            ([10, 20], &[[0, 5], [12, 14], [18, 30]], &[[10, 12], [14, 18]]),
            ([10, 20], &[[5, 12]], &[[12, 20]]),
            ([10, 20], &[[5, 25]], &[]),
            ([10, 20], &[[20, 25], [30, 40]], &[[10, 20]]),
            ([10, 10], &[[0, 5]], &[]),
        ];
        for ([start, end], cut, left) in table {
            assert_eq!(outside(start..end, &ranges(cut)).collect::<Vec<_>>(), ranges(left), "{cut:?}");
        }
    }
}
