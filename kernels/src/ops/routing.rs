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
    /// Scores of all experts, the k highest of them (plus `bias`, where given: it decides the choice and never enters a
    /// weight), and their weights. Ties go to the lower expert id; ids are in descending order of choice.
    /// `scores[T, E]`, `ids[T, k]`, `weights[T, k]`.
    fn gate(
        &self,
        spec: GateSpec,
        logits: View<'_, Self, f32>,
        bias: Option<View<'_, Self, f32>>,
        scores: ViewMut<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
        weights: ViewMut<'_, Self, f32>,
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
    /// sigmoid, scores divided by their sum) over each group of `tokens_per_group` consecutive tokens, and `z_sum[1]`, Σ_t lse².
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
        z_sum: ViewMut<'_, Self, f32>,
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
    /// `kept[T, k]`: the ids, with −1 where an expert already has [`Capacity::per_expert`] choices. `dropped[0]`: how many became −1.
    fn apply_capacity(
        &self,
        dims: GateDims,
        capacity: Capacity,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        kept: ViewMut<'_, Self, i32>,
        dropped: ViewMut<'_, Self, i32>,
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
