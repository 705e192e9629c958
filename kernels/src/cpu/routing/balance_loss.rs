//! The balance losses of [`crate::RoutingOps::balance_loss`] and their gradients.
//!
//! Owns their arithmetic on counts and summed probabilities, in f64. It never looks at a token.

use crate::{BalanceFactors, BalanceSpec};

/// One unit's numbers, summed over the layers that are pooled.
struct Unit {
    counts: Vec<f64>,
    probs: Vec<f64>,
    /// Counts and probabilities as shares of their sums.
    used: Vec<f64>,
    parts: Vec<f64>,
    /// Of `parts`, in nats.
    entropy: f64,
}

/// The losses, unit after unit; `coefficients` are overwritten.
pub(super) fn form(
    spec: BalanceSpec,
    counts: &[f32],
    prob_sums: &[f32],
    coefficients: &mut [f32],
) -> [f64; BalanceSpec::LOSSES] {
    let BalanceSpec { layers, groups, experts, .. } = spec;
    let (units, depth) = if spec.pooled { (groups, layers) } else { (layers * groups, 1) };
    // Where an expert's numbers of one of a unit's layers lie.
    let at = |unit: usize, layer: usize, e: usize| (layer * groups + unit) * experts + e;
    let mut losses = [0.0; BalanceSpec::LOSSES];
    for unit in 0..units {
        let over_layers = |x: &[f32]| -> Vec<f64> {
            (0..experts).map(|e| (0..depth).map(|layer| f64::from(x[at(unit, layer, e)])).sum()).collect()
        };
        let sums = Unit::of(over_layers(counts), over_layers(prob_sums));
        for e in 0..experts {
            let slope = sums.slope(spec, e) as f32;
            (0..depth).for_each(|layer| coefficients[at(unit, layer, e)] = slope);
        }
        let of_unit = sums.losses(spec);
        losses.iter_mut().zip(of_unit).for_each(|(sum, loss)| *sum += f64::from(spec.loss_scale) * loss);
    }
    losses
}

impl Unit {
    fn of(counts: Vec<f64>, probs: Vec<f64>) -> Self {
        let shares = |x: &[f64]| -> Vec<f64> {
            let sum: f64 = x.iter().sum();
            x.iter().map(|x| if sum > 0.0 { x / sum } else { 0.0 }).collect()
        };
        let (used, parts) = (shares(&counts), shares(&probs));
        let entropy = parts.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
        Self { counts, probs, used, parts, entropy }
    }

    /// Tokens: a token's probabilities sum to 1.
    fn tokens(&self) -> f64 {
        self.probs.iter().sum()
    }

    /// Experts of the same device as `e`.
    fn device(spec: BalanceSpec, e: usize) -> std::ops::Range<usize> {
        let size = spec.experts / spec.devices.max(1);
        e / size * size..(e / size + 1) * size
    }

    /// The objective's gradient with respect to a token's probability of `e`. What is the same for all experts is left out where a loss
    /// is a function of probabilities that sum to 1.
    fn slope(&self, spec: BalanceSpec, e: usize) -> f64 {
        let BalanceFactors { switch, devices, importance, difference, entropy } = spec.factors;
        let (experts, f_scale) = (spec.experts as f64, f64::from(spec.f_scale));
        let mut slope = f64::from(switch) * experts * self.counts[e] * f_scale;
        if devices != 0.0 {
            let count: f64 = self.counts[Self::device(spec, e)].iter().sum();
            slope += f64::from(devices) * spec.devices as f64 * count * f_scale;
        }
        let part = self.parts[e];
        if importance != 0.0 && spec.experts > 1 {
            slope += f64::from(importance) * 2.0 * (part - 1.0 / experts) * experts * experts / (experts - 1.0);
        }
        if difference != 0.0 {
            slope -= f64::from(difference) * 2.0 * (self.used[e] - part);
        }
        if entropy != 0.0 && part > 0.0 && self.entropy < f64::from(spec.least_entropy) {
            slope += f64::from(entropy) * part.ln();
        }
        slope * f64::from(spec.p_scale)
    }

    fn losses(&self, spec: BalanceSpec) -> [f64; BalanceSpec::LOSSES] {
        let (n, experts, f_scale) = (self.probs.len(), spec.experts as f64, f64::from(spec.f_scale));
        let p_scale = f64::from(spec.p_scale);
        let weight = self.tokens() * p_scale;
        let sum = |term: &dyn Fn(usize) -> f64| (0..n).map(term).sum::<f64>();
        let device_counts = |e: usize| self.counts[Self::device(spec, e)].iter().sum::<f64>();
        let part = |e: usize| self.parts[e];
        let variance = sum(&|e| (part(e) - 1.0 / experts).powi(2)) / (experts - 1.0).max(1.0);
        let short = (f64::from(spec.least_entropy) - self.entropy).max(0.0);
        [
            sum(&|e| experts * self.counts[e] * f_scale * self.probs[e] * p_scale),
            sum(&|e| spec.devices as f64 * device_counts(e) * f_scale * self.probs[e] * p_scale),
            if weight > 0.0 { weight * variance * experts * experts } else { 0.0 },
            weight * sum(&|e| (self.used[e] - part(e)).powi(2)),
            weight * short,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: (usize, usize, usize) = (3, 2, 4);
    const DEVICES: usize = 2;

    fn numbers(seed: f32) -> Vec<f32> {
        (0..24).map(|i| 1.5 + (seed + 1.7 * i as f32).sin()).collect()
    }

    fn spec(pooled: bool, factors: BalanceFactors, least_entropy: f32) -> BalanceSpec {
        let (layers, groups, experts) = SHAPE;
        let scales = (0.25, 0.5, 0.5);
        let (f_scale, p_scale, loss_scale) = scales;
        BalanceSpec {
            layers,
            groups,
            experts,
            pooled,
            f_scale,
            p_scale,
            loss_scale,
            factors,
            devices: DEVICES,
            least_entropy,
        }
    }

    /// The losses by their formulas, from `[L, G, E]` numbers.
    fn losses(spec: BalanceSpec, counts: &[f32], probs: &[f64]) -> [f64; BalanceSpec::LOSSES] {
        let (layers, groups, experts) = SHAPE;
        let units: Vec<Vec<usize>> = if spec.pooled { vec![vec![0, 1, 2]] } else { vec![vec![0], vec![1], vec![2]] };
        let mut sums = [0.0; BalanceSpec::LOSSES];
        assert_eq!(layers, 3);
        for (unit, g) in units.iter().flat_map(|unit| (0..groups).map(move |g| (unit, g))) {
            let over = |x: &dyn Fn(usize) -> f64, e: usize| {
                unit.iter().map(|l| x((l * groups + g) * experts + e)).sum::<f64>()
            };
            let c: Vec<f64> = (0..experts).map(|e| over(&|i| f64::from(counts[i]), e)).collect();
            let p: Vec<f64> = (0..experts).map(|e| over(&|i| probs[i], e)).collect();
            let (all_c, n) = (c.iter().sum::<f64>(), p.iter().sum::<f64>());
            let mean: Vec<f64> = p.iter().map(|p| p / n).collect();
            let weight = n * 0.5;
            sums[0] += (0..experts).map(|e| 4.0 * 0.25 * c[e] * 0.5 * p[e]).sum::<f64>();
            sums[1] += [0, 2].map(|d| 2.0 * 0.25 * (c[d] + c[d + 1]) * 0.5 * (p[d] + p[d + 1])).iter().sum::<f64>();
            let variance = mean.iter().map(|m| (m - 0.25).powi(2)).sum::<f64>() / 3.0;
            sums[2] += weight * variance / 0.25f64.powi(2);
            sums[3] += weight * (0..experts).map(|e| (c[e] / all_c - mean[e]).powi(2)).sum::<f64>();
            let entropy: f64 = mean.iter().map(|m| -m * m.ln()).sum();
            sums[4] += weight * (f64::from(spec.least_entropy) - entropy).max(0.0);
        }
        sums.map(|sum| 0.5 * sum)
    }

    #[test]
    fn losses_are_those_of_their_formulas_pooled_or_not() {
        for pooled in [false, true] {
            let spec = spec(pooled, BalanceFactors::default(), 4.0f32.ln());
            let (counts, probs) = (numbers(0.3), numbers(2.0));
            let found = form(spec, &counts, &probs, &mut [0.0; 24]);
            let wanted = losses(spec, &counts, &probs.iter().map(|&p| f64::from(p)).collect::<Vec<_>>());
            for (found, wanted) in found.iter().zip(wanted) {
                assert!((found - wanted).abs() < 1e-9 && wanted > 0.0, "pooled {pooled}: {found} {wanted}");
            }
        }
    }

    /// A token's probabilities sum to 1: what counts is what moves from one expert to another.
    #[test]
    fn slopes_are_the_losses_derivatives_where_probability_moves_between_experts() {
        const H: f64 = 1e-4;
        let one = |number: usize| {
            let factor = |i: usize| if i == number { 0.5 } else { 0.0 };
            let [switch, devices, importance, difference, entropy] = [0, 1, 2, 3, 4].map(factor);
            BalanceFactors { switch, devices, importance, difference, entropy }
        };
        for (number, pooled) in (0..BalanceSpec::LOSSES).flat_map(|n| [(n, false), (n, true)]) {
            let spec = spec(pooled, one(number), 4.0f32.ln());
            let (counts, probs) = (numbers(0.3), numbers(2.0));
            let mut slopes = [f32::NAN; 24];
            form(spec, &counts, &probs, &mut slopes);
            for (from, to) in (0..24).filter(|i| i % 4 > 0).map(|i| (i - 1, i)) {
                let moved = |by: f64| {
                    let mut probs: Vec<f64> = probs.iter().map(|&p| f64::from(p)).collect();
                    (probs[from], probs[to]) = (probs[from] - by, probs[to] + by);
                    losses(spec, &counts, &probs)[number]
                };
                let wanted = (moved(H) - moved(-H)) / (2.0 * H) * 0.5 / f64::from(spec.loss_scale);
                let found = f64::from(slopes[to]) - f64::from(slopes[from]);
                assert!((found - wanted).abs() < 1e-5, "loss {number}, pooled {pooled}: {found} {wanted}");
            }
        }
    }

    #[test]
    fn an_entropy_that_is_high_enough_costs_nothing_and_units_without_tokens_neither() {
        let factors = BalanceFactors { switch: 1.0, devices: 1.0, importance: 1.0, difference: 1.0, entropy: 1.0 };
        let mut slopes = [f32::NAN; 24];
        let enough = form(spec(false, factors, 0.5), &numbers(0.3), &numbers(2.0), &mut slopes);
        assert_eq!(enough[4], 0.0);
        let nothing = form(spec(false, factors, 1.0), &[0.0; 24], &[0.0; 24], &mut slopes);
        assert_eq!(nothing, [0.0; 5]);
        assert!(slopes.iter().all(|slope| slope.is_finite()), "{slopes:?}");
    }
}
