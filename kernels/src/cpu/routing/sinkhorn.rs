//! Sinkhorn's algorithm over a pass's tokens and experts.
//!
//! Owns the bias that evens out the experts' share. Which experts it makes a token choose is `gate`'s.

use super::columns::sum_columns;
use super::gate::softmax_sum;
use crate::GateDims;

/// See [`crate::RoutingOps::sinkhorn_bias`]. The factor of an expert is e^bias; that of a token follows from them.
pub(super) fn bias(dims: GateDims, iterations: usize, logits: &[f32], bias: &mut [f32]) {
    let GateDims { tokens, experts, .. } = dims;
    bias.fill(0.0);
    let share = tokens as f32 / experts as f32;
    let mut sums = vec![0.0; experts];
    for _ in 0..iterations {
        sum_columns(0..tokens, &mut sums, |t, columns, sums| {
            let row = &logits[t * experts..(t + 1) * experts];
            let (most, total) = softmax_sum(row.iter().zip(&*bias).map(|(logit, bias)| logit + bias));
            for ((sum, logit), bias) in sums.iter_mut().zip(&row[columns.clone()]).zip(&bias[columns]) {
                *sum += f64::from((logit + bias - most).exp() / total);
            }
        });
        for (bias, sum) in bias.iter_mut().zip(&sums) {
            // An expert of no token at all keeps its factor: no finite one would bring it any.
            if *sum > 0.0 {
                *bias += (share / sum).ln();
            }
        }
    }
}
