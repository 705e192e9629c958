//! Experts that are computed again in the backward pass: the same bits as those that keep their projections, in less memory.

// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used)]

mod support;

use moe_kernels::Cpu;
use moe_runtime::collectives::local;
use moe_runtime::config::Config;
use moe_runtime::model::{Parameters, Recompute};
use moe_runtime::plan::{Job, MemoryPlan, Numbers};
use moe_runtime::topology::Grid;
use support::training::{Ranks, small, take_steps, text, trainer};

const STEPS: u64 = 5;

/// Bits of what a rank has after some steps: losses and norms of each, all parameters, and the moments, which every gradient went
/// into; and its activations in bytes.
fn trained(config: &Config, ranks: Ranks) -> Vec<(Vec<u64>, Vec<u32>, u64)> {
    let corpus = text();
    local::run(ranks.world, |world| {
        let mut trainer = trainer(config, &corpus, world, ranks.ep);
        let steps = take_steps(&mut trainer, 1..=STEPS);
        let readings = steps.iter().flat_map(|m| [m.loss, m.grad_norm, m.balance_loss].map(f64::to_bits)).collect();
        let parameters: &Parameters<Cpu> = trainer.model.parameters();
        let (m, v) = trainer.optimizer.moments();
        let mut values = Vec::new();
        for (part, _) in parameters.layout().parts() {
            values.extend(parameters.read(&Cpu, part).unwrap());
            for moment in [m, v] {
                values.extend(moe_runtime::model::parameters::read(&Cpu, moment, part).unwrap());
            }
        }
        (readings, values.into_iter().map(f32::to_bits).collect(), trainer.tally().activations)
    })
}

#[test]
fn experts_computed_again_give_the_same_bits_under_any_layout() {
    for (world, ep) in [(1, 1), (2, 1), (2, 2), (4, 2)] {
        for (chunks, micro_batch) in [(1, None), (2, Some(2))] {
            let mut kept = small();
            (kept.parallel.chunks, kept.train.micro_batch) = (chunks, micro_batch);
            let mut again = kept.clone();
            again.train.recompute = Recompute::Experts;
            let ranks = Ranks { world, ep };
            let (kept, again) = (trained(&kept, ranks), trained(&again, ranks));
            for (rank, (kept, again)) in kept.iter().zip(&again).enumerate() {
                let what = format!("rank {rank} of {ranks:?}, {chunks} chunks");
                assert_eq!(kept.0, again.0, "losses and norms: {what}");
                assert!(kept.1 == again.1, "parameters or moments: {what}");
            }
        }
    }
}

#[test]
fn what_is_saved_is_what_the_plan_says() {
    let ranks = Ranks { world: 1, ep: 1 };
    let grid = Grid::new(1, 1, small().model.experts).unwrap();
    let [kept, again] = [Recompute::None, Recompute::Experts].map(|recompute| {
        let mut config = small();
        config.train.recompute = recompute;
        let counted = trained(&config, ranks)[0].2;
        let job = Job { config, grid, ranks_per_node: 1, numbers: Numbers::CPU };
        (counted, MemoryPlan::new(&job).buffers.activations)
    });
    // h[N, 2F] in f32: kept by both layers, or once in what they share. N = T·k.
    let config = small();
    let rows = 8 * 32 * config.model.top_k;
    assert_eq!(kept.0 - again.0, (4 * rows * 2 * config.model.expert_ffn_size) as u64);
    assert_eq!((kept.0, again.0), (kept.1, again.1));
}
