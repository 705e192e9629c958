//! Scores, top-k choice and weights, and the way back from the weights' gradient and the gate's losses to the logits.
//!
//! Owns the arithmetic of one token's routing and its spread over threads. It never sums over tokens (`statistics` does) and
//! never drops a choice (`capacity` does).

use rayon::prelude::*;

use crate::{Enough, GateSpec, GroupLimit, GroupRank, RankedBy, Score, TokenLosses};

/// Added to a sum of scores before dividing by it. Nothing to any ordinary sum; when all chosen scores underflow to 0 the
/// weights are 0 and the gradients finite instead of NaN.
const TINY: f32 = 1e-20;

/// Work below which one thread is faster than waking others, in logits.
const MIN_LOGITS_PER_TASK: usize = 4096;

/// Tokens one task handles.
fn tokens_per_task(spec: GateSpec) -> usize {
    let even = spec.dims.tokens.div_ceil(rayon::current_num_threads());
    even.max(MIN_LOGITS_PER_TASK.div_ceil(spec.dims.experts)).max(1)
}

/// See [`crate::RoutingOps::gate`]. In choosing, a NaN ranks below every number, so that k valid, distinct ids come out of any
/// input; NaN logits show up as NaN scores and weights.
pub(super) fn gate(
    spec: GateSpec,
    logits: &[f32],
    bias: Option<&[f32]>,
    scores: &mut [f32],
    ids: &mut [i32],
    weights: &mut [f32],
) {
    let (experts, k, tokens) = (spec.dims.experts, spec.dims.top_k, tokens_per_task(spec));
    let outputs =
        (scores.par_chunks_mut(tokens * experts), ids.par_chunks_mut(tokens * k), weights.par_chunks_mut(tokens * k));
    (logits.par_chunks(tokens * experts), outputs).into_par_iter().for_each(|(logits, (scores, ids, weights))| {
        let rows = logits.chunks_exact(experts).zip(scores.chunks_exact_mut(experts));
        let choices = ids.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k));
        for ((logits, scores), (ids, weights)) in rows.zip(choices) {
            match spec.score {
                Score::Softmax => softmax(logits, scores),
                Score::Sigmoid => sigmoid(logits, scores),
            }
            let ranked = match spec.choice.by {
                RankedBy::Score => &*scores,
                RankedBy::Logit => logits,
            };
            let rank = |e: usize| ranked[e] + bias.map_or(0.0, |bias| bias[e]);
            match spec.choice.groups {
                None => choose(rank, 0..experts, ids, weights),
                Some(limit) => choose(rank, within_groups(limit, experts, rank), ids, weights),
            }
            if let Some(enough) = spec.choice.enough {
                end_choices(spec.score, enough, scores, ids);
            }
            weigh(spec, scores, ids, weights);
        }
    });
}

/// The highest logit, and Σ exp(logit − highest).
pub(in crate::cpu) fn softmax_sum(logits: impl Iterator<Item = f32> + Clone) -> (f32, f32) {
    let most = logits.clone().fold(f32::NEG_INFINITY, f32::max);
    (most, logits.map(|logit| (logit - most).exp()).sum())
}

fn softmax(logits: &[f32], scores: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (score, logit) in scores.iter_mut().zip(logits) {
        *score = (logit - max).exp();
        sum += *score;
    }
    let scale = 1.0 / sum;
    scores.iter_mut().for_each(|score| *score *= scale);
}

fn sigmoid(logits: &[f32], scores: &mut [f32]) {
    for (score, logit) in scores.iter_mut().zip(logits) {
        *score = 1.0 / (1.0 + (-logit).exp());
    }
}

/// Whether `a` is chosen before a `b` of lower id.
pub(super) fn beats(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

/// The `ids.len()` of `experts`, which ascend, with the highest values, descending, ties to the lower id. `best` receives their values:
/// the ranking is kept in the outputs themselves, so that nothing is allocated.
fn choose(value: impl Fn(usize) -> f32, experts: impl Iterator<Item = usize>, ids: &mut [i32], best: &mut [f32]) {
    let k = ids.len();
    let mut filled = 0;
    for e in experts {
        let v = value(e);
        if filled == k && !beats(v, best[k - 1]) {
            continue;
        }
        let mut at = filled.min(k - 1);
        while at > 0 && beats(v, best[at - 1]) {
            best[at] = best[at - 1];
            ids[at] = ids[at - 1];
            at -= 1;
        }
        best[at] = v;
        ids[at] = e as i32;
        filled = (filled + 1).min(k);
    }
}

/// The experts of the groups that a token may use.
fn within_groups(limit: GroupLimit, experts: usize, rank: impl Fn(usize) -> f32) -> impl Iterator<Item = usize> {
    let size = experts / limit.groups;
    let of_group = |group: usize| {
        let members = group * size..(group + 1) * size;
        let (mut ids, mut best) = ([0; 2], [0.0; 2]);
        let n = match limit.by {
            GroupRank::Highest => 1,
            GroupRank::TwoHighest => size.min(2),
            GroupRank::All => return members.map(&rank).sum(),
        };
        choose(&rank, members, &mut ids[..n], &mut best[..n]);
        best[..n].iter().sum()
    };
    let mut ranks = [0.0f32; GroupLimit::MOST];
    ranks[..limit.groups].iter_mut().enumerate().for_each(|(group, rank)| *rank = of_group(group));
    let (mut ids, mut best) = ([0; GroupLimit::MOST], [0.0; GroupLimit::MOST]);
    choose(|group| ranks[group], 0..limit.groups, &mut ids[..limit.chosen], &mut best[..limit.chosen]);
    let allowed = ids[..limit.chosen].iter().fold(0u32, |mask, &group| mask | 1 << group);
    (0..experts).filter(move |e| allowed >> (e / size) & 1 == 1)
}

/// Takes back the choices after those that are enough.
fn end_choices(score: Score, enough: Enough, scores: &[f32], ids: &mut [i32]) {
    let factor = probability_factor(score, scores);
    let mut sum = 0.0;
    for (j, id) in ids.iter_mut().enumerate() {
        if j >= enough.least && sum * factor >= enough.mass {
            *id = -1;
        } else {
            sum += scores[*id as usize];
        }
    }
}

/// See [`crate::RoutingOps::weigh`].
pub(super) fn weigh_all(spec: GateSpec, scores: &[f32], ids: &[i32], weights: &mut [f32]) {
    let (experts, k) = (spec.dims.experts, spec.dims.top_k);
    let choices = ids.chunks_exact(k).zip(weights.chunks_exact_mut(k));
    scores.chunks_exact(experts).zip(choices).for_each(|(scores, (ids, weights))| weigh(spec, scores, ids, weights));
}

/// Weights from the chosen scores: scaled, and first divided by their sum where the spec says so.
fn weigh(spec: GateSpec, scores: &[f32], ids: &[i32], weights: &mut [f32]) {
    let factor = if spec.renormalize { spec.scale / chosen_sum(scores, ids) } else { spec.scale };
    for (weight, &id) in weights.iter_mut().zip(ids) {
        *weight = usize::try_from(id).map_or(0.0, |e| scores[e] * factor);
    }
}

/// The divisor of renormalisation. Ids of −1 are passed over.
fn chosen_sum(scores: &[f32], ids: &[i32]) -> f32 {
    chosen(ids).map(|(_, e)| scores[e]).sum::<f32>() + TINY
}

/// The choices that exist: (j, expert).
fn chosen(ids: &[i32]) -> impl Iterator<Item = (usize, usize)> {
    ids.iter().enumerate().filter(|&(_, &id)| id >= 0).map(|(j, &id)| (j, id as usize))
}

/// What a token's probabilities are multiplied with: 1 for softmax scores, 1 / Σ scores for sigmoid ones.
pub(super) fn probability_factor(score: Score, scores: &[f32]) -> f32 {
    match score {
        Score::Softmax => 1.0,
        Score::Sigmoid => 1.0 / (scores.iter().sum::<f32>() + TINY),
    }
}

/// `ln Σ_e exp(logits[e])`. The softmax scores already hold it: the highest one is exp(max − lse).
pub(super) fn log_sum_exp(score: Score, logits: &[f32], scores: &[f32]) -> f32 {
    match score {
        Score::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            max - scores.iter().copied().fold(0.0, f32::max).ln()
        }
        Score::Sigmoid => {
            let (max, sum) = softmax_sum(logits.iter().copied());
            max + sum.ln()
        }
    }
}

/// What [`gate_grad`] works from: the tensors saved by the forward pass and the gradients that arrive.
pub(super) struct Given<'a> {
    /// `[T, E]`.
    pub(super) logits: &'a [f32],
    /// `[T, E]`.
    pub(super) scores: &'a [f32],
    /// `[T, k]`.
    pub(super) ids: &'a [i32],
    /// `[T, k]`.
    pub(super) dweights: &'a [f32],
    /// ∂loss/∂probability `[G, E]`, and the tokens of a group.
    pub(super) balance: Option<(&'a [f32], usize)>,
    /// The tokens' own losses.
    pub(super) losses: TokenLosses,
}

/// See [`crate::RoutingOps::gate_grad`]. A token's row of `dlogits` holds the scores' gradient until it is turned into the logits'.
pub(super) fn gate_grad(spec: GateSpec, given: &Given<'_>, dlogits: &mut [f32]) {
    let (experts, k, tokens) = (spec.dims.experts, spec.dims.top_k, tokens_per_task(spec));
    dlogits.par_chunks_mut(tokens * experts).enumerate().for_each(|(task, dlogits)| {
        for (i, grad) in dlogits.chunks_exact_mut(experts).enumerate() {
            let t = task * tokens + i;
            let (row, choices) = (t * experts..(t + 1) * experts, t * k..(t + 1) * k);
            let (logits, scores) = (&given.logits[row.clone()], &given.scores[row]);
            grad.fill(0.0);
            add_weights_grad(spec, scores, &given.ids[choices.clone()], &given.dweights[choices], grad);
            if let Some((coefficients, tokens_per_group)) = given.balance {
                let group = t / tokens_per_group;
                add_balance_grad(spec.score, scores, &coefficients[group * experts..(group + 1) * experts], grad);
            }
            let TokenLosses { z_scale, entropy_scale } = given.losses;
            if entropy_scale != 0.0 {
                add_entropy_grad(spec.score, scores, entropy_scale, grad);
            }
            scores_grad_to_logits(spec.score, scores, grad);
            if z_scale != 0.0 {
                add_z_grad(spec.score, logits, scores, z_scale, grad);
            }
        }
    });
}

/// Through scale and renormalisation: with w = s / Σ s, ∂w_j/∂s_i = (δ_ij − w_j) / Σ s.
fn add_weights_grad(spec: GateSpec, scores: &[f32], ids: &[i32], dweights: &[f32], dscores: &mut [f32]) {
    if !spec.renormalize {
        chosen(ids).for_each(|(j, e)| dscores[e] += spec.scale * dweights[j]);
        return;
    }
    let scale = 1.0 / chosen_sum(scores, ids);
    let mean: f32 = chosen(ids).map(|(j, e)| scores[e] * scale * dweights[j]).sum();
    chosen(ids).for_each(|(j, e)| dscores[e] += spec.scale * scale * (dweights[j] - mean));
}

/// Through the probabilities, which are the scores themselves or, for sigmoid scores, the scores divided by their sum.
fn add_balance_grad(score: Score, scores: &[f32], coefficients: &[f32], dscores: &mut [f32]) {
    let factor = probability_factor(score, scores);
    let mean: f32 = match score {
        Score::Softmax => 0.0,
        Score::Sigmoid => scores.iter().zip(coefficients).map(|(s, c)| s * factor * c).sum(),
    };
    for (dscore, coefficient) in dscores.iter_mut().zip(coefficients) {
        *dscore += factor * (coefficient - mean);
    }
}

/// ∂H/∂score_e = factor · (−ln p_e − H), p = factor · score.
fn add_entropy_grad(score: Score, scores: &[f32], scale: f32, dscores: &mut [f32]) {
    let factor = probability_factor(score, scores);
    let surprise = |s: &f32| if *s > 0.0 { -(s * factor).ln() } else { 0.0 };
    let entropy: f32 = scores.iter().map(|s| s * factor * surprise(s)).sum();
    for (dscore, s) in dscores.iter_mut().zip(scores) {
        if *s > 0.0 {
            *dscore += scale * factor * (surprise(s) - entropy);
        }
    }
}

fn scores_grad_to_logits(score: Score, scores: &[f32], grad: &mut [f32]) {
    match score {
        Score::Softmax => {
            let mean: f32 = scores.iter().zip(&*grad).map(|(s, d)| s * d).sum();
            grad.iter_mut().zip(scores).for_each(|(d, s)| *d = s * (*d - mean));
        }
        Score::Sigmoid => grad.iter_mut().zip(scores).for_each(|(d, s)| *d *= s * (1.0 - s)),
    }
}

/// ∂(lse²)/∂logit_e = 2 · lse · softmax_e.
fn add_z_grad(score: Score, logits: &[f32], scores: &[f32], z_scale: f32, dlogits: &mut [f32]) {
    let lse = log_sum_exp(score, logits, scores);
    let factor = 2.0 * z_scale * lse;
    match score {
        Score::Softmax => dlogits.iter_mut().zip(scores).for_each(|(d, s)| *d += factor * s),
        Score::Sigmoid => dlogits.iter_mut().zip(logits).for_each(|(d, l)| *d += factor * (l - lse).exp()),
    }
}
