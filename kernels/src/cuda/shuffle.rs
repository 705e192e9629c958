//! The shuffle's plans on the device: kernels of `shuffle.cu`.
//!
//! Owns how choices are cut into stretches, one a block, and the checks of shapes. No count is read by the host.

use super::launch::{Grid, launch};
use super::shape::holds;
use super::{Cuda, CudaAct, pointer, pointer_mut};
use crate::{ExpandPlan, ShuffleDims, ShufflePlan, View};

/// Blocks at most: each sums the counts of all of them.
const MOST_BLOCKS: usize = 256;
/// Tokens that a block of the shuffle's plan places at once, and its threads.
const TILE_TOKENS: usize = 64;
const PLAN_THREADS: u32 = 256;
/// Slots that a block of the expansion places at once: one a thread.
const TILE_SLOTS: usize = 1024;
/// What the kernels' tables hold.
const MOST_RANKS: usize = 64;
const MOST_EXPERTS: usize = crate::GateDims::MOST_ON_GPUS.0;
const MOST_CHOICES: usize = crate::GateDims::MOST_ON_GPUS.1;

/// Items of a block and blocks, at least one block: it writes the totals.
fn stretches(items: usize, tile: usize) -> (usize, usize) {
    let stretch = items.div_ceil(MOST_BLOCKS).next_multiple_of(tile).max(tile);
    (stretch, items.div_ceil(stretch).max(1))
}

fn check(dims: ShuffleDims) {
    let ShuffleDims { top_k, experts, ranks, .. } = dims;
    assert!(
        ranks > 0 && top_k > 0 && experts > 0 && experts.is_multiple_of(ranks),
        "{experts} experts on {ranks} ranks, {top_k} a token"
    );
    assert!(ranks <= MOST_RANKS, "{ranks} ranks of an expert group, at most {MOST_RANKS}");
    assert!(top_k <= MOST_CHOICES, "{top_k} choices a token, at most {MOST_CHOICES}");
    assert!(dims.local_experts() <= MOST_EXPERTS, "{} experts on a rank, at most {MOST_EXPERTS}", dims.local_experts());
}

/// See [`crate::ExpertOps::shuffle_plan`].
pub(super) fn plan<A: CudaAct>(
    queue: &Cuda<A>,
    dims: ShuffleDims,
    ids: View<'_, Cuda<A>, i32>,
    weights: View<'_, Cuda<A>, f32>,
    plan: ShufflePlan<'_, Cuda<A>>,
) {
    check(dims);
    let ShuffleDims { tokens, top_k, experts, ranks } = dims;
    let bound = tokens * dims.rows_per_token();
    assert_eq!((ids.len(), weights.len()), (tokens * top_k, tokens * top_k), "ids and weights of {dims:?}");
    assert_eq!((plan.send_counts.len(), plan.token_rows.len()), (2 * ranks, bound), "outputs for {dims:?}");
    holds("row_token", plan.row_token.len(), bound);
    holds("row_experts", plan.row_experts.len(), bound * top_k);
    holds("row_choice", plan.row_choice.len(), bound * top_k);
    holds("row_weights", plan.row_weights.len(), bound * top_k);
    holds("rows", plan.rows.len(), 1);
    let (stretch, blocks) = stretches(tokens, TILE_TOKENS);
    let Some(scratch) = queue.scratch(blocks * 2 * ranks * size_of::<i32>()) else { return };
    let (grid, counts, ids) = (Grid::new(blocks, PLAN_THREADS), scratch.at(0), pointer(ids));
    let [tokens, top_k, experts, ranks, stretch] = [tokens, top_k, experts, ranks, stretch].map(|n| n as i32);
    launch!(queue, "shuffle_count", grid; tokens, top_k, experts, ranks, stretch, ids, counts);
    launch!(
        queue, "shuffle_place", grid;
        tokens, top_k, experts, ranks, stretch, ids, pointer(weights), counts,
        pointer_mut(plan.send_counts), pointer_mut(plan.row_token), pointer_mut(plan.row_experts),
        pointer_mut(plan.row_choice), pointer_mut(plan.row_weights), pointer_mut(plan.token_rows), pointer_mut(plan.rows)
    );
}

/// See [`crate::ExpertOps::expand_plan`]. As many rows may arrive as `row_experts` and the slots have room for.
pub(super) fn expand<A: CudaAct>(
    queue: &Cuda<A>,
    dims: ShuffleDims,
    recv_counts: View<'_, Cuda<A>, i32>,
    row_experts: View<'_, Cuda<A>, i32>,
    plan: ExpandPlan<'_, Cuda<A>>,
) {
    check(dims);
    let (top_k, experts) = (dims.top_k, dims.local_experts());
    assert_eq!((recv_counts.len(), plan.offsets.len()), (dims.ranks, experts + 1), "counts and offsets of {dims:?}");
    holds("rows", plan.rows.len(), 1);
    let bound = row_experts.len().min(plan.slots.len()) / top_k;
    let room = plan.source.len().min(plan.origin.len());
    let (stretch, blocks) = stretches(bound * top_k, TILE_SLOTS);
    let Some(scratch) = queue.scratch(blocks * experts * size_of::<i32>()) else { return };
    let (grid, counts) = (Grid::new(blocks, TILE_SLOTS as u32), scratch.at(0));
    let (recv_counts, row_experts) = (pointer(recv_counts), pointer(row_experts));
    let [bound, room, top_k, ranks, experts, stretch] =
        [bound, room, top_k, dims.ranks, experts, stretch].map(|n| n as i32);
    launch!(
        queue, "expand_count", grid;
        bound, top_k, ranks, experts, stretch, recv_counts, row_experts, pointer_mut(plan.rows), counts
    );
    launch!(
        queue, "expand_place", grid;
        bound, room, top_k, ranks, experts, stretch, recv_counts, row_experts, counts,
        pointer_mut(plan.offsets), pointer_mut(plan.slots), pointer_mut(plan.source), pointer_mut(plan.origin)
    );
}
