//! The gates, one a file, each with the paper it follows.
//!
//! A gate is a description of how logits become choices; `router` runs every description through the same operations.

mod expert_choice;
mod gshard;
pub(super) mod hash;
mod hierarchical;
mod multi_gate;
mod noisy_topk;
mod sigmoid_bias;
mod sinkhorn;
mod softmax_topk;
mod switch;
mod top_p;
mod topk_softmax;

use moe_kernels::{Choice, Fold, GroupLimit, GroupRank, RankedBy, Score};

use super::config::{RouterConfig, RouterKind};

/// Where a gate's logits come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// A matrix with a row an expert.
    Experts,
    /// One with more, whose products are folded.
    Folded(Fold),
    /// The token's hash: there is no matrix.
    Hashed,
}

/// How a gate turns logits into choices and weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateForm {
    /// Where logits come from.
    pub logits: Logits,
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
    /// Whether in training experts choose tokens instead.
    pub experts_choose: bool,
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
            RouterKind::ExpertChoice => expert_choice::form(),
            RouterKind::Hash => hash::form(),
            RouterKind::Hierarchical => hierarchical::form(config),
            RouterKind::MultiGate => multi_gate::form(config),
            // Its choices are replaced by the program's own.
            RouterKind::Custom => GateForm::PLAIN,
        };
        GateForm { choice: Choice { groups: group_limit(config, &form), ..form.choice }, ..form }
    }

    /// Softmax scores, weights as they are, nothing else.
    const PLAIN: GateForm = GateForm {
        logits: Logits::Experts,
        score: Score::Softmax,
        renormalize: false,
        scale: 1.0,
        noisy: false,
        random_second: false,
        selection_bias: false,
        sinkhorn_iterations: 0,
        choice: Choice { by: RankedBy::Score, groups: None, enough: None },
        experts_choose: false,
    };
}

/// The groups a token's experts may come from: ranked by their highest expert where scores are softmax's (DeepSeek-V2), by the sum of
/// their two highest where they are sigmoid's (DeepSeek-V3), by their own probability where groups have one.
fn group_limit(config: &RouterConfig, form: &GateForm) -> Option<GroupLimit> {
    let by = match (form.logits, form.score) {
        (Logits::Folded(Fold::Groups(_)), _) => GroupRank::All,
        (_, Score::Softmax) => GroupRank::Highest,
        (_, Score::Sigmoid) => GroupRank::TwoHighest,
    };
    (config.expert_groups > 1).then_some(GroupLimit {
        groups: config.expert_groups,
        chosen: config.groups_per_token,
        by,
    })
}
