//! What a router knows of the pass it works in.
//!
//! Owns the pass's place in the data and in training. It holds no activations.

use super::config::BalanceScope;

/// Where in the data and in training a pass stands.
#[derive(Clone, Copy, Debug)]
pub struct RoutePass<'a> {
    /// T of this rank and pass.
    pub tokens: usize,
    /// S.
    pub sequence_length: usize,
    /// Place of the first token in the data: sample number · S.
    pub first_token: u64,
    /// Training adds noise and random choices; evaluation does not.
    pub training: bool,
    /// Steps before this one.
    pub step: u64,
    /// `[T]`: the tokens, for gates that look at them; empty where nothing is known of them.
    pub ids: &'a [i32],
    /// `[T / S]`: each sequence's tag; empty: all are 0.
    pub tags: &'a [i32],
}

impl RoutePass<'_> {
    /// Tokens over which balance statistics are formed, and how many such groups there are (at least 1).
    pub fn groups(&self, scope: BalanceScope) -> (usize, usize) {
        match scope {
            BalanceScope::Sequence => (self.sequence_length, self.tokens.div_ceil(self.sequence_length).max(1)),
            BalanceScope::MicroBatch | BalanceScope::Global => (self.tokens.max(1), 1),
        }
    }

    /// The same pass with each token as `parts` tokens.
    pub fn split(self, parts: usize) -> Self {
        Self {
            tokens: self.tokens * parts,
            sequence_length: self.sequence_length * parts,
            first_token: self.first_token * parts as u64,
            ..self
        }
    }

    /// `[T]`: each token's tag.
    pub(super) fn token_tags(&self, tags: &mut Vec<i32>) {
        tags.clear();
        tags.extend(self.tags.iter().flat_map(|&tag| std::iter::repeat_n(tag, self.sequence_length)));
        tags.resize(self.tokens, 0);
    }

    /// The step, as capacity looks at it; None: evaluation.
    pub(super) fn training_step(&self) -> Option<u64> {
        self.training.then_some(self.step)
    }
}
