//! What a run is made of: every key, its default, where its value comes from and what it may be.
//!
//! Owns the keys (`section.name`), the presets, the order in which presets, file, `--set` and flags override one another, and
//! the rules that need more than one section. Apart from reading the one file it is told to and the tokenizer that decides the
//! vocabulary, it does no input or output: no environment variable, clock or directory decides a value.

mod error;
mod load;
mod presets;
mod resume;
mod schema;
mod sections;
mod validate;
mod values;

use serde::{Deserialize, Serialize};

pub use error::{ConfigError, Origin};
pub use load::{ConfigBuilder, FlagValue, Resolved};
pub use presets::{DEFAULT_PRESET, PRESETS};
pub use resume::Difference;
pub use sections::{
    DataConfig, DecayGroups, OptimizerConfig, ParallelConfig, RunConfig, ScheduleConfig, ScheduleKind, SourceConfig,
    TrainConfig,
};

use crate::data::LoaderSpec;
use crate::model::ModelConfig;
use crate::routing::RouterConfig;

/// A whole configuration. Every section has defaults; [`ConfigBuilder`] makes one from what a user said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The model's shape.
    pub model: ModelConfig,
    /// How tokens choose experts.
    pub router: RouterConfig,
    /// How ranks share the work.
    pub parallel: ParallelConfig,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// The learning rate over the steps.
    pub schedule: ScheduleConfig,
    /// How long, how much at a time, how often what is written.
    pub train: TrainConfig,
    /// The text.
    pub data: DataConfig,
    /// How the program runs here.
    pub run: RunConfig,
}

impl Config {
    /// The preset `name`, resolved; None: there is none of that name.
    pub fn preset(name: &str) -> Option<Self> {
        presets::preset(name).map(|mut config| {
            config.resolve();
            config
        })
    }

    /// Sets what follows from other keys: the schedule's length from `train.steps`, the vocabulary from the tokenizer, whose
    /// file is read for it. A tokenizer that cannot be read leaves the vocabulary at 0, which [`Config::validate`] reports.
    pub fn resolve(&mut self) {
        self.schedule.steps.get_or_insert(self.train.steps);
        if self.model.vocab_size == 0 {
            self.model.vocab_size = crate::data::tokenizer(&self.data.tokenizer).map_or(0, |t| t.vocab_size());
        }
    }

    /// The whole configuration as TOML. Reading it back gives an equal one.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|error| ConfigError::NotToml { reason: error.to_string() })
    }

    /// What the loader of `rank` among `world` ranks needs to know.
    pub fn loader_spec(&self, rank: usize, world: usize) -> LoaderSpec {
        LoaderSpec {
            rank,
            world,
            seed: self.train.seed,
            global_batch: self.train.global_batch,
            micro_batch: self.train.micro_batch_for(world),
            sequence_length: self.train.sequence_length,
            validation_fraction: self.data.validation_fraction,
            eval_batches: self.train.eval_batches,
            document_mask: self.train.document_mask,
        }
    }
}
