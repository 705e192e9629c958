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
    /// The most experts and the most choices a token that GPUs route: what a warp holds in registers.
    pub const MOST_ON_GPUS: (usize, usize) = (512, 32);

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
    /// All of them: where ranks are a softmax, the group's own probability.
    All,
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

/// What a token's own probabilities cost: losses that no other token has a part in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenLosses {
    /// Factor of Σ_t lse², the z-loss (ST-MoE, Zoph et al. 2022).
    pub z_scale: f32,
    /// Factor of Σ_t of the entropy of a token's probabilities (LIMoE's local loss, Mustafa et al. 2022).
    pub entropy_scale: f32,
}

/// Factors of the balance losses in the training objective: applied to the coefficients, not to the reported losses. In a unit of n tokens,
/// with f = counts · f_scale, p = prob_sums · p_scale, P = prob_sums / n:
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BalanceFactors {
    /// Of `E · Σ_e f_e · p_e` (Switch, Fedus et al. 2021).
    pub switch: f32,
    /// Of `D · Σ_d (Σ_{e of d} f_e) · (Σ_{e of d} p_e)`, over D groups of neighbouring experts (DeepSeekMoE's device-level loss, 2024).
    pub devices: f32,
    /// Of cv²(P), weighted by n · p_scale (Shazeer et al. 2017).
    pub importance: f32,
    /// Of Σ_e (counts_e / Σ counts − P_e)², weighted likewise.
    pub difference: f32,
    /// Of max(0, least_entropy − H(P)), weighted likewise (LIMoE's global loss).
    pub entropy: f32,
}

/// How balance statistics become losses, those of [`BalanceFactors`] in its order, summed over units. A unit is a (layer, group), or a group
/// with its layers pooled (sums over layers first), as Hugging Face does.
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
    /// Factor of the reported losses: 1 over the ranks that form the same ones.
    pub loss_scale: f32,
    /// Factors in the objective.
    pub factors: BalanceFactors,
    /// D, a divisor of E.
    pub devices: usize,
    /// Entropy in nats from which on the entropy loss is 0.
    pub least_entropy: f32,
}

impl BalanceSpec {
    /// How many losses there are.
    pub const LOSSES: usize = 5;
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
    /// through the probabilities (scores; for sigmoid, scores divided by their sum), and the tokens' own losses. `ids` are the choices before capacity (−1 entries have no weight gradient but do not leave
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
        losses: TokenLosses,
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
    /// The balance losses of all layers, added to `losses[5]`, and their `coefficients[L, G, E]` for [`BalanceGrad`] (overwritten), from
    /// `counts[L, G, E]` and `prob_sums[L, G, E]`. No gradient goes through the counts.
    fn balance_loss(
        &self,
        spec: BalanceSpec,
        counts: View<'_, Self, f32>,
        prob_sums: View<'_, Self, f32>,
        losses: ViewMut<'_, Self, f64>,
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
    /// Gives choices that [`RoutingOps::apply_capacity`] dropped another expert: in each of `rounds` every dropped choice, in ascending j,
    /// asks the token's highest scored expert that has room and is none of the token's own, and experts take those who ask in order of
    /// tokens. What is taken changes in `ids` and `kept`; `dropped[E]` becomes what is left (of the experts first chosen).
    #[allow(clippy::too_many_arguments)] // the choices in their three forms
    fn reroute(
        &self,
        dims: GateDims,
        per_expert: usize,
        rounds: usize,
        scores: View<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
        kept: ViewMut<'_, Self, i32>,
        dropped: ViewMut<'_, Self, f32>,
    );
    /// The weights that [`RoutingOps::gate`] would give the choices `ids`: `weights[T, k]` (overwritten) from `scores[T, E]`.
    fn weigh(
        &self,
        spec: GateSpec,
        scores: View<'_, Self, f32>,
        ids: View<'_, Self, i32>,
        weights: ViewMut<'_, Self, f32>,
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
    /// The squared coefficient of variation of `x[E]`, `var / (mean² + 1e-10)` with the unbiased variance (0 for E = 1), times
    /// `weight` added to `loss[0]`; `dx[E]` is its gradient times `weight · coefficient` (overwritten).
    fn cv_squared(
        &self,
        weight: f32,
        coefficient: f32,
        x: View<'_, Self, f32>,
        loss: ViewMut<'_, Self, f64>,
        dx: ViewMut<'_, Self, f32>,
    );
}
