//! The loss of a model on a text, beside any run.
//!
//! Owns the cut of the text: windows one after the other, so that every token but the first is predicted once, from at most one
//! window's worth of text before it.

use moe_kernels::Backend;

use crate::collectives::{Communicator, Groups};
use crate::model::{ModelError, PassTokens, Transformer};

/// Marks a position without a target.
const NO_TARGET: i32 = -1;

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TextLoss {
    /// Predicted tokens: all but the first.
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

/// The loss on `tokens` in windows of the model's sequence length, as many at a time as the model was built for. `each` hears
/// the tokens done. All ranks of an expert group call this together with the same tokens.
///
/// # Errors
/// The device or another rank failed.
pub fn text_loss<B: Backend, C: Communicator<B>>(
    model: &mut Transformer<B>,
    groups: &Groups<C>,
    tokens: &[i32],
    mut each: impl FnMut(u64),
) -> Result<TextLoss, ModelError> {
    let (length, at_once) = (model.setup().sequence_length, model.setup().max_sequences);
    let mut loss = TextLoss::default();
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    // Of the last token only the target is needed.
    for pass in tokens[..tokens.len().saturating_sub(1)].chunks(length * at_once) {
        let start = loss.tokens as usize;
        let padding = pass.len().div_ceil(length) * length - pass.len();
        inputs.clear();
        inputs.extend_from_slice(pass);
        inputs.extend(std::iter::repeat_n(0, padding));
        targets.clear();
        targets.extend_from_slice(&tokens[start + 1..start + 1 + pass.len()]);
        targets.extend(std::iter::repeat_n(NO_TARGET, padding));
        let first_token = start as u64;
        let tokens = PassTokens { targets: &targets, first_token, ..PassTokens::of_inputs(&inputs, length) };
        loss.sum += model.evaluate_pass(groups, tokens)?;
        loss.tokens += pass.len() as u64;
        each(loss.tokens);
    }
    Ok(loss)
}
