//! Every gate, and every way to limit its experts: the rows of the tests that hold for all of them.

use moe_runtime::config::Config;
use moe_runtime::routing::{HiddenActivation, Overflow, RouterConfig, RouterKind};

/// A gate with the choices it leaves.
#[derive(Clone, Copy)]
pub(crate) struct Gate {
    pub(crate) name: &'static str,
    top_k: usize,
    set: fn(&mut RouterConfig),
}

const fn gate(name: &'static str, top_k: usize, set: fn(&mut RouterConfig)) -> Gate {
    Gate { name, top_k, set }
}

pub(crate) const GATES: [Gate; 22] = [
    gate("topk-softmax", 2, |c| c.kind = RouterKind::TopkSoftmax),
    gate("softmax-topk", 2, |c| c.kind = RouterKind::SoftmaxTopk),
    gate("softmax-topk, renormalized", 3, |c| (c.kind, c.renormalize) = (RouterKind::SoftmaxTopk, true)),
    gate("switch", 1, |c| c.kind = RouterKind::Switch),
    gate("switch with jitter", 1, |c| (c.kind, c.input_jitter) = (RouterKind::Switch, 0.1)),
    gate("gshard", 2, |c| c.kind = RouterKind::Gshard),
    gate("noisy-topk", 2, |c| c.kind = RouterKind::NoisyTopk),
    gate("sigmoid-bias", 2, |c| (c.kind, c.weight_scale) = (RouterKind::SigmoidBias, 1.5)),
    gate("sigmoid-bias, renormalized", 2, |c| {
        (c.kind, c.weight_scale, c.renormalize) = (RouterKind::SigmoidBias, 1.5, true);
    }),
    gate("softmax-topk, 2 of 3 groups", 3, |c| {
        (c.kind, c.expert_groups, c.groups_per_token) = (RouterKind::SoftmaxTopk, 3, 2);
    }),
    gate("sigmoid-bias, 1 of 3 groups", 2, |c| {
        (c.kind, c.renormalize, c.expert_groups) = (RouterKind::SigmoidBias, true, 3);
    }),
    // Scores are nearly even at first: some tokens need three experts for this, some four.
    gate("top-p", 4, |c| (c.kind, c.top_p) = (RouterKind::TopP, 0.3)),
    gate("top-p, renormalized", 4, |c| (c.kind, c.top_p, c.renormalize) = (RouterKind::TopP, 0.3, true)),
    gate("sinkhorn", 2, |c| c.kind = RouterKind::Sinkhorn),
    gate("expert-choice", 2, |c| c.kind = RouterKind::ExpertChoice),
    gate("hash", 2, |c| c.kind = RouterKind::Hash),
    gate("hierarchical", 2, |c| (c.kind, c.expert_groups) = (RouterKind::Hierarchical, 3)),
    gate("hierarchical, 2 groups, renormalized", 3, |c| {
        (c.kind, c.expert_groups, c.groups_per_token) = (RouterKind::Hierarchical, 3, 2);
        c.renormalize = true;
    }),
    gate("multi-gate", 2, |c| (c.kind, c.tags) = (RouterKind::MultiGate, 2)),
    gate("two hidden layers, tanh, dropout, jitter", 2, |c| {
        (c.hidden_sizes, c.hidden_activation) = (vec![12, 10], HiddenActivation::Tanh);
        (c.dropout, c.input_jitter) = (0.2, 0.05);
    }),
    gate("noisy-topk with a hidden layer", 2, |c| {
        (c.kind, c.hidden_sizes, c.hidden_activation) = (RouterKind::NoisyTopk, vec![10], HiddenActivation::Gelu);
    }),
    gate("sigmoid-bias with expert dropout", 2, |c| (c.kind, c.expert_dropout) = (RouterKind::SigmoidBias, 0.3)),
];

/// The gate called `name`.
#[allow(dead_code, reason = "not every test looks for one")]
pub(crate) fn gate_named(name: &str) -> Gate {
    GATES.into_iter().find(|gate| gate.name == name).unwrap_or_else(|| panic!("no gate is called {name}"))
}

impl Gate {
    /// Puts the gate into `config`.
    pub(crate) fn choose(&self, config: &mut Config) {
        (self.set)(&mut config.router);
        config.model.top_k = self.top_k;
    }

    fn config(&self) -> RouterConfig {
        let mut config = RouterConfig::default();
        (self.set)(&mut config);
        config
    }

    /// Gives every loss that the gate has beside the balance loss so much weight that an error in its gradient shows.
    #[allow(dead_code, reason = "not every test weighs them")]
    pub(crate) fn weigh_losses(&self, config: &mut Config) {
        // Two levels of softmax leave nothing for a z-loss.
        if self.learns() && self.config().kind != RouterKind::Hierarchical {
            config.router.z_coefficient = 0.05;
        }
        if self.config().kind == RouterKind::NoisyTopk {
            (config.router.importance_coefficient, config.router.load_coefficient) = (0.2, 0.2);
        }
    }

    /// Whether its choices are the k highest scores.
    #[allow(dead_code, reason = "not every test asks")]
    pub(crate) fn chooses_highest(&self) -> bool {
        let config = self.config();
        let plain = matches!(
            config.kind,
            RouterKind::TopkSoftmax
                | RouterKind::SoftmaxTopk
                | RouterKind::Switch
                | RouterKind::Gshard
                | RouterKind::SigmoidBias
        );
        let one_matrix = config.hidden_sizes.is_empty() && config.input_jitter == 0.0;
        plain && one_matrix && config.expert_groups == 1 && config.expert_dropout == 0.0
    }

    /// Whether a token's choices depend on the others of its pass.
    #[allow(dead_code, reason = "not every test asks")]
    pub(crate) fn looks_at_the_pass(&self) -> bool {
        matches!(self.config().kind, RouterKind::Sinkhorn | RouterKind::ExpertChoice)
    }

    /// Whether equal tokens have equal choices.
    #[allow(dead_code, reason = "not every test asks")]
    pub(crate) fn treats_equals_alike(&self) -> bool {
        let config = self.config();
        let draws = config.input_jitter > 0.0 || config.dropout > 0.0;
        !draws && !matches!(config.kind, RouterKind::NoisyTopk | RouterKind::ExpertChoice)
    }

    /// Whether it has weights to learn.
    pub(crate) fn learns(&self) -> bool {
        self.config().kind != RouterKind::Hash
    }

    /// Whether a bias corrects its choice.
    #[allow(dead_code, reason = "not every test asks")]
    pub(crate) fn is_biased(&self) -> bool {
        self.config().kind == RouterKind::SigmoidBias
    }
}

/// A bound on an expert's choices.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    Dropless,
    /// Three quarters of the fair share: something overflows even where loads are even.
    Tight(Overflow),
}

pub(crate) const LIMITS: [Limit; 4] = [
    Limit::Dropless,
    Limit::Tight(Overflow::Position),
    Limit::Tight(Overflow::Probability),
    Limit::Tight(Overflow::Reroute),
];

impl Limit {
    /// Puts the bound into `config`, where its gate can have it.
    pub(crate) fn choose(self, config: &mut Config) {
        if let Self::Tight(overflow) = self
            && config.router.kind != RouterKind::ExpertChoice
        {
            config.router.capacity_factor = Some(0.75);
            let learns_one = !matches!(config.router.kind, RouterKind::Gshard | RouterKind::Hash);
            let next_best = learns_one && config.router.expert_groups == 1 && config.router.expert_dropout == 0.0;
            config.router.overflow = if next_best { overflow } else { Overflow::Position };
        }
    }

    /// Whether choices of `gate` are dropped; None: it depends on whether others have room.
    pub(crate) fn drops_with(self, gate: &Gate) -> Option<bool> {
        match self {
            Self::Tight(Overflow::Reroute) => None,
            Self::Tight(_) => Some(gate.config().kind != RouterKind::ExpertChoice),
            Self::Dropless => Some(false),
        }
    }
}
