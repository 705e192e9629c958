//! The loss of a model on a text, beside any run.
//!
//! Owns the cut of the text: windows one after the other, so that every token but the first is predicted once, from at most one
//! window's worth of text before it.

use moe_kernels::Backend;

use crate::collectives::{Communicator, Groups};
use crate::data::{Batch, Stream, Window};
use crate::model::{PassTokens, Transformer};
use crate::pass_error::PassError;

/// A text to predict.
#[derive(Clone, Debug)]
pub struct EvalText {
    /// Where it lies. Prompts of its documents are given and not predicted.
    pub stream: Stream,
    /// How many of its tokens count.
    pub tokens: usize,
    /// Whether its documents are kept apart, as `train.document_mask` does.
    pub document_mask: bool,
}

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TextLoss {
    /// Predicted tokens.
    pub tokens: u64,
    /// Σ of their losses, in nats.
    pub sum: f64,
}

impl TextLoss {
    /// Mean loss, in nats per token; NaN where there is none.
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens as f64
    }

    /// e to the mean loss.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }
}

/// The loss on `text` in windows of the model's sequence length, as many at a time as the model was built for. `each` hears
/// the tokens done. All ranks of an expert group call this together with the same text.
///
/// # Errors
/// The device or another rank failed.
pub fn text_loss<B: Backend, C: Communicator<B>>(
    model: &mut Transformer<B>,
    groups: &Groups<C>,
    text: &EvalText,
    mut each: impl FnMut(u64),
) -> Result<TextLoss, PassError> {
    let (length, at_once) = (model.setup().sequence_length, model.setup().max_sequences);
    let mut loss = TextLoss::default();
    let mut batch = Batch::default();
    // Of the last token only the target is needed.
    let inputs = text.tokens.min(text.stream.len()).saturating_sub(1);
    for first in (0..inputs).step_by(length * at_once) {
        let end = inputs.min(first + length * at_once);
        let windows = (0..(end - first).div_ceil(length)).map(|window| {
            let start = first + window * length;
            Window { stream: &text.stream, tag: 0, start, inputs: length.min(end - start) }
        });
        batch.fill(length, text.document_mask, windows);
        let tokens = PassTokens {
            targets: &batch.targets,
            starts: batch.starts.as_deref(),
            first_token: first as u64,
            ..PassTokens::of_inputs(&batch.inputs, length)
        };
        loss.sum += model.evaluate_pass(groups, tokens)?;
        loss.tokens += batch.valid_targets() as u64;
        each(end as u64);
    }
    Ok(loss)
}
