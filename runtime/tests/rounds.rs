//! Batches too unbalanced for the room that receive buffers have: they come in rounds, and nothing changes but the count of those.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use moe_runtime::collectives::local;
use moe_runtime::config::Config;
use moe_runtime::model::Recompute;
use moe_runtime::routing::RouterKind;
use moe_runtime::telemetry::StepMetrics;
use support::training::{
    ALONE, LocalTrainer, Ranks, assert_same_curve, small, take_steps, text, train_prepared, trainer,
};

const STEPS: u64 = 6;

/// A gate whose choice is decided by a bias on some experts, which stays as it is.
fn biased() -> Config {
    let mut config = small();
    config.router.kind = RouterKind::SigmoidBias;
    config.router.bias_update_rate = 0.0;
    config
}

/// Has all tokens prefer the experts `hot`.
fn heat(trainer: &mut LocalTrainer, hot: &[usize]) {
    let config = trainer.model.setup().model.clone();
    let bias: Vec<_> = (0..config.experts).map(|e| if hot.contains(&e) { 10.0 } else { 0.0 }).collect();
    for layer in config.moe_layers() {
        assert!(trainer.model.set_selection_bias(layer, &bias));
    }
}

fn train(config: &Config, ranks: Ranks, hot: &[usize]) -> Vec<StepMetrics> {
    train_prepared(config, &text(), ranks, STEPS, |trainer| heat(trainer, hot))
}

fn extra_rounds(curve: &[StepMetrics]) -> u64 {
    curve.iter().filter_map(|metrics| metrics.extra_rounds).sum()
}

#[test]
fn a_batch_that_all_goes_to_one_rank_has_the_losses_of_one_rank() {
    // 12 experts on 4 ranks: all tokens to rank 0; one hot expert on rank 3; the last rank's experts, where most tokens are far from.
    for hot in [&[0, 1][..], &[9], &[10, 11]] {
        let alone = train(&biased(), ALONE, hot);
        for ep in [2, 4] {
            let found = train(&biased(), Ranks { world: 4, ep }, hot);
            let what = format!("experts {hot:?} are hot, EP {ep}");
            assert_same_curve(&what, &found, &alone, 1e-5, 1e-4);
            assert!(extra_rounds(&found) > 0, "{what}: it all fitted");
        }
        assert_eq!(alone[0].extra_rounds, None);
    }
}

#[test]
fn rounds_change_nothing_whatever_else_is_cut() {
    let alone = train(&biased(), ALONE, &[0, 1]);
    let recompute = |config: &mut Config| config.train.recompute = Recompute::Experts;
    let chunks = |config: &mut Config| config.parallel.chunks = 3;
    let both = |config: &mut Config| (recompute(config), chunks(config)).1;
    for (what, change) in [("recompute", &recompute as &dyn Fn(&mut Config)), ("chunks", &chunks), ("both", &both)] {
        let mut config = biased();
        change(&mut config);
        let found = train(&config, Ranks { world: 2, ep: 2 }, &[0, 1]);
        assert_same_curve(what, &found, &alone, 1e-5, 1e-4);
        assert!(extra_rounds(&found) > 0, "{what}: it all fitted");
    }
}

#[test]
fn with_room_for_everything_there_are_no_rounds_and_the_bits_of_one_chunk_stay() {
    let mut roomy = biased();
    roomy.parallel.receive_headroom = 12.0;
    let ranks = Ranks { world: 2, ep: 2 };
    let (cramped, roomy) = (train(&biased(), ranks, &[0, 1]), train(&roomy, ranks, &[0, 1]));
    assert_eq!(extra_rounds(&roomy), 0);
    // Before the first update rounds have changed no sum but that of the weights' gradients.
    assert_eq!(cramped[0].loss.to_bits(), roomy[0].loss.to_bits());
}

#[test]
fn rounds_keep_memory_to_what_is_planned() {
    let tally = |headroom: f64| {
        let mut config = biased();
        config.parallel.receive_headroom = headroom;
        let corpus = text();
        local::run(4, |world| {
            let mut trainer = trainer(&config, &corpus, world, 4);
            heat(&mut trainer, &[0, 1]);
            take_steps(&mut trainer, 1..=2);
            trainer.tally().activations
        })
    };
    let (cramped, roomy) = (tally(1.4), tally(4.0));
    // Everything goes to rank 0, which has no more buffers for it than the others.
    assert!(cramped[0] <= cramped[1] && cramped[0] < roomy[0], "{cramped:?} {roomy:?}");
}
