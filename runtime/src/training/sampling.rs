//! Text from a model: one token after the other, drawn from its distribution.
//!
//! Owns the draw. The model sees the last `sequence_length` tokens at each step.

use moe_kernels::Backend;
use rand::SeedableRng;
use rand::rand_core::Rng;
use rand_chacha::ChaCha8Rng;

use crate::collectives::{Communicator, Groups};
use crate::model::{LogitsOf, PassTokens, Transformer};
use crate::pass_error::PassError;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens to generate.
    pub tokens: usize,
    /// Logits are divided by this; 0: always the likeliest token.
    pub temperature: f64,
    /// Only the likeliest `top_k` tokens are drawn from; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens are drawn from whose probabilities together first reach this (Holtzman et al. 2020); 1: all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// Continues `prompt` (at least one token), handing each new token to `each`. Tokens at or above `vocab` are never drawn: a
/// model's vocabulary may be padded beyond its tokenizer's. All ranks of an expert group call this together.
pub fn generate<B: Backend, C: Communicator<B>>(
    model: &mut Transformer<B>,
    groups: &Groups<C>,
    prompt: &[i32],
    vocab: usize,
    sampling: Sampling,
    mut each: impl FnMut(i32),
) -> Result<Vec<i32>, PassError> {
    let mut tokens = prompt.to_vec();
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let window = model.setup().sequence_length;
    for _ in 0..sampling.tokens {
        let context = &tokens[tokens.len().saturating_sub(window)..];
        let logits = model.read_logits(groups, PassTokens::of_inputs(context, context.len()), LogitsOf::Last)?;
        let uniform = f64::from(rng.next_u32()) / (f64::from(u32::MAX) + 1.0);
        let token = draw(&logits[..vocab.min(logits.len())], sampling, uniform);
        each(token);
        tokens.push(token);
    }
    Ok(tokens.split_off(prompt.len()))
}

/// The token that `uniform` in [0, 1) falls on.
fn draw(logits: &[f32], sampling: Sampling, uniform: f64) -> i32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if sampling.temperature == 0.0 {
        return order[0] as i32;
    }
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let highest = f64::from(logits[order[0]]);
    let weight = |&token: &usize| ((f64::from(logits[token]) - highest) / sampling.temperature).exp();
    let mut weights: Vec<f64> = order.iter().map(weight).collect();
    if sampling.top_p < 1.0 {
        let enough = sampling.top_p * weights.iter().sum::<f64>();
        let mut reached = 0.0;
        let wanted = weights.iter().take_while(|weight| {
            let wanted = reached < enough;
            reached += **weight;
            wanted
        });
        let kept = wanted.count().max(1);
        weights.truncate(kept);
        order.truncate(kept);
    }
    let mut left = uniform * weights.iter().sum::<f64>();
    for (&token, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return token as i32;
        }
    }
    order[order.len() - 1] as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLING: Sampling = Sampling { tokens: 1, temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 };

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, 3.0f32.ln(), f32::NEG_INFINITY];
        assert_eq!(draw(&logits, SAMPLING, 0.74), 1);
        assert_eq!(draw(&logits, SAMPLING, 0.76), 0);
    }

    #[test]
    fn top_p_keeps_the_likeliest_that_together_reach_it() {
        // Probabilities 0.5, 0.3, 0.2.
        let logits = [5f32, 3.0, 2.0].map(f32::ln);
        let drawn = |top_p, uniform| draw(&logits, Sampling { top_p, ..SAMPLING }, uniform);
        assert_eq!((drawn(1.0, 0.99), drawn(0.81, 0.99)), (2, 2));
        assert_eq!((drawn(0.7, 0.99), drawn(0.7, 0.5)), (1, 0), "0.5 and 0.3 share what is left: 5/8 and 3/8");
        assert_eq!((drawn(0.4, 0.99), drawn(0.0, 0.99)), (0, 0));
    }

    #[test]
    fn temperature_zero_and_top_one_take_the_likeliest() {
        let logits = [0.1, 0.3, 0.2];
        assert_eq!(draw(&logits, Sampling { temperature: 0.0, ..SAMPLING }, 0.99), 1);
        assert_eq!(draw(&logits, Sampling { top_k: 1, ..SAMPLING }, 0.99), 1);
    }
}
