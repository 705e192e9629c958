//! Every gate, and every way to limit its experts: the rows of the tests that hold for all of them.

use moe_runtime::config::Config;
use moe_runtime::routing::{Overflow, RouterKind};

/// A gate with the choices it leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    pub(crate) name: &'static str,
    kind: RouterKind,
    renormalize: bool,
    top_k: usize,
    /// Groups of experts, and how many of them a token may use.
    groups: (usize, usize),
}

const fn gate(name: &'static str, kind: RouterKind, renormalize: bool, top_k: usize) -> Gate {
    Gate { name, kind, renormalize, top_k, groups: (1, 1) }
}

const fn grouped(gate: Gate, groups: usize, chosen: usize) -> Gate {
    Gate { groups: (groups, chosen), ..gate }
}

pub(crate) const GATES: [Gate; 13] = [
    gate("topk-softmax", RouterKind::TopkSoftmax, false, 2),
    gate("softmax-topk", RouterKind::SoftmaxTopk, false, 2),
    gate("softmax-topk, renormalized", RouterKind::SoftmaxTopk, true, 3),
    gate("switch", RouterKind::Switch, false, 1),
    gate("gshard", RouterKind::Gshard, false, 2),
    gate("noisy-topk", RouterKind::NoisyTopk, false, 2),
    gate("sigmoid-bias", RouterKind::SigmoidBias, false, 2),
    gate("sigmoid-bias, renormalized", RouterKind::SigmoidBias, true, 2),
    grouped(gate("softmax-topk, 2 of 3 groups", RouterKind::SoftmaxTopk, false, 3), 3, 2),
    grouped(gate("sigmoid-bias, 1 of 3 groups", RouterKind::SigmoidBias, true, 2), 3, 1),
    gate("top-p", RouterKind::TopP, false, 4),
    gate("top-p, renormalized", RouterKind::TopP, true, 4),
    gate("sinkhorn", RouterKind::Sinkhorn, false, 2),
];

impl Gate {
    /// Puts the gate into `config`.
    pub(crate) fn choose(&self, config: &mut Config) {
        config.router.kind = self.kind;
        config.router.renormalize = self.renormalize;
        config.model.top_k = self.top_k;
        (config.router.expert_groups, config.router.groups_per_token) = self.groups;
        // Scores are nearly even at first: some tokens need three experts for this, some four.
        config.router.top_p = 0.3;
        if self.kind == RouterKind::SigmoidBias {
            config.router.weight_scale = 1.5;
        }
    }

    /// Whether its choices are the k highest scores.
    pub(crate) fn chooses_highest(&self) -> bool {
        let other = matches!(self.kind, RouterKind::NoisyTopk | RouterKind::TopP | RouterKind::Sinkhorn);
        !other && self.groups == (1, 1)
    }

    /// Whether a token's choices depend on the others of its pass.
    pub(crate) fn looks_at_the_pass(&self) -> bool {
        self.kind == RouterKind::Sinkhorn
    }

    /// Whether a bias corrects its choice.
    pub(crate) fn is_biased(&self) -> bool {
        self.kind == RouterKind::SigmoidBias
    }
}

/// A bound on an expert's choices.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    Dropless,
    /// Three quarters of the fair share: something overflows even where loads are even.
    Tight(Overflow),
}

pub(crate) const LIMITS: [Limit; 3] =
    [Limit::Dropless, Limit::Tight(Overflow::Position), Limit::Tight(Overflow::Probability)];

impl Limit {
    /// Puts the bound into `config`.
    pub(crate) fn choose(self, config: &mut Config) {
        if let Self::Tight(overflow) = self {
            config.router.capacity_factor = Some(0.75);
            config.router.overflow = overflow;
        }
    }

    /// Whether choices are dropped.
    pub(crate) fn drops(self) -> bool {
        matches!(self, Self::Tight(_))
    }
}
