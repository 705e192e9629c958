//! Small runs on local ranks: a configuration, a text, and the readings of each step.
//!
//! Ranks are threads of this process; the same [`Trainer`] that `moe-worker` builds runs on each.

use moe_kernels::{Backend, Cpu};
use moe_runtime::collectives::{Communicator, Groups, HostCommunicator, local};
use moe_runtime::config::{Config, ScheduleKind};
use moe_runtime::data::{Corpus, Loader, Tokens, generated_corpus};
use moe_runtime::routing::BalanceScope;
use moe_runtime::telemetry::StepMetrics;
use moe_runtime::topology::{Grid, Rank};
use moe_runtime::training::{Requests, Trainer};
use moe_runtime::worker::build;

/// A trainer on one local rank.
pub(crate) type LocalTrainer = Trainer<Cpu, HostCommunicator, Loader>;

/// Ranks, and how many of them share one set of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ranks {
    pub(crate) world: usize,
    pub(crate) ep: usize,
}

pub(crate) const ALONE: Ranks = Ranks { world: 1, ep: 1 };

/// Two dropless MoE layers of 12 experts, which 1, 2, 3 and 4 ranks can share, and a balance loss over the global batch.
pub(crate) fn small() -> Config {
    let mut config = Config::preset("tiny").unwrap();
    config.model.vocab_size = 128;
    config.model.hidden_size = 32;
    config.model.expert_ffn_size = 32;
    config.model.experts = 12;
    config.router.balance_scope = BalanceScope::Global;
    config.train.global_batch = 8;
    config.train.sequence_length = 32;
    config.train.eval_batches = 1;
    config.schedule.kind = ScheduleKind::Constant;
    config
}

/// The first 40,000 bytes of the generated text.
pub(crate) fn text() -> Corpus {
    let mut head = vec![0; 40_000];
    generated_corpus().sources[0].stream.copy_to(0, &mut head);
    Corpus::of_tokens(Tokens::U8(head.into_iter().map(|id| id as u8).collect()), "generated", "")
}

/// A trainer on the rank of `world`, with initial values.
pub(crate) fn trainer(config: &Config, corpus: &Corpus, world: HostCommunicator, ep: usize) -> LocalTrainer {
    trainer_on(Cpu, config, corpus, world, ep)
}

/// As [`trainer`], on any device.
pub(crate) fn trainer_on<B: Backend, C: Communicator<B>>(
    device: B,
    config: &Config,
    corpus: &Corpus,
    world: C,
    ep: usize,
) -> Trainer<B, C, Loader> {
    let (rank, size) = (world.rank(), world.size());
    let grid = Grid::new(size, ep, config.model.experts).unwrap();
    let loader = Loader::new(corpus, config.loader_spec(rank, size)).unwrap();
    build(device, config, (&grid, Rank(rank)), Groups::of_grid(world, &grid).unwrap(), loader).unwrap()
}

/// Takes the steps in `steps`.
pub(crate) fn take_steps(trainer: &mut LocalTrainer, steps: std::ops::RangeInclusive<u64>) -> Vec<StepMetrics> {
    steps.map(|step| trainer.step(step, Requests::default()).unwrap().0).collect()
}

/// The first `steps` steps on `ranks`, which must agree on every reading of the training to the bit. `prepare` is called on each
/// rank before the first step.
pub(crate) fn train_prepared(
    config: &Config,
    corpus: &Corpus,
    ranks: Ranks,
    steps: u64,
    prepare: impl Fn(&mut LocalTrainer) + Sync,
) -> Vec<StepMetrics> {
    let mut of_ranks = local::run(ranks.world, |world| {
        let mut trainer = trainer(config, corpus, world, ranks.ep);
        prepare(&mut trainer);
        take_steps(&mut trainer, 1..=steps)
    });
    let bits = |steps: &[StepMetrics]| -> Vec<_> {
        let of_step = |m: &StepMetrics| [m.loss, m.grad_norm, m.balance_loss, m.dropped_fraction].map(f64::to_bits);
        steps.iter().map(of_step).collect()
    };
    for (rank, other) in of_ranks.iter().enumerate() {
        assert_eq!(bits(other), bits(&of_ranks[0]), "ranks {rank} and 0 of {ranks:?} disagree");
    }
    of_ranks.swap_remove(0)
}

/// [`train_prepared`] from the initial values.
pub(crate) fn train(config: &Config, corpus: &Corpus, ranks: Ranks, steps: u64) -> Vec<StepMetrics> {
    train_prepared(config, corpus, ranks, steps, |_| {})
}

/// Asserts that two runs have the same curve: losses and gradient norms within `first` of each other at step 1 (rounding of one
/// pass) and losses within `later` afterwards, relative. Prints the largest differences.
pub(crate) fn assert_same_curve(what: &str, found: &[StepMetrics], expected: &[StepMetrics], first: f64, later: f64) {
    assert_eq!(found.len(), expected.len());
    let off = |a: f64, b: f64| (a - b).abs() / b.abs().max(1e-12);
    let (mut worst, mut at) = (0.0, 0);
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.loss.is_finite() && found.grad_norm.is_finite(), "{what}: {found:?}");
        let difference = off(found.loss, expected.loss);
        if difference > worst {
            (worst, at) = (difference, found.step);
        }
    }
    let start = off(found[0].loss, expected[0].loss).max(off(found[0].grad_norm, expected[0].grad_norm));
    println!("{what}: largest relative difference {start:.1e} at step 1, {worst:.1e} (step {at}) over all");
    assert!(start <= first, "{what}: loss or gradient norm differ by {start:e} at step 1");
    assert!(worst <= later, "{what}: losses differ by {worst:e} at step {at}");
}
