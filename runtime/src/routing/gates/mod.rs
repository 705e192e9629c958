//! The gates, one a file, each with the paper it follows.
//!
//! A gate is a description of how logits become choices; `router` runs every description through the same operations.

mod gshard;
mod noisy_topk;
mod sigmoid_bias;
mod sinkhorn;
mod softmax_topk;
mod switch;
mod top_p;
mod topk_softmax;

use moe_kernels::{Choice, GroupLimit, GroupRank, RankedBy, Score};

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
    /// Iterations by which a pass's choices are evened out in training; 0: none.
    pub sinkhorn_iterations: usize,
    /// Which experts are chosen.
    pub choice: Choice,
}

impl GateForm {
    /// The gate that a configuration names.
    pub fn of(config: &RouterConfig) -> Self {
        let form = match config.kind {
            RouterKind::SoftmaxTopk => softmax_topk::form(config),
            RouterKind::TopkSoftmax => topk_softmax::form(),
            RouterKind::TopP => top_p::form(config),
            RouterKind::Sinkhorn => sinkhorn::form(config),
            RouterKind::Switch => switch::form(),
            RouterKind::Gshard => gshard::form(),
            RouterKind::NoisyTopk => noisy_topk::form(),
            RouterKind::SigmoidBias => sigmoid_bias::form(config),
        };
        GateForm { choice: Choice { groups: group_limit(config, form.score), ..form.choice }, ..form }
    }

    /// Softmax scores, weights as they are, nothing else.
    const PLAIN: GateForm = GateForm {
        score: Score::Softmax,
        renormalize: false,
        scale: 1.0,
        noisy: false,
        random_second: false,
        selection_bias: false,
        sinkhorn_iterations: 0,
        choice: Choice { by: RankedBy::Score, groups: None, enough: None },
    };
}

/// The groups a token's experts may come from: ranked by their highest expert where scores are softmax's (DeepSeek-V2), by the sum of
/// their two highest where they are sigmoid's (DeepSeek-V3).
fn group_limit(config: &RouterConfig, score: Score) -> Option<GroupLimit> {
    let by = match score {
        Score::Softmax => GroupRank::Highest,
        Score::Sigmoid => GroupRank::TwoHighest,
    };
    (config.expert_groups > 1).then_some(GroupLimit {
        groups: config.expert_groups,
        chosen: config.groups_per_token,
        by,
    })
}
