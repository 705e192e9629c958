//! `LogitOps` on the CPU.
//!
//! Owns the arithmetic of one token's row, and of one element's random factor.

use rayon::prelude::*;

use super::routing::gate::softmax_sum;
use super::{slice, slice_mut};
use crate::ops::check_len;
use crate::{Accumulate, Cpu, Fold, LogitOps, Places, Random, RandomFactor, View, ViewMut};

/// Elements below which one thread is faster than waking others.
const MIN_PER_TASK: usize = 4096;

impl LogitOps for Cpu {
    fn fold_logits(
        &self,
        fold: Fold,
        experts: usize,
        raw: View<'_, Self, f32>,
        tags: Option<View<'_, Self, i32>>,
        logits: ViewMut<'_, Self, f32>,
    ) {
        fold.tokens(experts, raw.len(), logits.len(), tags.map(|tags| tags.len()));
        let (raw, tags) = (slice(raw), tags.map(slice));
        let width = fold.width(experts);
        slice_mut(logits).par_chunks_exact_mut(experts).with_min_len(MIN_PER_TASK / width + 1).enumerate().for_each(
            |(t, logits)| {
                let raw = &raw[t * width..(t + 1) * width];
                match fold {
                    Fold::Groups(groups) => {
                        let (of_groups, of_experts) = raw.split_at(groups);
                        let all = log_sum_exp(of_groups);
                        let size = experts / groups;
                        let groups = of_experts.chunks_exact(size).zip(logits.chunks_exact_mut(size)).zip(of_groups);
                        for ((raw, logits), group) in groups {
                            let shift = group - all - log_sum_exp(raw);
                            logits.iter_mut().zip(raw).for_each(|(logit, raw)| *logit = raw + shift);
                        }
                    }
                    Fold::Routers(_) => logits.copy_from_slice(&raw[router(tags, t, experts)]),
                }
            },
        );
    }

    fn fold_logits_grad(
        &self,
        fold: Fold,
        experts: usize,
        raw: View<'_, Self, f32>,
        tags: Option<View<'_, Self, i32>>,
        dlogits: View<'_, Self, f32>,
        draw: ViewMut<'_, Self, f32>,
    ) {
        fold.tokens(experts, raw.len(), dlogits.len(), tags.map(|tags| tags.len()));
        check_len("draw", draw.len(), raw.len());
        let (raw, tags, dlogits) = (slice(raw), tags.map(slice), slice(dlogits));
        let width = fold.width(experts);
        slice_mut(draw).par_chunks_exact_mut(width).with_min_len(MIN_PER_TASK / width + 1).enumerate().for_each(
            |(t, draw)| {
                let (raw, dlogits) = (&raw[t * width..(t + 1) * width], &dlogits[t * experts..(t + 1) * experts]);
                match fold {
                    Fold::Groups(groups) => groups_grad(groups, raw, dlogits, draw),
                    Fold::Routers(_) => {
                        draw.fill(0.0);
                        draw[router(tags, t, experts)].copy_from_slice(dlogits);
                    }
                }
            },
        );
    }

    fn random_factors(
        &self,
        factor: RandomFactor,
        places: Places,
        x: View<'_, Self, f32>,
        y: ViewMut<'_, Self, f32>,
        accumulate: Accumulate,
    ) {
        check_len("y", y.len(), x.len());
        let x = slice(x);
        slice_mut(y).par_iter_mut().with_min_len(MIN_PER_TASK).enumerate().for_each(|(i, y)| {
            let value = x[i] * factor.of(places.uniform(i));
            match accumulate {
                Accumulate::Overwrite => *y = value,
                Accumulate::Add => *y += value,
            }
        });
    }

    fn random_numbers(&self, random: Random, places: Places, y: ViewMut<'_, Self, f32>) {
        slice_mut(y).par_iter_mut().with_min_len(MIN_PER_TASK).enumerate().for_each(|(i, y)| *y = random.of(places, i));
    }
}

/// The logits of token `t`'s router in its row.
fn router(tags: Option<&[i32]>, t: usize, experts: usize) -> std::ops::Range<usize> {
    let tag = tags.map_or(0, |tags| tags[t] as usize);
    tag * experts..(tag + 1) * experts
}

fn log_sum_exp(x: &[f32]) -> f32 {
    let (most, sum) = softmax_sum(x.iter().copied());
    most + sum.ln()
}

/// With l = ln p(group) + ln p(expert | group): each softmax passes on what its members get, less its probability of their sum.
fn groups_grad(groups: usize, raw: &[f32], dlogits: &[f32], draw: &mut [f32]) {
    let size = dlogits.len() / groups;
    let (of_groups, of_experts) = raw.split_at(groups);
    let (dgroups, dexperts) = draw.split_at_mut(groups);
    for (dgroup, dlogits) in dgroups.iter_mut().zip(dlogits.chunks_exact(size)) {
        *dgroup = dlogits.iter().sum();
    }
    let members = of_experts.chunks_exact(size).zip(dlogits.chunks_exact(size)).zip(dexperts.chunks_exact_mut(size));
    for (((raw, dlogits), dexperts), sum) in members.zip(&*dgroups) {
        let all = log_sum_exp(raw);
        for ((d, dlogit), raw) in dexperts.iter_mut().zip(dlogits).zip(raw) {
            *d = dlogit - (raw - all).exp() * sum;
        }
    }
    let (all, sum) = (log_sum_exp(of_groups), dgroups.iter().sum::<f32>());
    dgroups.iter_mut().zip(of_groups).for_each(|(d, raw)| *d -= (raw - all).exp() * sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| 2.0 * (1.3 * i as f32).sin()).collect()
    }

    fn folded(fold: Fold, raw: &Vec<f32>, tags: Option<&Vec<i32>>) -> Vec<f32> {
        let mut logits = vec![f32::NAN; raw.len() / fold.width(6) * 6];
        Cpu.fold_logits(fold, 6, View::of(raw), tags.map(View::of), ViewMut::of(&mut logits));
        logits
    }

    #[test]
    fn probabilities_of_two_levels_are_products_and_sum_to_one() {
        let raw = numbers(2 * 9);
        let softmax = |x: &[f32]| {
            let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
            x.iter().map(|&x| f64::from(x).exp() / sum).collect::<Vec<_>>()
        };
        for (raw, logits) in raw.chunks(9).zip(folded(Fold::Groups(3), &raw, None).chunks(6)) {
            let groups = softmax(&raw[..3]);
            for (e, logit) in logits.iter().enumerate() {
                let inside = softmax(&raw[3 + e / 2 * 2..3 + e / 2 * 2 + 2]);
                let wanted = groups[e / 2] * inside[e % 2];
                assert!((f64::from(*logit).exp() - wanted).abs() < 1e-6, "{logit} {wanted}");
            }
        }
    }

    #[test]
    fn gradients_of_folds_agree_with_finite_differences() {
        let tags = vec![1, 0];
        for (fold, tags) in [(Fold::Groups(3), None), (Fold::Groups(1), None), (Fold::Routers(2), Some(&tags))] {
            let raw = numbers(2 * fold.width(6));
            let dlogits = numbers(14)[2..].to_vec();
            let mut draw = vec![f32::NAN; raw.len()];
            let (r, t, d) = (View::of(&raw), tags.map(View::of), View::of(&dlogits));
            Cpu.fold_logits_grad(fold, 6, r, t, d, ViewMut::of(&mut draw));
            for i in 0..raw.len() {
                let moved = |by: f32| {
                    let mut raw = raw.clone();
                    raw[i] += by;
                    let logits = folded(fold, &raw, tags);
                    logits.iter().zip(&dlogits).map(|(l, d)| f64::from(l * d)).sum::<f64>()
                };
                let wanted = (moved(0.01) - moved(-0.01)) / 0.02;
                assert!((f64::from(draw[i]) - wanted).abs() < 2e-3, "{fold:?}: element {i}: {} {wanted}", draw[i]);
            }
        }
    }

    #[test]
    fn a_token_meets_its_own_router() {
        let raw = numbers(24);
        let tags = vec![1, 0];
        assert_eq!(folded(Fold::Routers(2), &raw, Some(&tags)), [&raw[6..12], &raw[12..18]].concat());
    }

    #[test]
    fn random_factors_have_their_mean_belong_to_places_and_are_their_own_backward_pass() {
        let (x, n) = (vec![1.0f32; 50_000], 50_000);
        let places = Places { seed: 7, first: 1000 };
        let draw = |factor, places, from: usize, accumulate| {
            let mut y = vec![0.5; n - from];
            let x = View::of(&x).slice(from..n);
            Cpu.random_factors(factor, places, x, ViewMut::of(&mut y), accumulate);
            y
        };
        for (factor, spread) in [
            (RandomFactor::Around1 { spread: 0.1 }, 0.1 / 3f64.sqrt()),
            (RandomFactor::Dropout { probability: 0.2 }, (0.2f64 / 0.8).sqrt()),
        ] {
            let y = draw(factor, places, 0, Accumulate::Overwrite);
            let mean = y.iter().map(|&y| f64::from(y)).sum::<f64>() / n as f64;
            let variance = y.iter().map(|&y| (f64::from(y) - mean).powi(2)).sum::<f64>() / n as f64;
            assert!((mean - 1.0).abs() < 4.0 * spread / (n as f64).sqrt(), "{factor:?}: mean {mean}");
            assert!((variance.sqrt() / spread - 1.0).abs() < 0.03, "{factor:?}: variance {variance}");
            let tail = draw(factor, Places { first: 1300, ..places }, 300, Accumulate::Overwrite);
            assert_eq!(tail, y[300..], "{factor:?}");
            let added = draw(factor, places, 0, Accumulate::Add);
            assert!(added.iter().zip(&y).all(|(a, y)| *a == y + 0.5), "{factor:?}");
            assert_ne!(draw(factor, Places { seed: 8, ..places }, 0, Accumulate::Overwrite), y);
        }
    }

    #[test]
    fn random_numbers_have_their_moments_and_belong_to_places() {
        let n = 50_000;
        let places = Places { seed: 7, first: 1000 };
        let draw = |random, places, n| {
            let mut y = vec![f32::NAN; n];
            Cpu.random_numbers(random, places, ViewMut::of(&mut y));
            y
        };
        for (random, mean, deviation, fourth) in
            [(Random::Uniform, 0.5, 1.0 / 12f64.sqrt(), 1.8), (Random::Normal { deviation: 2.0 }, 0.0, 2.0, 3.0)]
        {
            let y = draw(random, places, n);
            let moment =
                |power| y.iter().map(|&y| ((f64::from(y) - mean) / deviation).powi(power)).sum::<f64>() / n as f64;
            assert!(moment(1).abs() < 0.02 && moment(3).abs() < 0.06, "{random:?}: {} {}", moment(1), moment(3));
            assert!((moment(2) - 1.0).abs() < 0.03, "{random:?}: variance {}", moment(2));
            assert!((moment(4) / fourth - 1.0).abs() < 0.05, "{random:?}: fourth moment {}", moment(4));
            // Neighbours have nothing to do with each other.
            let together = y.windows(2).map(|y| (f64::from(y[0]) - mean) * (f64::from(y[1]) - mean)).sum::<f64>();
            assert!((together / (n as f64 * deviation * deviation)).abs() < 0.02, "{random:?}: {together}");
            assert_eq!(draw(random, Places { first: 1300, ..places }, n - 300), y[300..], "{random:?}");
            assert_ne!(draw(random, Places { seed: 8, ..places }, n), y);
        }
    }
}
