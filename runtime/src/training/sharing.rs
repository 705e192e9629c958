//! Gradients over ranks before an update, parameters over ranks after it.
//!
//! Owns the two exchanges around the optimizer. Where its state is whole, gradients are summed everywhere and every rank updates
//! everything. Where it is sharded, each rank gets the sums of its own block only, updates it, and the blocks are gathered. Sums are
//! added in rank order either way, so both give the same parameters, but for the rounding of the norm that clips.

use moe_kernels::{Backend, DeviceError, View, ViewMut};

use super::step::StepError;
use crate::collectives::{Communicator, Groups, ReduceOp};
use crate::memory::{Kind, Slot, Tally};
use crate::model::Parameters;
use crate::optimizer::{Cut, Optimizer, Shard};

/// Room for one block of sums and of parameters on its way; empty where nothing is sharded.
pub(super) struct Sharing<B: Backend> {
    device: B,
    sums: Slot<B, f32>,
    block: Slot<B, B::Act>,
}

impl<B: Backend> Sharing<B> {
    /// Empty room.
    pub(super) fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            device: device.clone(),
            sums: Slot::new(device, "sums of a block of gradients")?,
            block: Slot::new(device, "updated block of parameters")?,
        })
    }

    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Communication, [self.sums.bytes(), self.block.bytes()]);
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
        optimizer.clear_frozen(&self.device, parameters);
        self.reduce_run(&groups.world, parameters, &shard.dense)?;
        self.reduce_run(&groups.replica, parameters, &shard.experts)?;
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
            let sums = parameters.grads_mut().slice(cut.run());
            device.wait(&group.all_reduce(device, sums, ReduceOp::Sum)?);
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

/// Elements of a block that are gathered at a time.
const PIECE: usize = 1 << 18;
