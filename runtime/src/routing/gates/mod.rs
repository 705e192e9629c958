//! The gates, one a file, each with the paper it follows.
//!
//! A gate is a description of how logits become choices; `router` runs every description through the same operations.

mod gshard;
mod noisy_topk;
mod sigmoid_bias;
mod softmax_topk;
mod switch;
mod topk_softmax;

use moe_kernels::Score;

use super::config::{RouterConfig, RouterKind};

/// How a gate turns logits into choices and weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateForm {
    /// Scores from logits.
    pub score: Score,
    /// Whether the chosen weights are divided by their sum.
    pub renormalize: bool,
    /// Factor on the weights.
    pub scale: f32,
    /// Whether learned noise is added to the logits in training.
    pub noisy: bool,
    /// Whether the second choice is dropped at random in training.
    pub random_second: bool,
    /// Whether a bias that follows the load corrects the choice.
    pub selection_bias: bool,
}

impl GateForm {
    /// The gate that a configuration names.
    pub fn of(config: &RouterConfig) -> Self {
        match config.kind {
            RouterKind::SoftmaxTopk => softmax_topk::form(config),
            RouterKind::TopkSoftmax => topk_softmax::form(),
            RouterKind::Switch => switch::form(),
            RouterKind::Gshard => gshard::form(),
            RouterKind::NoisyTopk => noisy_topk::form(),
            RouterKind::SigmoidBias => sigmoid_bias::form(config),
        }
    }

    /// Softmax scores, weights as they are, nothing else.
    const PLAIN: GateForm = GateForm {
        score: Score::Softmax,
        renormalize: false,
        scale: 1.0,
        noisy: false,
        random_second: false,
        selection_bias: false,
    };
}
