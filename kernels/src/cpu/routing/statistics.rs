//! What is summed over tokens: balance statistics, importance, and the losses made of them.
//!
//! Owns sums and small losses over vectors of E numbers. It never touches a single token's routing.

use super::columns;
use super::gate::{log_sum_exp, probability_factor};
use crate::{GateDims, GateSpec, Score};

/// What the gate made of a batch of tokens.
pub(super) struct Routed<'a> {
    /// How it was made.
    pub(super) spec: GateSpec,
    /// `[T, E]`.
    pub(super) logits: &'a [f32],
    /// `[T, E]`.
    pub(super) scores: &'a [f32],
    /// `[T, k]`.
    pub(super) ids: &'a [i32],
}

impl Routed<'_> {
    fn row<'a>(&self, of: &'a [f32], t: usize) -> &'a [f32] {
        &of[t * self.spec.dims.experts..(t + 1) * self.spec.dims.experts]
    }
}

/// `counts[G, E]` and `prob_sums[G, E]` of [`crate::RoutingOps::gate_statistics`]. G is what the outputs hold; groups beyond the last
/// token are 0, so that a rank without tokens takes part.
pub(super) fn group_sums(routed: &Routed<'_>, tokens_per_group: usize, counts: &mut [f32], prob_sums: &mut [f32]) {
    let GateDims { tokens, experts, top_k } = routed.spec.dims;
    let length = tokens_per_group.max(1);
    assert!(
        counts.len().is_multiple_of(experts) && counts.len() / experts >= tokens.div_ceil(length),
        "{} counts for {tokens} tokens in groups of {length} and {experts} experts",
        counts.len()
    );
    let groups = counts.chunks_exact_mut(experts).zip(prob_sums.chunks_exact_mut(experts));
    for (group, (counts, prob_sums)) in groups.enumerate() {
        let members = (group * length).min(tokens)..((group + 1) * length).min(tokens);
        columns::sum_columns(members.clone(), counts, |t, columns, sums| {
            for &id in &routed.ids[t * top_k..(t + 1) * top_k] {
                if id >= 0 && columns.contains(&(id as usize)) {
                    sums[id as usize - columns.start] += 1.0;
                }
            }
        });
        columns::sum_columns(members, prob_sums, |t, columns, sums| {
            let scores = routed.row(routed.scores, t);
            let factor = probability_factor(routed.spec.score, scores);
            for (sum, score) in sums.iter_mut().zip(&scores[columns]) {
                *sum += f64::from(score * factor);
            }
        });
    }
}

/// Σ_t lse².
pub(super) fn z_sum(routed: &Routed<'_>) -> f32 {
    let term = |t| {
        let lse = log_sum_exp(routed.spec.score, routed.row(routed.logits, t), routed.row(routed.scores, t));
        f64::from(lse).powi(2)
    };
    columns::sum(0..routed.spec.dims.tokens, term) as f32
}

/// Σ_t −Σ_e p ln p. For softmax scores that is lse − Σ p·logit, without a logarithm an expert.
pub(super) fn entropy_sum(routed: &Routed<'_>) -> f32 {
    let term = |t| {
        let (logits, scores) = (routed.row(routed.logits, t), routed.row(routed.scores, t));
        let entropy: f32 = match routed.spec.score {
            Score::Softmax => {
                let weighed = |(p, logit): (&f32, &f32)| if *p > 0.0 { p * logit } else { 0.0 };
                log_sum_exp(Score::Softmax, logits, scores) - scores.iter().zip(logits).map(weighed).sum::<f32>()
            }
            Score::Sigmoid => {
                let factor = probability_factor(Score::Sigmoid, scores);
                let of = |score: &f32| if *score > 0.0 { -score * factor * (score * factor).ln() } else { 0.0 };
                scores.iter().map(of).sum()
            }
        };
        f64::from(entropy)
    };
    columns::sum(0..routed.spec.dims.tokens, term) as f32
}

/// See [`crate::RoutingOps::importance`].
pub(super) fn importance(dims: GateDims, ids: &[i32], weights: &[f32], importance: &mut [f32]) {
    let k = dims.top_k;
    columns::sum_columns(0..dims.tokens, importance, |t, columns, sums| {
        let choices = t * k..(t + 1) * k;
        for (&id, &weight) in ids[choices.clone()].iter().zip(&weights[choices]) {
            if id >= 0 && columns.contains(&(id as usize)) {
                sums[id as usize - columns.start] += f64::from(weight);
            }
        }
    });
}

/// See [`crate::RoutingOps::importance_grad`].
pub(super) fn importance_grad(ids: &[i32], dimportance: &[f32], dweights: &mut [f32]) {
    for (dweight, &id) in dweights.iter_mut().zip(ids) {
        if id >= 0 {
            *dweight += dimportance[id as usize];
        }
    }
}

/// See [`crate::RoutingOps::cv_squared`]: returns the loss, overwrites `dx`.
pub(super) fn cv_squared((weight, coefficient): (f32, f32), x: &[f32], dx: &mut [f32]) -> f64 {
    let weight = f64::from(weight);
    const EPSILON: f64 = 1e-10;
    let n = x.len() as f64;
    if x.len() < 2 {
        dx.fill(0.0);
        return 0.0;
    }
    let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let divisor = mean * mean + EPSILON;
    for (dx, &v) in dx.iter_mut().zip(x) {
        let through_variance = 2.0 * (f64::from(v) - mean) / ((n - 1.0) * divisor);
        let through_mean = 2.0 * mean * variance / (n * divisor * divisor);
        *dx = (weight * f64::from(coefficient) * (through_variance - through_mean)) as f32;
    }
    weight * variance / divisor
}
