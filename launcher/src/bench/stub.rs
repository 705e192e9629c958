//! Communication without its cost: what a layer takes with it, less what it takes with this, is what is exposed of it.

use std::ops::Range;

use moe_kernels::{Backend, Device, Element, View, ViewMut};
use moe_runtime::collectives::{
    Berth, CollectiveError, Communicator, Context, Groups, Landing, Push, ReduceOp, Reducible,
};
use moe_runtime::topology::Rank;

/// A group whose exchanges are copies on this rank's device, of the sizes that the group would exchange: every other rank is taken to be
/// like this one, so that what "comes" from it is what this one sends to itself.
pub(super) struct Stubbed<'a, C>(&'a C);

impl<'a, C> Stubbed<'a, C> {
    /// The same groups, stubbed.
    pub(super) fn groups(groups: &'a Groups<C>) -> Groups<Self> {
        Groups { world: Self(&groups.world), expert: Self(&groups.expert), replica: Self(&groups.replica) }
    }
}

type Result<T> = std::result::Result<T, CollectiveError>;

/// Berths into which each rank stores its own rows.
struct Rehearsed<B: Backend>(Box<dyn Landing<B>>);

impl<B: Backend> Landing<B> for Rehearsed<B> {
    fn push(&self, queue: &B, push: &Push<'_, B>) -> Result<B::Event> {
        self.0.rehearse(queue, push)
    }

    fn rehearse(&self, queue: &B, push: &Push<'_, B>) -> Result<B::Event> {
        self.0.rehearse(queue, push)
    }
}

impl<D: Device, C: Communicator<D>> Communicator<D> for Stubbed<'_, C> {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn members(&self) -> &[Rank] {
        self.0.members()
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn context(&self) -> &Context {
        self.0.context()
    }

    fn all_to_all<T: Element>(&self, queue: &D, send: View<'_, D, T>, mut recv: ViewMut<'_, D, T>) -> Result<D::Event> {
        let block = send.len() / self.size();
        let own = send.slice(self.rank() * block..(self.rank() + 1) * block);
        for rank in 0..self.size() {
            queue.copy(own, recv.reborrow().slice(rank * block..(rank + 1) * block));
        }
        Ok(queue.record())
    }

    fn all_to_all_v<T: Element>(
        &self,
        queue: &D,
        width: usize,
        (send, send_rows): (View<'_, D, T>, &[Range<usize>]),
        (mut recv, recv_rows): (ViewMut<'_, D, T>, &[Range<usize>]),
    ) -> Result<D::Event> {
        let own = &send_rows[self.rank()];
        for rows in recv_rows {
            // On the way home ranges differ by the few rows by which routing is uneven.
            let len = own.len().min(rows.len()) * width;
            let from = send.slice(own.start * width..own.start * width + len);
            queue.copy(from, recv.reborrow().slice(rows.start * width..rows.start * width + len));
        }
        Ok(queue.record())
    }

    fn all_reduce<T: Reducible>(&self, queue: &D, _: ViewMut<'_, D, T>, _: ReduceOp) -> Result<D::Event> {
        Ok(queue.record())
    }

    fn reduce_scatter<T: Reducible>(
        &self,
        queue: &D,
        send: View<'_, D, T>,
        recv: ViewMut<'_, D, T>,
        _: ReduceOp,
    ) -> Result<D::Event> {
        let block = recv.len();
        queue.copy(send.slice(self.rank() * block..(self.rank() + 1) * block), recv);
        Ok(queue.record())
    }

    fn all_gather<T: Element>(&self, queue: &D, send: View<'_, D, T>, mut recv: ViewMut<'_, D, T>) -> Result<D::Event> {
        let block = send.len();
        for rank in 0..self.size() {
            queue.copy(send, recv.reborrow().slice(rank * block..(rank + 1) * block));
        }
        Ok(queue.record())
    }

    fn broadcast<T: Element>(&self, queue: &D, _: ViewMut<'_, D, T>, _: usize) -> Result<D::Event> {
        Ok(queue.record())
    }

    fn may_land(&self) -> bool {
        self.0.may_land()
    }

    fn landing(&self, queue: &D, berth: &Berth<'_, D>) -> Result<Option<Box<dyn Landing<D>>>>
    where
        D: Backend,
    {
        let landing = self.0.landing(queue, berth)?;
        Ok(landing.map(|landing| Box::new(Rehearsed(landing)) as Box<dyn Landing<D>>))
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![mine.to_vec(); self.size()])
    }

    fn broadcast_bytes(&self, _: &mut Vec<u8>, _: usize) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.0.barrier()
    }

    fn sent_bytes(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn staging_bytes(&self) -> u64 {
        0
    }

    fn split(&self, _: &str, _: usize, _: usize) -> Result<Self> {
        Ok(Self(self.0))
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::Cpu;
    use moe_runtime::collectives::{consecutive, local};
    use moe_runtime::model::{ModelConfig, SingleMoe};
    use moe_runtime::routing::RouterConfig;
    use moe_runtime::topology::Grid;

    use super::*;

    #[test]
    fn what_comes_from_another_rank_is_what_this_one_sends_to_itself() {
        local::run(2, |world| {
            let me = Communicator::<Cpu>::rank(&world);
            let stubbed = Stubbed(&world);
            let (send, mut recv) = (vec![1.0_f32, 2.0, 2.0, 3.0], vec![0.0; 4]);
            let rows = |counts: [usize; 2]| consecutive(counts).collect::<Vec<_>>();
            let own = send[rows([1, 3])[me].start];
            let outgoing = (View::of(&send), &*rows([1, 3]));
            stubbed.all_to_all_v(&Cpu, 1, outgoing, (ViewMut::of(&mut recv), &rows([1, 1]))).unwrap();
            assert_eq!(recv, [own, own, 0.0, 0.0]);
            assert_eq!(Communicator::<Cpu>::sent_bytes(&world), []);
        });
    }

    #[test]
    fn a_layer_runs_through_it_without_sending_a_byte() {
        let (config, tokens) = (ModelConfig::default(), 40);
        local::run(2, |world| {
            let grid = Grid::new(2, 2, config.experts).unwrap();
            let rank = Rank(Communicator::<Cpu>::rank(&world));
            let groups = Groups::of_grid::<Cpu>(world, &grid).unwrap();
            let layer = SingleMoe::new(Cpu, &config, &RouterConfig::default(), (&grid, rank), (tokens, 2, true));
            let mut layer = layer.unwrap().unwrap();
            let n = tokens * config.hidden_size;
            let x: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect();
            let (mut out, mut dx) = (vec![f32::NAN; n], vec![f32::NAN; n]);
            let stubbed = Stubbed::groups(&groups);
            layer.forward(&stubbed, (View::of(&x), ViewMut::of(&mut out))).unwrap();
            layer.backward(&stubbed, View::of(&x), (View::of(&x), ViewMut::of(&mut dx))).unwrap();
            assert!(out.iter().chain(&dx).all(|value| value.is_finite()));
            let sent = Communicator::<Cpu>::sent_bytes(&groups.expert);
            assert!(sent.is_empty(), "{sent:?}");
            layer.forward(&groups, (View::of(&x), ViewMut::of(&mut out))).unwrap();
            assert!(!Communicator::<Cpu>::sent_bytes(&groups.expert).is_empty());
        });
    }
}
