//! The head and the loss, in chunks of tokens: logits and their gradient are never held for the whole batch, nor at once.

use moe_kernels::{Accumulate, Backend, DeviceError, Element, GemmDims, View, ViewMut};

use super::layout::TensorId;
use super::parameters::{Gradients, Weights};
use crate::memory::{Kind, Slot, Tally};

/// Elements of logits held at once in f32 (16 MiB): wide enough to keep a CPU's matrix products efficient, small enough for its caches.
const LOGITS_AT_ONCE: usize = 1 << 22;
/// The same in half as many bits (256 MiB): a GPU wants products of thousands of rows, and each adds to all of the head's gradient.
const HALF_LOGITS_AT_ONCE: usize = 1 << 27;

/// Tokens whose logits are held at once, of `tokens`; `half`: in a number type of 16 bits.
pub fn logits_rows(vocab: usize, tokens: usize, half: bool) -> usize {
    let elements = if half { HALF_LOGITS_AT_ONCE } else { LOGITS_AT_ONCE };
    (elements / vocab.max(1)).clamp(1, tokens.max(1))
}

/// The head with its scratch.
pub(super) struct Head<B: Backend> {
    vocab: usize,
    hidden_size: usize,
    weight: TensorId,
    logits: Slot<B, B::Act>,
    losses: Slot<B, f32>,
    targets: Slot<B, i32>,
}

impl<B: Backend> Head<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.logits.bytes(), self.losses.bytes(), self.targets.bytes()]);
    }

    /// The head with weight `[V, H]`.
    pub(super) fn new(device: &B, vocab: usize, hidden_size: usize, weight: TensorId) -> Result<Self, DeviceError> {
        Ok(Self {
            vocab,
            hidden_size,
            weight,
            logits: Slot::new(device, "logits")?,
            losses: Slot::new(device, "token losses")?,
            targets: Slot::new(device, "targets")?,
        })
    }

    fn chunks(&self, tokens: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<B> {
        let rows = logits_rows(self.vocab, tokens, B::Act::BYTES == 2);
        (0..tokens).step_by(rows).map(move |start| start..tokens.min(start + rows))
    }

    fn dims(&self, rows: usize) -> GemmDims {
        GemmDims { m: rows, n: self.vocab, k: self.hidden_size }
    }

    fn reserve(&mut self, device: &B, targets: &[i32]) -> Result<(), DeviceError> {
        let rows = self.chunks(targets.len()).next().map_or(0, |first| first.len());
        self.logits.reserve(device, rows * self.vocab)?;
        self.losses.reserve(device, targets.len())?;
        self.targets.reserve(device, targets.len())?;
        device.upload(targets, self.targets.view_mut(targets.len()));
        Ok(())
    }

    /// Cross-entropy of all tokens and its gradients in one go: `dx_TH` (overwritten), the head's weight gradient (added to), and
    /// Σ losses (added to `total[0]`, not scaled). Gradients are of Σ losses · `scale`. Targets of −1 count nothing.
    pub(super) fn loss_and_gradients(
        &mut self,
        device: &B,
        (weights, gradients): (Weights<'_, B>, &mut Gradients<'_, B>),
        (targets, scale): (&[i32], f32),
        (x_TH, mut dx_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
        total: ViewMut<'_, B, f64>,
    ) -> Result<(), DeviceError> {
        let h = self.hidden_size;
        self.reserve(device, targets)?;
        let weight = weights.get(self.weight);
        for range in self.chunks(targets.len()) {
            let (dims, n) = (self.dims(range.len()), range.len() * self.vocab);
            let x = x_TH.slice(range.start * h..range.end * h);
            device.linear(dims, x, weight, None, self.logits.view_mut(n));
            let wanted = self.targets.view(targets.len()).slice(range.clone());
            let losses = self.losses.view_mut(targets.len()).slice(range.clone());
            device.cross_entropy(self.vocab, scale, wanted, self.logits.view_mut(n), losses);
            let (dlogits, dx) = (self.logits.view(n), dx_TH.reborrow().slice(range.start * h..range.end * h));
            device.linear_grad_input(dims, dlogits, weight, dx, Accumulate::Overwrite);
            device.linear_grad_weight(dims, dlogits, x, gradients.get(self.weight));
        }
        device.sum(self.losses.view(targets.len()), total);
        Ok(())
    }

    /// Σ losses of all tokens, added to `total[0]`.
    pub(super) fn loss(
        &mut self,
        device: &B,
        weights: Weights<'_, B>,
        targets: &[i32],
        x_TH: View<'_, B, B::Act>,
        total: ViewMut<'_, B, f64>,
    ) -> Result<(), DeviceError> {
        let h = self.hidden_size;
        self.reserve(device, targets)?;
        for range in self.chunks(targets.len()) {
            let n = range.len() * self.vocab;
            let x = x_TH.slice(range.start * h..range.end * h);
            device.linear(self.dims(range.len()), x, weights.get(self.weight), None, self.logits.view_mut(n));
            let wanted = self.targets.view(targets.len()).slice(range.clone());
            let losses = self.losses.view_mut(targets.len()).slice(range);
            device.cross_entropy_loss(self.vocab, wanted, self.logits.view(n), losses);
        }
        device.sum(self.losses.view(targets.len()), total);
        Ok(())
    }

    /// Logits of `rows` tokens, `[rows, V]`, on the host.
    pub(super) fn read_logits(
        &mut self,
        device: &B,
        weights: Weights<'_, B>,
        x: View<'_, B, B::Act>,
    ) -> Result<Vec<B::Act>, DeviceError> {
        let rows = x.len() / self.hidden_size;
        let n = rows * self.vocab;
        self.logits.reserve(device, n)?;
        device.linear(self.dims(rows), x, weights.get(self.weight), None, self.logits.view_mut(n));
        let mut host = vec![B::Act::default(); n];
        device.read_to_host(self.logits.view(n), &mut host)?;
        Ok(host)
    }
}
