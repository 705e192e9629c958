//! Routing: scores, top-k choice, capacity, balance statistics, and what noisy and random gates need.
//!
//! Everything here is f32: choices made on rounded logits differ between devices.

use crate::{Device, View, ViewMut};

/// Sizes of one routing decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateDims {
    /// T.
    pub tokens: usize,
    /// E, over all ranks.
    pub experts: usize,
    /// k ≤ E.
    pub top_k: usize,
}

impl GateDims {
    /// T·E, after a check that k fits.
    pub(crate) fn logits_len(self) -> usize {
        let Self { tokens, experts, top_k } = self;
        assert!(1 <= top_k && top_k <= experts, "top-{top_k} of {experts} experts: k must be between 1 and E");
        tokens * experts
    }

    /// T·k.
    pub(crate) fn choices_len(self) -> usize {
        self.tokens * self.top_k
    }
}

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts (Switch, Mixtral, OLMoE, Qwen). Softmax over the chosen logits alone is the same as this with
    /// [`GateSpec::renormalize`].
    Softmax,
    /// Sigmoid of each logit (DeepSeek-V3).
    Sigmoid,
}

/// By what a group of experts is ranked: the ranks of its experts, summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupRank {
    /// The highest one (DeepSeek-V2).
    Highest,
    /// The two highest (DeepSeek-V3).
    TwoHighest,
}

/// A bound on the groups of experts that a token's choices may come from: `groups` of E / `groups` consecutive experts each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Groups there are, a divisor of E.
    pub groups: usize,
    /// Groups a token may use, at least k experts in all.
    pub chosen: usize,
    /// What ranks them; ties go to the lower group.
    pub by: GroupRank,
}

impl GroupLimit {
    /// The most groups there can be.
    pub const MOST: usize = 32;
}

/// A token's choices end where their probabilities sum to `mass`, after at least `least` of them (top-p routing, Huang et al. 2024).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Enough {
    /// Summed probability.
    pub mass: f32,
    /// Choices every token has.
    pub least: usize,
}

/// What ranks a token's experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RankedBy {
    /// Their scores.
    #[default]
    Score,
    /// Their logits.
    Logit,
}

/// Which experts are a token's choices: the k highest ranked, of some groups only, and only as many as are enough.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Choice {
    /// What ranks them; a bias that is given to the gate is added to it.
    pub by: RankedBy,
    /// The groups they come from.
    pub groups: Option<GroupLimit>,
    /// How many there are.
    pub enough: Option<Enough>,
}

/// How a token's experts and weights follow from its logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateSpec {
    /// Sizes.
    pub dims: GateDims,
    /// Scores from logits.
    pub score: Score,
    /// Whether the k weights are divided by their sum.
    pub renormalize: bool,
    /// Factor on the weights after that (DeepSeek's routed scaling factor).
    pub scale: f32,
    /// Which experts are chosen.
    pub choice: Choice,
}

impl GateSpec {
    /// T·E, after a check that k and the groups fit.
    pub(crate) fn logits_len(self) -> usize {
        let GateDims { experts, top_k, .. } = self.dims;
        if let Some(GroupLimit { groups, chosen, .. }) = self.choice.groups {
            assert!(
                (1..=GroupLimit::MOST).contains(&groups) && experts.is_multiple_of(groups),
                "{groups} groups of {experts} experts: must divide them and be at most {}",
                GroupLimit::MOST
            );
            assert!(
                chosen <= groups && chosen * (experts / groups) >= top_k,
                "{chosen} of {groups} groups, top-{top_k}"
            );
        }
        self.dims.logits_len()
    }
}

/// What a full expert does with the choices that do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapacityPolicy {
    /// Later tokens are dropped (as Megatron-Core's `position`).
    Position,
    /// The choices with the lowest weight are dropped; ties drop the later token (V-MoE's batch-priority routing).
    Probability,
}

/// A bound on the choices an expert takes from this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// C: choices one expert accepts from these tokens.
    pub per_expert: usize,
    /// Which are dropped.
    pub policy: CapacityPolicy,
}

/// The gradient of a balance loss with respect to a gate's mean probabilities, the same for all tokens of a group.
pub struct BalanceGrad<'a, D: Device> {
    /// `[G, E]`: ∂loss/∂probability of every token in the group.
    pub coefficients: View<'a, D, f32>,
    /// Consecutive tokens that form a group; the last may be shorter.
    pub tokens_per_group: usize,
}

/// How balance statistics become a loss: `Σ_units E · Σ_e f_e · P_e`, `f = counts · f_scale`, `P = prob_sums · p_scale`.
/// A unit is a (layer, group), or a group with its layers pooled (sums over layers first), as Hugging Face does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BalanceSpec {
    /// L: layers in the statistics.
    pub layers: usize,
    /// G: groups of a layer.
    pub groups: usize,
    /// E.
    pub experts: usize,
    /// Whether layers are pooled.
    pub pooled: bool,
    /// f for each count.
    pub f_scale: f32,
    /// P for each unit of probability.
    pub p_scale: f32,
    /// The loss's factor in the training objective: applied to the coefficients, not to the reported loss.
    pub coefficient: f32,
}

/// Routing operations and their backward passes.
pub trait RoutingOps: Device {
    /// Scores of all experts, the choices by [`GateSpec::choice`] (`bias[E]`, where given, decides the choice and never enters a
    /// weight), and their weights. Ties go to the lower expert id; ids are in descending order of choice, −1 with weight 0 where
    /// fewer are enough. `scores[T, E]`, `ids[T, k]`, `weights[T, k]`.
    fn gate(
        &self,
        spec: GateSpec,
        logits: View<'_, Self, f32>,
        bias: Option<View<'_, Self, f32>>,
        scores: ViewMut<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
        weights: ViewMut<'_, Self, f32>,
    );
    /// The bias of a balanced assignment: `bias[E]` (overwritten) such that Σ_t softmax(logits_t + bias) nears T / E for every expert,
    /// by `iterations` of Sinkhorn's algorithm from 0 (Clark et al. 2022, Megatron-LM; BASE, Lewis et al. 2021, solves the limit).
    fn sinkhorn_bias(
        &self,
        dims: GateDims,
        iterations: usize,
        logits: View<'_, Self, f32>,
        bias: ViewMut<'_, Self, f32>,
    );
    /// Backward of [`RoutingOps::gate`]: `dlogits[T, E]` (overwritten) from the weights' gradient, the balance loss's gradient
    /// through the probabilities (scores; for sigmoid, scores divided by their sum), and the z-loss `z_scale · Σ_t lse_t²`
    /// (ST-MoE, Zoph et al. 2022). `ids` are the choices before capacity (−1 entries have no weight gradient but do not leave
    /// the renormalisation: give the ids that [`RoutingOps::gate`] returned).
    #[allow(clippy::too_many_arguments)] // saved tensors of the forward pass, and the three losses that reach a gate
    fn gate_grad(
        &self,
        spec: GateSpec,
        logits: View<'_, Self, f32>,
        scores: View<'_, Self, f32>,
        ids: View<'_, Self, i32>,
        dweights: View<'_, Self, f32>,
        balance: Option<BalanceGrad<'_, Self>>,
        z_scale: f32,
        dlogits: ViewMut<'_, Self, f32>,
    );
    /// Balance statistics, overwritten: `counts[G, E]` choices (−1 ids are not counted) and `prob_sums[G, E]` probabilities (scores; for
    /// sigmoid, scores divided by their sum) over each group of `tokens_per_group` consecutive tokens, and `sums[2]` over all of them: Σ_t lse²,
    /// and Σ_t of the probabilities' entropy in nats.
    #[allow(clippy::too_many_arguments)] // three tensors in, three statistics out
    fn gate_statistics(
        &self,
        spec: GateSpec,
        tokens_per_group: usize,
        logits: View<'_, Self, f32>,
        scores: View<'_, Self, f32>,
        ids: View<'_, Self, i32>,
        counts: ViewMut<'_, Self, f32>,
        prob_sums: ViewMut<'_, Self, f32>,
        sums: ViewMut<'_, Self, f32>,
    );
    /// The balance loss of all layers, added to `loss[0]`, and its `coefficients[L, G, E]` for [`BalanceGrad`] (overwritten), from
    /// `counts[L, G, E]` and `prob_sums[L, G, E]`. No gradient goes through the counts.
    fn balance_loss(
        &self,
        spec: BalanceSpec,
        counts: View<'_, Self, f32>,
        prob_sums: View<'_, Self, f32>,
        loss: ViewMut<'_, Self, f64>,
        coefficients: ViewMut<'_, Self, f32>,
    );
    /// `kept[T, k]`: the ids, with −1 where an expert already has [`Capacity::per_expert`] choices. `dropped[E]`: how many of each expert's
    /// became −1 (overwritten).
    fn apply_capacity(
        &self,
        dims: GateDims,
        capacity: Capacity,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        kept: ViewMut<'_, Self, i32>,
        dropped: ViewMut<'_, Self, f32>,
    );
    /// GShard's random second expert (Lepikhin et al. 2020): `ids[t, 1]` becomes −1 where `2 · weights[t, 1] ≤ uniform[t]`.
    fn drop_second(
        &self,
        dims: GateDims,
        uniform: View<'_, Self, f32>,
        weights: View<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
    );
    /// Noisy top-k gating (Shazeer et al. 2017): `noisy = clean + noise · std`, `std = softplus(raw) + 0.01`, all `[T, E]`, and
    /// `load[E] = Σ_t Φ((clean − threshold) / std)` (overwritten), where the threshold of an expert is the k-th highest of the
    /// *other* experts' noisy logits. k = E: every Φ is 1.
    fn noisy_logits(
        &self,
        dims: GateDims,
        clean: View<'_, Self, f32>,
        raw: View<'_, Self, f32>,
        noise: View<'_, Self, f32>,
        noisy: ViewMut<'_, Self, f32>,
        load: ViewMut<'_, Self, f32>,
    );
    /// Backward of [`RoutingOps::noisy_logits`]: `dclean`, `draw` `[T, E]` (overwritten) from `dnoisy[T, E]` and `dload[E]`. The
    /// thresholds carry gradient.
    #[allow(clippy::too_many_arguments)] // four saved tensors, two gradients in, two out
    fn noisy_logits_grad(
        &self,
        dims: GateDims,
        clean: View<'_, Self, f32>,
        raw: View<'_, Self, f32>,
        noise: View<'_, Self, f32>,
        noisy: View<'_, Self, f32>,
        dnoisy: View<'_, Self, f32>,
        dload: View<'_, Self, f32>,
        dclean: ViewMut<'_, Self, f32>,
        draw: ViewMut<'_, Self, f32>,
    );
    /// `importance[E] = Σ_t` of the weights given to each expert (overwritten).
    fn importance(
        &self,
        dims: GateDims,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        importance: ViewMut<'_, Self, f32>,
    );
    /// Backward of [`RoutingOps::importance`]: `dweights[t, j] += dimportance[ids[t, j]]`.
    fn importance_grad(
        &self,
        dims: GateDims,
        ids: View<'_, Self, i32>,
        dimportance: View<'_, Self, f32>,
        dweights: ViewMut<'_, Self, f32>,
    );
    /// The squared coefficient of variation of `x[E]`, `var / (mean² + 1e-10)` with the unbiased variance (0 for E = 1), added to
    /// `loss[0]`; `dx[E]` is its gradient times `coefficient` (overwritten).
    fn cv_squared(
        &self,
        coefficient: f32,
        x: View<'_, Self, f32>,
        loss: ViewMut<'_, Self, f64>,
        dx: ViewMut<'_, Self, f32>,
    );
}
