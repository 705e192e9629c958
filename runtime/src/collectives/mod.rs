//! Collectives: what the ranks of a group do together, on device buffers, with bounded waits.
//!
//! Owns the [`Communicator`] trait, the groups of a grid, the CPU's implementation over three transports, [`local`] (threads
//! of one process), `mpi` (processes; cargo feature `mpi`) and [`tcp`] (processes without MPI), and the GPUs' (`nccl`; cargo feature `cuda`). It moves and adds numbers and never knows what they mean: no
//! token, no parameter, no model.
//!
//! Rules that every implementation keeps:
//! - All ranks of a group call the same collectives in the same order with agreeing sizes.
//! - A collective begins after what its queue has been given so far, and returns a point in time: a CPU has come to it by then, a GPU
//!   has not. Its buffers are the collective's until the queue that wants them has waited for that point.
//! - A worker's collectives run one after another, in the order of their calls: who has waited for one has waited for all before it.
//! - How many rows go where is known on the host, since what carries them between GPUs wants it there.
//! - Reductions add in ascending rank order: the same bits on every rank and in every run.
//! - No wait is unbounded. One that ends early says which collective, at which step, and for whom it waited.
//!
//! Letters: W ranks in the group (here of any group, not of the world).

mod algorithms;
mod context;
mod error;
mod exchange;
mod host;
mod landing;
mod launch;
pub mod local;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "cuda")]
pub mod nccl;
mod post;
pub mod tcp;
mod transport;
pub mod volume;

use std::fmt::Display;
use std::ops::Range;

use moe_kernels::{Backend, Device, Element, View, ViewMut};

pub use context::{AbortHandle, Context, DEFAULT_DEADLINE};
pub use error::{CollectiveError, Place};
pub use host::HostCommunicator;
pub use landing::{BERTH_PAGE, Berth, Landing, Push};
pub use launch::{LaunchError, Launcher, LauncherFacts, RankFlags, launcher, rank_facts};

use crate::topology::{Grid, Rank};

/// How values of several ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// The sum, added in ascending rank order. Integers wrap.
    Sum,
    /// The largest; NaN if any is NaN.
    Max,
    /// The smallest; NaN if any is NaN.
    Min,
}

/// An element that ranks can reduce.
pub trait Reducible: Element {
    /// `into[i] = op(into[i], from[i])`, `into` being of the lower ranks. Slices have the same length.
    fn fold(op: ReduceOp, into: &mut [Self], from: &[Self]);
}

fn fold_with<T: Copy>(into: &mut [T], from: &[T], op: impl Fn(T, T) -> T) {
    for (into, from) in into.iter_mut().zip(from) {
        *into = op(*into, *from);
    }
}

macro_rules! reducible_float {
    ($type:ty) => {
        impl Reducible for $type {
            fn fold(op: ReduceOp, into: &mut [Self], from: &[Self]) {
                match op {
                    ReduceOp::Sum => fold_with(into, from, |a, b| a + b),
                    // Unlike `max` and `min`, a comparison that fails keeps the NaN on either side.
                    ReduceOp::Max => fold_with(into, from, |a, b| if b > a || b.is_nan() { b } else { a }),
                    ReduceOp::Min => fold_with(into, from, |a, b| if b < a || b.is_nan() { b } else { a }),
                }
            }
        }
    };
}
reducible_float!(f32);
reducible_float!(f64);

impl Reducible for i32 {
    fn fold(op: ReduceOp, into: &mut [Self], from: &[Self]) {
        match op {
            ReduceOp::Sum => fold_with(into, from, i32::wrapping_add),
            ReduceOp::Max => fold_with(into, from, i32::max),
            ReduceOp::Min => fold_with(into, from, i32::min),
        }
    }
}

/// One group of ranks, as seen by one of them.
///
/// Collectives of a group are called one at a time; groups are independent of each other. Views of lengths that cannot be right
/// (a block that is not a W-th part) are programming errors and panic; whatever comes from data or from peers is an error.
///
/// # Errors
/// Every collective may return any [`CollectiveError`]; the group is of no use after that.
pub trait Communicator<D: Device>: Send + Sync + Sized {
    /// This rank's place in the group, 0 ≤ rank < W. [`Communicator::members`] has its rank in the world.
    fn rank(&self) -> usize;

    /// W, at least 1.
    fn size(&self) -> usize {
        self.members().len()
    }

    /// World ranks of the group, in the group's order.
    fn members(&self) -> &[Rank];

    /// The group's name in messages: "world", "expert", "replica"…
    fn name(&self) -> &str;

    /// The waiting rules, shared by all groups of this worker.
    fn context(&self) -> &Context;

    /// Block i of `send [W, n]` goes to rank i; block j of `recv [W, n]` comes from rank j.
    fn all_to_all<T: Element>(
        &self,
        queue: &D,
        send: View<'_, D, T>,
        recv: ViewMut<'_, D, T>,
    ) -> Result<D::Event, CollectiveError>;

    /// Rows of `width` elements, the buffer that leaves and the one that is filled each with a range `[W]` of rows for each rank: rows
    /// `outgoing.1[i]` go to rank i, and what rank j sends lands in rows `incoming.1[j]`, which must be as many and may not overlap. Ranges
    /// may be empty; other rows are left alone.
    fn all_to_all_v<T: Element>(
        &self,
        queue: &D,
        width: usize,
        outgoing: (View<'_, D, T>, &[Range<usize>]),
        incoming: (ViewMut<'_, D, T>, &[Range<usize>]),
    ) -> Result<D::Event, CollectiveError>;

    /// `buffer` becomes the reduction of all ranks' buffers, the same bits everywhere.
    fn all_reduce<T: Reducible>(
        &self,
        queue: &D,
        buffer: ViewMut<'_, D, T>,
        op: ReduceOp,
    ) -> Result<D::Event, CollectiveError>;

    /// `recv [n]` becomes the reduction of block `rank` of all ranks' `send [W, n]`.
    fn reduce_scatter<T: Reducible>(
        &self,
        queue: &D,
        send: View<'_, D, T>,
        recv: ViewMut<'_, D, T>,
        op: ReduceOp,
    ) -> Result<D::Event, CollectiveError>;

    /// Block i of `recv [W, n]` becomes `send [n]` of rank i.
    fn all_gather<T: Element>(
        &self,
        queue: &D,
        send: View<'_, D, T>,
        recv: ViewMut<'_, D, T>,
    ) -> Result<D::Event, CollectiveError>;

    /// `buffer` becomes that of the group's rank `root`.
    fn broadcast<T: Element>(
        &self,
        queue: &D,
        buffer: ViewMut<'_, D, T>,
        root: usize,
    ) -> Result<D::Event, CollectiveError>;

    /// Whether [`Communicator::landing`] is worth asking for.
    fn may_land(&self) -> bool {
        false
    }

    /// Makes `berth` a place that all ranks of the group store rows into; all of them call this. None, on all of them: they have no such way to
    /// each other, and rows go by [`Communicator::all_to_all_v`].
    fn landing(&self, _queue: &D, _berth: &Berth<'_, D>) -> Result<Option<Box<dyn Landing<D>>>, CollectiveError>
    where
        D: Backend,
    {
        Ok(None)
    }

    /// What each rank brought, of any length, in rank order. Host memory, and finished on return: for manifests and errors.
    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// `bytes` becomes that of the group's rank `root`, whatever length others had. Host memory, and finished on return.
    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<(), CollectiveError>;

    /// Returns once every rank has called it. Says nothing about what is still queued on a device.
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// Whether what collectives have received so far can be trusted. A device's queue runs on after an aborted collective, with partial
    /// data: to be asked after every wait for the queue, before what was read is used.
    fn check(&self) -> Result<(), CollectiveError> {
        self.context().aborted().map_or(Ok(()), Err)
    }

    /// Bytes this rank has sent to the others of the group so far: (collective, bytes), of those that sent any.
    fn sent_bytes(&self) -> Vec<(&'static str, u64)>;

    /// Bytes of messages that this worker keeps for reuse, over all its groups.
    fn staging_bytes(&self) -> u64;

    /// Splits the group: ranks that give the same `color` form a new one, ordered by `key` and then by their rank here. `name`
    /// is what messages call it. A worker splits its groups on one thread, and can make about a thousand in its life.
    fn split(&self, name: &str, color: usize, key: usize) -> Result<Self, CollectiveError>;
}

/// The ranges of `counts` rows that lie one after another, from row 0 on.
pub fn consecutive(counts: impl IntoIterator<Item = usize>) -> impl Iterator<Item = Range<usize>> {
    counts.into_iter().scan(0, |end, count| {
        let start = std::mem::replace(end, *end + count);
        Some(start..*end)
    })
}

/// Whether all `ranges` lie in a buffer of `rows` rows.
fn fit(ranges: &[Range<usize>], rows: usize) -> bool {
    ranges.iter().all(|range| range.start <= range.end && range.end <= rows)
}

/// The groups one rank is a member of in an EP×DP grid.
#[derive(Debug)]
pub struct Groups<C> {
    /// All W ranks.
    pub world: C,
    /// The EP ranks that share one set of experts: same dp.
    pub expert: C,
    /// The DP ranks that hold the same experts: same ep.
    pub replica: C,
}

impl<C> Groups<C> {
    /// Splits the groups of `grid` off `world`, whose ranks must be those of the grid. All ranks call this.
    ///
    /// # Errors
    /// As [`Communicator::split`]. Panics if the world has another size than the grid.
    pub fn of_grid<D: Device>(world: C, grid: &Grid) -> Result<Self, CollectiveError>
    where
        C: Communicator<D>,
    {
        assert_eq!(world.size(), grid.world(), "ranks of the world and of the grid");
        let at = grid.coordinate(Rank(world.rank()));
        let expert = world.split("expert", at.dp, at.ep)?;
        let replica = world.split("replica", at.ep, at.dp)?;
        Ok(Self { world, expert, replica })
    }

    /// Passes `outcome` on; for a failure of this rank alone, the groups will end without waiting for peers who know nothing of it.
    pub(crate) fn end_alone_unless<D: Device, T, E: Display>(&self, outcome: Result<T, E>) -> Result<T, E>
    where
        C: Communicator<D>,
    {
        outcome.inspect_err(|error| self.world.context().abort_handle().abort(None, error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes_do_not_hide_a_nan() {
        for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
            for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
                let mut into = [a];
                f32::fold(op, &mut into, &[b]);
                assert!(into[0].is_nan(), "{op:?} of {a} and {b}");
            }
        }
    }
}
