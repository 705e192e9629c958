//! The token shuffle's local half and the experts' grouped GEMM.
//!
//! A shuffled row is a (token, destination rank) pair. On arrival a row is expanded to one row per local expert it chose, the
//! expanded rows grouped by expert; combining reduces them back, weighted, before the row goes home.

use crate::{Accumulate, Device, Rows, View, ViewMut};

/// Sizes of a shuffle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShuffleDims {
    /// T on this rank.
    pub tokens: usize,
    /// k.
    pub top_k: usize,
    /// E over all ranks of the expert group; a multiple of `ranks`. Rank r holds experts `r·E/W .. (r+1)·E/W`.
    pub experts: usize,
    /// W: ranks of the expert group.
    pub ranks: usize,
}

impl ShuffleDims {
    /// Experts of one rank.
    pub fn local_experts(&self) -> usize {
        self.experts / self.ranks
    }

    /// The most rows one token can become: one for each of its choices or of the ranks.
    pub fn rows_per_token(&self) -> usize {
        self.top_k.min(self.ranks)
    }
}

/// Where the rows of a shuffle come from: the outputs of [`ExpertOps::shuffle_plan`]. Bound of R: T · [`ShuffleDims::rows_per_token`].
pub struct ShufflePlan<'a, D: Device> {
    /// `[2, W]`: rows for each destination rank, then choices in them: as many rows each will expand them to.
    pub send_counts: ViewMut<'a, D, i32>,
    /// `[R]`: the token of each row; rows sorted by destination rank, then by token.
    pub row_token: ViewMut<'a, D, i32>,
    /// `[R, k]`: the row's expert ids *on its destination* (0 .. E/W), ascending, then −1.
    pub row_experts: ViewMut<'a, D, i32>,
    /// `[R, k]`: which choice `t·k + j` each of them was, then −1.
    pub row_choice: ViewMut<'a, D, i32>,
    /// `[R, k]`: its weight, then 0.
    pub row_weights: ViewMut<'a, D, f32>,
    /// `[T, rows_per_token]`: the rows of each token, ascending rank, then −1.
    pub token_rows: ViewMut<'a, D, i32>,
    /// `[1]`: R.
    pub rows: ViewMut<'a, D, i32>,
}

/// How arrived rows become expanded ones: the outputs of [`ExpertOps::expand_plan`].
pub struct ExpandPlan<'a, D: Device> {
    /// `[1]`: rows that arrived, Σ `recv_counts`.
    pub rows: ViewMut<'a, D, i32>,
    /// `[E_local + 1]`: where each expert's expanded rows begin; the last is N.
    pub offsets: ViewMut<'a, D, i32>,
    /// `[R', k]`: the expanded row of each (row, expert), or −1.
    pub slots: ViewMut<'a, D, i32>,
    /// `[N]`: the arrived row of each expanded row; ascending inside an expert.
    pub source: ViewMut<'a, D, i32>,
    /// `[N]`: which slot `r·k + j` of the arrived rows each expanded row is, so that `slots[origin[i]] = i`.
    pub origin: ViewMut<'a, D, i32>,
}

/// Sizes of a grouped GEMM: group e of E multiplies rows `offsets[e] .. offsets[e+1]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedDims {
    /// Groups.
    pub experts: usize,
    /// Output width.
    pub n: usize,
    /// Input width.
    pub k: usize,
}

/// Sizes of a reduction over expanded rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CombineDims {
    /// Slots of a row.
    pub slots: usize,
    /// H.
    pub width: usize,
}

/// What a weighted SwiGLU's backward pass works from beside its gradient, and what it makes; see [`ExpertOps::weighted_swiglu_grad`].
pub struct WeightedSwiglu<'a, D: Device> {
    /// `[N]`: which weight is each row's.
    pub origin: View<'a, D, i32>,
    /// The weights.
    pub weights: View<'a, D, f32>,
    /// `[N, 2F]`: gate and up.
    pub h: View<'a, D, D::Act>,
    /// `[N, 2F]`: its gradient.
    pub dh: ViewMut<'a, D, D::Act>,
    /// `[N, F]`: weighted activations.
    pub a: ViewMut<'a, D, D::Act>,
    /// The weights' gradients.
    pub dweights: ViewMut<'a, D, f32>,
}

/// Shuffle plans, row movement and grouped GEMM, with backward passes.
pub trait ExpertOps: Device {
    /// Plans the shuffle of `ids[T, k]` (−1: not sent) with `weights[T, k]`. A token whose choices are all −1 gets no row.
    fn shuffle_plan(
        &self,
        dims: ShuffleDims,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        plan: ShufflePlan<'_, Self>,
    );
    /// Plans the expansion of arrived rows. `recv_counts[W]`; `row_experts[R', k]` as [`ShufflePlan::row_experts`] of the senders, or, where
    /// there is one rank, the choices of its tokens as they are: in any order, −1 anywhere.
    fn expand_plan(
        &self,
        dims: ShuffleDims,
        recv_counts: View<'_, Self, i32>,
        row_experts: View<'_, Self, i32>,
        plan: ExpandPlan<'_, Self>,
    );
    /// `dst[i] = src[index[i]]` for rows of `width` elements.
    fn gather_rows(
        &self,
        rows: Rows<'_, Self>,
        width: usize,
        index: View<'_, Self, i32>,
        src: View<'_, Self, Self::Act>,
        dst: ViewMut<'_, Self, Self::Act>,
    );
    /// Expansion: `dst[slots[r, j]] = src[r]` for the slots of the `arrived` rows that are not −1, which is `dst[i] = src[source[i]]` for
    /// the `expanded` ones. Both forms are given: reading each row once, or writing in order, is best for different memories.
    #[allow(clippy::too_many_arguments)] // one copy in two forms
    fn expand_rows(
        &self,
        arrived: Rows<'_, Self>,
        expanded: Rows<'_, Self>,
        dims: CombineDims,
        slots: View<'_, Self, i32>,
        source: View<'_, Self, i32>,
        src: View<'_, Self, Self::Act>,
        dst: ViewMut<'_, Self, Self::Act>,
    ) {
        assert!(slots.len() >= arrived.bound * dims.slots, "{} slots of {} rows", slots.len(), arrived.bound);
        self.gather_rows(expanded, dims.width, source, src, dst);
    }
    /// `out[r] = Σ_j weights[r, j] · y[slots[r, j]]` over the slots that are not −1, ascending j, summed in f32; no weights: all
    /// 1. A row without slots is 0.
    fn weighted_reduce(
        &self,
        rows: Rows<'_, Self>,
        dims: CombineDims,
        slots: View<'_, Self, i32>,
        weights: Option<View<'_, Self, f32>>,
        y: View<'_, Self, Self::Act>,
        out: ViewMut<'_, Self, Self::Act>,
    );
    /// Backward of SwiGLU where the experts' outputs are weighted after the down projection, `out = Σ w · (a · downᵀ)`: the weight is
    /// moved in front of it, so that the outputs need not be kept (Guo et al. 2025, SonicMoE). Row i has the weight
    /// `w = weights[origin[i]]`. From `da[N, F]`, the gradient of a row's output times the down projection *without* the weight, and
    /// the saved `h[N, 2F]`:
    /// `dh[N, 2F]` = SwiGLU's gradient for `w · da`; `a[N, F] = w · swiglu(h)`, for the down projection's weight gradient;
    /// `dweights[origin[i]] = ⟨da[i], swiglu(h[i])⟩`, other entries of `dweights` are left alone. `a` may not be `da`.
    #[allow(clippy::too_many_arguments)] // what is saved, what comes in, and three gradients
    fn weighted_swiglu_grad(
        &self,
        rows: Rows<'_, Self>,
        f: usize,
        origin: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        da: View<'_, Self, Self::Act>,
        h: View<'_, Self, Self::Act>,
        dh: ViewMut<'_, Self, Self::Act>,
        a: ViewMut<'_, Self, Self::Act>,
        dweights: ViewMut<'_, Self, f32>,
    );
    /// As [`ExpertOps::weighted_swiglu_grad`] for experts without a gate, whose activation is GELU, from the saved `h[N, F]`: `dh[N, F]` =
    /// GELU's gradient for `w · da`; `a[N, F] = w · gelu(h)`; `dweights[origin[i]] = ⟨da[i], gelu(h[i])⟩`.
    #[allow(clippy::too_many_arguments)] // as there
    fn weighted_gelu_grad(
        &self,
        rows: Rows<'_, Self>,
        f: usize,
        origin: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        da: View<'_, Self, Self::Act>,
        h: View<'_, Self, Self::Act>,
        dh: ViewMut<'_, Self, Self::Act>,
        a: ViewMut<'_, Self, Self::Act>,
        dweights: ViewMut<'_, Self, f32>,
    );
    /// Brings weight gradients home: `dweights[row_choice[r, j]] = row_dweights[r, j]`; choices without a row get 0.
    /// `dweights[T, k]` is overwritten.
    fn scatter_choices(
        &self,
        rows: Rows<'_, Self>,
        top_k: usize,
        row_choice: View<'_, Self, i32>,
        row_dweights: View<'_, Self, f32>,
        dweights: ViewMut<'_, Self, f32>,
    );

    /// Grouped GEMM: `y[i] = x[i] · w[e]ᵀ` for the rows i of group e. `w[E, n, k]`.
    fn grouped_linear(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        y: ViewMut<'_, Self, Self::Act>,
    );
    /// The experts' first half: [`ExpertOps::grouped_linear`] with the fused gate and up projection `w[E, 2F, H]` into `h[N, 2F]`
    /// (gate columns first), and `a[N, F]` = SwiGLU of it. `dims.n` is 2F.
    #[allow(clippy::too_many_arguments)] // two operations in one
    fn grouped_linear_swiglu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        h: ViewMut<'_, Self, Self::Act>,
        a: ViewMut<'_, Self, Self::Act>,
    );
    /// The first half of experts without a gate: [`ExpertOps::grouped_linear`] with `w[E, F, H]` into `h[N, F]`, and `a[N, F]` = GELU of
    /// it, `x · Φ(x)` with the normal distribution itself and not an approximation by tanh (Hendrycks and Gimpel 2016).
    #[allow(clippy::too_many_arguments)] // two operations in one
    fn grouped_linear_gelu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        x: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        h: ViewMut<'_, Self, Self::Act>,
        a: ViewMut<'_, Self, Self::Act>,
    );
    /// `dx[i] = dy[i] · w[e]`, overwritten.
    fn grouped_linear_grad_input(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        dx: ViewMut<'_, Self, Self::Act>,
    );
    /// The experts' backward pass down to their projections: [`ExpertOps::grouped_linear_grad_input`] of `dy` and the down projection `w`
    /// gives `da`, and [`ExpertOps::weighted_swiglu_grad`] the rest. `dims.k` is F. `da[N, F]` is anything afterwards: where both are one
    /// kernel it does not leave the multiprocessor.
    #[allow(clippy::too_many_arguments)] // two operations in one
    fn grouped_linear_grad_swiglu(
        &self,
        rows: Rows<'_, Self>,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, Self::Act>,
        w: View<'_, Self, Self::Act>,
        da: ViewMut<'_, Self, Self::Act>,
        swiglu: WeightedSwiglu<'_, Self>,
    );
    /// `dw[e] (+)= dyᵀ · x` over the rows of group e; of an empty group that is 0.
    #[allow(clippy::too_many_arguments)] // the operands of one product
    fn grouped_linear_grad_weight(
        &self,
        dims: GroupedDims,
        offsets: View<'_, Self, i32>,
        dy: View<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        dw: ViewMut<'_, Self, f32>,
        accumulate: Accumulate,
    );
}
