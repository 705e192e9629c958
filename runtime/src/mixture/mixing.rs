//! What becomes of several experts' outputs, and what each of them and the gate learn from it.
//!
//! Owns the forms' arithmetic: values in, losses and gradients out, in f64. It holds no parameter and knows no rank and no device.
//!
//! Letters: T rows, E experts, K classes. With g = softmax of a row's gate logits and p_e = softmax of expert e's output for it:
//!
//! - cooperative: `loss = −ln softmax(Σ_e g_e · output_e)[y]`
//! - competitive: `loss = −ln Σ_e g_e · p_e[y]`, whose gradient is that of the expected loss `−Σ_e h_e · (ln g_e + ln p_e[y])` with the
//!   posteriors `h_e = g_e · p_e[y] / Σ_f g_f · p_f[y]` held fast. So the M step of expectation-maximisation and the gradient share a
//!   body; they differ in whether the posteriors are those of the parameters as they are now.

/// Sizes of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixingDims {
    /// T.
    pub rows: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub classes: usize,
}

/// One batch's gate logits and outputs.
#[derive(Clone, Copy, Debug)]
pub struct Outputs<'a> {
    /// Sizes.
    pub dims: MixingDims,
    /// `[T, E]`.
    pub gate: &'a [f32],
    /// `[E, T, K]`, of all experts.
    pub experts: &'a [f32],
}

/// The mean loss over the batch, and its gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// In nats a row.
    pub loss: f64,
    /// `[T, E]`: by the gate's logits.
    pub gate: Vec<f32>,
    /// `[E, T, K]`: by the experts' outputs.
    pub experts: Vec<f32>,
}

impl Outputs<'_> {
    fn gate_row(&self, t: usize) -> &[f32] {
        let e = self.dims.experts;
        &self.gate[t * e..(t + 1) * e]
    }

    fn output(&self, e: usize, t: usize) -> &[f32] {
        &self.experts[self.place(e, t)]
    }

    fn place(&self, e: usize, t: usize) -> std::ops::Range<usize> {
        let MixingDims { rows, classes, .. } = self.dims;
        (e * rows + t) * classes..(e * rows + t + 1) * classes
    }

    /// Cooperation: the sum's loss, in which experts make up for each other's errors.
    pub fn cooperative(&self, labels: &[usize]) -> Gradients {
        let MixingDims { rows, experts, .. } = self.dims;
        let mut gradients = self.zero_gradients();
        let share = 1.0 / rows.max(1) as f64;
        for (t, &label) in labels.iter().enumerate() {
            let g = softmax(self.gate_row(t));
            let mut slope = log_softmax(&self.weighted_sum(&g, t));
            gradients.loss -= share * slope[label];
            // ∂loss/∂sum, then ⟨∂loss/∂sum, output_e⟩ = ∂loss/∂g_e.
            slope.iter_mut().for_each(|x| *x = share * x.exp());
            slope[label] -= share;
            let inner = |e: usize| slope.iter().zip(self.output(e, t)).map(|(d, z)| d * f64::from(*z)).sum::<f64>();
            let by_weight: Vec<f64> = (0..experts).map(inner).collect();
            let mean: f64 = g.iter().zip(&by_weight).map(|(g, d)| g * d).sum();
            for e in 0..experts {
                gradients.gate[t * experts + e] = (g[e] * (by_weight[e] - mean)) as f32;
                let to = &mut gradients.experts[self.place(e, t)];
                to.iter_mut().zip(&slope).for_each(|(to, d)| *to = (g[e] * d) as f32);
            }
        }
        gradients
    }

    /// Competition: the likelihood's loss, which each expert learns from by as much as it explains the row.
    pub fn competitive(&self, labels: &[usize]) -> Gradients {
        let posteriors = self.posteriors(labels);
        let mut gradients = self.expected(labels, &posteriors);
        // −ln Σ_e exp(joint_e) = −Σ_e h_e · (joint_e − ln h_e).
        let plogp = posteriors.iter().filter(|h| **h > 0.0).map(|h| h * h.ln()).sum::<f64>();
        gradients.loss += plogp / self.dims.rows.max(1) as f64;
        gradients
    }

    /// The E step: `h[T, E]`, how likely each expert is to have been the one behind a row's label. Rows sum to 1.
    pub fn posteriors(&self, labels: &[usize]) -> Vec<f64> {
        let joint = labels.iter().enumerate().map(|(t, &label)| self.log_joint(t, label));
        joint.flat_map(|joint| log_softmax(&joint).into_iter().map(f64::exp).collect::<Vec<_>>()).collect()
    }

    /// The M step's loss, `−Σ_e h_e · (ln g_e + ln p_e[y])` with `posteriors[T, E]` held fast, and its gradients: the gate learns the
    /// posteriors, each expert its rows weighted by them.
    pub fn expected(&self, labels: &[usize], posteriors: &[f64]) -> Gradients {
        let MixingDims { rows, experts, .. } = self.dims;
        let mut gradients = self.zero_gradients();
        let share = 1.0 / rows.max(1) as f64;
        for (t, &label) in labels.iter().enumerate() {
            let h = &posteriors[t * experts..(t + 1) * experts];
            let log_g = log_softmax(&wide(self.gate_row(t)));
            for e in 0..experts {
                let mut log_p = log_softmax(&wide(self.output(e, t)));
                // A posterior of 0 is an expert that has nothing to say, however unlikely it finds the row.
                if h[e] > 0.0 {
                    gradients.loss -= share * h[e] * (log_g[e] + log_p[label]);
                }
                gradients.gate[t * experts + e] = (share * (log_g[e].exp() - h[e])) as f32;
                log_p.iter_mut().for_each(|x| *x = x.exp());
                log_p[label] -= 1.0;
                let to = &mut gradients.experts[self.place(e, t)];
                to.iter_mut().zip(log_p).for_each(|(to, d)| *to = (share * h[e] * d) as f32);
            }
        }
        gradients
    }

    /// `−ln Σ_e g_e · p_e[y]`, the mean over the batch.
    pub fn negative_log_likelihood(&self, labels: &[usize]) -> f64 {
        let rows = labels.iter().enumerate();
        -rows.map(|(t, &label)| log_sum_exp(&self.log_joint(t, label))).sum::<f64>() / self.dims.rows.max(1) as f64
    }

    /// Class probabilities `[T, K]` of the experts that cooperate.
    pub fn cooperative_probabilities(&self) -> Vec<f64> {
        let row = |t| log_softmax(&self.weighted_sum(&softmax(self.gate_row(t)), t));
        (0..self.dims.rows).flat_map(row).map(f64::exp).collect()
    }

    /// Class probabilities `[T, K]` of the experts that compete: `Σ_e g_e · p_e`.
    pub fn competitive_probabilities(&self) -> Vec<f64> {
        let row = |t| {
            let mut p = vec![0.0; self.dims.classes];
            for (e, g) in softmax(self.gate_row(t)).into_iter().enumerate() {
                p.iter_mut().zip(softmax(self.output(e, t))).for_each(|(p, of_expert)| *p += g * of_expert);
            }
            p
        };
        (0..self.dims.rows).flat_map(row).collect()
    }

    /// Class probabilities `[T, K]` of one expert alone.
    pub fn expert_probabilities(&self, e: usize) -> Vec<f64> {
        (0..self.dims.rows).flat_map(|t| softmax(self.output(e, t))).collect()
    }

    /// `Σ_e g_e · output_e` of a row.
    fn weighted_sum(&self, g: &[f64], t: usize) -> Vec<f64> {
        let mut sum = vec![0.0; self.dims.classes];
        for (e, g) in g.iter().enumerate() {
            sum.iter_mut().zip(self.output(e, t)).for_each(|(sum, z)| *sum += g * f64::from(*z));
        }
        sum
    }

    /// `ln g_e + ln p_e[label]` of each expert.
    fn log_joint(&self, t: usize, label: usize) -> Vec<f64> {
        let log_g = log_softmax(&wide(self.gate_row(t)));
        log_g.into_iter().enumerate().map(|(e, g)| g + log_softmax(&wide(self.output(e, t)))[label]).collect()
    }

    fn zero_gradients(&self) -> Gradients {
        Gradients { loss: 0.0, gate: vec![0.0; self.gate.len()], experts: vec![0.0; self.experts.len()] }
    }
}

fn wide(row: &[f32]) -> Vec<f64> {
    row.iter().map(|x| f64::from(*x)).collect()
}

fn log_sum_exp(row: &[f64]) -> f64 {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    let total = log_sum_exp(row);
    row.iter().map(|x| x - total).collect()
}

fn softmax(row: &[f32]) -> Vec<f64> {
    log_softmax(&wide(row)).into_iter().map(f64::exp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// (T, E, K): no row, one expert, one class, several.
    const SIZES: [(usize, usize, usize); 5] = [(0, 2, 3), (1, 1, 3), (4, 3, 1), (5, 3, 3), (7, 4, 2)];

    fn dims((rows, experts, classes): (usize, usize, usize)) -> MixingDims {
        MixingDims { rows, experts, classes }
    }

    fn batch(size: (usize, usize, usize)) -> (Vec<f32>, Vec<f32>, Vec<usize>) {
        let MixingDims { rows, experts, classes } = dims(size);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut draw = |len| (0..len).map(|_| rng.random_range(-2.0..2.0)).collect::<Vec<f32>>();
        let (gate, outputs) = (draw(rows * experts), draw(rows * experts * classes));
        (gate, outputs, (0..rows).map(|t| t * 5 % classes).collect())
    }

    /// Holds `gradients` to central differences of their loss.
    fn check(size: (usize, usize, usize), gradients: impl Fn(Outputs<'_>, &[usize]) -> Gradients) {
        let (mut gate, mut experts, labels) = batch(size);
        let exact = gradients(Outputs { dims: dims(size), gate: &gate, experts: &experts }, &labels);
        // Steps of a power of two in f32 are exact; the loss is f64 and smooth.
        let step = 1.0 / 4096.0;
        for i in 0..gate.len() + experts.len() {
            let gates = gate.len();
            let mut at = |offset: f32| {
                let x = if i < gates { &mut gate[i] } else { &mut experts[i - gates] };
                let kept = std::mem::replace(x, *x + offset);
                let moved = f64::from(*x) - f64::from(kept);
                let loss = gradients(Outputs { dims: dims(size), gate: &gate, experts: &experts }, &labels).loss;
                *(if i < gates { &mut gate[i] } else { &mut experts[i - gates] }) = kept;
                (loss, moved)
            };
            let ((above, up), (below, down)) = (at(step), at(-step));
            let numeric = (above - below) / (up - down);
            let exact = f64::from(if i < gates { exact.gate[i] } else { exact.experts[i - gates] });
            assert!((numeric - exact).abs() < 2e-7, "{size:?} {i}: {exact}, by differences {numeric}");
        }
    }

    #[test]
    fn gradients_are_those_of_the_losses() {
        for size in SIZES {
            check(size, |outputs, labels| outputs.cooperative(labels));
            check(size, |outputs, labels| outputs.competitive(labels));
            let (gate, experts, labels) = batch(size);
            let posteriors = Outputs { dims: dims(size), gate: &gate, experts: &experts }.posteriors(&labels);
            check(size, |outputs, labels| outputs.expected(labels, &posteriors));
        }
    }

    #[test]
    fn posteriors_sum_to_one_and_equal_experts_leave_the_gate_as_it_is() {
        for size in SIZES {
            let (gate, experts, labels) = batch(size);
            let dims = dims(size);
            let posteriors = Outputs { dims, gate: &gate, experts: &experts }.posteriors(&labels);
            for h in posteriors.chunks(dims.experts) {
                assert!((h.iter().sum::<f64>() - 1.0).abs() < 1e-12 && h.iter().all(|h| *h >= 0.0), "{h:?}");
            }
            // Experts that all say the same: the row tells nothing about who was behind it.
            let one = &experts[..dims.rows * dims.classes];
            let twins = Outputs { dims, gate: &gate, experts: &one.repeat(dims.experts) };
            for (t, h) in twins.posteriors(&labels).chunks(dims.experts).enumerate() {
                let g = softmax(twins.gate_row(t));
                assert!(h.iter().zip(&g).all(|(h, g)| (h - g).abs() < 1e-12), "{h:?} {g:?}");
            }
            assert!(twins.competitive(&labels).gate.iter().all(|d| d.abs() < 1e-7), "a gate cannot learn from twins");
        }
    }

    #[test]
    fn one_expert_alone_is_plain_cross_entropy_in_either_form() {
        let size = (4, 1, 3);
        let (gate, experts, labels) = batch(size);
        let outputs = Outputs { dims: dims(size), gate: &gate, experts: &experts };
        let (cooperative, competitive) = (outputs.cooperative(&labels), outputs.competitive(&labels));
        assert!((cooperative.loss - competitive.loss).abs() < 1e-12);
        assert!(cooperative.gate.iter().chain(&competitive.gate).all(|d| d.abs() < 1e-9));
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-7);
        assert!(close(&cooperative.experts, &competitive.experts));
        let alone = outputs.expert_probabilities(0);
        for p in [outputs.cooperative_probabilities(), outputs.competitive_probabilities()] {
            assert!(p.iter().zip(&alone).all(|(p, alone)| (p - alone).abs() < 1e-12));
        }
    }

    #[test]
    fn far_apart_outputs_stay_finite() {
        let (gate, experts, labels) = (vec![300.0, -300.0], vec![-500.0, 500.0, 400.0, -400.0], [0]);
        let outputs = Outputs { dims: dims((1, 2, 2)), gate: &gate, experts: &experts };
        let Gradients { loss, gate, experts } = outputs.competitive(&labels);
        // The gate gives e⁻⁶⁰⁰ to the one expert that explains the row: that is still likelier than the other's e⁻¹⁰⁰⁰.
        assert!((loss - 600.0).abs() < 1e-9, "{loss}");
        assert!(gate.iter().chain(&experts).all(|x| x.is_finite()));
        assert_eq!(outputs.posteriors(&labels)[1], 1.0);
    }
}
