//! What a gate of one's own is checked by.
//!
//! Owns the cases: sizes with nothing, one, all experts; ties, extreme logits; repetition; tokens apart and together; finite differences.

use moe_kernels::GateDims;

use super::own::{Choices, Gate, GatePass};

/// T, E, k: none, one, k = E, many.
const SIZES: [(usize, usize, usize); 6] = [(0, 4, 2), (1, 1, 1), (5, 4, 4), (7, 6, 1), (64, 8, 2), (33, 12, 5)];

/// Steps of finite differences, and how far a gradient may be from them, relative to the largest and in rounding.
const H: f32 = 1.0 / 512.0;
const RELATIVE: f32 = 0.02;
const ROUNDING: f32 = 2e-3;

struct Run {
    pass: GatePass,
    logits: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

impl Run {
    fn of(gate: &dyn Gate, pass: GatePass, logits: Vec<f32>) -> Self {
        let choices = pass.dims.tokens * pass.dims.top_k;
        let (mut ids, mut weights) = (vec![-1; choices], vec![0.0; choices]);
        gate.choose(pass, &logits, Choices { ids: &mut ids, weights: &mut weights });
        Self { pass, logits, ids, weights }
    }

    /// Places that are no choice or that no choice can be.
    fn misplaced(&self) -> Vec<String> {
        let GateDims { experts, top_k, .. } = self.pass.dims;
        let mut faults = Vec::new();
        for (t, (ids, weights)) in self.ids.chunks(top_k).zip(self.weights.chunks(top_k)).enumerate() {
            for (j, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
                let at = format!("token {t}, choice {j}");
                if id < -1 || id >= experts as i32 {
                    faults.push(format!("{at}: expert {id} of {experts}"));
                }
                if id >= 0 && ids[..j].contains(&id) {
                    faults.push(format!("{at}: expert {id} a second time"));
                }
                if id == -1 && weight != 0.0 {
                    faults.push(format!("{at}: no expert, but a weight of {weight}"));
                }
                if !weight.is_finite() {
                    faults.push(format!("{at}: weight {weight}"));
                }
            }
        }
        faults
    }

    /// Whether it chose as `other` did.
    fn equals(&self, other: &Self) -> bool {
        self.ids == other.ids && self.weights == other.weights
    }
}

/// Numbers that look random and are the same every time, within ±2.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| 2.0 * ((i * i * 7 + 13 * i + 101 * seed) as f32 * 0.618_034).sin()).collect()
}

/// What `gate` does that the runtime does not count on, a line each; none: it can be used.
pub fn faults(gate: &dyn Gate) -> Vec<String> {
    let mut faults = Vec::new();
    for (tokens, experts, top_k) in SIZES {
        let dims = GateDims { tokens, experts, top_k };
        for training in [true, false] {
            let pass = GatePass { dims, training, step: 3, first_token: 640 };
            let mut add = |what: &str, found: Vec<String>| {
                let of =
                    |fault: String| format!("T {tokens}, E {experts}, k {top_k}, training {training}, {what}: {fault}");
                faults.extend(found.into_iter().map(of));
            };
            let n = tokens * experts;
            let run = Run::of(gate, pass, numbers(n, 1));
            add("logits within 2", run.misplaced());
            if !run.equals(&Run::of(gate, pass, numbers(n, 1))) {
                add("logits within 2", vec!["other choices the second time".into()]);
            }
            add("equal logits", Run::of(gate, pass, vec![0.25; n]).misplaced());
            let extreme: Vec<f32> = numbers(n, 2).into_iter().map(|x| 1e4 * x).collect();
            add("logits within 20000", Run::of(gate, pass, extreme).misplaced());
            if !training {
                add("tokens by themselves", alone(gate, &run));
            }
            add("gradient", gradient(gate, &run));
        }
    }
    faults
}

/// Tokens that choose otherwise when nobody is beside them.
fn alone(gate: &dyn Gate, run: &Run) -> Vec<String> {
    let GateDims { tokens, experts, top_k } = run.pass.dims;
    let differs = |&t: &usize| {
        let dims = GateDims { tokens: 1, ..run.pass.dims };
        let pass = GatePass { dims, first_token: run.pass.first_token + t as u64, ..run.pass };
        let one = Run::of(gate, pass, run.logits[t * experts..(t + 1) * experts].to_vec());
        let choices = t * top_k..(t + 1) * top_k;
        one.ids != run.ids[choices.clone()] || one.weights != run.weights[choices]
    };
    (0..tokens).filter(differs).map(|t| format!("token {t} chooses otherwise than beside others")).collect()
}

/// Where the gradient of Σ weights · numbers is not the one of differences, as long as choices stay.
fn gradient(gate: &dyn Gate, run: &Run) -> Vec<String> {
    let GateDims { experts, top_k, .. } = run.pass.dims;
    let dweights = numbers(run.weights.len(), 3);
    let mut dlogits = vec![0.0; run.logits.len()];
    gate.choose_grad(run.pass, &run.logits, &run.ids, &dweights, &mut dlogits);
    let largest = dlogits.iter().fold(0.0f32, |most, d| most.max(d.abs()));
    let mut faults = Vec::new();
    for i in 0..dlogits.len() {
        let moved = |by: f32| {
            let mut logits = run.logits.clone();
            logits[i] += by;
            Run::of(gate, run.pass, logits)
        };
        let (up, down) = (moved(H), moved(-H));
        if up.ids != run.ids || down.ids != run.ids {
            continue;
        }
        let row = i / experts * top_k..(i / experts + 1) * top_k;
        let loss = |run: &Run| -> f32 {
            run.weights[row.clone()].iter().zip(&dweights[row.clone()]).map(|(w, d)| w * d).sum()
        };
        let wanted = (loss(&up) - loss(&down)) / (2.0 * H);
        if (wanted - dlogits[i]).abs() > RELATIVE * largest.max(wanted.abs()) + ROUNDING {
            faults.push(format!("of logit {i}: {}, by differences {wanted}", dlogits[i]));
        }
    }
    faults
}
