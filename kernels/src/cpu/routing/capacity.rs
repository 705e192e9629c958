//! Which choices an expert turns away: capacity, and GShard's random second expert.
//!
//! Owns decisions on ids. It never changes a weight: a dropped choice leaves the others' weights as they are.

use std::cell::RefCell;

use crate::{Capacity, CapacityPolicy, GateDims};

/// Working memory of [`apply`], kept per thread so that steps after the first allocate nothing. It carries nothing from one call
/// to the next.
#[derive(Default)]
struct Scratch {
    /// `[E + 1]`: choices counted so far, or where an expert's choices end.
    ends: Vec<usize>,
    /// `[T, k]`: choices grouped by expert.
    choices: Vec<usize>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// See [`crate::RoutingOps::apply_capacity`]: overwrites `kept` and `dropped`. Weights are compared as numbers; a NaN is dropped first.
pub(super) fn apply(
    dims: GateDims,
    capacity: Capacity,
    ids: &[i32],
    weights: &[f32],
    kept: &mut [i32],
    dropped: &mut [f32],
) {
    kept.copy_from_slice(ids);
    dropped.fill(0.0);
    SCRATCH.with_borrow_mut(|scratch| match capacity.policy {
        CapacityPolicy::Position => by_position(capacity.per_expert, kept, dropped, scratch),
        CapacityPolicy::Probability => by_weight(dims, capacity.per_expert, weights, kept, dropped, scratch),
    });
}

fn by_position(per_expert: usize, kept: &mut [i32], dropped: &mut [f32], scratch: &mut Scratch) {
    let taken = &mut scratch.ends;
    taken.clear();
    taken.resize(dropped.len(), 0);
    for id in kept.iter_mut().filter(|id| **id >= 0) {
        let expert = *id as usize;
        if taken[expert] == per_expert {
            *id = -1;
            dropped[expert] += 1.0;
        } else {
            taken[expert] += 1;
        }
    }
}

fn by_weight(
    dims: GateDims,
    per_expert: usize,
    weights: &[f32],
    kept: &mut [i32],
    dropped: &mut [f32],
    scratch: &mut Scratch,
) {
    let Scratch { ends, choices } = scratch;
    group_by_expert(dims.experts, kept, ends, choices);
    let rank = |choice: usize| if weights[choice].is_nan() { f32::NEG_INFINITY } else { weights[choice] };
    let mut start = 0;
    for (&end, dropped) in ends[..dims.experts].iter().zip(dropped) {
        let group = &mut choices[start..end];
        start = end;
        if group.len() <= per_expert {
            continue;
        }
        // No two choices compare equal, so the ones before `per_expert` are the same set whatever the selection's inner order.
        group.select_nth_unstable_by(per_expert, |&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
        for &choice in &group[per_expert..] {
            kept[choice] = -1;
        }
        *dropped = (group.len() - per_expert) as f32;
    }
}

/// Counting sort: `choices` lists the choices of expert 0, then of expert 1, …; those of expert e end at `ends[e]`.
fn group_by_expert(experts: usize, ids: &[i32], ends: &mut Vec<usize>, choices: &mut Vec<usize>) {
    let chosen = || ids.iter().enumerate().filter(|&(_, &id)| id >= 0).map(|(choice, &id)| (choice, id as usize));
    ends.clear();
    ends.resize(experts + 1, 0);
    chosen().for_each(|(_, e)| ends[e + 1] += 1);
    for e in 0..experts {
        ends[e + 1] += ends[e];
    }
    choices.clear();
    choices.resize(ends[experts], 0);
    for (choice, e) in chosen() {
        // `ends[e]` begins as the start of e's choices and has become their end when all are placed.
        choices[ends[e]] = choice;
        ends[e] += 1;
    }
}

/// See [`crate::RoutingOps::drop_second`].
pub(super) fn drop_second(dims: GateDims, uniform: &[f32], weights: &[f32], ids: &mut [i32]) {
    let k = dims.top_k;
    assert!(k >= 2, "a random second expert needs two choices a token, not {k}");
    for ((ids, weights), uniform) in ids.chunks_exact_mut(k).zip(weights.chunks_exact(k)).zip(uniform) {
        if 2.0 * weights[1] <= *uniform {
            ids[1] = -1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(
        dims: GateDims,
        per_expert: usize,
        policy: CapacityPolicy,
        ids: &[i32],
        weights: &[f32],
    ) -> (Vec<i32>, usize) {
        let (mut kept, mut dropped) = (vec![7; ids.len()], vec![f32::NAN; dims.experts]);
        apply(dims, Capacity { per_expert, policy }, ids, weights, &mut kept, &mut dropped);
        for (e, &dropped) in dropped.iter().enumerate() {
            let count = |ids: &[i32]| ids.iter().filter(|&&id| id == e as i32).count();
            assert_eq!(dropped as usize, count(ids) - count(&kept), "expert {e}");
        }
        (kept, dropped.iter().sum::<f32>() as usize)
    }

    #[test]
    fn position_drops_later_tokens_and_probability_the_lowest_weights() {
        let dims = GateDims { tokens: 4, experts: 3, top_k: 2 };
        let ids = [0, 1, 0, 2, 0, -1, 1, 0];
        let weights = [0.1, 0.9, 0.5, 0.5, 0.5, 0.0, 0.8, 0.2];
        assert_eq!(run(dims, 2, CapacityPolicy::Position, &ids, &weights), (vec![0, 1, 0, 2, -1, -1, 1, -1], 2));
        assert_eq!(run(dims, 2, CapacityPolicy::Probability, &ids, &weights), (vec![-1, 1, 0, 2, 0, -1, 1, -1], 2));
        // Tokens 1 and 2 tie at 0.5: the later one goes.
        assert_eq!(run(dims, 1, CapacityPolicy::Probability, &ids, &weights), (vec![-1, 1, 0, 2, -1, -1, -1, -1], 4));
    }

    #[test]
    fn nan_weights_are_dropped_first() {
        let dims = GateDims { tokens: 3, experts: 1, top_k: 1 };
        let (kept, dropped) = run(dims, 2, CapacityPolicy::Probability, &[0, 0, 0], &[-f32::NAN, 0.0, f32::NAN]);
        assert_eq!((kept, dropped), (vec![0, 0, -1], 1));
    }

    #[test]
    fn a_second_expert_survives_in_proportion_to_its_weight() {
        let dims = GateDims { tokens: 3, experts: 4, top_k: 2 };
        let mut ids = [0, 1, 2, 3, 3, 2];
        drop_second(dims, &[0.5, 0.5, 0.4], &[0.8, 0.2, 0.75, 0.25, 0.7, 0.3], &mut ids);
        assert_eq!(ids, [0, -1, 2, -1, 3, 2]);
    }

    /// T, k, E, C, ids with distinct experts a token or −1, weights on a coarse grid so that ties are common.
    fn routed() -> impl Strategy<Value = (GateDims, usize, Vec<i32>, Vec<f32>)> {
        (0usize..40, 1usize..7, 0usize..9).prop_flat_map(|(tokens, experts, per_expert)| {
            let token = Just((0..experts as i32).collect::<Vec<_>>()).prop_shuffle();
            (1..=experts, prop::collection::vec(token, tokens)).prop_flat_map(move |(top_k, orders)| {
                let ids: Vec<i32> = orders.iter().flat_map(|order| order[..top_k].to_vec()).collect();
                let len = ids.len();
                let dims = GateDims { tokens, experts, top_k };
                (prop::collection::vec(any::<bool>(), len), prop::collection::vec(0u8..5, len)).prop_map(
                    move |(gone, grid)| {
                        let ids =
                            ids.iter().zip(gone).map(|(&id, gone)| if gone && id == 0 { -1 } else { id }).collect();
                        (dims, per_expert, ids, grid.iter().map(|&w| f32::from(w) / 4.0).collect())
                    },
                )
            })
        })
    }

    proptest! {
        #[test]
        fn capacity_keeps_the_best_and_no_more_than_it_may((dims, per_expert, ids, weights) in routed()) {
            for policy in [CapacityPolicy::Position, CapacityPolicy::Probability] {
                let (kept, dropped) = run(dims, per_expert, policy, &ids, &weights);
                let gone = |choice: usize| ids[choice] >= 0 && kept[choice] < 0;
                prop_assert_eq!((0..ids.len()).filter(|&c| gone(c)).count(), dropped);
                prop_assert!((0..ids.len()).all(|c| kept[c] == ids[c] || gone(c)));
                for e in 0..dims.experts as i32 {
                    let wanted = ids.iter().filter(|&&id| id == e).count();
                    prop_assert_eq!(kept.iter().filter(|&&id| id == e).count(), wanted.min(per_expert));
                    // Every kept choice goes before every dropped one under the policy.
                    for a in (0..ids.len()).filter(|&c| kept[c] == e) {
                        for b in (0..ids.len()).filter(|&c| ids[c] == e && gone(c)) {
                            let in_order = match policy {
                                CapacityPolicy::Position => a < b,
                                CapacityPolicy::Probability if weights[a] == weights[b] => a < b,
                                CapacityPolicy::Probability => weights[a] > weights[b],
                            };
                            prop_assert!(in_order, "choice {} was kept and {} was not", a, b);
                        }
                    }
                }
            }
        }
    }
}
