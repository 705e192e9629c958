//! What goes into a model at once.
//!
//! Owns the form of a pass's tokens. Where they come from is `data`'s.

use crate::routing::RoutePass;

/// The tokens of one pass of one rank.
#[derive(Clone, Copy, Debug)]
pub struct PassTokens<'a> {
    /// `[B, S]`.
    pub inputs: &'a [i32],
    /// `[B, S]`: the token to predict at each place; −1: none.
    pub targets: &'a [i32],
    /// `[B, S]`: where in its sequence the document of each token begins, which is how far back it sees; None: every token sees
    /// its whole sequence up to itself.
    pub starts: Option<&'a [i32]>,
    /// S.
    pub sequence_length: usize,
    /// Place of the first token in the data: sample number · S.
    pub first_token: u64,
    /// `[B]`: each sequence's tag; empty: all are 0.
    pub tags: &'a [i32],
    /// Steps before this one, in training.
    pub step: u64,
}

impl<'a> PassTokens<'a> {
    /// Sequences of which nothing is predicted, each one text.
    pub fn of_inputs(inputs: &'a [i32], sequence_length: usize) -> Self {
        Self { inputs, targets: &[], starts: None, sequence_length, first_token: 0, tags: &[], step: 0 }
    }

    /// The pass as routers see it.
    pub(super) fn route(&self, training: bool) -> RoutePass<'a> {
        RoutePass {
            tokens: self.inputs.len(),
            sequence_length: self.sequence_length,
            first_token: self.first_token,
            training,
            step: self.step,
            ids: self.inputs,
            tags: self.tags,
        }
    }
}
