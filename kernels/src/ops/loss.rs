//! Cross-entropy and sums.

use crate::{Device, Element, View, ViewMut};

/// Losses at the head of the model.
pub trait LossOps: Device {
    /// Softmax cross-entropy of `logits[rows, V]` against `targets[rows]`; −1: no target, loss and gradient 0.
    /// `losses[rows]` gets each row's loss in nats (unscaled). The logits are overwritten by their gradient times `scale`, so
    /// that logits and gradient are never held at once.
    fn cross_entropy(
        &self,
        vocab: usize,
        scale: f32,
        targets: View<'_, Self, i32>,
        logits: ViewMut<'_, Self, Self::Act>,
        losses: ViewMut<'_, Self, f32>,
    );
    /// The losses alone, for evaluation: the logits are left as they are.
    fn cross_entropy_loss(
        &self,
        vocab: usize,
        targets: View<'_, Self, i32>,
        logits: View<'_, Self, Self::Act>,
        losses: ViewMut<'_, Self, f32>,
    );
    /// `total[0] += Σ x`, summed in f64.
    fn sum<T: Element + Into<f64>>(&self, x: View<'_, Self, T>, total: ViewMut<'_, Self, f64>);
}
