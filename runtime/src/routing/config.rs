//! What a user can say about routing.

use moe_kernels::{CapacityPolicy, GroupLimit};
use serde::{Deserialize, Serialize};

use crate::invalid::InvalidValue;

/// How tokens choose experts; each is a file of `routing` that names its paper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterKind {
    /// Softmax over all experts, then the k highest (OLMoE, Qwen-MoE).
    SoftmaxTopk,
    /// The k highest logits, then a softmax over them (Mixtral).
    #[default]
    TopkSoftmax,
    /// Switch: the one highest of a softmax.
    Switch,
    /// GShard: the two highest, the second at random in proportion to its weight.
    Gshard,
    /// Noisy top-k with importance and load losses (Shazeer et al. 2017).
    NoisyTopk,
    /// Sigmoid scores, selection corrected by a bias that balances the load (DeepSeek-V3).
    SigmoidBias,
    /// As many experts as it takes for their probabilities to sum to a threshold (Huang et al. 2024).
    TopP,
    /// A balanced assignment of the pass's tokens by Sinkhorn's algorithm (Clark et al. 2022).
    Sinkhorn,
}

impl RouterKind {
    /// Whether the gate chooses among all experts alike, so that groups can limit it.
    fn takes_groups(self) -> bool {
        matches!(self, Self::SoftmaxTopk | Self::TopkSoftmax | Self::SigmoidBias | Self::TopP)
    }
}

/// Over which tokens the balance loss is formed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceScope {
    /// Each sequence on its own.
    Sequence,
    /// Each rank's micro-batch on its own.
    #[default]
    MicroBatch,
    /// The global batch: loads summed over ranks and over the micro-batches so far.
    Global,
}

/// Which choices a full expert drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overflow {
    /// Later tokens.
    #[default]
    Position,
    /// Lower probabilities.
    Probability,
}

impl From<Overflow> for CapacityPolicy {
    fn from(overflow: Overflow) -> Self {
        match overflow {
            Overflow::Position => CapacityPolicy::Position,
            Overflow::Probability => CapacityPolicy::Probability,
        }
    }
}

/// Routing settings of every MoE block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// The gate.
    pub kind: RouterKind,
    /// Whether the chosen weights are divided by their sum; `softmax-topk`, `sigmoid-bias`, `top-p` and `sinkhorn` leave the choice.
    pub renormalize: bool,
    /// Factor on the weights (`sigmoid-bias`).
    pub weight_scale: f32,
    /// Factor of the balance loss in the objective; 0: none.
    pub balance_coefficient: f32,
    /// Tokens it is formed over.
    pub balance_scope: BalanceScope,
    /// Whether all layers' statistics are pooled into one loss, as Hugging Face does, or each layer has its own.
    pub balance_pooled: bool,
    /// Factor of the z-loss (ST-MoE) in the objective; 0: none.
    pub z_coefficient: f32,
    /// Factor of cv²(importance) (`noisy-topk`).
    pub importance_coefficient: f32,
    /// Factor of cv²(load) (`noisy-topk`).
    pub load_coefficient: f32,
    /// Step of the selection bias after each optimizer step (`sigmoid-bias`).
    pub bias_update_rate: f32,
    /// Groups of neighbouring experts (DeepSeek-V2, -V3: one a node); 1: none.
    pub expert_groups: usize,
    /// Groups that a token's experts may come from.
    pub groups_per_token: usize,
    /// Summed probability after which a token takes no more experts (`top-p`).
    pub top_p: f32,
    /// Experts that every token takes (`top-p`).
    pub least_choices: usize,
    /// Iterations of the balanced assignment (`sinkhorn`).
    pub sinkhorn_iterations: usize,
    /// Capacity of an expert over its fair share of this rank's choices; absent: dropless.
    pub capacity_factor: Option<f32>,
    /// What overflows.
    pub overflow: Overflow,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            kind: RouterKind::TopkSoftmax,
            renormalize: false,
            weight_scale: 1.0,
            balance_coefficient: 0.01,
            balance_scope: BalanceScope::MicroBatch,
            balance_pooled: false,
            z_coefficient: 0.0,
            importance_coefficient: 0.01,
            load_coefficient: 0.01,
            bias_update_rate: 0.001,
            expert_groups: 1,
            groups_per_token: 1,
            top_p: 0.8,
            least_choices: 1,
            sinkhorn_iterations: 10,
            capacity_factor: None,
            overflow: Overflow::Position,
        }
    }
}

impl RouterConfig {
    /// Checks the settings for `experts` of which a token chooses `top_k`.
    pub fn validate(&self, experts: usize, top_k: usize) -> Result<(), InvalidValue> {
        for (key, value) in [
            ("router.balance_coefficient", self.balance_coefficient),
            ("router.z_coefficient", self.z_coefficient),
            ("router.importance_coefficient", self.importance_coefficient),
            ("router.load_coefficient", self.load_coefficient),
            ("router.bias_update_rate", self.bias_update_rate),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(InvalidValue::new(key, value, "must be a number of at least 0"));
            }
        }
        if !(self.weight_scale.is_finite() && self.weight_scale > 0.0) {
            return Err(InvalidValue::new("router.weight_scale", self.weight_scale, "must be a positive number"));
        }
        if let Some(factor) = self.capacity_factor
            && !(factor.is_finite() && factor > 0.0)
        {
            let reason = "must be a positive number; leave the key out for dropless routing";
            return Err(InvalidValue::new("router.capacity_factor", factor, reason));
        }
        self.validate_groups(experts, top_k)?;
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(InvalidValue::new("router.top_p", self.top_p, "must be above 0 and at most 1"));
        }
        if self.kind == RouterKind::TopP && !(1..=top_k).contains(&self.least_choices) {
            let reason = format!("a token takes 1 to model.top_k = {top_k} experts");
            return Err(InvalidValue::new("router.least_choices", self.least_choices, reason));
        }
        if self.sinkhorn_iterations == 0 {
            let reason = "must be at least 1; another router.kind assigns without";
            return Err(InvalidValue::new("router.sinkhorn_iterations", 0, reason));
        }
        let needed = match self.kind {
            RouterKind::Switch => Some((1, "switch sends a token to one expert")),
            RouterKind::Gshard => Some((2, "gshard sends a token to two experts")),
            _ => None,
        };
        match needed {
            Some((k, why)) if top_k != k => {
                Err(InvalidValue::new("model.top_k", top_k, format!("router.kind: {why}; set model.top_k = {k}")))
            }
            _ => {
                debug_assert!(top_k <= experts, "the model checks this first");
                Ok(())
            }
        }
    }

    fn validate_groups(&self, experts: usize, top_k: usize) -> Result<(), InvalidValue> {
        let (groups, chosen) = (self.expert_groups, self.groups_per_token);
        if groups == 1 && chosen == 1 {
            return Ok(());
        }
        if !self.kind.takes_groups() {
            let accepted = "accepted: 1, or router.kind softmax-topk, topk-softmax, sigmoid-bias or top-p";
            let reason = format!("this router.kind chooses among all experts; {accepted}");
            return Err(InvalidValue::new("router.expert_groups", groups, reason));
        }
        if groups == 0 || groups > GroupLimit::MOST || !experts.is_multiple_of(groups) {
            let fit: Vec<usize> = (1..=GroupLimit::MOST).filter(|n| experts.is_multiple_of(*n)).collect();
            let reason = format!("must divide model.experts = {experts}; those that do: {fit:?}");
            return Err(InvalidValue::new("router.expert_groups", groups, reason));
        }
        let least = top_k.div_ceil(experts / groups);
        if !(least..=groups).contains(&chosen) {
            let reason = format!(
                "model.top_k = {top_k} experts come from {least} to {groups} groups of {} experts",
                experts / groups
            );
            return Err(InvalidValue::new("router.groups_per_token", chosen, reason));
        }
        Ok(())
    }

    /// C of `tokens` tokens on a rank: `ceil(capacity_factor · k · T / E)`; None: dropless.
    pub fn capacity(&self, tokens: usize, top_k: usize, experts: usize) -> Option<usize> {
        let factor = f64::from(self.capacity_factor?);
        Some((factor * (top_k * tokens) as f64 / experts as f64).ceil() as usize)
    }
}
