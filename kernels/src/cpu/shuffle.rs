//! The shuffle's plans: which row goes to which rank, and where it is expanded to.
//!
//! Owns index arithmetic over one rank's choices and arrivals: pure functions on slices that keep their counters in the outputs
//! themselves and allocate nothing. It never moves a row and never reads an activation.

#[cfg(test)]
mod tests;

use crate::ShuffleDims;

/// The outputs of [`plan`]: [`crate::ShufflePlan`] as slices.
pub(super) struct Shuffle<'a> {
    /// `[2, W]`.
    pub(super) send_counts: &'a mut [i32],
    /// `[R]`.
    pub(super) row_token: &'a mut [i32],
    /// `[R, k]`.
    pub(super) row_experts: &'a mut [i32],
    /// `[R, k]`.
    pub(super) row_choice: &'a mut [i32],
    /// `[R, k]`.
    pub(super) row_weights: &'a mut [f32],
    /// `[T, rows_per_token]`.
    pub(super) token_rows: &'a mut [i32],
}

/// See [`crate::ExpertOps::shuffle_plan`]; returns R. Two passes over the choices: count rows by rank, then place them.
pub(super) fn plan(dims: ShuffleDims, ids: &[i32], weights: &[f32], plan: &mut Shuffle<'_>) -> usize {
    check_ranks(dims);
    let (k, slots) = (dims.top_k, dims.rows_per_token());
    let bound = dims.tokens * slots;
    assert_eq!((ids.len(), weights.len()), (dims.tokens * k, dims.tokens * k), "ids and weights of {dims:?}");
    assert_eq!((plan.send_counts.len(), plan.token_rows.len()), (2 * dims.ranks, bound), "outputs for {dims:?}");
    assert!(
        plan.row_token.len() >= bound
            && [plan.row_experts.len(), plan.row_choice.len(), plan.row_weights.len()].iter().all(|&l| l >= bound * k),
        "a plan of {dims:?} needs room for {bound} rows"
    );
    plan.send_counts.fill(0);
    for (ids, ranks) in ids.chunks_exact(k).zip(plan.token_rows.chunks_exact_mut(slots)) {
        for &rank in destinations(dims, ids, ranks) {
            plan.send_counts[rank as usize] += 1;
        }
        for &id in ids.iter().filter(|&&id| id >= 0) {
            plan.send_counts[dims.ranks + id as usize / dims.local_experts()] += 1;
        }
    }
    // From here to the end, `send_counts[r]` is where the next row for rank r goes.
    let rows = exclusive_scan(&mut plan.send_counts[..dims.ranks]);
    for t in 0..dims.tokens {
        for slot in t * slots..(t + 1) * slots {
            let rank = plan.token_rows[slot];
            if rank < 0 {
                break;
            }
            let row = plan.send_counts[rank as usize];
            plan.send_counts[rank as usize] += 1;
            plan.token_rows[slot] = row;
            plan.row_token[row as usize] = t as i32;
            fill_row(dims, rank as usize, t, (ids, weights), row as usize, plan);
        }
    }
    // Each rank's next row is now the first of the rank after it: differences are the counts again.
    for rank in (1..dims.ranks).rev() {
        plan.send_counts[rank] -= plan.send_counts[rank - 1];
    }
    rows
}

fn check_ranks(dims: ShuffleDims) {
    assert!(
        dims.ranks > 0 && dims.top_k > 0 && dims.experts > 0 && dims.experts.is_multiple_of(dims.ranks),
        "{} experts on {} ranks, {} a token",
        dims.experts,
        dims.ranks,
        dims.top_k
    );
}

/// The distinct ranks of one token's choices, ascending, written to the front of `ranks`; the rest of it becomes −1.
fn destinations<'a>(dims: ShuffleDims, ids: &[i32], ranks: &'a mut [i32]) -> &'a [i32] {
    ranks.fill(-1);
    let mut found = 0;
    for &id in ids.iter().filter(|&&id| id >= 0) {
        assert!((id as usize) < dims.experts, "expert {id} of {}", dims.experts);
        let rank = (id as usize / dims.local_experts()) as i32;
        let at = ranks[..found].partition_point(|&seen| seen < rank);
        if at < found && ranks[at] == rank {
            continue;
        }
        ranks.copy_within(at..found, at + 1);
        ranks[at] = rank;
        found += 1;
    }
    &ranks[..found]
}

/// The experts of token t that `rank` holds, ascending, with their choices and weights.
fn fill_row(dims: ShuffleDims, rank: usize, t: usize, routed: (&[i32], &[f32]), row: usize, plan: &mut Shuffle<'_>) {
    let (ids, weights) = routed;
    let k = dims.top_k;
    let slots = row * k..(row + 1) * k;
    let experts = &mut plan.row_experts[slots.clone()];
    let choices = &mut plan.row_choice[slots.clone()];
    let row_weights = &mut plan.row_weights[slots];
    experts.fill(-1);
    choices.fill(-1);
    row_weights.fill(0.0);
    let held = (rank * dims.local_experts()) as i32..((rank + 1) * dims.local_experts()) as i32;
    let mut found = 0;
    for choice in t * k..(t + 1) * k {
        if !held.contains(&ids[choice]) {
            continue;
        }
        let expert = ids[choice] - held.start;
        let at = experts[..found].partition_point(|&seen| seen < expert);
        experts.copy_within(at..found, at + 1);
        choices.copy_within(at..found, at + 1);
        row_weights.copy_within(at..found, at + 1);
        experts[at] = expert;
        choices[at] = choice as i32;
        row_weights[at] = weights[choice];
        found += 1;
    }
}

/// Turns counts into starts and returns their sum.
fn exclusive_scan(counts: &mut [i32]) -> usize {
    let mut start = 0;
    for count in counts {
        start += std::mem::replace(count, start);
    }
    start as usize
}

/// The outputs of [`expand`]: [`crate::ExpandPlan`] as slices.
pub(super) struct Expansion<'a> {
    /// `[E_local + 1]`.
    pub(super) offsets: &'a mut [i32],
    /// `[R', k]`.
    pub(super) slots: &'a mut [i32],
    /// `[N]`.
    pub(super) source: &'a mut [i32],
    /// `[N]`.
    pub(super) origin: &'a mut [i32],
}

/// See [`crate::ExpertOps::expand_plan`]; returns the rows that arrived. A counting sort by expert: rows stay ascending inside one.
pub(super) fn expand(dims: ShuffleDims, recv_counts: &[i32], row_experts: &[i32], plan: &mut Expansion<'_>) -> usize {
    check_ranks(dims);
    let (k, experts) = (dims.top_k, dims.local_experts());
    assert_eq!((recv_counts.len(), plan.offsets.len()), (dims.ranks, experts + 1), "counts and offsets of {dims:?}");
    let rows: i32 = recv_counts.iter().sum();
    let rows = rows as usize;
    assert!(
        row_experts.len() >= rows * k && plan.slots.len() >= rows * k,
        "{rows} rows arrived; buffers hold {} and {}",
        row_experts.len() / k,
        plan.slots.len() / k
    );
    let row_experts = &row_experts[..rows * k];
    plan.offsets.fill(0);
    for &expert in row_experts.iter().filter(|&&expert| expert >= 0) {
        assert!((expert as usize) < experts, "local expert {expert} of {experts}");
        plan.offsets[expert as usize] += 1;
    }
    let expanded = exclusive_scan(plan.offsets);
    let room = plan.source.len().min(plan.origin.len());
    assert!(room >= expanded, "{expanded} expanded rows where {room} fit");
    // Until the last line, `offsets[e]` is where expert e's next row goes.
    for (choice, (&expert, slot)) in row_experts.iter().zip(plan.slots.iter_mut()).enumerate() {
        if expert < 0 {
            *slot = -1;
            continue;
        }
        let next = &mut plan.offsets[expert as usize];
        *slot = *next;
        plan.source[*next as usize] = (choice / k) as i32;
        plan.origin[*next as usize] = choice as i32;
        *next += 1;
    }
    // Each expert's next row is now the first of the expert after it.
    plan.offsets.copy_within(..experts, 1);
    plan.offsets[0] = 0;
    rows
}
