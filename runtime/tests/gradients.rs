//! The gradient of a whole model against central differences of its objective, for every gate, limit and balance scope.
//!
//! The objective is written down once, in [`Probe::objective`]: mean cross-entropy over the targets of the global batch, plus the
//! balance loss (the sum of the layers' own, or the one they are pooled into), plus the mean over tokens of each layer's lse²,
//! plus the other balance losses of each layer, which are means over passes, weighted by their tokens.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use std::collections::BTreeMap;

use moe_kernels::{Cpu, Device};
use moe_runtime::collectives::{Context, Groups, HostCommunicator, local};
use moe_runtime::config::Config;
use moe_runtime::experts::ExpertActivation;
use moe_runtime::model::layout::{Part, PartKind};
use moe_runtime::model::{BlockNorm, ModelSetup, PassTokens, Recompute, Transformer};
use moe_runtime::routing::{BalanceScope, BatchShare, RouterConfig};
use moe_runtime::stages::StageClock;
use moe_runtime::topology::{Grid, Rank};
use rand::SeedableRng;
use rand::rand_core::Rng;
use rand_chacha::ChaCha8Rng;
use support::gates::{GATES, LIMITS, gate_named};

/// S.
const LENGTH: usize = 6;
/// Sequences of each pass: unequal, so that a weight that should count tokens shows.
const PASSES: [usize; 2] = [2, 1];
const VOCAB: usize = 16;

/// Half the distance of the outer points. Two central differences, the second at half of it, cancel the error of order h²; what
/// remains is h⁴, and rounding: the objective's, some units in the last place of numbers near 3, over h.
const H: f32 = 1.0 / 256.0;
/// Rounding of one derivative: 4 units of the objective over h.
const ROUNDING: f64 = 4.0 * 4.0 * f32::EPSILON as f64 / H as f64;
/// Relative error of all sampled derivatives of one kind of parameter.
const RELATIVE: f64 = 5e-3;
/// Parameters sampled of each kind.
const SAMPLES: usize = 12;

/// A small model with initial values large enough that every gradient is far from 0, and its two passes.
struct Probe {
    config: Config,
    model: Transformer<Cpu>,
    groups: Groups<HostCommunicator>,
    inputs: Vec<i32>,
    targets: Vec<i32>,
    /// Where the documents of its tokens start; None: they are one.
    starts: Option<Vec<i32>>,
}

/// The objective, and what shows that a choice has changed.
#[derive(Clone, Debug, PartialEq)]
struct Reading {
    objective: f64,
    loads: Vec<f64>,
    dropped: f64,
}

/// Every loss counts so much that an error in its gradient is larger than the tolerance.
fn configuration() -> Config {
    let mut config = Config::preset("tiny").unwrap();
    config.model.vocab_size = VOCAB;
    config.model.hidden_size = 16;
    config.model.heads = 2;
    config.model.kv_heads = 1;
    config.model.experts = 6;
    config.model.expert_ffn_size = 8;
    config.model.init_std = 0.4;
    config.router.balance_coefficient = 0.5;
    config
}

impl Probe {
    /// The first of some seeds at which no choice is about to change.
    fn away_from_ties(config: &Config) -> Self {
        (0..100)
            .map(|seed| Self::new(config.clone(), seed))
            .find_map(|mut probe| probe.is_calm().then_some(probe))
            .unwrap()
    }

    /// Whether choices stay when the first block's norm, which reaches every token and layer, moves.
    fn is_calm(&mut self) -> bool {
        let base = self.objective();
        let layout = self.model.parameters().layout();
        let norm = layout.parts().find(|(part, _)| part.id.kind == PartKind::AttentionNorm).unwrap().0.clone();
        (0..norm.range.len()).all(|index| self.derivative(&base, &norm, index).is_some())
    }

    fn new(config: Config, seed: u64) -> Self {
        config.model.validate(&config.router).unwrap();
        let grid = Grid::new(1, 1, config.model.experts).unwrap();
        let setup = ModelSetup {
            model: config.model.clone(),
            router: config.router.clone(),
            grid,
            rank: Rank(0),
            seed,
            chunks: 1,
            receive_headroom: 1.4,
            direct: true,
            max_sequences: PASSES[0],
            sequence_length: LENGTH,
            recompute: config.train.recompute,
            gate: None,
        };
        let mut model = Transformer::new(Cpu, setup).unwrap();
        let bias: Vec<f32> = (0..config.model.experts).map(|e| 0.1 * e as f32).collect();
        for layer in 0..config.model.layers {
            model.set_selection_bias(layer, &bias[..config.model.experts_in(layer)]);
        }
        let groups = Groups::of_grid::<Cpu>(local::solo(Context::default()), &grid).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let tokens = PASSES.iter().sum::<usize>() * LENGTH;
        let mut ids = || (0..tokens).map(|_| (rng.next_u32() % VOCAB as u32) as i32).collect::<Vec<_>>();
        let (inputs, mut targets) = (ids(), ids());
        targets[LENGTH - 1] = -1;
        let starts = config.train.document_mask.then(|| [0, 0, 2, 2, 2, 5].repeat(tokens / LENGTH));
        Self { config, model, groups, inputs, targets, starts }
    }

    /// Forward and backward over both passes: the objective, with its gradient left in the model.
    fn objective(&mut self) -> Reading {
        let router = &self.config.router;
        let all = self.inputs.len();
        let valid = self.targets.iter().filter(|&&target| target >= 0).count() as f64;
        Cpu.fill(self.model.parameters_mut().grads_mut(), 0.0);
        self.model.begin_step();
        let mut start = 0;
        for sequences in PASSES {
            let end = start + sequences * LENGTH;
            let tokens = PassTokens {
                inputs: &self.inputs[start..end],
                targets: &self.targets[start..end],
                starts: self.starts.as_ref().map(|starts| &starts[start..end]),
                sequence_length: LENGTH,
                first_token: (600 + start) as u64,
                tags: &[0, 1, 1][start / LENGTH..end / LENGTH],
                step: 3,
            };
            let share = BatchShare { global_tokens: all, tokens_so_far: end, pass_tokens: end - start };
            let clock = &mut StageClock::default();
            self.model.train_pass(&self.groups, clock, tokens, share, (1.0 / valid) as f32).unwrap();
            start = end;
        }
        let sums = self.model.step_sums().unwrap();
        let layers = if router.balance_pooled { 1 } else { self.config.model.moe_layers().count() };
        let losses = sums.balance.losses;
        let of_layers = [
            (router.balance_coefficient, losses.balance),
            (router.device_coefficient, losses.device),
            (router.importance(), losses.importance),
            (router.load_coefficient, losses.load),
            (router.difference_coefficient, losses.difference),
            (router.batch_entropy_coefficient, losses.batch_entropy),
        ];
        let routed = (all * self.config.model.sub_tokens) as f64;
        let of_tokens = [
            (router.z_coefficient, sums.balance.z_sum),
            (router.entropy_coefficient, sums.balance.entropy.iter().sum::<f64>()),
        ];
        let objective = sums.loss / valid
            + of_layers.map(|(coefficient, loss)| f64::from(coefficient) * loss * layers as f64).iter().sum::<f64>()
            + of_tokens.map(|(coefficient, sum)| f64::from(coefficient) * sum / routed).iter().sum::<f64>();
        Reading { objective, loads: sums.balance.loads, dropped: sums.balance.dropped.iter().sum() }
    }

    /// The objective with element `index` of `part` moved by `by`, and where it then is.
    fn moved(&mut self, part: &Part, values: &[f32], index: usize, by: f32) -> (Reading, f64) {
        let mut moved = values.to_vec();
        moved[index] += by;
        self.model.parameters_mut().set(&Cpu, part, &moved);
        (self.objective(), f64::from(moved[index]))
    }

    /// The derivative with respect to one element; None: a choice changes nearby, so there is none.
    fn derivative(&mut self, base: &Reading, part: &Part, index: usize) -> Option<f64> {
        let values = self.model.parameters().read(&Cpu, part).unwrap();
        let mut same = true;
        let mut difference = |h: f32| {
            let ((up, right), (down, left)) =
                (self.moved(part, &values, index, h), self.moved(part, &values, index, -h));
            let unchanged = |r: &Reading| r.loads == base.loads && r.dropped == base.dropped;
            same &= unchanged(&up) && unchanged(&down);
            (up.objective - down.objective) / (right - left)
        };
        let (wide, narrow) = (difference(H), difference(H / 2.0));
        self.model.parameters_mut().set(&Cpu, part, &values);
        // Two tokens that swap experts leave the loads as they are, but not the objective: a jump, over h.
        let jumps = (wide - narrow).abs() > 10.0 * ROUNDING + 0.02 * narrow.abs();
        (same && !jumps).then_some((4.0 * narrow - wide) / 3.0)
    }
}

/// Compares the gradient of a sample of every kind of parameter with its derivatives. Returns the choices that were dropped.
fn check(what: &str, config: &Config) -> f64 {
    let mut probe = Probe::away_from_ties(config);
    let base = probe.objective();
    let mut by_kind: BTreeMap<PartKind, Vec<(Part, Vec<f32>)>> = BTreeMap::new();
    for (part, _) in probe.model.parameters().layout().parts() {
        let gradient = probe.model.parameters().read_grad(&Cpu, part).unwrap();
        by_kind.entry(part.id.kind).or_default().push((part.clone(), gradient));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (mut skipped, mut all, mut worst) = (0, 0, (0.0, PartKind::Head));
    for (kind, parts) in by_kind {
        let (mut error, mut norm, mut taken) = (0.0, 0.0, 0);
        for sample in 0..SAMPLES {
            let (part, gradient) = &parts[(sample + rng.next_u32() as usize) % parts.len()];
            let index = rng.next_u32() as usize % gradient.len();
            let Some(derivative) = probe.derivative(&base, part, index) else { continue };
            error += (derivative - f64::from(gradient[index])).powi(2);
            norm += derivative.powi(2);
            taken += 1;
        }
        let (error, norm) = (f64::sqrt(error), f64::sqrt(norm));
        let bound = RELATIVE * norm + ROUNDING * f64::from(taken).sqrt();
        assert!(
            error <= bound,
            "{what}: {kind:?}: gradients differ by {error:.2e} where derivatives have a norm of {norm:.2e}"
        );
        assert!(2 * taken >= SAMPLES as i32, "{what}: {kind:?}: only {taken} of {SAMPLES} samples could be compared");
        if error / norm > worst.0 {
            worst = (error / norm, kind);
        }
        (skipped, all) = (skipped + SAMPLES as i32 - taken, all + SAMPLES as i32);
    }
    println!("{what}: worst relative error {:.1e} ({:?}), {skipped} of {all} samples skipped", worst.0, worst.1);
    assert!(8 * skipped <= all, "{what}: {skipped} of {all} samples were near a change of choice");
    base.dropped
}

#[test]
fn gradients_are_those_of_the_objective_for_every_gate_and_limit() {
    for gate in GATES {
        for limit in LIMITS {
            let mut config = configuration();
            gate.choose(&mut config);
            limit.choose(&mut config);
            gate.weigh_losses(&mut config);
            let dropped = check(&format!("{}, {limit:?}", gate.name), &config);
            let drops = limit.drops_with(&gate);
            assert!(drops.is_none_or(|drops| drops == (dropped > 0.0)), "{}, {limit:?}: {dropped} dropped", gate.name);
        }
    }
}

/// Losses that no default has, one at a time and all at once, with scores of both kinds.
#[test]
fn gradients_are_those_of_the_objective_for_every_loss() {
    type Weigh = fn(&mut RouterConfig);
    let losses: [(&str, Weigh); 5] = [
        ("importance", |c| c.mass_coefficient = 0.3),
        ("devices", |c| (c.device_coefficient, c.device_groups) = (0.5, 3)),
        ("difference", |c| c.difference_coefficient = 2.0),
        ("entropy", |c| c.entropy_coefficient = 0.3),
        ("entropy of the mean", |c| c.batch_entropy_coefficient = 0.5),
    ];
    for gate in ["topk-softmax", "sigmoid-bias"].map(gate_named) {
        for scope in [BalanceScope::Sequence, BalanceScope::MicroBatch] {
            for pooled in [false, true] {
                let mut all = configuration();
                gate.choose(&mut all);
                (all.router.balance_scope, all.router.balance_pooled) = (scope, pooled);
                for (name, weigh) in losses {
                    let mut config = all.clone();
                    config.router.balance_coefficient = 0.0;
                    weigh(&mut config.router);
                    weigh(&mut all.router);
                    check(&format!("{}, {name}, {scope:?}, pooled {pooled}", gate.name), &config);
                }
                check(&format!("{}, all losses, {scope:?}, pooled {pooled}", gate.name), &all);
            }
        }
    }
}

/// Layers of different numbers of experts, with every loss.
#[test]
fn gradients_are_those_of_the_objective_with_other_numbers_of_experts_by_layer() {
    for gate in ["topk-softmax", "sigmoid-bias", "noisy-topk", "hierarchical"].map(gate_named) {
        for scope in [BalanceScope::Sequence, BalanceScope::Global] {
            let mut config = configuration();
            gate.choose(&mut config);
            gate.weigh_losses(&mut config);
            config.model.layers = 3;
            config.model.dense_layers = vec![1];
            config.model.ffn_size = 12;
            config.model.experts_by_layer = vec![3, 6];
            (config.router.device_coefficient, config.router.device_groups) = (0.2, 3);
            // A group of the small layer is one expert.
            if config.router.expert_groups > 1 {
                config.router.groups_per_token = 2;
            }
            config.router.difference_coefficient = 0.5;
            config.router.balance_scope = scope;
            check(&format!("{}, 3 and 6 experts, {scope:?}", gate.name), &config);
        }
    }
}

/// What stands around experts: parts of tokens, norms behind sums.
#[test]
fn gradients_are_those_of_the_objective_with_parts_of_tokens_and_norms_behind_sums() {
    for (sub_tokens, block_norm) in [(2, BlockNorm::Pre), (4, BlockNorm::Post), (1, BlockNorm::Post)] {
        for gate in ["topk-softmax", "sigmoid-bias", "noisy-topk", "multi-gate"].map(gate_named) {
            let mut config = configuration();
            gate.choose(&mut config);
            gate.weigh_losses(&mut config);
            (config.model.sub_tokens, config.model.block_norm) = (sub_tokens, block_norm);
            config.model.layers = 3;
            config.model.dense_layers = vec![1];
            config.model.ffn_size = 12;
            check(&format!("{}, {sub_tokens} parts, {block_norm:?}", gate.name), &config);
        }
    }
}

#[test]
fn gradients_are_those_of_the_objective_for_every_balance_scope() {
    for gate in ["topk-softmax", "sigmoid-bias"].map(gate_named) {
        for scope in [BalanceScope::Sequence, BalanceScope::MicroBatch, BalanceScope::Global] {
            for pooled in [false, true] {
                let mut config = configuration();
                gate.choose(&mut config);
                config.router.balance_scope = scope;
                config.router.balance_pooled = pooled;
                check(&format!("{}, {scope:?}, pooled {pooled}", gate.name), &config);
            }
        }
    }
}

#[test]
fn gradients_are_those_of_the_objective_for_experts_without_a_gate() {
    let mut config = configuration();
    config.model.expert_activation = ExpertActivation::Gelu;
    check("experts without a gate", &config);
    config.train.recompute = Recompute::Experts;
    check("experts without a gate, computed again", &config);
}

#[test]
fn gradients_are_those_of_the_objective_with_shared_experts_dense_blocks_norms_and_biases() {
    let mut config = configuration();
    config.model.layers = 3;
    config.model.moe_every = 2;
    config.model.ffn_size = 12;
    config.model.shared_expert_ffn_size = 8;
    config.model.shared_expert_gate = true;
    config.model.qkv_bias = true;
    config.model.qk_norm = moe_runtime::model::QkNorm::PerHead;
    check("everything", &config);
    config.train.document_mask = true;
    check("everything, documents kept apart", &config);
}
