//! `RoutingOps` on CUDA: kernels of `gate.cu`, `statistics.cu` and `noisy.cu`.
//!
//! Owns the checks of shapes, the choice of a kernel by the length of a row, and where partial sums lie in the scratch.

use super::launch::{Grid, launch};
use super::{Cuda, CudaAct, pointer, pointer_mut, pointer_or_null};
use crate::ops::check_len;
use crate::{
    BalanceFactors, BalanceGrad, BalanceSpec, Capacity, CapacityPolicy, Choice, Device, GateDims, GateSpec, GroupRank,
    RankedBy, RoutingOps, Score, TokenLosses, View, ViewMut,
};

/// Threads of a block, and tokens of it where each warp has one.
const THREADS: u32 = 256;
const TOKENS_PER_BLOCK: usize = 8;
/// Threads of the kernels that one block an item runs.
const WIDE: u32 = 1024;
/// Tokens that one block sums.
const STRETCH: usize = 32;
/// Columns of partial sums that one block adds up.
const COLUMNS: usize = 32;
/// The longest rows and choices: what a warp holds in registers.
const MOST_EXPERTS: usize = GateDims::MOST_ON_GPUS.0;
const MOST_CHOICES: usize = GateDims::MOST_ON_GPUS.1;

/// T·E, after a check that E and k fit.
fn logits_len(dims: GateDims) -> usize {
    let (len, GateDims { experts, top_k, .. }) = (dims.logits_len(), dims);
    assert!(experts <= MOST_EXPERTS, "{experts} experts; the CUDA gate takes at most {MOST_EXPERTS}");
    assert!(top_k <= MOST_CHOICES, "top-{top_k}; the CUDA gate takes at most {MOST_CHOICES}");
    len
}

/// T, E, k as the kernels take them.
fn sizes(dims: GateDims) -> (i32, i32, i32) {
    (dims.tokens as i32, dims.experts as i32, dims.top_k as i32)
}

fn is_sigmoid(spec: GateSpec) -> i32 {
    i32::from(spec.score == Score::Sigmoid)
}

/// How many of a group's highest ranks count, as the kernel takes it; 0: all.
fn summed_ranks(by: GroupRank) -> i32 {
    match by {
        GroupRank::Highest => 1,
        GroupRank::TwoHighest => 2,
        GroupRank::All => 0,
    }
}

macro_rules! sized {
    ($name:literal, $experts:expr) => {
        match $experts {
            0..=32 => concat!($name, "_1"),
            33..=64 => concat!($name, "_2"),
            65..=128 => concat!($name, "_4"),
            129..=256 => concat!($name, "_8"),
            _ => concat!($name, "_16"),
        }
    };
}

fn warp_a_token(dims: GateDims) -> Grid {
    Grid::new(dims.tokens.div_ceil(TOKENS_PER_BLOCK), THREADS)
}

impl<A: CudaAct> Cuda<A> {
    /// Adds up `n` partial sums `[groups, n, columns]` at `partial`.
    fn sum_stretches(&self, [groups, n, columns]: [usize; 3], partial: u64, out: u64) {
        let grid = Grid::new(groups * columns.div_ceil(COLUMNS), WIDE);
        launch!(self, "sum_stretches", grid; n as i32, columns as i32, partial, out);
    }
}

impl<A: CudaAct> RoutingOps for Cuda<A> {
    fn gate(
        &self,
        spec: GateSpec,
        logits: View<'_, Self, f32>,
        bias: Option<View<'_, Self, f32>>,
        scores: ViewMut<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
        weights: ViewMut<'_, Self, f32>,
    ) {
        check_len("logits", logits.len(), logits_len(spec.dims).max(spec.logits_len()));
        check_len("scores", scores.len(), logits.len());
        check_len("ids", ids.len(), spec.dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        if let Some(bias) = bias {
            check_len("bias", bias.len(), spec.dims.experts);
        }
        let (tokens, experts, top_k) = sizes(spec.dims);
        let Choice { by, groups, enough } = spec.choice;
        let (groups, groups_chosen, summed) =
            groups.map_or((1, 1, 0), |limit| (limit.groups, limit.chosen, summed_ranks(limit.by)));
        let (mass, least) = enough.map_or((0.0, top_k), |enough| (enough.mass, enough.least as i32));
        launch!(
            self, sized!("gate", spec.dims.experts), warp_a_token(spec.dims);
            tokens, experts, top_k, is_sigmoid(spec), i32::from(spec.renormalize), spec.scale,
            i32::from(by == RankedBy::Logit), groups as i32, groups_chosen as i32, summed, mass, least,
            pointer(logits), pointer_or_null(bias), pointer_mut(scores), pointer_mut(ids), pointer_mut(weights)
        );
    }

    fn sinkhorn_bias(
        &self,
        dims: GateDims,
        iterations: usize,
        logits: View<'_, Self, f32>,
        mut bias: ViewMut<'_, Self, f32>,
    ) {
        check_len("logits", logits.len(), logits_len(dims));
        check_len("bias", bias.len(), dims.experts);
        self.fill(bias.reborrow(), 0.0);
        let (e, stretches) = (dims.experts, dims.tokens.div_ceil(STRETCH));
        let table = stretches * e * size_of::<f64>();
        let Some(scratch) = self.scratch(table + e * size_of::<f32>()) else { return };
        let (partial, sums) = (scratch.at(0), scratch.at(table));
        let bias = pointer_mut(bias);
        for _ in 0..iterations {
            launch!(
                self, sized!("sinkhorn_sums", e), Grid::new(stretches, THREADS);
                dims.tokens as i32, e as i32, pointer(logits), bias, partial
            );
            self.sum_stretches([1, stretches, e], partial, sums);
            let share = dims.tokens as f32 / e as f32;
            launch!(self, "sinkhorn_step", Grid::new(e.div_ceil(THREADS as usize), THREADS); e as i32, share, sums, bias);
        }
    }

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
    ) {
        check_len("logits", logits.len(), logits_len(spec.dims));
        check_len("scores", scores.len(), logits.len());
        check_len("dlogits", dlogits.len(), logits.len());
        check_len("ids", ids.len(), spec.dims.choices_len());
        check_len("dweights", dweights.len(), ids.len());
        let (coefficients, tokens_per_group) = balance.map_or((0, 1), |balance| {
            let tokens_per_group = balance.tokens_per_group.clamp(1, spec.dims.tokens.max(1));
            let groups = spec.dims.tokens.div_ceil(tokens_per_group);
            let given = balance.coefficients.len();
            assert!(given >= groups * spec.dims.experts, "{given} coefficients for {groups} groups of {:?}", spec.dims);
            (pointer(balance.coefficients), tokens_per_group)
        });
        let (tokens, experts, top_k) = sizes(spec.dims);
        let TokenLosses { z_scale, entropy_scale } = losses;
        launch!(
            self, sized!("gate_grad", spec.dims.experts), warp_a_token(spec.dims);
            tokens, experts, top_k, is_sigmoid(spec), i32::from(spec.renormalize), spec.scale, z_scale, entropy_scale,
            tokens_per_group as i32, pointer(logits), pointer(scores), pointer(ids), pointer(dweights), coefficients,
            pointer_mut(dlogits)
        );
    }

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
    ) {
        let GateDims { tokens, experts, .. } = spec.dims;
        check_len("logits", logits.len(), logits_len(spec.dims));
        check_len("scores", scores.len(), logits.len());
        check_len("ids", ids.len(), spec.dims.choices_len());
        check_len("prob_sums", prob_sums.len(), counts.len());
        check_len("sums", sums.len(), 2);
        let length = tokens_per_group.clamp(1, tokens.max(1));
        let groups = counts.len() / experts;
        assert!(
            counts.len().is_multiple_of(experts) && groups >= tokens.div_ceil(length),
            "{} counts for {tokens} tokens in groups of {length} and {experts} experts",
            counts.len()
        );
        let stretches = length.div_ceil(STRETCH);
        let blocks = groups * stretches;
        let table = blocks * experts * size_of::<f64>();
        let Some(scratch) = self.scratch(2 * table + 2 * blocks * size_of::<f64>()) else { return };
        let [count_parts, prob_parts, parts] = [0, table, 2 * table].map(|offset| scratch.at(offset));
        let (tokens, width, top_k) = sizes(spec.dims);
        launch!(
            self, sized!("gate_statistics", experts), Grid::new(blocks, THREADS);
            tokens, width, top_k, is_sigmoid(spec), length as i32, stretches as i32,
            pointer(logits), pointer(scores), pointer(ids), count_parts, prob_parts, parts
        );
        // A block for each 32 columns of counts and of probabilities, and one for the sums.
        let grid = Grid::new(2 * groups * experts.div_ceil(COLUMNS) + 1, WIDE);
        launch!(
            self, "sum_gate_statistics", grid;
            groups as i32, stretches as i32, width, count_parts, prob_parts, parts,
            pointer_mut(counts), pointer_mut(prob_sums), pointer_mut(sums)
        );
    }

    fn balance_loss(
        &self,
        spec: BalanceSpec,
        counts: View<'_, Self, f32>,
        prob_sums: View<'_, Self, f32>,
        losses: ViewMut<'_, Self, f64>,
        coefficients: ViewMut<'_, Self, f32>,
    ) {
        check_len("losses", losses.len(), BalanceSpec::LOSSES);
        check_len("counts", counts.len(), spec.layers * spec.groups * spec.experts);
        check_len("prob_sums", prob_sums.len(), counts.len());
        check_len("coefficients", coefficients.len(), counts.len());
        let BalanceFactors { switch, devices, importance, difference, entropy } = spec.factors;
        launch!(
            self, "balance_loss", Grid::new(1, WIDE);
            spec.layers as i32, spec.groups as i32, spec.experts as i32, i32::from(spec.pooled),
            spec.f_scale, spec.p_scale, spec.loss_scale, spec.devices as i32, spec.least_entropy,
            switch, devices, importance, difference, entropy,
            pointer(counts), pointer(prob_sums), pointer_mut(losses), pointer_mut(coefficients)
        );
    }

    fn apply_capacity(
        &self,
        dims: GateDims,
        capacity: Capacity,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        kept: ViewMut<'_, Self, i32>,
        dropped: ViewMut<'_, Self, f32>,
    ) {
        check_len("ids", ids.len(), dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        check_len("kept", kept.len(), ids.len());
        check_len("dropped", dropped.len(), dims.experts);
        let per_expert = capacity.per_expert.min(i32::MAX as usize) as i32;
        launch!(
            self, "apply_capacity", Grid::new(dims.experts, WIDE);
            ids.len() as i32, per_expert, i32::from(capacity.policy == CapacityPolicy::Probability),
            pointer(ids), pointer(weights), pointer_mut(kept), pointer_mut(dropped)
        );
    }

    fn reroute(
        &self,
        dims: GateDims,
        per_expert: usize,
        rounds: usize,
        scores: View<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
        kept: ViewMut<'_, Self, i32>,
        dropped: ViewMut<'_, Self, f32>,
    ) {
        check_len("scores", scores.len(), logits_len(dims));
        check_len("ids", ids.len(), dims.choices_len());
        check_len("kept", kept.len(), ids.len());
        check_len("dropped", dropped.len(), dims.experts);
        let (choices, e) = (dims.choices_len(), dims.experts);
        let room_bytes = e * size_of::<i32>();
        let Some(scratch) = self.scratch(room_bytes.next_multiple_of(16) + choices * size_of::<i32>()) else { return };
        let (room, wishes) = (scratch.at(0), scratch.at(room_bytes.next_multiple_of(16)));
        let (n, per_expert) = (choices as i32, per_expert.min(i32::MAX as usize) as i32);
        let (tokens, experts, top_k) = sizes(dims);
        let (scores, ids, kept, dropped) = (pointer(scores), pointer_mut(ids), pointer_mut(kept), pointer_mut(dropped));
        let an_expert = || Grid::new(e, WIDE);
        launch!(self, "reroute_count", an_expert(); n, per_expert, ids, kept, room, dropped);
        for _ in 0..rounds {
            launch!(
                self, sized!("reroute_wish", e), warp_a_token(dims);
                tokens, experts, top_k, scores, room, ids, kept, wishes
            );
            launch!(self, "reroute_take", an_expert(); n, room, wishes, ids, kept);
        }
        launch!(self, "reroute_count", an_expert(); n, per_expert, ids, kept, room, dropped);
    }

    fn weigh(
        &self,
        spec: GateSpec,
        scores: View<'_, Self, f32>,
        ids: View<'_, Self, i32>,
        weights: ViewMut<'_, Self, f32>,
    ) {
        check_len("scores", scores.len(), logits_len(spec.dims));
        check_len("ids", ids.len(), spec.dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        let (tokens, experts, top_k) = sizes(spec.dims);
        launch!(
            self, "weigh", warp_a_token(spec.dims);
            tokens, experts, top_k, i32::from(spec.renormalize), spec.scale, pointer(scores), pointer(ids), pointer_mut(weights)
        );
    }

    fn drop_second(
        &self,
        dims: GateDims,
        uniform: View<'_, Self, f32>,
        weights: View<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
    ) {
        check_len("uniform", uniform.len(), dims.tokens);
        check_len("ids", ids.len(), dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        assert!(dims.top_k >= 2, "a random second expert needs two choices a token, not {}", dims.top_k);
        launch!(
            self, "drop_second", Grid::cover(dims.tokens, THREADS, self.facts());
            dims.tokens as i32, dims.top_k as i32, pointer(uniform), pointer(weights), pointer_mut(ids)
        );
    }

    fn noisy_logits(
        &self,
        dims: GateDims,
        clean: View<'_, Self, f32>,
        raw: View<'_, Self, f32>,
        noise: View<'_, Self, f32>,
        noisy: ViewMut<'_, Self, f32>,
        load: ViewMut<'_, Self, f32>,
    ) {
        check_len("clean", clean.len(), logits_len(dims));
        check_len("raw", raw.len(), clean.len());
        check_len("noise", noise.len(), clean.len());
        check_len("noisy", noisy.len(), clean.len());
        check_len("load", load.len(), dims.experts);
        let blocks = dims.tokens.div_ceil(STRETCH);
        let Some(scratch) = self.scratch(blocks * dims.experts * size_of::<f64>()) else { return };
        let (tokens, experts, top_k) = sizes(dims);
        launch!(
            self, "noisy_logits", Grid::new(blocks, THREADS);
            tokens, experts, top_k, pointer(clean), pointer(raw), pointer(noise), pointer_mut(noisy), scratch.at(0)
        );
        self.sum_stretches([1, blocks, dims.experts], scratch.at(0), pointer_mut(load));
    }

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
    ) {
        check_len("clean", clean.len(), logits_len(dims));
        check_len("raw", raw.len(), clean.len());
        check_len("noise", noise.len(), clean.len());
        check_len("noisy", noisy.len(), clean.len());
        check_len("dnoisy", dnoisy.len(), clean.len());
        check_len("dload", dload.len(), dims.experts);
        check_len("dclean", dclean.len(), clean.len());
        check_len("draw", draw.len(), clean.len());
        let (tokens, experts, top_k) = sizes(dims);
        launch!(
            self, "noisy_logits_grad", warp_a_token(dims);
            tokens, experts, top_k, pointer(clean), pointer(raw), pointer(noise), pointer(noisy), pointer(dnoisy),
            pointer(dload), pointer_mut(dclean), pointer_mut(draw)
        );
    }

    fn importance(
        &self,
        dims: GateDims,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        importance: ViewMut<'_, Self, f32>,
    ) {
        logits_len(dims);
        check_len("ids", ids.len(), dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        check_len("importance", importance.len(), dims.experts);
        let blocks = dims.tokens.div_ceil(STRETCH);
        let Some(scratch) = self.scratch(blocks * dims.experts * size_of::<f64>()) else { return };
        let (tokens, experts, top_k) = sizes(dims);
        launch!(
            self, "importance", Grid::new(blocks, THREADS);
            tokens, experts, top_k, pointer(ids), pointer(weights), scratch.at(0)
        );
        self.sum_stretches([1, blocks, dims.experts], scratch.at(0), pointer_mut(importance));
    }

    fn importance_grad(
        &self,
        dims: GateDims,
        ids: View<'_, Self, i32>,
        dimportance: View<'_, Self, f32>,
        dweights: ViewMut<'_, Self, f32>,
    ) {
        check_len("ids", ids.len(), dims.choices_len());
        check_len("dweights", dweights.len(), ids.len());
        check_len("dimportance", dimportance.len(), dims.experts);
        launch!(
            self, "importance_grad", Grid::cover(ids.len(), THREADS, self.facts());
            ids.len() as i32, pointer(ids), pointer(dimportance), pointer_mut(dweights)
        );
    }

    fn cv_squared(
        &self,
        weight: f32,
        coefficient: f32,
        x: View<'_, Self, f32>,
        loss: ViewMut<'_, Self, f64>,
        dx: ViewMut<'_, Self, f32>,
    ) {
        check_len("dx", dx.len(), x.len());
        launch!(
            self, "cv_squared", Grid::new(1, THREADS);
            x.len() as i32, weight, coefficient, pointer(x), pointer_mut(loss), pointer_mut(dx)
        );
    }
}
