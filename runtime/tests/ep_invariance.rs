//! The same training whatever the layout: loss curves under several numbers of ranks, expert-parallel sizes, passes and chunks.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use moe_runtime::config::Config;
use support::training::{ALONE, Ranks, assert_same_curve, small, text, train};

/// Rounding of one step in f32, and what a hundred steps make of it.
const FIRST: f64 = 1e-5;
const LATER: f64 = 1e-3;

const STEPS: u64 = 100;

/// Holds `variants` of one training to the first.
fn same_curves(variants: &[(&str, Config, Ranks)]) {
    let corpus = text();
    let curves: Vec<_> = variants.iter().map(|(_, config, ranks)| train(config, &corpus, *ranks, STEPS)).collect();
    let (first, last) = (&curves[0][0], &curves[0][STEPS as usize - 1]);
    assert!(last.loss < first.loss - 0.5, "nothing was learnt: {} to {}", first.loss, last.loss);
    for ((what, ..), curve) in variants.iter().zip(&curves).skip(1) {
        assert_same_curve(what, curve, &curves[0], FIRST, LATER);
    }
}

#[test]
fn expert_parallel_sizes_and_numbers_of_ranks_share_one_curve() {
    let ranks = |world, ep| Ranks { world, ep };
    same_curves(&[
        ("4 ranks, EP 1", small(), ranks(4, 1)),
        ("4 ranks, EP 2", small(), ranks(4, 2)),
        ("4 ranks, EP 4", small(), ranks(4, 4)),
        ("2 ranks, EP 2", small(), ranks(2, 2)),
        ("1 rank", small(), ALONE),
    ]);
}

/// With 8 sequences on 3 ranks in passes of 2, the last pass of rank 2 has none.
#[test]
fn ranks_that_run_out_of_sequences_change_nothing() {
    // The balance loss counts loads up to a pass: it depends on how a step is cut into passes, and is left out where that differs.
    let mut config = small();
    config.router.balance_coefficient = 0.0;
    config.router.z_coefficient = 0.01;
    let passes_of_two = |world, ep| {
        let mut config = config.clone();
        config.train.micro_batch = Some(2);
        (config, Ranks { world, ep })
    };
    let ((three_1, ranks_1), (three_3, ranks_3)) = (passes_of_two(3, 1), passes_of_two(3, 3));
    let (alone, one) = passes_of_two(1, 1);
    same_curves(&[
        ("1 rank, 1 pass", config.clone(), ALONE),
        ("1 rank, 4 passes", alone, one),
        ("3 ranks, EP 1, 2 passes", three_1, ranks_1),
        ("3 ranks, EP 3, 2 passes", three_3, ranks_3),
        ("3 ranks, EP 3, 1 pass", config.clone(), Ranks { world: 3, ep: 3 }),
    ]);
}

#[test]
fn sums_beside_the_backward_pass_have_the_same_bits() {
    let bits = |early, micro_batch, ranks| -> Vec<_> {
        let mut config = small();
        (config.parallel.reduce_early, config.train.micro_batch) = (early, micro_batch);
        config.model.tie_embeddings = micro_batch.is_some();
        let steps = train(&config, &text(), ranks, 5);
        steps.iter().map(|m| [m.loss, m.grad_norm].map(f64::to_bits)).collect()
    };
    for ranks in [ALONE, Ranks { world: 2, ep: 2 }, Ranks { world: 4, ep: 2 }] {
        for micro_batch in [None, Some(1)] {
            assert_eq!(bits(true, micro_batch, ranks), bits(false, micro_batch, ranks), "{ranks:?}, {micro_batch:?}");
        }
    }
}

#[test]
fn chunks_of_a_layers_tokens_change_nothing() {
    let chunks = |chunks| {
        let mut config = small();
        config.parallel.chunks = chunks;
        config
    };
    let ranks = Ranks { world: 2, ep: 2 };
    same_curves(&[
        ("1 chunk", chunks(1), ranks),
        ("2 chunks", chunks(2), ranks),
        ("3 chunks", chunks(3), ranks),
        ("3 chunks on 1 rank", chunks(3), ALONE),
    ]);
}
