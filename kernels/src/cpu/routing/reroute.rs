//! Other experts for choices that capacity turned away.
//!
//! Owns the rounds of asking and taking. Which choices are turned away is `capacity`'s.

use crate::GateDims;

use super::gate::beats;

/// The choices of all tokens, `[T, k]`.
pub(super) struct Choices<'a> {
    /// What each is.
    pub(super) ids: &'a mut [i32],
    /// The same, −1 where it is not carried out.
    pub(super) kept: &'a mut [i32],
}

/// See [`crate::RoutingOps::reroute`].
pub(super) fn reroute(
    dims: GateDims,
    (per_expert, rounds): (usize, usize),
    scores: &[f32],
    choices: Choices<'_>,
    dropped: &mut [f32],
) {
    let GateDims { experts, top_k: k, .. } = dims;
    let Choices { ids, kept } = choices;
    let mut room = vec![per_expert; experts];
    for &id in kept.iter().filter(|&&id| id >= 0) {
        room[id as usize] = room[id as usize].saturating_sub(1);
    }
    let mut wishes = vec![None; k];
    for _ in 0..rounds {
        let at_first = room.clone();
        let tokens = ids.chunks_exact_mut(k).zip(kept.chunks_exact_mut(k)).zip(scores.chunks_exact(experts));
        for ((ids, kept), scores) in tokens {
            wish(scores, &at_first, ids, kept, &mut wishes);
            for ((id, kept), wish) in ids.iter_mut().zip(kept).zip(&wishes) {
                if let Some(expert) = *wish
                    && room[expert] > 0
                {
                    room[expert] -= 1;
                    (*id, *kept) = (expert as i32, expert as i32);
                }
            }
        }
    }
    dropped.fill(0.0);
    let lost = ids.iter().zip(kept.iter()).filter(|&(&id, &kept)| id >= 0 && kept < 0);
    lost.for_each(|(&id, _)| dropped[id as usize] += 1.0);
}

/// Whom each choice of a token asks: the dropped ones, in order, the highest scored experts with room that are not its own.
fn wish(scores: &[f32], room: &[usize], ids: &[i32], kept: &[i32], wishes: &mut [Option<usize>]) {
    wishes.fill(None);
    for j in 0..ids.len() {
        if ids[j] < 0 || kept[j] >= 0 {
            continue;
        }
        let free = |e: &usize| room[*e] > 0 && !ids.contains(&(*e as i32)) && !wishes.contains(&Some(*e));
        let best =
            (0..scores.len()).filter(free).reduce(|best, e| if beats(scores[e], scores[best]) { e } else { best });
        wishes[j] = best;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_choices_go_to_the_next_best_with_room_in_order_of_tokens() {
        let dims = GateDims { tokens: 4, experts: 3, top_k: 1 };
        // All want expert 0, which takes one; 1 is next best for all but the last, and takes one as well.
        let scores = [0.5, 0.3, 0.2, 0.6, 0.3, 0.1, 0.7, 0.2, 0.1, 0.8, 0.05, 0.15];
        let (mut ids, mut kept, mut dropped) = ([0; 4], [0, -1, -1, -1], [f32::NAN; 3]);
        let run = |rounds, ids: &mut [i32], kept: &mut [i32], dropped: &mut [f32]| {
            reroute(dims, (1, rounds), &scores, Choices { ids, kept }, dropped);
        };
        run(1, &mut ids, &mut kept, &mut dropped);
        assert_eq!((ids, kept, dropped), ([0, 1, 0, 2], [0, 1, -1, 2], [1.0, 0.0, 0.0]));
        run(4, &mut ids, &mut kept, &mut dropped);
        assert_eq!((ids, kept, dropped), ([0, 1, 0, 2], [0, 1, -1, 2], [1.0, 0.0, 0.0]), "nobody has room");
    }

    #[test]
    fn two_choices_of_a_token_ask_different_experts() {
        let dims = GateDims { tokens: 1, experts: 4, top_k: 2 };
        let (mut ids, mut kept, mut dropped) = ([2, 3], [-1, -1], [0.0; 4]);
        let choices = Choices { ids: &mut ids, kept: &mut kept };
        reroute(dims, (1, 1), &[0.1, 0.2, 0.4, 0.3], choices, &mut dropped);
        assert_eq!((ids, kept, dropped), ([1, 0], [1, 0], [0.0; 4]));
    }
}
