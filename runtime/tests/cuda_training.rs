//! Training on a GPU beside the CPU: the same configuration, the same losses. Skipped with a notice where there is no GPU.

#![cfg(feature = "cuda")]
// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use moe_kernels::cuda::{Cuda, CudaAct, OpenError};
use moe_kernels::{Backend, Cpu};
use moe_runtime::collectives::local;
use moe_runtime::config::Config;
use moe_runtime::data::{Corpus, Tokens};
use moe_runtime::model::Recompute;
use moe_runtime::plan::{Job, MemoryPlan, Numbers};
use moe_runtime::topology::Grid;
use moe_runtime::training::Requests;
use support::training::{small, text, trainer_on};

fn gpu<A: CudaAct>() -> Option<Cuda<A>> {
    match Cuda::open(0) {
        Ok(device) => Some(device),
        Err(error @ (OpenError::NoDriver | OpenError::NoDevice)) => {
            eprintln!("notice: training on a GPU was not tested: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The text that `MOE_TEXT` names, by default `shared/data/tinyshakespeare.txt` beside the workspace; none where there is no such file.
fn real_text() -> Option<Corpus> {
    let named = std::env::var_os("MOE_TEXT").map(PathBuf::from);
    let path =
        named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/tinyshakespeare.txt"));
    match std::fs::read(&path) {
        Ok(bytes) => Some(Corpus::of_tokens(Tokens::U8(bytes.into()), "text", "")),
        Err(error) => {
            eprintln!("notice: training on a real text was not tested: {}: {error}", path.display());
            None
        }
    }
}

/// Loss and gradient norm of each step on one rank.
fn losses<B: Backend>(device: B, config: &Config, corpus: &Corpus, steps: u64) -> Vec<(f64, f64)> {
    let mut trainer = trainer_on(device, config, corpus, local::solo(Default::default()), 1);
    let take = |step| trainer.step(step, Requests::default()).unwrap().0;
    (1..=steps).map(take).map(|metrics| (metrics.loss, metrics.grad_norm)).collect()
}

fn largest_difference(found: &[f64], expected: &[f64]) -> f64 {
    let off = |(found, expected): (&f64, &f64)| ((found - expected) / expected).abs();
    found.iter().zip(expected).map(off).fold(0.0, f64::max)
}

fn only_losses(run: &[(f64, f64)]) -> Vec<f64> {
    run.iter().map(|(loss, _)| *loss).collect()
}

/// Means of twenty steps. Late single steps say little: two runs in f32 that only sum in another order are one or two hundredths apart
/// after 200 steps, since a token that chooses another expert changes all that comes later.
fn smoothed(run: &[(f64, f64)]) -> Vec<f64> {
    only_losses(run).chunks(20).map(|losses| losses.iter().sum::<f64>() / losses.len() as f64).collect()
}

#[test]
fn two_hundred_steps_in_bf16_follow_the_cpus_curve_within_a_hundredth() {
    let (Some(device), Some(corpus)) = (gpu::<half::bf16>(), real_text()) else { return };
    let config = Config::preset("moe-15m").unwrap();
    let on_gpu = losses(device, &config, &corpus, 200);
    let on_cpu = losses(Cpu, &config, &corpus, 200);
    let worst = largest_difference(&smoothed(&on_gpu), &smoothed(&on_cpu));
    let single = largest_difference(&only_losses(&on_gpu), &only_losses(&on_cpu));
    println!("bf16 on a GPU, f32 on the CPU: the curves differ by {worst:.1e}, single steps by up to {single:.1e}");
    assert!(worst <= 1e-2, "the curves differ by {worst:e}");
}

#[test]
fn steps_in_f32_are_the_cpus() {
    let Some(device) = gpu::<f32>() else { return };
    let (config, corpus) = (small(), text());
    let run = (losses(device, &config, &corpus, 50), losses(Cpu, &config, &corpus, 50));
    let worst = largest_difference(&only_losses(&run.0), &only_losses(&run.1));
    println!("f32 on a GPU and the CPU: largest relative difference of a loss {worst:.1e}");
    assert!(worst <= 1e-3, "losses differ by {worst:e}");
}

#[test]
fn the_same_seed_gives_the_same_bits_twice() {
    let Some(device) = gpu::<half::bf16>() else { return };
    let bits = |run: Vec<(f64, f64)>| run.into_iter().map(|(a, b)| (a.to_bits(), b.to_bits())).collect::<Vec<_>>();
    let (config, corpus) = (small(), text());
    assert_eq!(bits(losses(device.clone(), &config, &corpus, 20)), bits(losses(device, &config, &corpus, 20)));
}

#[test]
fn experts_computed_again_give_the_same_bits() {
    let Some(device) = gpu::<half::bf16>() else { return };
    let kept = small();
    let mut again = kept.clone();
    again.train.recompute = Recompute::Experts;
    let corpus = text();
    assert_eq!(losses(device.clone(), &kept, &corpus, 20), losses(device, &again, &corpus, 20));
}

#[test]
fn buffers_of_a_gpu_are_planned_to_the_byte() {
    let Some(device) = gpu::<half::bf16>() else { return };
    for recompute in [Recompute::None, Recompute::Experts] {
        let mut config = small();
        config.train.recompute = recompute;
        let corpus = text();
        let mut trainer = trainer_on(device.clone(), &config, &corpus, local::solo(Default::default()), 1);
        for step in 1..=2 {
            trainer.step(step, Requests::default()).unwrap();
        }
        let grid = Grid::new(1, 1, config.model.experts).unwrap();
        let job = Job { config, grid, ranks_per_node: 1, numbers: Numbers::GPU };
        assert_eq!(MemoryPlan::new(&job).buffers, trainer.tally(), "{recompute:?}");
    }
}
