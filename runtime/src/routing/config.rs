//! What a user can say about routing.

use moe_kernels::{ActivationKind, CapacityPolicy};
use serde::{Deserialize, Serialize};

use super::gates::{GateForm, Logits};

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
    /// Experts choose tokens, as many each (Zhou et al. 2022).
    ExpertChoice,
    /// A hash of the token decides; nothing is learned (Roller et al. 2021).
    Hash,
    /// A softmax over groups, then one inside each (Jordan and Jacobs 1994; Shazeer et al. 2017).
    Hierarchical,
    /// One router a tag of the data over the same experts (MMoE, Ma et al. 2018).
    MultiGate,
    /// The gate that the program was built with.
    Custom,
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
    /// Later tokens, to the next best expert that has room.
    Reroute,
}

impl From<Overflow> for CapacityPolicy {
    fn from(overflow: Overflow) -> Self {
        match overflow {
            Overflow::Position | Overflow::Reroute => CapacityPolicy::Position,
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
    /// Whether the chosen weights are divided by their sum; `softmax-topk`, `sigmoid-bias`, `top-p`, `sinkhorn`, `hierarchical` and
    /// `multi-gate` leave the choice.
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
    /// Factor of cv²(importance), of summed weights (`noisy-topk`).
    pub importance_coefficient: f32,
    /// Factor of cv²(load) (`noisy-topk`).
    pub load_coefficient: f32,
    /// Factor of cv² of summed probabilities (gates without noise); 0: none.
    pub mass_coefficient: f32,
    /// Factor of the balance loss over groups of experts (DeepSeekMoE's devices); 0: none.
    pub device_coefficient: f32,
    /// Groups of neighbouring experts that it evens out.
    pub device_groups: usize,
    /// Factor of Σ (usage − importance)², both as shares; 0: none.
    pub difference_coefficient: f32,
    /// Factor of the mean entropy of a token's probabilities (LIMoE's local loss, Mustafa et al. 2022): sure choices; 0: none.
    pub entropy_coefficient: f32,
    /// Factor of what the entropy of the mean probabilities lacks (LIMoE's global loss): varied choices; 0: none.
    pub batch_entropy_coefficient: f32,
    /// Entropy in nats from which on it lacks nothing; absent: ln(model.experts).
    pub batch_entropy_target: Option<f32>,
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
    /// Routers to choose from by a sequence's tag, `data.sources.NAME.tag` (`multi-gate`).
    pub tags: usize,
    /// Widths of layers between a token and its logits; none: one matrix.
    pub hidden_sizes: Vec<usize>,
    /// What follows each of them.
    pub hidden_activation: HiddenActivation,
    /// Probability with which an element behind such a layer is dropped in training.
    pub dropout: f32,
    /// In training a router's input is multiplied by uniform numbers in 1 ± this (Switch's jitter); 0: not.
    pub input_jitter: f32,
    /// Steps over which noise (`noisy-topk`) and jitter go down to nothing; 0: they stay.
    pub noise_steps: u64,
    /// Probability with which an expert can't be chosen in a step, at least `model.top_k` staying; 0: none.
    pub expert_dropout: f32,
    /// Capacity of an expert over its fair share of this rank's choices; absent: dropless.
    pub capacity_factor: Option<f32>,
    /// What it is at first, from where it goes evenly to `capacity_factor`; absent: the same.
    pub capacity_factor_start: Option<f32>,
    /// Steps that takes.
    pub capacity_steps: u64,
    /// What it is in evaluation; absent: the same.
    pub capacity_factor_eval: Option<f32>,
    /// What overflows.
    pub overflow: Overflow,
}

/// The activation of a router's hidden layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HiddenActivation {
    /// max(0, x).
    Relu,
    /// x · Φ(x) (Hendrycks and Gimpel 2016).
    Gelu,
    /// x · sigmoid(x).
    #[default]
    Silu,
    /// tanh.
    Tanh,
}

impl From<HiddenActivation> for ActivationKind {
    fn from(activation: HiddenActivation) -> Self {
        match activation {
            HiddenActivation::Relu => Self::Relu,
            HiddenActivation::Gelu => Self::Gelu,
            HiddenActivation::Silu => Self::Silu,
            HiddenActivation::Tanh => Self::Tanh,
        }
    }
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
            mass_coefficient: 0.0,
            device_coefficient: 0.0,
            device_groups: 1,
            difference_coefficient: 0.0,
            entropy_coefficient: 0.0,
            batch_entropy_coefficient: 0.0,
            batch_entropy_target: None,
            bias_update_rate: 0.001,
            expert_groups: 1,
            groups_per_token: 1,
            top_p: 0.8,
            least_choices: 1,
            sinkhorn_iterations: 10,
            tags: 0,
            hidden_sizes: Vec::new(),
            hidden_activation: HiddenActivation::Silu,
            dropout: 0.0,
            input_jitter: 0.0,
            noise_steps: 0,
            expert_dropout: 0.0,
            capacity_factor: None,
            capacity_factor_start: None,
            capacity_steps: 0,
            capacity_factor_eval: None,
            overflow: Overflow::Position,
        }
    }
}

impl RouterConfig {
    /// The most hidden layers of a router.
    pub const MOST_HIDDEN: usize = 3;

    /// Whether the gate's own cv² losses are formed.
    pub fn is_noisy(&self) -> bool {
        self.kind == RouterKind::NoisyTopk
    }

    /// Factor of cv²(importance): of weights or, without noise, of probabilities.
    pub fn importance(&self) -> f32 {
        if self.is_noisy() { self.importance_coefficient } else { self.mass_coefficient }
    }

    /// Numbers that the router's last matrix gives for a token of `experts` experts; 0: there is no matrix.
    pub fn rows(&self, experts: usize) -> usize {
        match GateForm::of(self).logits {
            Logits::Experts => experts,
            Logits::Folded(fold) => fold.width(experts),
            Logits::Hashed => 0,
        }
    }

    /// Places for choices that a token has: more than `top_k` where experts choose.
    pub fn slots(&self, top_k: usize, experts: usize) -> usize {
        if self.kind == RouterKind::ExpertChoice { experts } else { top_k }
    }

    /// Whether in training a token's choices depend on tokens behind it.
    pub fn looks_ahead(&self) -> bool {
        let over_all = self.capacity_factor.is_some() && self.overflow != Overflow::Position;
        matches!(self.kind, RouterKind::ExpertChoice | RouterKind::Sinkhorn) || over_all
    }

    /// What is left of noise in the step after `step` steps: 1 to 0.
    pub fn noise_at(&self, step: u64) -> f32 {
        if self.noise_steps == 0 { 1.0 } else { 1.0 - (step as f64 / self.noise_steps as f64).min(1.0) as f32 }
    }

    /// C of `tokens` tokens on a rank after `step` steps: `ceil(factor · k · T / E)`; None: dropless.
    pub fn capacity(&self, tokens: usize, (top_k, experts): (usize, usize), step: Option<u64>) -> Option<usize> {
        let end = f64::from(self.capacity_factor?);
        let factor = match (step, self.capacity_factor_start, self.capacity_factor_eval) {
            (None, _, Some(eval)) => f64::from(eval),
            (Some(step), Some(start), _) if step < self.capacity_steps => {
                let start = f64::from(start);
                start + (end - start) * step as f64 / self.capacity_steps as f64
            }
            _ => end,
        };
        Some((factor * (top_k * tokens) as f64 / experts as f64).ceil() as usize)
    }
}
