//! The EP×DP grid: which rank stands where, who belongs to which group, and which experts live on it.
//!
//! Owns arithmetic on sizes and ranks, and the refusal of sizes that do not fit. It never talks to a rank, reads a variable or
//! knows what an expert computes.
//!
//! Letters: E experts, EP expert-parallel size, DP data-parallel size, W = EP·DP world size. `rank = dp · EP + ep`, so that the
//! ranks of one expert group are neighbours and lie inside one node where EP allows it.

use std::fmt;
use std::ops::Range;

/// A rank of the world, 0 ≤ rank < W.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(pub usize);

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An expert of a layer, 0 ≤ expert < E, the same number on every rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId(pub usize);

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Sizes that form no grid. `nearest` holds the next legal expert-parallel sizes below and above the one asked for: those that
/// divide both the world and the experts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// A world without ranks.
    #[error("a world needs at least one rank")]
    NoRanks,
    /// EP of zero.
    #[error("the expert-parallel size is 0; nearest sizes that work: {nearest:?}")]
    ZeroExpertParallel {
        /// Legal sizes.
        nearest: Vec<usize>,
    },
    /// EP does not divide W.
    #[error(
        "{world} ranks cannot form expert groups of {ep} ranks each; nearest expert-parallel sizes that work: {nearest:?}"
    )]
    WorldNotDivisible {
        /// W.
        world: usize,
        /// EP as asked for.
        ep: usize,
        /// Legal sizes.
        nearest: Vec<usize>,
    },
    /// EP does not divide E.
    #[error(
        "{experts} experts cannot be shared evenly by {ep} expert-parallel ranks; nearest sizes that work: {nearest:?}"
    )]
    ExpertsNotDivisible {
        /// E.
        experts: usize,
        /// EP as asked for.
        ep: usize,
        /// Legal sizes.
        nearest: Vec<usize>,
    },
    /// EP above one for a model that has no experts.
    #[error(
        "a model without experts has nothing to share among {ep} expert-parallel ranks; nearest sizes that work: {nearest:?}"
    )]
    NoExperts {
        /// EP as asked for.
        ep: usize,
        /// Legal sizes.
        nearest: Vec<usize>,
    },
}

impl TopologyError {
    /// The legal expert-parallel sizes next to the one that was asked for.
    pub fn nearest(&self) -> &[usize] {
        match self {
            Self::NoRanks => &[],
            Self::ZeroExpertParallel { nearest }
            | Self::WorldNotDivisible { nearest, .. }
            | Self::ExpertsNotDivisible { nearest, .. }
            | Self::NoExperts { nearest, .. } => nearest,
        }
    }
}

/// Where a rank stands in the grid: `rank = dp * EP + ep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Coordinate {
    /// Which expert group, 0 ≤ dp < DP.
    pub dp: usize,
    /// Which place in the expert group, 0 ≤ ep < EP.
    pub ep: usize,
}

/// A legal EP×DP grid over W ranks and E experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    ep: usize,
    dp: usize,
    experts: usize,
}

impl Grid {
    /// The grid of `world` ranks in expert groups of `ep`, for layers of `experts` experts (0: a dense model, EP = 1).
    ///
    /// # Errors
    /// Every combination that does not divide evenly, with the nearest that does.
    pub fn new(world: usize, ep: usize, experts: usize) -> Result<Self, TopologyError> {
        if world == 0 {
            return Err(TopologyError::NoRanks);
        }
        let nearest = || nearest_legal(world, experts, ep);
        match ep {
            0 => Err(TopologyError::ZeroExpertParallel { nearest: nearest() }),
            _ if !world.is_multiple_of(ep) => Err(TopologyError::WorldNotDivisible { world, ep, nearest: nearest() }),
            2.. if experts == 0 => Err(TopologyError::NoExperts { ep, nearest: nearest() }),
            _ if !experts.is_multiple_of(ep) => {
                Err(TopologyError::ExpertsNotDivisible { experts, ep, nearest: nearest() })
            }
            _ => Ok(Self { ep, dp: world / ep, experts }),
        }
    }

    /// The grid with the largest EP that is legal: the largest divisor of the world size that divides the number of experts.
    ///
    /// # Errors
    /// [`TopologyError::NoRanks`] only; EP = 1 always fits.
    pub fn automatic(world: usize, experts: usize) -> Result<Self, TopologyError> {
        Self::new(world, legal_sizes(world, experts).last().unwrap_or(1), experts)
    }

    /// W.
    pub fn world(&self) -> usize {
        self.ep * self.dp
    }

    /// EP.
    pub fn ep(&self) -> usize {
        self.ep
    }

    /// DP.
    pub fn dp(&self) -> usize {
        self.dp
    }

    /// E.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// E_local = E / EP.
    pub fn experts_per_rank(&self) -> usize {
        self.experts / self.ep
    }

    /// Where `rank` stands. Panics if the world has no such rank.
    pub fn coordinate(&self, rank: Rank) -> Coordinate {
        assert!(rank.0 < self.world(), "rank {rank} of a world of {}", self.world());
        Coordinate { dp: rank.0 / self.ep, ep: rank.0 % self.ep }
    }

    /// The rank at `at`. Panics outside the grid.
    pub fn rank_at(&self, at: Coordinate) -> Rank {
        assert!(at.ep < self.ep && at.dp < self.dp, "{at:?} in a grid of EP {} and DP {}", self.ep, self.dp);
        Rank(at.dp * self.ep + at.ep)
    }

    /// All ranks, ascending.
    pub fn all_ranks(&self) -> Vec<Rank> {
        (0..self.world()).map(Rank).collect()
    }

    /// The ranks that share one set of experts with `rank`: same dp, EP of them, ascending.
    pub fn expert_group(&self, rank: Rank) -> Vec<Rank> {
        let dp = self.coordinate(rank).dp;
        (0..self.ep).map(|ep| self.rank_at(Coordinate { dp, ep })).collect()
    }

    /// The ranks that hold the same experts as `rank`: same ep, DP of them, ascending.
    pub fn replica_group(&self, rank: Rank) -> Vec<Rank> {
        let ep = self.coordinate(rank).ep;
        (0..self.dp).map(|dp| self.rank_at(Coordinate { dp, ep })).collect()
    }

    /// The rank that holds `expert` in the expert group of `rank`. Panics if there is no such expert or rank.
    pub fn home_of(&self, expert: ExpertId, rank: Rank) -> Rank {
        assert!(expert.0 < self.experts, "expert {expert} of {}", self.experts);
        self.rank_at(Coordinate { ep: expert.0 / self.experts_per_rank(), ..self.coordinate(rank) })
    }

    /// The experts that live on `rank`: E_local consecutive ones, empty for a dense model.
    pub fn local_experts(&self, rank: Rank) -> Range<usize> {
        let first = self.coordinate(rank).ep * self.experts_per_rank();
        first..first + self.experts_per_rank()
    }
}

/// The part of `0..total` that falls to `index` of `parts`: contiguous, in order, sizes differing by at most one with the larger
/// parts first. Splits a global batch over ranks and a buffer over the ranks that reduce it.
///
/// Panics unless `index < parts`.
pub fn share(total: usize, parts: usize, index: usize) -> Range<usize> {
    assert!(index < parts, "part {index} of {parts}");
    let (size, larger) = (total / parts, total % parts);
    let start = index * size + index.min(larger);
    start..start + size + usize::from(index < larger)
}

/// Expert-parallel sizes that fit, ascending: the divisors of `world` that divide `experts`; 1 alone for a dense model.
fn legal_sizes(world: usize, experts: usize) -> impl Iterator<Item = usize> {
    let most = if experts == 0 { 1 } else { world.min(experts) };
    (1..=most).filter(move |ep| world.is_multiple_of(*ep) && experts.is_multiple_of(*ep))
}

/// The legal sizes next to `ep`, at most one below and one above.
fn nearest_legal(world: usize, experts: usize, ep: usize) -> Vec<usize> {
    let below = legal_sizes(world, experts).take_while(|legal| *legal < ep).last();
    let above = legal_sizes(world, experts).find(|legal| *legal > ep);
    below.into_iter().chain(above).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn illegal_sizes_are_refused_with_the_nearest_that_work() {
        use TopologyError::*;
        #[rustfmt::skip]
        let table = [
            // world, ep, experts, refusal
            (0, 1, 8, NoRanks),
            (8, 0, 8, ZeroExpertParallel { nearest: vec![1] }),
            (8, 3, 8, WorldNotDivisible { world: 8, ep: 3, nearest: vec![2, 4] }),
            (8, 16, 16, WorldNotDivisible { world: 8, ep: 16, nearest: vec![8] }),
            (7, 3, 6, WorldNotDivisible { world: 7, ep: 3, nearest: vec![1] }),
            (48, 6, 16, ExpertsNotDivisible { experts: 16, ep: 6, nearest: vec![4, 8] }),
            (6, 6, 16, ExpertsNotDivisible { experts: 16, ep: 6, nearest: vec![2] }),
            (8, 8, 4, ExpertsNotDivisible { experts: 4, ep: 8, nearest: vec![4] }),
            (4, 2, 0, NoExperts { ep: 2, nearest: vec![1] }),
        ];
        for (world, ep, experts, refusal) in table {
            assert_eq!(Grid::new(world, ep, experts), Err(refusal), "W={world} EP={ep} E={experts}");
        }
    }

    #[test]
    fn a_refusal_reads_as_a_sentence() {
        let refusal = Grid::new(48, 6, 16).unwrap_err().to_string();
        assert_eq!(
            refusal,
            "16 experts cannot be shared evenly by 6 expert-parallel ranks; nearest sizes that work: [4, 8]"
        );
    }

    #[test]
    fn the_automatic_size_is_the_largest_common_divisor() {
        for (world, experts, ep) in
            [(1, 8, 1), (16, 8, 8), (16, 64, 16), (6, 16, 2), (7, 16, 1), (12, 18, 6), (8, 0, 1)]
        {
            assert_eq!(Grid::automatic(world, experts).map(|grid| grid.ep()), Ok(ep), "W={world} E={experts}");
        }
        assert_eq!(Grid::automatic(0, 8), Err(TopologyError::NoRanks));
    }

    #[test]
    fn groups_of_a_two_by_three_grid() {
        let grid = Grid::new(6, 2, 8).unwrap();
        let ranks = |list: &[usize]| list.iter().copied().map(Rank).collect::<Vec<_>>();
        assert_eq!(grid.coordinate(Rank(5)), Coordinate { dp: 2, ep: 1 });
        assert_eq!(grid.expert_group(Rank(3)), ranks(&[2, 3]));
        assert_eq!(grid.replica_group(Rank(3)), ranks(&[1, 3, 5]));
        assert_eq!(grid.local_experts(Rank(3)), 4..8);
        assert_eq!(grid.home_of(ExpertId(3), Rank(3)), Rank(2));
        assert_eq!(grid.home_of(ExpertId(4), Rank(3)), Rank(3));
    }

    #[test]
    fn a_dense_model_has_no_local_experts() {
        assert_eq!(Grid::automatic(4, 0).unwrap().local_experts(Rank(3)), 0..0);
    }

    proptest! {
        #[test]
        fn every_size_either_forms_a_grid_or_names_sizes_that_do(
            world in 1_usize..200, ep in 0_usize..200, experts in 0_usize..200,
        ) {
            match Grid::new(world, ep, experts) {
                Ok(grid) => prop_assert_eq!((grid.world(), grid.ep() * grid.dp()), (world, world)),
                Err(
                    TopologyError::ZeroExpertParallel { nearest }
                    | TopologyError::WorldNotDivisible { nearest, .. }
                    | TopologyError::ExpertsNotDivisible { nearest, .. }
                    | TopologyError::NoExperts { nearest, .. },
                ) => {
                    prop_assert!(!nearest.is_empty());
                    for legal in nearest {
                        prop_assert!(Grid::new(world, legal, experts).is_ok());
                    }
                }
                Err(TopologyError::NoRanks) => prop_assert!(false, "the world has ranks"),
            }
        }

        #[test]
        fn every_expert_has_one_home_in_each_expert_group(log_ep in 0_u32..5, dp in 1_usize..6, per_rank in 1_usize..5) {
            let ep = 2_usize.pow(log_ep);
            let grid = Grid::new(ep * dp, ep, ep * per_rank).unwrap();
            for rank in grid.all_ranks() {
                prop_assert_eq!(grid.rank_at(grid.coordinate(rank)), rank);
                prop_assert!(grid.expert_group(rank).contains(&rank) && grid.replica_group(rank).contains(&rank));
                for expert in 0..grid.experts() {
                    let home = grid.home_of(ExpertId(expert), rank);
                    prop_assert!(grid.expert_group(rank).contains(&home));
                    prop_assert!(grid.local_experts(home).contains(&expert));
                }
                for twin in grid.replica_group(rank) {
                    prop_assert_eq!(grid.local_experts(twin), grid.local_experts(rank));
                }
            }
        }

        #[test]
        fn shares_cover_everything_once_and_evenly(total in 0_usize..1000, parts in 1_usize..40) {
            let mut next = 0;
            for index in 0..parts {
                let part = share(total, parts, index);
                prop_assert_eq!(part.start, next);
                prop_assert!(part.len() == total / parts || part.len() == total.div_ceil(parts));
                next = part.end;
            }
            prop_assert_eq!(next, total);
        }
    }
}
