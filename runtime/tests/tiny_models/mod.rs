//! Tiny models of every family, and how tests train and save them.

// Helpers of tests may stop at the first surprise like the tests themselves; not every test file uses all of them.
#![allow(clippy::unwrap_used, dead_code)]

use std::path::{Path, PathBuf};

use moe_kernels::Cpu;
use moe_runtime::checkpoint::{Checkpoint, Store};
use moe_runtime::collectives::{Communicator, Context, Groups, HostCommunicator, local};
use moe_runtime::config::{Config, OptimizerConfig, ScheduleConfig, ScheduleKind, TrainConfig};
use moe_runtime::data::Batch;
use moe_runtime::model::{Family, LogitsOf, ModelConfig, ModelSetup, PassTokens, QkNorm, Transformer};
use moe_runtime::routing::{RouterConfig, RouterKind};
use moe_runtime::telemetry::StepMetrics;
use moe_runtime::topology::{Grid, Rank, share};
use moe_runtime::training::{Requests, Trainer, TrainingData};

pub(crate) const SEQUENCES: usize = 4;
pub(crate) const LENGTH: usize = 32;
const VOCAB: usize = 256;
/// Different tokens that are seen.
const SEEN: usize = 64;

/// A small model of every family with what is special about it, each under its `model_type`.
pub(crate) fn families() -> Vec<(&'static str, ModelConfig, RouterConfig)> {
    let base = ModelConfig {
        vocab_size: VOCAB,
        hidden_size: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        experts: 8,
        top_k: 2,
        expert_ffn_size: 48,
        max_positions: 64,
        ..ModelConfig::default()
    };
    let topk = RouterConfig { kind: RouterKind::TopkSoftmax, ..RouterConfig::default() };
    let softmax = RouterConfig { kind: RouterKind::SoftmaxTopk, ..RouterConfig::default() };
    let divided = RouterConfig { renormalize: true, ..softmax.clone() };
    let qwen3 = ModelConfig {
        family: Family::Qwen3Moe,
        qk_norm: QkNorm::PerHead,
        head_dim: 16,
        layers: 4,
        moe_every: 2,
        ffn_size: 64,
        ..base.clone()
    };
    let qwen2 = ModelConfig {
        family: Family::Qwen2Moe,
        qkv_bias: true,
        shared_expert_ffn_size: 24,
        shared_expert_gate: true,
        ffn_size: 64,
        dense_layers: vec![0],
        ..base.clone()
    };
    let olmoe = ModelConfig { family: Family::Olmoe, qk_norm: QkNorm::FullWidth, kv_heads: 4, ..base.clone() };
    vec![
        ("mixtral", base, topk),
        ("qwen3_moe", qwen3, divided),
        ("qwen2_moe", qwen2, softmax.clone()),
        ("olmoe", olmoe, softmax),
        ("llama", dense(), RouterConfig::default()),
    ]
}

/// A dense Llama.
pub(crate) fn dense() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab_size: VOCAB,
        hidden_size: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        experts: 0,
        top_k: 0,
        expert_ffn_size: 0,
        ffn_size: 48,
        max_positions: 64,
        ..ModelConfig::default()
    }
}

/// Sequences that follow a rule, so that there is something to learn.
pub(crate) struct Counting {
    rank: usize,
    world: usize,
}

impl TrainingData for Counting {
    fn passes(&self) -> usize {
        1
    }

    fn train_pass(&self, steps_done: u64, _: usize, batch: &mut Batch) {
        let mine = share(SEQUENCES, self.world, self.rank);
        batch.sequences = mine.len();
        batch.sequence_length = LENGTH;
        batch.first_sample = steps_done * SEQUENCES as u64 + mine.start as u64;
        let token = |sequence: usize, at: usize| ((steps_done as usize * 7 + sequence * 13 + at * 3) % SEEN) as i32;
        batch.inputs = mine.clone().flat_map(|s| (0..LENGTH).map(move |at| token(s, at))).collect();
        batch.targets = mine.flat_map(|s| (0..LENGTH).map(move |at| token(s, at + 1))).collect();
    }

    fn eval_passes(&self) -> usize {
        0
    }

    fn eval_pass(&self, _: usize, _: &mut Batch) {}
}

/// The settings that the models are trained with.
pub(crate) fn config(model: &ModelConfig, router: &RouterConfig) -> Config {
    Config {
        model: model.clone(),
        router: router.clone(),
        train: TrainConfig {
            global_batch: SEQUENCES,
            micro_batch: Some(SEQUENCES),
            sequence_length: LENGTH,
            ..TrainConfig::default()
        },
        schedule: ScheduleConfig { kind: ScheduleKind::Constant, warmup_steps: 0, ..ScheduleConfig::default() },
        optimizer: OptimizerConfig { lr: 3e-3, ..OptimizerConfig::default() },
        ..Config::default()
    }
}

/// A trainer on one rank of a world, with initial weights of seed 5.
pub(crate) fn trainer(world: HostCommunicator, config: &Config) -> Trainer<Cpu, HostCommunicator, Counting> {
    let (rank, size) = (Communicator::<Cpu>::rank(&world), Communicator::<Cpu>::size(&world));
    let experts = if config.model.moe_layers().next().is_some() { config.model.experts } else { 0 };
    let grid = Grid::automatic(size, experts).unwrap();
    let setup = ModelSetup {
        model: config.model.clone(),
        router: config.router.clone(),
        grid,
        rank: Rank(rank),
        seed: 5,
        chunks: 1,
        receive_headroom: 1.4,
        direct: true,
        max_sequences: SEQUENCES,
        sequence_length: LENGTH,
        recompute: config.train.recompute,
        gate: None,
    };
    let groups = Groups::of_grid::<Cpu>(world, &grid).unwrap();
    Trainer::new(Transformer::new(Cpu, setup).unwrap(), groups, config, Counting { rank, world: size }).unwrap()
}

/// [`trainer`] of a world of one.
pub(crate) fn alone(config: &Config) -> Trainer<Cpu, HostCommunicator, Counting> {
    trainer(local::solo(Context::default()), config)
}

/// Takes `steps` steps.
pub(crate) fn train(trainer: &mut Trainer<Cpu, HostCommunicator, Counting>, steps: u64) -> Vec<StepMetrics> {
    (1..=steps).map(|step| trainer.step(step, Requests::default()).unwrap().0).collect()
}

/// Saves a checkpoint of step `step` below `dir`.
pub(crate) fn save(trainer: &Trainer<Cpu, HostCommunicator, Counting>, dir: &Path, step: u64) -> (PathBuf, Checkpoint) {
    let path = trainer.save(&Store::new(dir, 0), step, serde_json::Value::Null).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    (path, checkpoint)
}

/// The inputs of the first batch.
pub(crate) fn inputs() -> Vec<i32> {
    let mut batch = Batch::default();
    Counting { rank: 0, world: 1 }.train_pass(0, 0, &mut batch);
    batch.inputs
}

/// The logits of the first batch.
pub(crate) fn logits(trainer: &mut Trainer<Cpu, HostCommunicator, Counting>) -> Vec<f32> {
    let groups = Groups::of_grid::<Cpu>(local::solo(Context::default()), &trainer.model.setup().grid.clone()).unwrap();
    trainer.model.read_logits(&groups, PassTokens::of_inputs(&inputs(), LENGTH), LogitsOf::All).unwrap()
}

/// The largest difference of two lists of numbers.
pub(crate) fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
