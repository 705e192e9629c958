//! Training over GPUs: experts over ranks, tokens shuffled by NCCL, the losses of one rank. Skipped with a notice where there are fewer
//! GPUs than ranks.

#![cfg(feature = "cuda")]
// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used)]

mod gpus;
mod support;

use moe_runtime::config::Config;
use moe_runtime::telemetry::StepMetrics;
use moe_runtime::training::Requests;
use support::training::{ALONE, Ranks, assert_same_curve, small, text, train, trainer_on};

/// The metrics of each step on `ranks` GPUs, the same on all of them.
fn on_gpus(config: &Config, ranks: Ranks, steps: u64) -> Option<Vec<StepMetrics>> {
    let corpus = text();
    let of_ranks = gpus::on_gpus::<f32, _>(ranks.world, |gpu, world| {
        let mut trainer = trainer_on(gpu.clone(), config, &corpus, world, ranks.ep);
        (1..=steps).map(|step| trainer.step(step, Requests::default()).unwrap().0).collect::<Vec<_>>()
    })?;
    let bits =
        |steps: &[StepMetrics]| steps.iter().map(|m| [m.loss.to_bits(), m.grad_norm.to_bits()]).collect::<Vec<_>>();
    for (rank, other) in of_ranks.iter().enumerate() {
        assert_eq!(bits(other), bits(&of_ranks[0]), "ranks {rank} and 0 of {ranks:?} disagree");
    }
    of_ranks.into_iter().next()
}

#[test]
fn every_layout_has_the_losses_of_one_cpu() {
    let config = small();
    for ranks in
        [Ranks { world: 2, ep: 2 }, Ranks { world: 2, ep: 1 }, Ranks { world: 4, ep: 4 }, Ranks { world: 4, ep: 2 }]
    {
        let Some(found) = on_gpus(&config, ranks, 100) else { continue };
        assert_same_curve(&format!("{ranks:?}"), &found, &train(&config, &text(), ALONE, 100), 1e-4, 1e-3);
    }
}

#[test]
fn chunks_and_rounds_have_the_losses_of_one_cpu() {
    let alone = train(&small(), &text(), ALONE, 40);
    for chunks in [1, 2, 3] {
        for headroom in [1.0, 12.0] {
            let mut config = small();
            (config.parallel.chunks, config.parallel.receive_headroom) = (chunks, headroom);
            config.parallel.reduce_early = chunks > 1;
            for ranks in [Ranks { world: 2, ep: 2 }, Ranks { world: 4, ep: 4 }] {
                let Some(found) = on_gpus(&config, ranks, 40) else { continue };
                let what = format!("{chunks} chunks, room for {headroom} times the expected, {ranks:?}");
                assert_same_curve(&what, &found, &alone, 1e-4, 1e-3);
                let rounds: u64 = found.iter().filter_map(|metrics| metrics.extra_rounds).sum();
                assert_eq!(rounds > 0, headroom < 2.0, "{what}: {rounds} rounds");
            }
        }
    }
}

#[test]
fn the_same_layout_gives_the_same_bits_twice() {
    let ranks = Ranks { world: 2, ep: 2 };
    let Some(first) = on_gpus(&small(), ranks, 10) else { return };
    let second = on_gpus(&small(), ranks, 10).unwrap();
    let bits = |steps: &[StepMetrics]| steps.iter().map(|m| m.loss.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&first), bits(&second));
}
