//! Gradients over ranks before an update, parameters over ranks after it.
//!
//! Owns the two exchanges around the optimizer. Where its state is whole, gradients are summed everywhere and every rank updates
//! everything; stretches that are complete early may be summed beside the backward pass ([`Sharing::begin`]), to the same bits. Where it is sharded, each rank gets the sums of its own block only, updates it, and the blocks are gathered. Sums are
//! added in rank order either way, so both give the same parameters, but for the rounding of the norm that clips.

use std::ops::Range;

use moe_kernels::{Backend, DeviceError, View, ViewMut};

use super::step::StepError;
use crate::collectives::{CollectiveError, Communicator, Groups, ReduceOp};
use crate::memory::{Kind, Slot, Tally};
use crate::model::Parameters;
use crate::model::layout::Ownership;
use crate::optimizer::{Cut, Optimizer, Shard};

/// Room for one block of sums and of parameters on its way; empty where nothing is sharded.
pub(super) struct Sharing<B: Backend> {
    device: B,
    /// Stretches whose sums are under way or done, and when the last of them is.
    begun: Vec<Range<usize>>,
    last: Option<B::Event>,
    sums: Slot<B, f32>,
    block: Slot<B, B::Act>,
}

impl<B: Backend> Sharing<B> {
    /// Empty room.
    pub(super) fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            device: device.clone(),
            begun: Vec::new(),
            last: None,
            sums: Slot::new(device, "sums of a block of gradients")?,
            block: Slot::new(device, "updated block of parameters")?,
        })
    }

    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Communication, [self.sums.bytes(), self.block.bytes()]);
    }

    /// Begins to sum a stretch of gradients, before the others are complete.
    pub(super) fn begin<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        gradients: ViewMut<'_, B, f32>,
        (range, ownership): (Range<usize>, Ownership),
    ) -> Result<(), CollectiveError> {
        let group = match ownership {
            Ownership::Replicated => &groups.world,
            Ownership::Expert => &groups.replica,
        };
        self.last = Some(group.all_reduce(&self.device, gradients, ReduceOp::Sum)?);
        self.begun.push(range);
        Ok(())
    }

    /// Sums gradients over the ranks that hold each parameter and returns the global norm, each parameter counted once. Where state
    /// is sharded only the sums of this rank's stretches are formed; other gradients are zero afterwards.
    pub(super) fn reduce<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        parameters: &mut Parameters<B>,
        optimizer: &mut Optimizer<B>,
    ) -> Result<f64, StepError> {
        let shard = optimizer.shard().clone();
        if let Some(last) = self.last.take() {
            self.device.wait(&last);
        }
        optimizer.clear_frozen(&self.device, parameters);
        self.reduce_run(&groups.world, parameters, &shard.dense)?;
        self.reduce_run(&groups.replica, parameters, &shard.experts)?;
        self.begun.clear();
        let device = &self.device;
        let mut squares = optimizer.squared_norms(device, parameters);
        if shard.dense.is_shared() {
            // Each block is counted by its one owner.
            device.wait(&groups.world.all_reduce(device, squares.reborrow(), ReduceOp::Sum)?);
        } else {
            // An expert group holds every expert once, so its sum is the norm of all experts, whatever DP is.
            let experts = squares.reborrow().slice(1..2);
            device.wait(&groups.expert.all_reduce(device, experts, ReduceOp::Sum)?);
        }
        let mut host = [0.0; 2];
        device.read_to_host(squares.as_view(), &mut host)?;
        Ok((host[0] + host[1]).sqrt())
    }

    /// Hands every rank the parameters that others have updated.
    pub(super) fn spread<C: Communicator<B>>(
        &mut self,
        groups: &Groups<C>,
        parameters: &mut Parameters<B>,
        shard: &Shard,
    ) -> Result<(), StepError> {
        self.spread_run(&groups.world, parameters, &shard.dense)?;
        self.spread_run(&groups.replica, parameters, &shard.experts)
    }

    fn reduce_run<C: Communicator<B>>(
        &mut self,
        group: &C,
        parameters: &mut Parameters<B>,
        cut: &Cut,
    ) -> Result<(), StepError> {
        let device = &self.device;
        if !cut.is_shared() {
            for rest in gaps(cut.run(), &mut self.begun) {
                let sums = parameters.grads_mut().slice(rest);
                device.wait(&group.all_reduce(device, sums, ReduceOp::Sum)?);
            }
            return Ok(());
        }
        let len = cut.block_len();
        self.sums.reserve(device, len)?;
        let all = parameters.grads().slice(cut.blocks());
        device.wait(&group.reduce_scatter(device, all, self.sums.view_mut(len), ReduceOp::Sum)?);
        // What others will update: the next step's sums begin at zero.
        device.fill(parameters.grads_mut().slice(cut.blocks()), 0.0);
        device.copy(self.sums.view(len), parameters.grads_mut().slice(cut.own()));
        let tail = parameters.grads_mut().slice(cut.tail());
        device.wait(&group.all_reduce(device, tail, ReduceOp::Sum)?);
        Ok(())
    }

    fn spread_run<C: Communicator<B>>(
        &mut self,
        group: &C,
        parameters: &mut Parameters<B>,
        cut: &Cut,
    ) -> Result<(), StepError> {
        if !cut.is_shared() {
            return Ok(());
        }
        let (device, len) = (&self.device, cut.block_len());
        self.block.reserve(device, len)?;
        device.copy(parameters.compute(cut.own()), self.block.view_mut(len));
        let views = parameters.update_views(cut.blocks());
        device.wait(&group.all_gather(device, self.block.view(len), views.compute)?);
        // Masters travel too, so that a checkpoint can be read from any rank's.
        let own = parameters.master(cut.own()).map(|own| device.copy(own, self.sums.view_mut(len)));
        if let (Some(()), Some(masters)) = (own, parameters.update_views(cut.blocks()).master) {
            device.wait(&group.all_gather(device, self.sums.view(len), masters)?);
        }
        Ok(())
    }

    /// `state`, the moments of this rank's spans, in the parameters' layout with those of all other ranks, where `wanted`; an empty
    /// buffer elsewhere. All ranks call this.
    pub(super) fn gather_state<C: Communicator<B>>(
        &self,
        groups: &Groups<C>,
        shard: &Shard,
        state: &B::Buffer<f32>,
        wanted: bool,
    ) -> Result<B::Buffer<f32>, StepError> {
        let device = &self.device;
        let len = shard.experts.run().end;
        let mut whole = device.alloc(if wanted { len } else { 0 }, "gathered moments")?;
        let [dense, dense_tail, experts, experts_tail] = shard.spans();
        let mut gather = |group: &C, cut: &Cut, own: View<'_, B, f32>| self.gather_blocks(group, cut, own, &mut whole);
        gather(&groups.world, &shard.dense, View::range(state, dense.state))?;
        gather(&groups.replica, &shard.experts, View::range(state, experts.state))?;
        for tail in [dense_tail, experts_tail] {
            if wanted {
                device.copy(View::range(state, tail.state), ViewMut::range(&mut whole, tail.flat));
            }
        }
        Ok(whole)
    }

    /// Gathers the blocks of `cut` into `whole`, unless that is empty, a piece at a time so that no rank holds more than it wants.
    fn gather_blocks<C: Communicator<B>>(
        &self,
        group: &C,
        cut: &Cut,
        own: View<'_, B, f32>,
        whole: &mut B::Buffer<f32>,
    ) -> Result<(), StepError> {
        let (device, ranks, block) = (&self.device, group.size(), cut.block_len());
        let mut arrived = device.alloc::<f32>(PIECE.min(block) * ranks, "gathered piece")?;
        for start in (0..block).step_by(PIECE) {
            let len = PIECE.min(block - start);
            let mut all = ViewMut::range(&mut arrived, 0..len * ranks);
            device.wait(&group.all_gather(device, own.slice(start..start + len), all.reborrow())?);
            if moe_kernels::Buffer::is_empty(whole) {
                continue;
            }
            for rank in 0..ranks {
                let to = cut.blocks().start + rank * block + start;
                device.copy(all.as_view().slice(rank * len..(rank + 1) * len), ViewMut::range(whole, to..to + len));
            }
        }
        Ok(())
    }

    /// The reverse, without talking: this rank's spans of moments `whole` in the parameters' layout.
    pub(super) fn take_state(&self, shard: &Shard, whole: &B::Buffer<f32>, state: &mut B::Buffer<f32>) {
        for span in shard.spans() {
            self.device.copy(View::range(whole, span.flat), ViewMut::range(state, span.state));
        }
    }
}

/// What of `run` none of `covered` holds, in ascending order. Each of them lies inside `run` or outside; they are sorted.
pub(crate) fn gaps(run: Range<usize>, covered: &mut [Range<usize>]) -> Vec<Range<usize>> {
    covered.sort_unstable_by_key(|range| range.start);
    let inside = covered.iter().filter(|range| run.start <= range.start && range.end <= run.end);
    let (mut gaps, mut next) = (Vec::new(), run.start);
    for range in inside {
        gaps.push(next..range.start);
        next = range.end;
    }
    gaps.push(next..run.end);
    gaps.retain(|gap| !gap.is_empty());
    gaps
}

/// Elements of a block that are gathered at a time.
const PIECE: usize = 1 << 18;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_is_left_of_a_run() {
        let left = |run, covered: &[(usize, usize)]| {
            let mut covered: Vec<_> = covered.iter().map(|&(start, end)| start..end).collect();
            gaps(run, &mut covered).into_iter().map(|gap| (gap.start, gap.end)).collect::<Vec<_>>()
        };
        assert_eq!(left(10..20, &[]), [(10, 20)]);
        assert_eq!(left(10..20, &[(15, 17), (10, 12), (30, 40), (0, 5)]), [(12, 15), (17, 20)]);
        assert_eq!(left(10..20, &[(12, 20), (10, 12)]), []);
        assert_eq!(left(10..10, &[(10, 10)]), []);
    }
}
