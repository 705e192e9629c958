//! Gates that a program brings along: what the kit finds, that the runtime treats them as its own, and that a program without one says so.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use std::sync::Arc;

use moe_kernels::Cpu;
use moe_runtime::collectives::{Communicator, Groups, local};
use moe_runtime::config::Config;
use moe_runtime::data::Loader;
use moe_runtime::routing::kit::faults;
use moe_runtime::routing::{BalanceScope, Choices, Gate, GatePass, RouterConfig, RouterKind, check_own_gate};
use moe_runtime::telemetry::StepMetrics;
use moe_runtime::topology::{Grid, Rank};
use moe_runtime::worker::build_with_gate;
use support::training::{ALONE, Ranks, assert_same_curve, small, take_steps, text, train};

/// The k highest of a softmax over all experts: what `softmax-topk` is.
#[derive(Debug)]
struct OwnSoftmax;

/// A token's experts, best first, and all its probabilities.
fn ranked(logits: &[f32], k: usize) -> (Vec<usize>, Vec<f32>) {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|x| (x - most).exp()).sum();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order.truncate(k);
    (order, logits.iter().map(|x| (x - most).exp() / sum).collect())
}

impl Gate for OwnSoftmax {
    fn choose(&self, pass: GatePass, logits: &[f32], choices: Choices<'_>) {
        let (e, k) = (pass.dims.experts, pass.dims.top_k);
        let places = choices.ids.chunks_mut(k).zip(choices.weights.chunks_mut(k));
        for (logits, (ids, weights)) in logits.chunks(e).zip(places) {
            let (order, p) = ranked(logits, k);
            for ((id, weight), expert) in ids.iter_mut().zip(weights).zip(order) {
                (*id, *weight) = (expert as i32, p[expert]);
            }
        }
    }

    fn choose_grad(&self, pass: GatePass, logits: &[f32], ids: &[i32], dweights: &[f32], dlogits: &mut [f32]) {
        let (e, k) = (pass.dims.experts, pass.dims.top_k);
        let tokens = logits.chunks(e).zip(ids.chunks(k).zip(dweights.chunks(k)));
        for ((logits, (ids, dweights)), dlogits) in tokens.zip(dlogits.chunks_mut(e)) {
            let (_, p) = ranked(logits, k);
            let mut dp = vec![0.0; e];
            ids.iter().zip(dweights).for_each(|(&id, d)| dp[id as usize] = *d);
            let mean: f32 = dp.iter().zip(&p).map(|(d, p)| d * p).sum();
            (0..e).for_each(|i| dlogits[i] = p[i] * (dp[i] - mean));
        }
    }
}

/// [`OwnSoftmax`] with one thing wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Gradient,
    SameExpertTwice,
    ExpertThatIsNone,
    WeightOfNone,
    LooksAtOthers,
}

impl Gate for Wrong {
    fn choose(&self, pass: GatePass, logits: &[f32], choices: Choices<'_>) {
        let Choices { ids, weights } = choices;
        OwnSoftmax.choose(pass, logits, Choices { ids: &mut *ids, weights: &mut *weights });
        let Some(last) = ids.len().checked_sub(1) else { return };
        match self {
            Self::Gradient => {}
            Self::SameExpertTwice if pass.dims.top_k > 1 => ids[last] = ids[last - 1],
            Self::SameExpertTwice => {}
            Self::ExpertThatIsNone => ids[last] = pass.dims.experts as i32,
            Self::WeightOfNone => ids[last] = -1,
            Self::LooksAtOthers => weights[0] += logits[logits.len() - 1].abs().min(1.0),
        }
    }

    fn choose_grad(&self, pass: GatePass, logits: &[f32], ids: &[i32], dweights: &[f32], dlogits: &mut [f32]) {
        if ids.iter().all(|&id| (0..pass.dims.experts as i32).contains(&id)) {
            OwnSoftmax.choose_grad(pass, logits, ids, dweights, dlogits);
        }
        if *self == Self::Gradient {
            dlogits.iter_mut().for_each(|d| *d *= 1.2);
        }
    }
}

#[test]
fn the_kit_passes_what_is_right_and_names_what_is_wrong() {
    assert_eq!(faults(&OwnSoftmax), Vec::<String>::new());
    for (wrong, said) in [
        (Wrong::Gradient, "gradient: of logit"),
        (Wrong::SameExpertTwice, "a second time"),
        (Wrong::ExpertThatIsNone, "expert 8 of 8"),
        (Wrong::WeightOfNone, "no expert, but a weight of"),
        (Wrong::LooksAtOthers, "chooses otherwise than beside others"),
    ] {
        let found = faults(&wrong);
        assert!(found.iter().any(|fault| fault.contains(said)), "{wrong:?}: {found:?}");
    }
}

/// Steps with [`OwnSoftmax`] on `ranks`.
fn own(config: &Config, ranks: Ranks, steps: u64) -> Vec<StepMetrics> {
    let mut config = config.clone();
    config.router.kind = RouterKind::Custom;
    local::run(ranks.world, |world| {
        let (rank, size) = (Communicator::<Cpu>::rank(&world), Communicator::<Cpu>::size(&world));
        let grid = Grid::new(size, ranks.ep, config.model.experts).unwrap();
        let loader = Loader::new(&text(), config.loader_spec(rank, size)).unwrap();
        let groups = Groups::of_grid::<Cpu>(world, &grid).unwrap();
        let gate: Arc<dyn Gate> = Arc::new(OwnSoftmax);
        let mut trainer = build_with_gate(Cpu, &config, (&grid, Rank(rank)), groups, (loader, Some(gate))).unwrap();
        take_steps(&mut trainer, 1..=steps)
    })
    .swap_remove(0)
}

#[test]
fn a_gate_of_ones_own_trains_as_the_runtimes_under_any_layout_with_capacity_and_losses() {
    for capacity_factor in [None, Some(0.75)] {
        let mut config = small();
        config.router.kind = RouterKind::SoftmaxTopk;
        config.router.capacity_factor = capacity_factor;
        config.router.balance_scope = BalanceScope::Global;
        config.router.z_coefficient = 0.01;
        let expected = train(&config, &text(), ALONE, 6);
        for ranks in [ALONE, Ranks { world: 4, ep: 4 }] {
            if ranks != ALONE && capacity_factor.is_some() {
                // Capacity is by rank and pass.
                continue;
            }
            let found = own(&config, ranks, 6);
            assert_same_curve(&format!("own gate, {capacity_factor:?}, {ranks:?}"), &found, &expected, 1e-5, 1e-3);
        }
    }
}

#[test]
fn ranks_without_tokens_are_ordinary_for_a_gate_of_ones_own() {
    let mut config = small();
    (config.router.kind, config.train.global_batch) = (RouterKind::SoftmaxTopk, 2);
    let expected = train(&config, &text(), ALONE, 4);
    let found = own(&config, Ranks { world: 4, ep: 4 }, 4);
    assert_same_curve("own gate, two ranks without tokens", &found, &expected, 1e-5, 1e-3);
}

#[test]
fn a_program_without_a_gate_says_so() {
    let custom = RouterConfig { kind: RouterKind::Custom, ..RouterConfig::default() };
    let refusal = check_own_gate(&custom, None).unwrap_err();
    assert_eq!(refusal.key, "router.kind");
    assert!(refusal.reason.contains("docs/routers.md"), "{refusal}");
    let gate: Arc<dyn Gate> = Arc::new(OwnSoftmax);
    check_own_gate(&custom, Some(&gate)).unwrap();
    check_own_gate(&RouterConfig::default(), None).unwrap();
}
