//! Noisy top-k gating and the importance and variation losses against references in f64, gradients by finite differences.

use super::normal;
use crate::cpu::testkit::{assert_close, finite_differences, on_threads, rng, uniform};
use crate::{Cpu, GateDims, RoutingOps, View, ViewMut};

/// f32 results computed in f64 from f32 logits: the rounding of the logits, over a std of at least 0.5, is what is left.
const TOLERANCE: f64 = 64.0 * f32::EPSILON as f64;

fn forward(dims: GateDims, clean: &Vec<f32>, raw: &Vec<f32>, noise: &Vec<f32>) -> (Vec<f32>, Vec<f32>) {
    let (mut noisy, mut load) = (vec![f32::NAN; clean.len()], vec![f32::NAN; dims.experts]);
    let (clean, raw, noise) = (View::of(clean), View::of(raw), View::of(noise));
    Cpu.noisy_logits(dims, clean, raw, noise, ViewMut::of(&mut noisy), ViewMut::of(&mut load));
    (noisy, load)
}

/// Word by word: each expert's threshold comes from sorting the others.
fn reference(dims: GateDims, clean: &[f64], raw: &[f64], noise: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let std = |i: usize| (1.0 + raw[i].exp()).ln() + 0.01;
    let noisy: Vec<f64> = (0..clean.len()).map(|i| clean[i] + f64::from(noise[i]) * std(i)).collect();
    let mut load = vec![0.0; dims.experts];
    for (i, clean) in clean.iter().enumerate() {
        let (t, e) = (i / dims.experts, i % dims.experts);
        let mut others: Vec<f64> = (0..dims.experts).filter(|&o| o != e).map(|o| noisy[t * dims.experts + o]).collect();
        others.sort_by(|a, b| b.total_cmp(a));
        load[e] += others.get(dims.top_k - 1).map_or(1.0, |threshold| normal::cumulative((clean - threshold) / std(i)));
    }
    (noisy, load)
}

fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Clean logits, raw deviations, noise.
fn inputs(dims: GateDims, seed: u64) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut rng = rng(seed);
    let mut draw = |scale| uniform(&mut rng, dims.tokens * dims.experts, scale);
    (draw(2.0), draw(1.0), draw(1.5))
}

const SIZES: [(usize, usize, usize); 6] = [(0, 4, 2), (9, 4, 1), (9, 8, 2), (5, 4, 3), (5, 4, 4), (3, 70, 6)];

#[test]
fn noisy_logits_and_load_follow_the_definition() {
    for (tokens, experts, top_k) in SIZES {
        let dims = GateDims { tokens, experts, top_k };
        let (clean, raw, noise) = inputs(dims, 21);
        let (noisy, load) = forward(dims, &clean, &raw, &noise);
        let (want_noisy, want_load) = reference(dims, &to_f64(&clean), &to_f64(&raw), &noise);
        assert_close("noisy", &noisy, &want_noisy, TOLERANCE);
        assert_close("load", &load, &want_load, TOLERANCE * tokens as f64);
    }
}

fn grad(
    dims: GateDims,
    (clean, raw, noise): (&Vec<f32>, &Vec<f32>, &Vec<f32>),
    dnoisy: &Vec<f32>,
    dload: &Vec<f32>,
) -> (Vec<f32>, Vec<f32>) {
    let (noisy, _) = forward(dims, clean, raw, noise);
    let (mut dclean, mut draw) = (vec![f32::NAN; clean.len()], vec![f32::NAN; clean.len()]);
    Cpu.noisy_logits_grad(
        dims,
        View::of(clean),
        View::of(raw),
        View::of(noise),
        View::of(&noisy),
        View::of(dnoisy),
        View::of(dload),
        ViewMut::of(&mut dclean),
        ViewMut::of(&mut draw),
    );
    (dclean, draw)
}

#[test]
fn gradients_agree_with_finite_differences_through_the_thresholds() {
    for (tokens, experts, top_k) in SIZES {
        let dims = GateDims { tokens, experts, top_k };
        let (clean, raw, noise) = inputs(dims, 22);
        let dnoisy = uniform(&mut rng(23), clean.len(), 1.0);
        let dload = uniform(&mut rng(24), experts, 1.0);
        let dot = |a: &[f64], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum::<f64>();
        let loss = |clean: &[f64], raw: &[f64]| {
            let (noisy, load) = reference(dims, clean, raw, &noise);
            dot(&noisy, &dnoisy) + dot(&load, &dload)
        };
        let (dclean, draw) = grad(dims, (&clean, &raw, &noise), &dnoisy, &dload);
        let raw_64 = to_f64(&raw);
        let clean_64 = to_f64(&clean);
        // A threshold sums the slopes of up to E experts.
        let tolerance = TOLERANCE * experts as f64;
        assert_close("dclean", &dclean, &finite_differences(&clean, |clean| loss(clean, &raw_64)), tolerance);
        assert_close("draw", &draw, &finite_differences(&raw, |raw| loss(&clean_64, raw)), tolerance);
    }
}

#[test]
fn extreme_deviations_stay_finite() {
    let dims = GateDims { tokens: 2, experts: 3, top_k: 1 };
    let (clean, raw) = (vec![500.0, -500.0, 0.0, 1e30, 0.0, -1e30], vec![-200.0, -200.0, -200.0, 90.0, 90.0, 90.0]);
    let noise = vec![0.5; 6];
    let (noisy, load) = forward(dims, &clean, &raw, &noise);
    let (dclean, draw) = grad(dims, (&clean, &raw, &noise), &vec![1.0; 6], &vec![1.0; 3]);
    for values in [noisy, load, dclean, draw] {
        assert!(values.iter().all(|v| v.is_finite()), "{values:?}");
    }
}

#[test]
fn importance_sums_weights_and_hands_its_gradient_to_each_choice() {
    let dims = GateDims { tokens: 3, experts: 4, top_k: 2 };
    let (ids, weights) = (vec![0, 3, 3, -1, 0, 1], vec![0.25, 0.75, 1.0, f32::NAN, 0.5, 0.5]);
    let mut importance = vec![f32::NAN; 4];
    Cpu.importance(dims, View::of(&ids), View::of(&weights), ViewMut::of(&mut importance));
    assert_eq!(importance, [0.75, 0.5, 0.0, 1.75]);
    let mut dweights = vec![1.0; 6];
    let dimportance = vec![10.0, 20.0, 30.0, 40.0];
    Cpu.importance_grad(dims, View::of(&ids), View::of(&dimportance), ViewMut::of(&mut dweights));
    assert_eq!(dweights, [11.0, 41.0, 41.0, 1.0, 11.0, 21.0]);
}

#[test]
fn the_squared_variation_and_its_gradient_follow_the_definition() {
    let cv_squared = |x: &[f64]| {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0) / (mean * mean + 1e-10)
    };
    for x in [vec![1.0, 2.0], vec![3.0, 0.5, 0.25, 1.0, 7.0], vec![2.0; 6]] {
        let (mut loss, mut dx) = (vec![5.0], vec![f32::NAN; x.len()]);
        Cpu.cv_squared(2.0, 0.25, View::of(&x), ViewMut::of(&mut loss), ViewMut::of(&mut dx));
        assert!((loss[0] - 5.0 - 2.0 * cv_squared(&to_f64(&x))).abs() < 1e-12, "{x:?}: {}", loss[0]);
        let want: Vec<f64> = finite_differences(&x, cv_squared).iter().map(|d| 0.5 * d).collect();
        assert_close("dx", &dx, &want, TOLERANCE);
    }
}

#[test]
fn one_expert_and_no_load_at_all_have_no_variation() {
    for x in [vec![3.0], vec![0.0; 4]] {
        let (mut loss, mut dx) = (vec![0.0], vec![f32::NAN; x.len()]);
        Cpu.cv_squared(1.0, 1.0, View::of(&x), ViewMut::of(&mut loss), ViewMut::of(&mut dx));
        assert_eq!((loss[0], dx), (0.0, vec![0.0; x.len()]));
    }
}

#[test]
fn load_has_the_same_bits_on_any_number_of_threads() {
    let dims = GateDims { tokens: 2000, experts: 8, top_k: 2 };
    let (clean, raw, noise) = inputs(dims, 25);
    let run = |threads| on_threads(threads, || forward(dims, &clean, &raw, &noise));
    assert_eq!(run(1), run(2));
}
