//! Noisy top-k gating (Shazeer et al. 2017): the perturbed logits, the smooth load, and their backward pass.
//!
//! Owns what stands between the two linear maps of the gate and the choice. It never chooses: `gate` does, on the noisy logits.

use rayon::prelude::*;

use super::gate::beats;
use super::{columns, normal};
use crate::GateDims;

/// The least standard deviation of the noise.
const MIN_STD: f32 = 0.01;

/// Experts whose gradient one task handles, at least.
const MIN_LOGITS_PER_TASK: usize = 1024;

fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Derivative of [`softplus`].
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn std(raw: f32) -> f32 {
    softplus(raw) + MIN_STD
}

/// `noisy = clean + noise · std(raw)`.
pub(super) fn perturb(clean: &[f32], raw: &[f32], noise: &[f32], noisy: &mut [f32]) {
    let inputs = clean.iter().zip(raw).zip(noise);
    for (noisy, ((clean, raw), noise)) in noisy.iter_mut().zip(inputs) {
        *noisy = clean + noise * std(*raw);
    }
}

/// Logits before and after the noise, each `[T, E]`.
pub(super) struct Perturbed<'a> {
    /// Sizes.
    pub(super) dims: GateDims,
    /// Logits without noise.
    pub(super) clean: &'a [f32],
    /// What softplus makes the standard deviation of.
    pub(super) raw: &'a [f32],
    /// Logits with noise.
    pub(super) noisy: &'a [f32],
}

/// Which noisy logits are the thresholds of one token: what an expert must exceed to be chosen, were its noise drawn again.
struct Thresholds {
    /// The k-th highest: the threshold of the experts that are not chosen.
    outside: usize,
    /// The next one: the threshold of those that are.
    inside: usize,
}

impl Thresholds {
    /// `None` when every expert is chosen whatever the noise.
    fn of(noisy: &[f32], k: usize) -> Option<Self> {
        if k == noisy.len() {
            return None;
        }
        let outside = (1..k).fold(next_best(noisy, None), |last, _| next_best(noisy, Some(last)));
        Some(Self { outside, inside: next_best(noisy, Some(outside)) })
    }

    /// The expert whose noisy logit is the threshold of expert e.
    fn for_expert(&self, noisy: &[f32], e: usize) -> usize {
        if e == self.outside || goes_before(noisy, e, self.outside) { self.inside } else { self.outside }
    }
}

/// Whether expert a is chosen before expert b: higher logit, then lower id.
fn goes_before(noisy: &[f32], a: usize, b: usize) -> bool {
    beats(noisy[a], noisy[b]) || (!beats(noisy[b], noisy[a]) && a < b)
}

/// The expert that follows `last` in the order of choice, or the first one.
fn next_best(noisy: &[f32], last: Option<usize>) -> usize {
    let after_last = |e: &usize| last.is_none_or(|last| goes_before(noisy, last, *e));
    let first = |a: usize, b: usize| if goes_before(noisy, b, a) { b } else { a };
    (0..noisy.len()).filter(after_last).reduce(first).unwrap_or(0)
}

impl Perturbed<'_> {
    fn row<'a>(&self, of: &'a [f32], t: usize) -> &'a [f32] {
        &of[t * self.dims.experts..(t + 1) * self.dims.experts]
    }

    /// `(clean − threshold) / std` of one expert of a token's rows, and the std.
    fn margin(clean: f32, raw: f32, threshold: f32) -> (f64, f64) {
        let std = f64::from(std(raw));
        ((f64::from(clean) - f64::from(threshold)) / std, std)
    }
}

/// `load[E]` of [`crate::RoutingOps::noisy_logits`].
pub(super) fn load(logits: &Perturbed<'_>, load: &mut [f32]) {
    columns::sum_columns(0..logits.dims.tokens, load, |t, columns, sums| {
        let noisy = logits.row(logits.noisy, t);
        let (clean, raw) = (logits.row(logits.clean, t), logits.row(logits.raw, t));
        let Some(thresholds) = Thresholds::of(noisy, logits.dims.top_k) else {
            sums.iter_mut().for_each(|sum| *sum += 1.0);
            return;
        };
        for (e, sum) in columns.zip(sums) {
            let (z, _) = Perturbed::margin(clean[e], raw[e], noisy[thresholds.for_expert(noisy, e)]);
            *sum += normal::cumulative(z);
        }
    });
}

/// The gradients that arrive at the noisy logits, and the noise.
pub(super) struct Incoming<'a> {
    /// `[T, E]`.
    pub(super) noise: &'a [f32],
    /// `[T, E]`.
    pub(super) dnoisy: &'a [f32],
    /// `[E]`.
    pub(super) dload: &'a [f32],
}

/// See [`crate::RoutingOps::noisy_logits_grad`].
pub(super) fn grad(logits: &Perturbed<'_>, incoming: &Incoming<'_>, dclean: &mut [f32], draw: &mut [f32]) {
    let GateDims { tokens, experts, .. } = logits.dims;
    let per_task = tokens.div_ceil(rayon::current_num_threads()).max(MIN_LOGITS_PER_TASK.div_ceil(experts));
    let tasks = dclean.par_chunks_mut(per_task * experts).zip(draw.par_chunks_mut(per_task * experts));
    tasks.enumerate().for_each(|(task, (dclean, draw))| {
        let rows = dclean.chunks_exact_mut(experts).zip(draw.chunks_exact_mut(experts));
        for (i, (dclean, draw)) in rows.enumerate() {
            token_grad(logits, incoming, task * per_task + i, dclean, draw);
        }
    });
}

/// One token. With z = (clean − threshold)/std and g = dload · φ(z)/std: clean gets g, the threshold −g, std −g·z; the threshold is
/// a noisy logit, which hands its gradient on to its own clean logit and std.
fn token_grad(logits: &Perturbed<'_>, incoming: &Incoming<'_>, t: usize, dclean: &mut [f32], draw: &mut [f32]) {
    let (clean, raw, noisy) = (logits.row(logits.clean, t), logits.row(logits.raw, t), logits.row(logits.noisy, t));
    let (noise, dnoisy) = (logits.row(incoming.noise, t), logits.row(incoming.dnoisy, t));
    let thresholds = Thresholds::of(noisy, logits.dims.top_k);
    let through_load = |e: usize| {
        let Some(thresholds) = &thresholds else { return (0, 0.0, 0.0) };
        let threshold = thresholds.for_expert(noisy, e);
        let (z, std) = Perturbed::margin(clean[e], raw[e], noisy[threshold]);
        let slope = f64::from(incoming.dload[e]) * normal::density(z) / std;
        // Far from its threshold an expert has no slope; 0 · ∞ must not become NaN.
        (threshold, slope, if slope == 0.0 { 0.0 } else { -slope * z })
    };
    let (mut dinside, mut doutside) = (0.0, 0.0);
    for e in 0..noisy.len() {
        let (threshold, slope, dstd) = through_load(e);
        (dclean[e], draw[e]) = (slope as f32, dstd as f32);
        match &thresholds {
            Some(thresholds) if threshold == thresholds.inside => dinside -= slope,
            _ => doutside -= slope,
        }
    }
    for e in 0..noisy.len() {
        let at_threshold = match &thresholds {
            Some(thresholds) if e == thresholds.inside => dinside,
            Some(thresholds) if e == thresholds.outside => doutside,
            _ => 0.0,
        };
        let dnoisy = f64::from(dnoisy[e]) + at_threshold;
        let dstd = f64::from(draw[e]) + dnoisy * f64::from(noise[e]);
        dclean[e] = (f64::from(dclean[e]) + dnoisy) as f32;
        draw[e] = (dstd * sigmoid(f64::from(raw[e]))) as f32;
    }
}
