//! Balance losses of two layers on two ranks in two passes against the formulas of DESIGN's terms, in f64 from the logits.
//!
//! f is the share of a unit's tokens that chose an expert (so Σ f = k), P the mean probability; a unit's loss is E · Σ_e f_e · P_e.
//! Units are weighted by their tokens, layers are averaged or pooled.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use moe_kernels::{Cpu, Device, View, ViewMut};
use moe_runtime::collectives::{Communicator, HostCommunicator, local};
use moe_runtime::config::Config;
use moe_runtime::routing::{
    Balance, BalanceReport, BalanceScope, BatchShare, RoutePass, Router, RouterConfig, RouterKind, RouterShape,
    RouterWeights,
};
use rand::SeedableRng;
use rand::rand_core::Rng;
use rand_chacha::ChaCha8Rng;
use support::gates::{GATES, Gate};

const LAYERS: usize = 2;
const EXPERTS: usize = 5;
const HIDDEN: usize = 7;
/// S.
const LENGTH: usize = 4;
/// Sequences of each rank in each pass: unequal, and none for rank 1 in the second.
const SEQUENCES: [[usize; 2]; 2] = [[3, 2], [1, 0]];

/// Deterministic values with a mean of 0, different for every key.
fn values(key: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(key);
    (0..len).map(|_| (rng.next_u32() as f64 / f64::from(u32::MAX) * 4.0 - 2.0) as f32).collect()
}

fn tokens(pass: usize) -> usize {
    SEQUENCES[pass].iter().sum::<usize>() * LENGTH
}

fn all_tokens() -> usize {
    tokens(0) + tokens(1)
}

fn x(layer: usize, pass: usize, rank: usize) -> Vec<f32> {
    values(1000 + (layer * 100 + pass * 10 + rank) as u64, SEQUENCES[pass][rank] * LENGTH * HIDDEN)
}

fn weights(layer: usize) -> Vec<f32> {
    values(1 + layer as u64, EXPERTS * HIDDEN)
}

/// Runs both passes of one rank and reports.
fn report(world: &HostCommunicator, config: &RouterConfig, top_k: usize) -> BalanceReport {
    let rank = Communicator::<Cpu>::rank(world);
    let shape = RouterShape { hidden_size: HIDDEN, experts: EXPERTS, top_k, config: config.clone(), gate: None };
    let mut balance = Balance::new(&Cpu, config, vec![EXPERTS; LAYERS], 3).unwrap();
    let mut routers: Vec<_> = (0..LAYERS).map(|layer| Router::new(&Cpu, shape.clone(), 1, layer).unwrap()).collect();
    balance.begin_step(&Cpu);
    let mut tokens_so_far = 0;
    for (pass, sequences) in SEQUENCES.iter().enumerate() {
        tokens_so_far += tokens(pass);
        let share = BatchShare { global_tokens: all_tokens(), tokens_so_far, pass_tokens: tokens(pass) };
        let at = RoutePass {
            tokens: sequences[rank] * LENGTH,
            sequence_length: LENGTH,
            first_token: 0,
            training: true,
            step: 0,
            ids: &[],
            tags: &[],
        };
        balance.begin_pass(at);
        for (layer, router) in routers.iter_mut().enumerate() {
            let (x, weight) = (x(layer, pass, rank), weights(layer));
            let weights = RouterWeights { router: Some(View::of(&weight)), noise: None, hidden: [None; 3] };
            let (counts, probabilities) = balance.layer_mut(layer);
            router.forward(&Cpu, at, View::of(&x), &weights).unwrap();
            router.take_statistics(&Cpu, at, counts, probabilities);
        }
        balance.form(&Cpu, world, at, share).unwrap();
        for (layer, router) in routers.iter().enumerate() {
            balance.add(&Cpu, layer, &router.statistics);
        }
    }
    balance.report(&Cpu).unwrap()
}

/// What one token contributes: its probabilities, its choices, lse².
struct Token {
    probabilities: Vec<f64>,
    chosen: Vec<usize>,
    lse_squared: f64,
}

/// The tokens of a layer, pass and rank, worked out anew.
fn route(gate: RouterKind, top_k: usize, (layer, pass, rank): (usize, usize, usize)) -> Vec<Token> {
    let (x, weights) = (x(layer, pass, rank), weights(layer));
    let token = |x: &[f32]| {
        let dot = |row: &[f32]| row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
        let logits: Vec<f64> = weights.chunks(HIDDEN).map(dot).collect();
        let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
        let scores: Vec<f64> = match gate {
            RouterKind::SigmoidBias => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
            _ => logits.iter().map(|l| (l - lse).exp()).collect(),
        };
        let sum: f64 = scores.iter().sum();
        let mut order: Vec<usize> = (0..EXPERTS).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(top_k);
        Token { probabilities: scores.iter().map(|s| s / sum).collect(), chosen: order, lse_squared: lse * lse }
    };
    x.chunks(HIDDEN).map(token).collect()
}

/// Counts and summed probabilities of some tokens.
fn statistics<'a>(tokens: impl Iterator<Item = &'a Token>) -> [Vec<f64>; 2] {
    let (mut counts, mut sums) = (vec![0.0; EXPERTS], vec![0.0; EXPERTS]);
    for token in tokens {
        token.chosen.iter().for_each(|&e| counts[e] += 1.0);
        sums.iter_mut().zip(&token.probabilities).for_each(|(sum, p)| *sum += p);
    }
    [counts, sums]
}

/// The loss of tokens whose layers are `by_layer`, with f from `loads` of `counted` tokens, weighted by its share of all tokens.
fn unit(loads: &[Vec<f64>], probabilities: &[Vec<f64>], counted: usize, pooled: bool) -> f64 {
    let loss = |counts: &[f64], sums: &[f64], layers: usize| -> f64 {
        let each = |(c, p): (&f64, &f64)| c / (counted * layers) as f64 * p / (all_tokens() * layers) as f64;
        EXPERTS as f64 * counts.iter().zip(sums).map(each).sum::<f64>()
    };
    if !pooled {
        return loads.iter().zip(probabilities).map(|(c, p)| loss(c, p, 1)).sum::<f64>() / LAYERS as f64;
    }
    let pool =
        |layers: &[Vec<f64>]| (0..EXPERTS).map(|e| layers.iter().map(|layer| layer[e]).sum()).collect::<Vec<f64>>();
    loss(&pool(loads), &pool(probabilities), LAYERS)
}

/// The balance loss of the whole step.
fn expected(gate: RouterKind, top_k: usize, scope: BalanceScope, pooled: bool) -> f64 {
    let places = || (0..2).flat_map(|pass| (0..2).map(move |rank| (pass, rank)));
    let layers_of =
        |pass, rank| (0..LAYERS).map(move |layer| route(gate, top_k, (layer, pass, rank))).collect::<Vec<_>>();
    let of = |tokens: &[&[Token]]| -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        tokens.iter().map(|layer| statistics(layer.iter())).map(|[counts, sums]| (counts, sums)).unzip()
    };
    match scope {
        BalanceScope::Sequence => places()
            .flat_map(|(pass, rank)| {
                let layers = layers_of(pass, rank);
                let one = |sequence: usize| {
                    let range = sequence * LENGTH..(sequence + 1) * LENGTH;
                    let (counts, sums) = of(&layers.iter().map(|layer| &layer[range.clone()]).collect::<Vec<_>>());
                    unit(&counts, &sums, LENGTH, pooled)
                };
                (0..SEQUENCES[pass][rank]).map(one).collect::<Vec<_>>()
            })
            .sum(),
        BalanceScope::MicroBatch => places()
            .filter(|&(pass, rank)| SEQUENCES[pass][rank] > 0)
            .map(|(pass, rank)| {
                let layers = layers_of(pass, rank);
                let (counts, sums) = of(&layers.iter().map(Vec::as_slice).collect::<Vec<_>>());
                unit(&counts, &sums, SEQUENCES[pass][rank] * LENGTH, pooled)
            })
            .sum(),
        BalanceScope::Global => {
            // Loads of all ranks, up to the pass; probabilities of the pass alone.
            let (mut loads, mut counted, mut sum) = (vec![vec![0.0; EXPERTS]; LAYERS], 0, 0.0);
            for pass in 0..2 {
                counted += tokens(pass);
                let layers: Vec<Vec<Token>> = (0..LAYERS)
                    .map(|layer| (0..2).flat_map(|rank| route(gate, top_k, (layer, pass, rank))).collect())
                    .collect();
                let (counts, sums) = of(&layers.iter().map(Vec::as_slice).collect::<Vec<_>>());
                for (load, count) in loads.iter_mut().flatten().zip(counts.iter().flatten()) {
                    *load += count;
                }
                sum += unit(&loads, &sums, counted, pooled);
            }
            sum
        }
    }
}

fn configured(gate: Gate) -> Config {
    let mut config = Config::default();
    gate.choose(&mut config);
    config
}

/// Sums of f32 counts and probabilities over some 20 tokens.
const TOLERANCE: f64 = 1e-5;

fn near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= TOLERANCE * expected.abs()
}

#[test]
fn balance_losses_are_those_of_the_formula() {
    // The choices of the others are the kernels' tests.
    for gate in GATES.into_iter().filter(Gate::chooses_highest) {
        for scope in [BalanceScope::Sequence, BalanceScope::MicroBatch, BalanceScope::Global] {
            for pooled in [false, true] {
                let Config { mut router, model, .. } = configured(gate);
                (router.balance_scope, router.balance_pooled) = (scope, pooled);
                let reports = local::run(2, |world| report(&world, &router, model.top_k));
                let what = format!("{}, {scope:?}, pooled {pooled}", gate.name);
                let found: f64 = reports.iter().map(|report| report.losses.balance).sum();
                let expected = expected(router.kind, model.top_k, scope, pooled);
                println!("{what}: {found:.6}, expected {expected:.6}");
                assert!(near(found, expected), "{what}: {found}, expected {expected}");
            }
        }
    }
}

#[test]
fn loads_mass_entropy_and_z_are_sums_over_all_tokens() {
    for scope in [BalanceScope::Sequence, BalanceScope::MicroBatch, BalanceScope::Global] {
        let router = RouterConfig { balance_scope: scope, ..RouterConfig::default() };
        let reports = local::run(2, |world| report(&world, &router, 2));
        let all: Vec<Vec<Token>> = (0..LAYERS)
            .map(|layer| {
                let place = |at: usize| route(router.kind, 2, (layer, at / 2, at % 2));
                (0..4).flat_map(place).collect()
            })
            .collect();
        let z: f64 = all.iter().flatten().map(|token| token.lse_squared).sum();
        let found: f64 = reports.iter().map(|report| report.z_sum).sum();
        assert!(near(found, z), "{scope:?}: {found}, expected {z}");
        for (layer, tokens) in all.iter().enumerate() {
            let [_, mass] = statistics(tokens.iter());
            for (e, mass) in mass.into_iter().enumerate() {
                let found: f64 = reports.iter().map(|report| report.mass[layer * EXPERTS + e]).sum();
                assert!(near(found, mass), "{scope:?}, layer {layer}, expert {e}: mass {found}, expected {mass}");
            }
            let of = |token: &Token| token.probabilities.iter().map(|p| -p * p.ln()).sum::<f64>();
            let (found, entropy): (f64, f64) =
                (reports.iter().map(|report| report.entropy[layer]).sum(), tokens.iter().map(of).sum());
            assert!(near(found, entropy), "{scope:?}, layer {layer}: entropy {found}, expected {entropy}");
        }
        let loads: Vec<f64> = all.iter().flat_map(|layer| statistics(layer.iter())[0].clone()).collect();
        let global = scope == BalanceScope::Global;
        let sum = |i: usize| reports.iter().map(|report| report.loads[i]).sum::<f64>() / if global { 2.0 } else { 1.0 };
        assert_eq!((0..loads.len()).map(sum).collect::<Vec<_>>(), loads, "{scope:?}");
    }
}

/// Expert choice by its formula, in f64: each expert takes its ⌈kT/E⌉ likeliest tokens in training, each token its k likeliest experts in
/// evaluation; weights are the probabilities.
#[test]
fn experts_take_the_tokens_that_are_likeliest_for_them() {
    const K: usize = 2;
    let tokens = route(RouterKind::SoftmaxTopk, K, (0, 0, 0));
    let t = tokens.len();
    let capacity = (K * t).div_ceil(EXPERTS);
    let config = RouterConfig { kind: RouterKind::ExpertChoice, ..RouterConfig::default() };
    let shape = RouterShape { hidden_size: HIDDEN, experts: EXPERTS, top_k: K, config, gate: None };
    let mut router = Router::new(&Cpu, shape, 1, 0).unwrap();
    let (x, weight) = (x(0, 0, 0), weights(0));
    for training in [true, false] {
        let pass = RoutePass { tokens: t, sequence_length: t, first_token: 0, training, step: 0, ids: &[], tags: &[] };
        let of_router = RouterWeights { router: Some(View::of(&weight)), noise: None, hidden: [None; 3] };
        let (mut counts, mut probabilities) = (vec![0.0f32; EXPERTS], vec![0.0f32; EXPERTS]);
        let sums = (ViewMut::of(&mut counts), ViewMut::of(&mut probabilities));
        router.forward(&Cpu, pass, View::of(&x), &of_router).unwrap();
        router.take_statistics(&Cpu, pass, sums.0, sums.1);
        let (mut kept, mut given) = (vec![0; t * EXPERTS], vec![0.0; t * EXPERTS]);
        Cpu.read_to_host(router.kept(t), &mut kept).unwrap();
        Cpu.read_to_host(router.weights(t), &mut given).unwrap();
        for (e, &load) in counts.iter().enumerate() {
            let takes = |t: usize| (0..EXPERTS).find(|&j| kept[t * EXPERTS + j] == e as i32);
            let mut order: Vec<usize> = (0..t).collect();
            order.sort_by(|&a, &b| tokens[b].probabilities[e].total_cmp(&tokens[a].probabilities[e]));
            let expected = |token: usize| match training {
                true => order[..capacity].contains(&token),
                false => tokens[token].chosen.contains(&e),
            };
            for (token, reference) in tokens.iter().enumerate() {
                assert_eq!(takes(token).is_some(), expected(token), "expert {e}, token {token}, training {training}");
                if let Some(j) = takes(token) {
                    let weight = f64::from(given[token * EXPERTS + j]);
                    assert!((weight - reference.probabilities[e]).abs() < 1e-5, "expert {e}, token {token}");
                }
            }
            let taken = (0..t).filter(|&token| takes(token).is_some()).count();
            assert!(!training || taken == capacity, "expert {e} took {taken} of {capacity}");
            assert_eq!(load as usize, taken, "expert {e}'s load");
        }
    }
}
