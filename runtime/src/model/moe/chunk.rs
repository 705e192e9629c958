//! One chunk of an MoE layer's tokens.
//!
//! Owns the knowledge whether its expanded rows are still the experts' input. The order of stages is the layer's.

use moe_kernels::{Backend, DeviceError, View};

use crate::dispatch::Shuffle;
use crate::experts::{ExpertScratch, Experts};

/// A shuffle and the experts' activations of one chunk of tokens.
pub(super) struct Chunk<B: Backend> {
    pub(super) shuffle: Shuffle<B>,
    pub(super) experts: Experts<B>,
    /// The round that was expanded last, and the number that the scratch gave it.
    expanded: Option<(usize, u64)>,
}

impl<B: Backend> Chunk<B> {
    /// Nothing is expanded yet.
    pub(super) fn new(shuffle: Shuffle<B>, experts: Experts<B>) -> Self {
        Self { shuffle, experts, expanded: None }
    }

    /// Makes the rows of `round` the experts' input.
    pub(super) fn expand(
        &mut self,
        device: &B,
        scratch: &mut ExpertScratch<B>,
        (round, h): (usize, usize),
        x_TH: View<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let grouped = self.shuffle.grouped(round);
        self.shuffle.expanded(device, round, x_TH, scratch.input_mut(device, grouped, h)?);
        self.expanded = Some((round, scratch.input_number()));
        Ok(())
    }

    /// As [`Chunk::expand`] of the tokens of the forward pass, whose rows may still be there.
    pub(super) fn expand_again(
        &mut self,
        device: &B,
        scratch: &mut ExpertScratch<B>,
        (round, h): (usize, usize),
        x_TH: View<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        if self.is_expanded(scratch, round) { Ok(()) } else { self.expand(device, scratch, (round, h), x_TH) }
    }

    /// Whether the rows of `round` still are the experts' input.
    pub(super) fn is_expanded(&self, scratch: &ExpertScratch<B>, round: usize) -> bool {
        self.expanded == Some((round, scratch.input_number()))
    }
}
