//! Communication without its cost: what a layer takes with it, less what it takes with this, is what is exposed of it.

use std::ops::Range;

use moe_kernels::{Device, Element, View, ViewMut};
use moe_runtime::collectives::{CollectiveError, Communicator, Context, Groups, ReduceOp, Reducible};
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

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![mine.to_vec(); self.size()])
    }

    fn broadcast_bytes(&self, _: &mut Vec<u8>, _: usize) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
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
