//! Hash layers (Roller et al. 2021): a hash of the token and of the layer gives k different experts with equal weights.
//! Nothing is learned, and equal tokens meet equal experts.

use super::{GateForm, Logits};
use crate::routing::noise::hash;

pub(super) fn form() -> GateForm {
    GateForm { logits: Logits::Hashed, ..GateForm::PLAIN }
}

/// A logit whose probability beside 0 is 0.
const NEVER: f32 = -1e9;

/// `[tokens, experts]` logits: 0 for the `top_k` experts of each token, [`NEVER`] for the others.
pub(in crate::routing) fn logits(stream: u64, tokens: &[i32], (top_k, experts): (usize, usize), logits: &mut Vec<f32>) {
    logits.clear();
    logits.resize(tokens.len() * experts, NEVER);
    for (token, row) in tokens.iter().zip(logits.chunks_exact_mut(experts)) {
        let mut left: Vec<usize> = (0..experts).collect();
        for j in 0..top_k {
            let draw = hash(stream, [*token as u64, j as u64]) % left.len() as u64;
            row[left.swap_remove(draw as usize)] = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_tokens_get_equal_experts_and_all_experts_are_used() {
        let tokens: Vec<i32> = (0..256).chain([5, 5]).collect();
        let mut rows = Vec::new();
        logits(9, &tokens, (2, 8), &mut rows);
        let rows: Vec<&[f32]> = rows.chunks(8).collect();
        assert!(rows.iter().all(|row| row.iter().filter(|&&logit| logit == 0.0).count() == 2));
        assert!(rows[5] == rows[256] && rows[5] == rows[257]);
        let uses = |e: usize| rows[..256].iter().filter(|row| row[e] == 0.0).count();
        assert!((0..8).all(|e| (40..90).contains(&uses(e))), "{:?}", (0..8).map(uses).collect::<Vec<_>>());
        let mut other = Vec::new();
        logits(10, &tokens, (2, 8), &mut other);
        assert_ne!(other, rows.concat());
    }
}
