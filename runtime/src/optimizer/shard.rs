//! Which part of the optimizer's state a rank holds (ZeRO stage 1, Rajbhandari et al. 2020).
//!
//! Owns the arithmetic of the cut: a run of the flat buffer that several ranks replicate is cut into equal blocks, one a rank,
//! and a tail shorter than the number of ranks that every rank keeps. One rank, or state that is not sharded, is the case of a
//! single block. It holds no numbers and talks to no rank.

use std::ops::Range;

use crate::collectives::Communicator;
use crate::collectives::Groups;
use crate::model::layout::Regions;
use moe_kernels::Device;

/// One run of the flat buffer, cut among the ranks that replicate it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    run: Range<usize>,
    ranks: usize,
    index: usize,
}

impl Cut {
    /// `run` cut among `ranks` ranks, seen by number `index` of them.
    ///
    /// Panics unless `index < ranks`.
    pub fn new(run: Range<usize>, ranks: usize, index: usize) -> Self {
        assert!(index < ranks, "block {index} of {ranks}");
        Self { run, ranks, index }
    }

    /// Whether other ranks hold parts of the state.
    pub fn is_shared(&self) -> bool {
        self.ranks > 1
    }

    /// Elements of a block.
    pub fn block_len(&self) -> usize {
        self.run.len() / self.ranks
    }

    /// All blocks.
    pub fn blocks(&self) -> Range<usize> {
        self.run.start..self.run.start + self.block_len() * self.ranks
    }

    /// This rank's block.
    pub fn own(&self) -> Range<usize> {
        let start = self.run.start + self.index * self.block_len();
        start..start + self.block_len()
    }

    /// What no block holds: fewer elements than ranks, kept by all of them.
    pub fn tail(&self) -> Range<usize> {
        self.blocks().end..self.run.end
    }

    /// Whether this rank is the one that counts the tail where something is counted once.
    pub fn counts_tail(&self) -> bool {
        self.index == 0
    }

    /// The whole run.
    pub fn run(&self) -> Range<usize> {
        self.run.clone()
    }
}

/// The cuts of a rank's flat buffer: replicated tensors over the world, experts over their replica group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Replicated matrices and vectors.
    pub dense: Cut,
    /// This rank's experts.
    pub experts: Cut,
}

/// A stretch of the flat buffer that this rank updates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where its parameters and gradients lie in the flat buffer.
    pub flat: Range<usize>,
    /// Where its moments lie in the state.
    pub state: Range<usize>,
}

impl Shard {
    /// State that every rank holds whole.
    pub fn whole(regions: &Regions) -> Self {
        let (dense, experts) = runs(regions);
        Self { dense: Cut::new(dense, 1, 0), experts: Cut::new(experts, 1, 0) }
    }

    /// State shared out in the groups of this rank.
    pub fn of_groups<D: Device, C: Communicator<D>>(regions: &Regions, groups: &Groups<C>) -> Self {
        let (dense, experts) = runs(regions);
        Self {
            dense: Cut::new(dense, groups.world.size(), groups.world.rank()),
            experts: Cut::new(experts, groups.replica.size(), groups.replica.rank()),
        }
    }

    /// The stretches of this rank, in the order of its state.
    pub fn spans(&self) -> [Span; 4] {
        let mut end = 0;
        [self.dense.own(), self.dense.tail(), self.experts.own(), self.experts.tail()].map(|flat| {
            let start = end;
            end += flat.len();
            Span { flat, state: start..end }
        })
    }

    /// Elements of the state.
    pub fn state_len(&self) -> usize {
        self.spans().map(|span| span.flat.len()).iter().sum()
    }
}

impl Span {
    /// The part of the stretch inside `region` of the flat buffer; empty where they do not meet.
    pub fn within(&self, region: &Range<usize>) -> Span {
        let start = self.flat.start.max(region.start).min(self.flat.end);
        let end = self.flat.end.min(region.end).max(start);
        let state = self.state.start + (start - self.flat.start);
        Span { flat: start..end, state: state..state + (end - start) }
    }
}

fn runs(regions: &Regions) -> (Range<usize>, Range<usize>) {
    (regions.replicated.start..regions.replicated_vectors.end, regions.experts.clone())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_and_tail_cover_a_run_once_and_blocks_are_equal(start in 0_usize..50, len in 0_usize..300, ranks in 1_usize..9) {
            let mut next = start;
            for index in 0..ranks {
                let cut = Cut::new(start..start + len, ranks, index);
                prop_assert_eq!(cut.own().start, next);
                prop_assert_eq!(cut.own().len(), len / ranks);
                prop_assert!(cut.tail().len() < ranks && cut.tail().end == start + len);
                next = cut.own().end;
            }
            prop_assert_eq!(next, Cut::new(start..start + len, ranks, 0).tail().start);
        }
    }

    #[test]
    fn a_span_meets_a_region_in_flat_and_in_state_alike() {
        let span = Span { flat: 10..20, state: 3..13 };
        assert_eq!(span.within(&(0..15)), Span { flat: 10..15, state: 3..8 });
        assert_eq!(span.within(&(15..40)), Span { flat: 15..20, state: 8..13 });
        assert!(span.within(&(0..5)).flat.is_empty() && span.within(&(30..40)).flat.is_empty());
    }

    #[test]
    fn whole_state_has_the_flat_buffers_own_order() {
        let regions = Regions { replicated: 0..64, replicated_vectors: 64..128, experts: 128..192 };
        let shard = Shard::whole(&regions);
        assert_eq!(shard.state_len(), 192);
        assert!(shard.spans().iter().filter(|span| !span.flat.is_empty()).all(|span| span.flat == span.state));
    }
}
