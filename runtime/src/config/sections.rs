//! The sections of a configuration beside the model's and the router's, and their defaults.
//!
//! Owns names, units and defaults. What a value may be is checked in `validate`; what it does is its user's business.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::values::{automatic, one_or_many};
use crate::data::{ByteTokenizer, CorpusSpec, EndOfDocument, SourceSpec};
use crate::dispatch::Room;
use crate::model::Recompute;

/// How the ranks share the work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// EP: ranks that share one set of experts; None (`"auto"`): chosen from the ranks and the experts.
    #[serde(with = "automatic")]
    pub ep: Option<usize>,
    /// Parts a layer's tokens are cut into, so that one part's shuffle can overlap another's experts. On a CPU they run one after
    /// another.
    pub chunks: usize,
    /// Room for rows that come from other ranks, as a multiple of what comes where experts are equally busy. More is taken in rounds.
    pub receive_headroom: f64,
    /// Whether rows are stored straight into other GPUs' memory, where the ranks that share experts are on one machine and reach each other.
    pub direct: bool,
    /// Whether gradients of a block are summed over ranks beside the backward pass of the block before it, instead of all at the end.
    pub reduce_early: bool,
    /// Whether the ranks that replicate a tensor share its optimizer state out (ZeRO stage 1) instead of each holding all of it.
    pub shard_optimizer: bool,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self {
            ep: None,
            chunks: 1,
            receive_headroom: Room::HEADROOM,
            direct: true,
            reduce_early: true,
            shard_optimizer: false,
        }
    }
}

/// Which parameters decay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecayGroups {
    /// Matrices and embeddings; norms and biases do not.
    #[default]
    Matrices,
    /// Every parameter.
    All,
}

/// AdamW (Loshchilov and Hutter 2019).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// That of the experts; absent: the same.
    pub expert_weight_decay: Option<f64>,
    /// What it applies to.
    pub decay: DecayGroups,
    /// Largest norm of the whole gradient, every parameter counted once; 0: no clipping.
    pub clip_grad_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            expert_weight_decay: None,
            decay: DecayGroups::Matrices,
            clip_grad_norm: 1.0,
        }
    }
}

/// The course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to `min_ratio` of it (Loshchilov and Hutter 2017).
    #[default]
    Cosine,
    /// Warm-up, stable, decay: the peak, then down to `min_ratio` of it over the last `decay_fraction` (Hu et al. 2024).
    Wsd,
    /// The peak.
    Constant,
}

/// The learning rate over the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Its course.
    pub kind: ScheduleKind,
    /// Its length in steps; None (`"auto"`): `train.steps`. Always set in a resolved configuration.
    #[serde(with = "automatic")]
    pub steps: Option<u64>,
    /// Steps of linear rise from 0 to the peak; a schedule no longer than these only rises.
    pub warmup_steps: u64,
    /// The last learning rate over the peak.
    pub min_ratio: f64,
    /// Share of the steps that `wsd` decays over.
    pub decay_fraction: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Cosine, steps: None, warmup_steps: 10, min_ratio: 0.1, decay_fraction: 0.2 }
    }
}

/// The numbers of activations and of the parameters' compute copy. Statistics, losses, master weights and optimizer state are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// bf16 on GPUs, f32 on CPUs.
    #[default]
    Auto,
    /// bf16 with f32 masters; GPUs only.
    Bf16,
    /// f32 throughout.
    F32,
}

/// How long, how much at a time, and how often what is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps, counted from the start of the run and not from where it resumes.
    pub steps: u64,
    /// Seeds initial weights, sample order and noise.
    pub seed: u64,
    /// Sequences a step, over all ranks.
    pub global_batch: usize,
    /// Sequences a rank and pass; None (`"auto"`): as many as a rank has, at most [`TrainConfig::MICRO_BATCH_LIMIT`].
    #[serde(with = "automatic")]
    pub micro_batch: Option<usize>,
    /// What activations and the compute copy of parameters are held in.
    pub precision: Precision,
    /// What the backward pass computes again instead of what the forward pass would keep.
    pub recompute: Recompute,
    /// S: tokens of a sequence.
    pub sequence_length: usize,
    /// Whether documents that share a sequence are kept apart: attention stays inside each, and the first token of one is not
    /// predicted from the one before.
    pub document_mask: bool,
    /// Patterns of names, as tensors have them on disk, of what is not trained: no gradient norm, no update, no decay.
    pub freeze: Vec<String>,
    /// Patterns of names of what alone is trained; none: everything that is not frozen.
    pub trainable: Vec<String>,
    /// Steps between evaluations on the held-out text; 0: only after the last step.
    pub eval_every: u64,
    /// Global batches of an evaluation; 0: the whole held-out text.
    pub eval_batches: usize,
    /// Steps between checkpoints; 0: only after the last step.
    pub checkpoint_every: u64,
    /// Newest checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// Steps between log lines.
    pub log_every: u64,
}

impl TrainConfig {
    /// The largest micro-batch that is chosen automatically.
    pub const MICRO_BATCH_LIMIT: usize = 8;

    /// Sequences a rank and pass when `world` ranks share a step.
    pub fn micro_batch_for(&self, world: usize) -> usize {
        let share = self.global_batch.div_ceil(world.max(1));
        self.micro_batch.unwrap_or(share.min(Self::MICRO_BATCH_LIMIT)).max(1)
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 200,
            seed: 1,
            global_batch: 16,
            micro_batch: None,
            precision: Precision::Auto,
            recompute: Recompute::None,
            sequence_length: 128,
            document_mask: false,
            freeze: Vec::new(),
            trainable: Vec::new(),
            eval_every: 0,
            eval_batches: 8,
            checkpoint_every: 0,
            keep_checkpoints: 2,
            log_every: 1,
        }
    }
}

/// One named source of a mixture.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// As `data.paths`.
    #[serde(deserialize_with = "one_or_many")]
    pub paths: Vec<PathBuf>,
    /// Its share of the samples in proportion to the other sources'. Without weights the sources' sizes decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Which router its text meets, from 0 (`router.kind = "multi-gate"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<usize>,
}

/// The text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Text, JSONL, token shards, directories of them and patterns; none: the default corpus. One path may stand without
    /// brackets.
    #[serde(deserialize_with = "one_or_many")]
    pub paths: Vec<PathBuf>,
    /// The tokenizer: `bytes`, or the path of a `tokenizer.json` or of a folder that holds one.
    pub tokenizer: String,
    /// The field of JSONL records that holds their text.
    pub text_field: String,
    /// What ends a document: `auto`, the tokenizer's own token; `none`; or a token by its name.
    pub end_of_document: String,
    /// Share of each source, at its end, that is held out for evaluation; 0: none.
    pub validation_fraction: f64,
    /// Held-out text of its own, as `paths`; then all of the sources is trained on.
    #[serde(deserialize_with = "one_or_many")]
    pub validation_paths: Vec<PathBuf>,
    /// Sources of a mixture, by name, in place of `paths`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sources: BTreeMap<String, SourceConfig>,
}

impl DataConfig {
    /// What the corpus is made of, for a model with `vocab_size` tokens; None: the default corpus.
    pub fn corpus(&self, vocab_size: usize) -> Option<CorpusSpec> {
        let source = |(name, source): (&String, &SourceConfig)| SourceSpec {
            name: name.clone(),
            paths: source.paths.clone(),
            weight: source.weight,
            tag: source.tag.unwrap_or(0) as i32,
        };
        let mut sources: Vec<_> = self.sources.iter().map(source).collect();
        if !self.paths.is_empty() {
            sources.push(SourceSpec { paths: self.paths.clone(), ..SourceSpec::default() });
        }
        (!sources.is_empty()).then(|| CorpusSpec {
            sources,
            validation: self.validation_paths.clone(),
            text_field: self.text_field.clone(),
            end_of_document: EndOfDocument::of_word(&self.end_of_document),
            vocab_size,
        })
    }

    /// Every path, for those who must change them.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let sources = self.sources.values_mut().flat_map(|source| &mut source.paths);
        self.paths.iter_mut().chain(&mut self.validation_paths).chain(sources)
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            tokenizer: ByteTokenizer::NAME.into(),
            text_field: CorpusSpec::TEXT_FIELD.into(),
            end_of_document: "auto".into(),
            validation_fraction: 0.1,
            validation_paths: Vec::new(),
            sources: BTreeMap::new(),
        }
    }
}

/// How the program runs here; never changes what is computed, apart from the rounding of another thread count.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Compute threads of a rank; 0: the CPUs it may use, shared by the ranks that may use the same.
    pub threads: usize,
    /// Seconds a collective waits for its peers before it names who is missing.
    pub collective_timeout_s: f64,
    /// Whether readings are also written as TensorBoard event files, under `tensorboard/` of the run directory.
    pub tensorboard: bool,
    /// Steps between lines of `balance.jsonl`, which says how each expert was used; 0: none.
    pub balance_every: u64,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { threads: 0, collective_timeout_s: 60.0, tensorboard: false, balance_every: 10 }
    }
}
