//! Plans against what training counts, and against figures worked out by hand.

use moe_kernels::Cpu;

use super::*;
use crate::collectives::{Communicator, Groups, HostCommunicator, local};
use crate::data::Batch;
use crate::memory::Tally;
use crate::model::{ModelSetup, QkNorm, Recompute, Transformer};
use crate::routing::{BalanceScope, Overflow, RouterKind};
use crate::training::{Requests, Trainer, TrainingData};

/// Tokens that walk through the vocabulary.
struct Counting {
    sequences: usize,
    micro: usize,
    passes: usize,
    length: usize,
    first: usize,
}

impl Counting {
    fn new(job: &Job, rank: usize) -> Self {
        let mine = share(job.config.train.global_batch, job.world(), rank);
        Self {
            sequences: mine.len(),
            micro: job.micro_batch(),
            passes: job.passes(),
            length: job.config.train.sequence_length,
            first: mine.start,
        }
    }
}

impl TrainingData for Counting {
    fn passes(&self) -> usize {
        self.passes
    }

    fn train_pass(&self, steps_done: u64, pass: usize, batch: &mut Batch) {
        batch.sequences = self.micro.min(self.sequences.saturating_sub(pass * self.micro));
        batch.sequence_length = self.length;
        let start = self.first + pass * self.micro + steps_done as usize * 31;
        let token = |i: usize| ((start * self.length + i) * 7919 % 251) as i32;
        batch.inputs = (0..batch.sequences * self.length).map(token).collect();
        batch.targets = (1..=batch.sequences * self.length).map(token).collect();
    }

    fn eval_passes(&self) -> usize {
        0
    }

    fn eval_pass(&self, _: usize, _: &mut Batch) {}
}

fn small() -> Config {
    let mut config = Config::preset("tiny").unwrap();
    (config.train.sequence_length, config.train.global_batch, config.train.micro_batch) = (16, 10, Some(2));
    config
}

fn job(config: &Config, world: usize, ep: usize) -> Job {
    config.validate(world).unwrap();
    let experts = if config.model.moe_layers().next().is_some() { config.model.experts } else { 0 };
    Job {
        config: config.clone(),
        grid: Grid::new(world, ep, experts).unwrap(),
        ranks_per_node: world,
        numbers: Numbers::CPU,
    }
}

/// What a rank has counted after `steps` steps: buffers, rows, and bytes by group and collective.
struct Counted {
    tally: Tally,
    rows: ShuffledRows,
    sent: Vec<(String, &'static str, u64)>,
    losses: Vec<f64>,
}

fn train(job: &Job, world: HostCommunicator, steps: u64) -> Counted {
    let rank = Rank(Communicator::<Cpu>::rank(&world));
    let groups = Groups::of_grid::<Cpu>(world, &job.grid).unwrap();
    let setup = ModelSetup {
        model: job.config.model.clone(),
        router: job.config.router.clone(),
        grid: job.grid,
        rank,
        seed: 1,
        chunks: job.config.parallel.chunks,
        receive_headroom: job.config.parallel.receive_headroom,
        direct: job.config.parallel.direct,
        max_sequences: job.micro_batch(),
        sequence_length: job.config.train.sequence_length,
        recompute: job.config.train.recompute,
        gate: None,
    };
    let model = Transformer::new(Cpu, setup).unwrap();
    let mut trainer = Trainer::new(model, groups, &job.config, Counting::new(job, rank.0)).unwrap();
    let losses = (1..=steps).map(|step| trainer.step(step, Requests::default()).unwrap().0.loss).collect();
    let groups = trainer.groups();
    let mut sent = Vec::new();
    for group in [&groups.world, &groups.expert, &groups.replica] {
        for (collective, bytes) in Communicator::<Cpu>::sent_bytes(group) {
            sent.push((Communicator::<Cpu>::name(group).to_owned(), collective, bytes));
        }
    }
    Counted { tally: trainer.tally(), rows: trainer.model.shuffled_rows(), sent, losses }
}

/// Configurations that differ in what they keep and send.
fn variants() -> Vec<(&'static str, Config)> {
    type Change = fn(&mut Config);
    let changes: [(&str, Change); 13] = [
        ("tiny", |_| {}),
        ("sharded state", |c| c.parallel.shard_optimizer = true),
        ("chunks", |c| c.parallel.chunks = 2),
        ("rows in rounds", |c| c.parallel.receive_headroom = 1.0),
        ("sums at the end", |c| c.parallel.reduce_early = false),
        ("experts computed again", |c| c.train.recompute = Recompute::Experts),
        ("experts computed again, chunks", |c| {
            (c.train.recompute, c.parallel.chunks) = (Recompute::Experts, 2);
        }),
        ("global balance, noisy gate", |c| {
            (c.router.balance_scope, c.router.kind) = (BalanceScope::Global, RouterKind::NoisyTopk);
        }),
        ("dropped choices rerouted", |c| {
            (c.router.capacity_factor, c.router.overflow) = (Some(1.0), Overflow::Reroute);
        }),
        ("balance by sequence", |c| c.router.balance_scope = BalanceScope::Sequence),
        ("shared expert with a gate, norms on queries", |c| {
            (c.model.shared_expert_ffn_size, c.model.shared_expert_gate) = (24, true);
            c.model.qk_norm = QkNorm::PerHead;
        }),
        ("dense and routed blocks", |c| (c.model.moe_every, c.model.ffn_size) = (2, 96)),
        ("passes of different sizes, sharded", |c| {
            (c.train.micro_batch, c.parallel.shard_optimizer) = (Some(3), true);
        }),
    ];
    let changed = |(name, change): (&'static str, Change)| {
        let mut config = small();
        change(&mut config);
        (name, config)
    };
    changes.map(changed).into()
}

#[test]
fn bytes_sent_in_a_step_are_those_that_were_planned_for_its_rows() {
    for (name, config) in variants() {
        for (world, ep) in [(1, 1), (2, 1), (2, 2), (4, 2)] {
            let job = job(&config, world, ep);
            let again = local::run(world, |communicator| {
                let rank = Rank(Communicator::<Cpu>::rank(&communicator));
                let counted = train(&job, communicator, 1);
                let planned = Traffic::of_rank(&job, rank, StepRows::counted(counted.rows, 1));
                let what = format!("{name}, rank {rank} of {world}, EP {ep}");
                for (group, collective, bytes) in &counted.sent {
                    if *collective != "split" {
                        assert_eq!(
                            planned.counted_as(group, collective),
                            *bytes as f64,
                            "{what}: {group} {collective}"
                        );
                    }
                }
                let all: u64 = counted.sent.iter().filter(|(_, which, _)| *which != "split").map(|sent| sent.2).sum();
                assert_eq!(planned.total(), all as f64, "{what}");
                counted.rows.again
            });
            assert!(
                name != "rows in rounds" || ep == 1 || again.iter().any(|&rows| rows > 0),
                "{world} ranks, EP {ep}"
            );
        }
    }
}

#[test]
fn buffers_of_a_rank_alone_are_planned_to_the_byte() {
    for (name, config) in variants() {
        let job = job(&config, 1, 1);
        let counted = local::run(1, |world| train(&job, world, 2)).remove(0).tally;
        assert_eq!(MemoryPlan::new(&job).buffers, counted, "{name}");
    }
}

#[test]
fn buffers_of_ranks_that_exchange_rows_are_planned_within_the_headroom() {
    for (name, config) in variants() {
        for (world, ep) in [(2, 1), (4, 2), (4, 4)] {
            let job = job(&config, world, ep);
            let all = local::run(world, |world| train(&job, world, 3));
            let counted = all[0].tally;
            // Which rank's experts are chosen most is the gate's affair: the busiest has what is expected or more.
            let activations = all.iter().map(|counted| counted.tally.activations).max().unwrap();
            let planned = MemoryPlan::new(&job).buffers;
            let what = format!("{name} on {world} ranks, EP {ep}: planned {planned:?}, counted {counted:?}");
            assert_eq!((planned.parameters, planned.gradients), (counted.parameters, counted.gradients), "{what}");
            assert_eq!(planned.optimizer, counted.optimizer, "{what}");
            let off = planned.activations as f64 / activations as f64;
            assert!(
                (0.85..=job.config.parallel.receive_headroom).contains(&off),
                "{what}, {activations} on the busiest rank"
            );
        }
    }
}

#[test]
fn sharded_state_gives_the_same_losses_and_a_fraction_of_the_memory() {
    let whole = small();
    let mut sharded = whole.clone();
    sharded.parallel.shard_optimizer = true;
    for (world, ep) in [(2, 1), (2, 2), (3, 1), (4, 2)] {
        let run = |config: &Config| {
            let job = job(config, world, ep);
            local::run(world, |world| train(&job, world, 8)).remove(0)
        };
        let (a, b) = (run(&whole), run(&sharded));
        for (step, (a, b)) in a.losses.iter().zip(&b.losses).enumerate() {
            // The norm that clips is summed in another order.
            assert!((a - b).abs() <= 1e-6 * a.abs(), "{world} ranks, EP {ep}, step {}: {a} and {b}", step + 1);
        }
        let dense = MemoryPlan::new(&job(&whole, world, ep)).buffers.parameters;
        assert!(b.tally.optimizer < a.tally.optimizer && b.tally.optimizer * world as u64 >= dense, "{world} ranks");
    }
}

#[test]
fn expected_rows_are_those_of_even_and_independent_choices() {
    #[rustfmt::skip]
    let table = [
        // experts, top_k, ep, the probability that a token visits a given rank
        (4, 1, 2, 0.5), (4, 2, 2, 5.0 / 6.0), (4, 3, 2, 1.0), (8, 2, 8, 0.25), (8, 2, 1, 1.0),
    ];
    for (experts, top_k, ep, p) in table {
        let mut config = small();
        (config.model.experts, config.model.top_k) = (experts, top_k);
        let found = job(&config, ep, ep).visit_probability();
        assert!((found - p).abs() < 1e-12, "E {experts}, k {top_k}, EP {ep}: {found}");
    }
}

#[test]
fn bytes_between_nodes_are_those_to_ranks_elsewhere() {
    let mut config = small();
    config.train.global_batch = 8;
    let at = |ep, ranks_per_node| {
        let job = Job { ranks_per_node, ..job(&config, 4, ep) };
        Traffic::of_rank(&job, Rank(0), StepRows { sent: 90.0, received: 90.0, again: 0.0 })
    };
    assert_eq!(at(2, 4).between_nodes_bytes, 0.0);
    // Expert groups of two inside nodes of two: only sums cross, two of three peers in the world, the one in the replica group.
    let split = at(2, 2);
    let of = |group: &str| split.flows.iter().filter(|f| f.group == group).map(|f| f.bytes).sum::<f64>();
    assert!((split.between_nodes_bytes - (of("world") * 2.0 / 3.0 + of("replica"))).abs() < 1e-6);
    // One group over both nodes: rows cross to two of three peers.
    assert!(at(4, 2).between_nodes_bytes > 0.6 * at(4, 2).of(Purpose::Dispatch));
}

#[test]
fn a_job_that_does_not_fit_is_told_what_would() {
    let mut config = Config::preset("moe-15m").unwrap();
    config.train.global_batch = 32;
    let job = job(&config, 2, 2);
    let peak = MemoryPlan::new(&job).peak_bytes;
    let changes = |limit: u64| -> Vec<String> {
        nearest_that_fit(&job, limit)
            .into_iter()
            .map(|alternative| {
                assert!(alternative.peak_bytes <= limit);
                alternative.change
            })
            .collect()
    };
    let near = changes(peak - 1);
    // Nodes are as full as before: a rank has its share of one node's memory.
    for change in ["--set train.micro_batch=7", "-n 4 --nodes 2"] {
        assert!(near.iter().any(|found| found == change), "{near:?}");
    }
    let together = changes(peak / 6);
    assert!(together.len() <= 2, "{together:?}");
    assert!(changes(1000).is_empty(), "a model needs more than a kilobyte");
}

#[test]
fn time_follows_rates() {
    let job = job(&small(), 2, 2);
    let rates = Rates { gemm_flops: 1e9, memory_bytes: 1e9, within_node_bytes: 1e8, between_nodes_bytes: 1e7 };
    let twice = Rates { gemm_flops: 2e9, memory_bytes: 2e9, within_node_bytes: 2e8, between_nodes_bytes: 2e7 };
    let time = |rates| Plan::new(&job, Some(rates)).time.unwrap();
    let (slow, fast) = (time(&rates), time(&twice));
    assert!((slow.step_ms / fast.step_ms - 2.0).abs() < 1e-9 && slow.exchange_ms > 0.0);
    let compute = 1e3 * Flops::of(&job.config).total() * 5.0 * 16.0 / 1e9;
    assert!((slow.compute_ms - compute).abs() < 1e-9, "five of ten sequences: {} and {compute}", slow.compute_ms);
}

#[test]
fn what_is_computed_again_takes_time_and_is_no_operation_of_the_model() {
    let kept = job(&small(), 1, 1);
    let mut again = kept.clone();
    again.config.train.recompute = Recompute::Experts;
    assert_eq!(Flops::of(&again.config), Flops::of(&kept.config));
    let rates = Rates { gemm_flops: 1e9, memory_bytes: 1e9, within_node_bytes: 1e8, between_nodes_bytes: 1e7 };
    let time = |job| Plan::new(job, Some(&rates)).time.unwrap();
    let (kept, again) = (time(&kept), time(&again));
    // 2 layers, 160 tokens, k = 2, two products of H = 64 and F = 128.
    let more = 1e3 * (2 * 160 * 2 * 2 * 2 * 64 * 128) as f64 / 1e9;
    assert!((again.compute_ms - kept.compute_ms - more).abs() < 1e-9, "{} and {}", again.compute_ms, kept.compute_ms);
    assert!(again.memory_ms > kept.memory_ms);
}
