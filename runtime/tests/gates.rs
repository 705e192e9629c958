//! Every gate in whole runs: the layout changes nothing, experts and ranks without tokens are ordinary, the selection bias moves
//! as its rule says and survives a stop.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use moe_kernels::Cpu;
use moe_runtime::collectives::{Communicator, Context, Groups, local};
use moe_runtime::config::Config;
use moe_runtime::data::{Corpus, Tokens};
use moe_runtime::model::{BlockNorm, LogitsOf, PassTokens};
use moe_runtime::routing::BalanceScope;
use moe_runtime::telemetry::StepMetrics;
use moe_runtime::topology::Grid;
use support::gates::{GATES, LIMITS, gate_named};
use support::training::{ALONE, Ranks, assert_same_curve, small, take_steps, text, train, train_prepared, trainer};

const FIRST: f64 = 1e-5;
const LATER: f64 = 1e-3;

/// The losses beside the balance loss, where they are.
fn losses(metrics: &StepMetrics) -> impl Iterator<Item = f64> {
    let StepMetrics { importance_loss, load_loss, device_loss, z_loss, .. } = *metrics;
    let StepMetrics { difference_loss, entropy_loss, batch_entropy_loss, .. } = *metrics;
    let all = [importance_loss, load_loss, device_loss, difference_loss, entropy_loss, batch_entropy_loss, z_loss];
    all.into_iter().flatten()
}

fn ranks(world: usize, ep: usize) -> Ranks {
    Ranks { world, ep }
}

/// One rank takes in four passes what four ranks take in one: losses over micro-batches, capacities and noise are the same.
#[test]
fn every_gate_and_limit_trains_the_same_under_any_layout() {
    let corpus = text();
    for gate in GATES {
        for limit in LIMITS {
            let mut config = small();
            gate.choose(&mut config);
            limit.choose(&mut config);
            config.router.balance_scope = BalanceScope::MicroBatch;
            gate.weigh_losses(&mut config);
            config.train.micro_batch = Some(2);
            let what = format!("{}, {limit:?}", gate.name);
            let expected = train(&config, &corpus, ranks(4, 1), 6);
            let dropped = expected.iter().any(|m| m.dropped_fraction > 0.0);
            assert!(limit.drops_with(&gate).is_none_or(|drops| drops == dropped), "{what}");
            for layout in [ranks(4, 4), ranks(4, 2), ALONE] {
                let what = format!("{what}, {layout:?}");
                let found = train(&config, &corpus, layout, 6);
                assert_same_curve(&what, &found, &expected, FIRST, LATER);
                for (found, expected) in found.iter().zip(&expected) {
                    let near = |a: f64, b: f64| (a - b).abs() <= LATER * b.abs();
                    let at = format!("{what}: step {}", found.step);
                    assert!(near(found.balance_loss, expected.balance_loss), "{at}: {found:?} {expected:?}");
                    assert!(near(found.dropped_fraction, expected.dropped_fraction), "{at}: {found:?} {expected:?}");
                    for (found, expected) in losses(found).zip(losses(expected)) {
                        assert!(near(found, expected), "{at}: {found:?} {expected:?}");
                    }
                }
            }
        }
    }
}

/// Layers of 4 and of 12 experts, tokens in two parts, norms behind sums: what stands around a gate changes with no layout either.
#[test]
fn layers_of_different_experts_and_parts_of_tokens_train_the_same_under_any_layout() {
    let corpus = text();
    for gate in ["topk-softmax", "noisy-topk", "sigmoid-bias", "expert-choice", "multi-gate"].map(gate_named) {
        for (experts, sub_tokens, block_norm) in
            [(vec![4, 12], 1, BlockNorm::Pre), (vec![], 2, BlockNorm::Pre), (vec![12, 4], 4, BlockNorm::Post)]
        {
            let mut config = small();
            gate.choose(&mut config);
            gate.weigh_losses(&mut config);
            config.model.experts_by_layer = experts;
            (config.model.sub_tokens, config.model.block_norm) = (sub_tokens, block_norm);
            config.router.balance_scope = BalanceScope::MicroBatch;
            config.train.micro_batch = Some(2);
            config.model.validate(&config.router).unwrap();
            let what = format!("{}, {:?} experts, {sub_tokens} parts", gate.name, config.model.experts_by_layer);
            let expected = train(&config, &corpus, ranks(4, 1), 4);
            for layout in [ranks(4, 4), ranks(4, 2), ALONE] {
                let found = train(&config, &corpus, layout, 4);
                assert_same_curve(&format!("{what}, {layout:?}"), &found, &expected, FIRST, LATER);
            }
        }
    }
}

/// In a text of one letter all tokens are alike: in every layer they all go to the same experts, and under EP 4 most ranks get
/// nothing.
#[test]
fn one_hot_expert_and_experts_and_ranks_without_tokens_change_nothing() {
    let corpus = Corpus::of_tokens(Tokens::U8(vec![b'e'; 5000].into()), "one letter", "");
    for gate in GATES {
        for limit in LIMITS {
            let mut config = small();
            gate.choose(&mut config);
            limit.choose(&mut config);
            config.router.balance_scope = BalanceScope::MicroBatch;
            config.train.micro_batch = Some(2);
            let what = format!("{}, {limit:?}", gate.name);
            let expected = train(&config, &corpus, ranks(4, 1), 4);
            let busiest = expected[0].load_max_over_mean;
            if gate.treats_equals_alike() {
                assert_eq!(busiest, 12.0 / config.model.top_k as f64, "{what}");
            }
            for layout in [ranks(4, 4), ALONE] {
                let found = train(&config, &corpus, layout, 4);
                assert_same_curve(&format!("{what}, {layout:?}"), &found, &expected, FIRST, LATER);
            }
        }
    }
}

/// Two sequences on four ranks: two ranks have no tokens at all, whatever the gate needs from them.
#[test]
fn ranks_without_sequences_change_nothing() {
    let corpus = text();
    for gate in GATES {
        let mut config = small();
        gate.choose(&mut config);
        config.router.balance_scope = BalanceScope::Global;
        config.train.global_batch = 2;
        if gate.looks_at_the_pass() {
            (config.router.balance_scope, config.train.micro_batch) = (BalanceScope::MicroBatch, Some(1));
        }
        let expected = train(&config, &corpus, ALONE, 6);
        for layout in [ranks(4, 1), ranks(4, 4)] {
            let found = train(&config, &corpus, layout, 6);
            assert_same_curve(&format!("{}, {layout:?}", gate.name), &found, &expected, FIRST, LATER);
        }
    }
}

fn biased() -> Config {
    let mut config = small();
    let gate = GATES.into_iter().find(|gate| gate.is_biased()).unwrap();
    gate.choose(&mut config);
    config.router.bias_update_rate = 0.25;
    config
}

/// A bias that outweighs every score sends all tokens to experts 3 and 7. After the step those two have more than the mean and
/// go down by the rate, the others go up by it.
#[test]
fn the_selection_bias_moves_towards_even_load_by_its_rate() {
    let (config, corpus) = (biased(), text());
    let mut bias = vec![0.0; 12];
    [bias[3], bias[7]] = [100.0; 2];
    let mut expected = vec![0.25; 12];
    [expected[3], expected[7]] = [99.75; 2];
    for layout in [ALONE, ranks(4, 2)] {
        let of_ranks = local::run(layout.world, |world| {
            let mut trainer = trainer(&config, &corpus, world, layout.ep);
            for layer in 0..2 {
                assert!(trainer.model.set_selection_bias(layer, &bias));
            }
            let metrics = take_steps(&mut trainer, 1..=1).remove(0);
            (metrics.load_max_over_mean, trainer.model.selection_biases().unwrap())
        });
        for (busiest, biases) in of_ranks {
            assert_eq!(busiest, 6.0, "{layout:?}");
            assert_eq!(biases, [(0, expected.clone()), (1, expected.clone())], "{layout:?}");
        }
    }
}

#[test]
fn an_expert_at_the_mean_keeps_its_bias() {
    let (mut config, corpus) = (biased(), text());
    // Every token takes every expert: all loads are the mean.
    config.model.top_k = config.model.experts;
    let check = |trainer: &mut support::training::LocalTrainer| {
        take_steps(trainer, 1..=3);
        assert_eq!(trainer.model.selection_biases().unwrap(), [(0, vec![0.0; 12]), (1, vec![0.0; 12])]);
    };
    train_prepared(&config, &corpus, ranks(2, 2), 1, check);
}

/// The model itself stands still here: what evens the load is the bias.
#[test]
fn the_selection_bias_balances_the_load() {
    let corpus = text();
    let busiest = |rate: f32| {
        let mut config = biased();
        config.optimizer.lr = 1e-9;
        config.router.bias_update_rate = rate;
        let steps = train(&config, &corpus, ranks(2, 2), 40);
        steps[20..].iter().map(|m| m.load_max_over_mean).sum::<f64>() / 20.0
    };
    let (with, without) = (busiest(0.002), busiest(0.0));
    println!("busiest over mean expert: {with:.2} with the bias, {without:.2} without");
    assert!(with < 1.7 && without > 2.2, "{with} with the bias, {without} without");
}

#[test]
fn the_selection_bias_is_saved_and_restored() {
    let (config, corpus) = (biased(), text());
    let dir = tempfile::tempdir().unwrap();
    let store = moe_runtime::checkpoint::Store::new(dir.path(), 0);
    let saved = local::run(2, |world| {
        let mut trainer = trainer(&config, &corpus, world, 2);
        take_steps(&mut trainer, 1..=3);
        trainer.save(&store, 3, serde_json::Value::Null).unwrap();
        trainer.model.selection_biases().unwrap()
    });
    assert!(saved[0].iter().all(|(_, bias)| bias.iter().any(|&b| b != 0.0)), "{saved:?}");
    let checkpoint = store.latest().unwrap().unwrap();
    let restored = local::run(4, |world| {
        let rank = Communicator::<Cpu>::rank(&world);
        let mut trainer = trainer(&config, &corpus, world, 4);
        assert_eq!(trainer.restore(&checkpoint).unwrap().step, 3, "rank {rank}");
        trainer.model.selection_biases().unwrap()
    });
    assert!(restored.iter().all(|biases| *biases == saved[0]), "{restored:?} {saved:?}");
}

/// What is written by ranks that share out layers of 4 and of 12 experts is one model, selection biases included.
#[test]
fn a_pyramids_checkpoint_opens_under_any_layout_and_goes_on_the_same() {
    let corpus = text();
    let mut config = biased();
    config.model.experts_by_layer = vec![4, 12];
    let at_a_stretch = train(&config, &corpus, ALONE, 5);
    let dir = tempfile::tempdir().unwrap();
    let store = moe_runtime::checkpoint::Store::new(dir.path(), 0);
    local::run(2, |world| {
        let mut trainer = trainer(&config, &corpus, world, 2);
        take_steps(&mut trainer, 1..=3);
        trainer.save(&store, 3, serde_json::Value::Null).unwrap();
    });
    let checkpoint = store.latest().unwrap().unwrap();
    for layout in [ranks(4, 4), ranks(4, 2), ALONE] {
        let found = local::run(layout.world, |world| {
            let mut trainer = trainer(&config, &corpus, world, layout.ep);
            assert_eq!(trainer.restore(&checkpoint).unwrap().step, 3);
            take_steps(&mut trainer, 4..=5)
        });
        assert_same_curve(&format!("pyramid, {layout:?}"), &found[0], &at_a_stretch[3..], FIRST * 10.0, LATER);
    }
}

/// In evaluation nothing that comes later changes what came before, whatever the gate does in training.
#[test]
fn no_gate_looks_ahead_in_evaluation() {
    const LENGTH: usize = 24;
    let corpus = text();
    for gate in GATES {
        for limit in LIMITS {
            let mut config = small();
            gate.choose(&mut config);
            limit.choose(&mut config);
            let logits = local::run(1, |world| {
                let mut trainer = trainer(&config, &corpus, world, 1);
                let groups = Groups::of_grid::<Cpu>(local::solo(Context::default()), &Grid::new(1, 1, 12).unwrap());
                let groups = groups.unwrap();
                [7, 11].map(|step: usize| {
                    let later = |i: usize| if i < LENGTH / 2 { (5 * i % 90) as i32 } else { (step * i % 90) as i32 };
                    let inputs: Vec<i32> = (0..LENGTH).map(later).collect();
                    let pass = PassTokens::of_inputs(&inputs, LENGTH);
                    trainer.model.read_logits(&groups, pass, LogitsOf::All).unwrap()
                })
            })
            .swap_remove(0);
            let half = logits[0].len() / 2;
            let worst =
                logits[0][..half].iter().zip(&logits[1][..half]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{}, {limit:?}: what comes later moves logits by {worst:e}", gate.name);
            assert_ne!(logits[0][half..], logits[1][half..], "{}", gate.name);
        }
    }
}
