//! Text from a model: one token after the other, drawn from its distribution.
//!
//! Owns the draw. The model sees the last `sequence_length` tokens at each step.

use moe_kernels::Backend;
use rand::SeedableRng;
use rand::rand_core::Rng;
use rand_chacha::ChaCha8Rng;

use crate::collectives::{Communicator, Groups};
use crate::model::{LogitsOf, ModelError, Transformer};

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens to generate.
    pub tokens: usize,
    /// Logits are divided by this; 0: always the likeliest token.
    pub temperature: f64,
    /// Only the likeliest `top_k` tokens are drawn from; 0: all.
    pub top_k: usize,
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
) -> Result<Vec<i32>, ModelError> {
    let mut tokens = prompt.to_vec();
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let window = model.setup().sequence_length;
    for _ in 0..sampling.tokens {
        let context = &tokens[tokens.len().saturating_sub(window)..];
        let logits = model.read_logits(groups, context, context.len(), LogitsOf::Last)?;
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
    let weights: Vec<f64> = order.iter().map(weight).collect();
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

    const SAMPLING: Sampling = Sampling { tokens: 1, temperature: 1.0, top_k: 0, seed: 0 };

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, 3.0f32.ln(), f32::NEG_INFINITY];
        assert_eq!(draw(&logits, SAMPLING, 0.74), 1);
        assert_eq!(draw(&logits, SAMPLING, 0.76), 0);
    }

    #[test]
    fn temperature_zero_and_top_one_take_the_likeliest() {
        let logits = [0.1, 0.3, 0.2];
        assert_eq!(draw(&logits, Sampling { temperature: 0.0, ..SAMPLING }, 0.99), 1);
        assert_eq!(draw(&logits, Sampling { top_k: 1, ..SAMPLING }, 0.99), 1);
    }
}
