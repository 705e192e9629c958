//! Which values can be: every rule that is not a type's.
//!
//! Owns the ranges of the sections beside the model's and the router's, and the rules between sections. It looks at values only
//! and allocates nothing.

use std::time::Duration;

use super::{Config, DataConfig, RunConfig};
use crate::checkpoint::Selection;
use crate::data::{is_path, tokenizer};
use crate::invalid::InvalidValue;
use crate::model::layout::Layout;
use crate::routing::RouterKind;
use crate::topology::{Grid, TopologyError};

/// The longest wait a collective can be given: a week.
const LONGEST_TIMEOUT_S: f64 = 7.0 * 24.0 * 3600.0;

/// Parts of a batch, each with its own shuffle: beyond this they are single tokens.
const MOST_CHUNKS: u64 = 1 << 10;

/// Compute threads of a rank.
const MOST_THREADS: u64 = 1 << 12;

/// The largest whole number that TOML holds.
const LARGEST: u64 = i64::MAX as u64;

impl Config {
    /// Checks every value, and the whole against `world` ranks; the configuration is a resolved one. The error names the first
    /// key that cannot be as it is, and what would do.
    pub fn validate(&self, world: usize) -> Result<(), InvalidValue> {
        self.validate_data()?;
        self.model.validate(&self.router)?;
        self.validate_selection()?;
        self.validate_parallel(world)?;
        self.validate_optimizer()?;
        // First: where the schedule's length is left open it is the run's, and the fault is not its own.
        self.validate_train(world)?;
        self.validate_schedule()?;
        let timeout = self.run.collective_timeout_s;
        if !(timeout > 0.0 && timeout <= LONGEST_TIMEOUT_S) {
            let reason = format!("must be a number of seconds above 0 and at most {LONGEST_TIMEOUT_S}");
            return Err(InvalidValue::new("run.collective_timeout_s", timeout, reason));
        }
        Ok(())
    }

    fn validate_data(&self) -> Result<(), InvalidValue> {
        let (data, vocabulary) = (&self.data, self.model.vocab_size);
        let name = &data.tokenizer;
        // The vocabulary of a file is compared where the file is read for its tokens; here it decided `model.vocab_size`, or could
        // not be read.
        if !is_path(name) || vocabulary == 0 {
            let tokenizer = tokenizer(name)
                .map_err(|error| InvalidValue::new("data.tokenizer", format!("{name:?}"), error.to_string()))?;
            let needed = tokenizer.vocab_size();
            if vocabulary < needed {
                let reason =
                    format!("data.tokenizer = {name:?} makes {needed} different tokens; set it to {needed} or more");
                return Err(InvalidValue::new("model.vocab_size", vocabulary, reason));
            }
        }
        let fraction = data.validation_fraction;
        if !(0.0..1.0).contains(&fraction) {
            let reason = "must be at least 0 and below 1: the share of the text that is held out";
            return Err(InvalidValue::new("data.validation_fraction", fraction, reason));
        }
        if data.text_field.is_empty() {
            let reason = "must be the name of the field that holds a record's text, as \"text\"";
            return Err(InvalidValue::new("data.text_field", "\"\"", reason));
        }
        self.validate_sources()
    }

    fn validate_sources(&self) -> Result<(), InvalidValue> {
        let DataConfig { sources, paths, validation_paths, .. } = &self.data;
        if !sources.is_empty() && !paths.is_empty() {
            let reason = "is set beside data.sources; give either paths or named sources";
            return Err(InvalidValue::new("data.paths", format!("{paths:?}"), reason));
        }
        if sources.is_empty() && paths.is_empty() && !validation_paths.is_empty() {
            let reason = "there is nothing beside it to train on; set data.paths or data.sources as well";
            return Err(InvalidValue::new("data.validation_paths", format!("{validation_paths:?}"), reason));
        }
        let weighted = sources.values().filter(|source| source.weight.is_some()).count();
        for (name, source) in sources {
            let key = |field: &str| format!("data.sources.{name}.{field}");
            if source.paths.is_empty() {
                return Err(InvalidValue::new(&key("paths"), "[]", "must name at least one file or directory"));
            }
            match source.weight {
                Some(weight) if !(weight.is_finite() && weight > 0.0) => {
                    return Err(InvalidValue::new(&key("weight"), weight, "must be a positive number"));
                }
                None if weighted > 0 => {
                    let reason = "other sources have a weight; give every source one, or none of them";
                    return Err(InvalidValue::new(&key("weight"), "not set", reason));
                }
                _ => {}
            }
        }
        self.validate_tags()
    }

    /// Every text a multi-gate router meets says which of its routers it belongs to.
    fn validate_tags(&self) -> Result<(), InvalidValue> {
        let DataConfig { sources, validation_paths, .. } = &self.data;
        let (multi_gate, tags) = (self.router.kind == RouterKind::MultiGate, self.router.tags);
        for (name, source) in sources {
            let key = format!("data.sources.{name}.tag");
            match source.tag {
                None if multi_gate => {
                    let reason = format!("router.kind = multi-gate needs it: 0 to {}", tags.saturating_sub(1));
                    return Err(InvalidValue::new(&key, "not set", reason));
                }
                Some(tag) if multi_gate && tag >= tags => {
                    let reason = format!("router.tags = {tags}: tags are 0 to {}", tags.saturating_sub(1));
                    return Err(InvalidValue::new(&key, tag, reason));
                }
                Some(tag) if !multi_gate => {
                    return Err(InvalidValue::new(&key, tag, "only router.kind = multi-gate looks at tags"));
                }
                _ => {}
            }
        }
        if multi_gate && sources.is_empty() {
            let reason =
                "router.kind = multi-gate needs text with tags: name each as data.sources.NAME with paths and tag";
            return Err(InvalidValue::new("data.sources", "not set", reason));
        }
        if multi_gate && !validation_paths.is_empty() {
            let reason = "held-out text of its own has no tag for router.kind = multi-gate; without it the end of each source is held out";
            return Err(InvalidValue::new("data.validation_paths", format!("{validation_paths:?}"), reason));
        }
        Ok(())
    }

    fn validate_selection(&self) -> Result<(), InvalidValue> {
        let selection = Selection::new(&self.train.freeze, &self.train.trainable)?;
        if selection.is_all() {
            return Ok(());
        }
        selection.check(self.model.family, &Layout::new(&self.model, &self.router, 0..self.model.experts))
    }

    fn validate_parallel(&self, world: usize) -> Result<(), InvalidValue> {
        at_least_one("parallel.chunks", self.parallel.chunks as u64)?;
        at_most("parallel.chunks", self.parallel.chunks as u64, MOST_CHUNKS)?;
        at_most("run.threads", self.run.threads as u64, MOST_THREADS)?;
        let headroom = self.parallel.receive_headroom;
        if !(headroom.is_finite() && headroom >= 1.0) {
            let reason = "must be a number of at least 1: what comes where experts are equally busy";
            return Err(InvalidValue::new("parallel.receive_headroom", headroom, reason));
        }
        let Some(ep) = self.parallel.ep else { return Ok(()) };
        let experts = self.model.divisible_experts();
        let Err(error) = Grid::new(world, ep, experts) else { return Ok(()) };
        let reason = match &error {
            TopologyError::NoExperts { .. } => error.to_string(),
            error => format!(
                "must divide both the {world} ranks and {}; nearest that do: {:?}",
                self.model.experts_in_words(),
                error.nearest()
            ),
        };
        Err(InvalidValue::new("parallel.ep", ep, reason))
    }

    fn validate_optimizer(&self) -> Result<(), InvalidValue> {
        let optimizer = &self.optimizer;
        for (key, value) in [("optimizer.lr", optimizer.lr), ("optimizer.eps", optimizer.eps)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(InvalidValue::new(key, value, "must be a positive number"));
            }
        }
        for (key, value) in [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(InvalidValue::new(key, value, "must be at least 0 and below 1"));
            }
        }
        for (key, value) in [
            ("optimizer.weight_decay", optimizer.weight_decay),
            ("optimizer.expert_weight_decay", optimizer.expert_weight_decay.unwrap_or(0.0)),
            ("optimizer.clip_grad_norm", optimizer.clip_grad_norm),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(InvalidValue::new(key, value, "must be a number of at least 0; 0 turns it off"));
            }
        }
        Ok(())
    }

    fn validate_schedule(&self) -> Result<(), InvalidValue> {
        let schedule = &self.schedule;
        if schedule.steps == Some(0) {
            return at_least_one("schedule.steps", 0);
        }
        if !(0.0..=1.0).contains(&schedule.min_ratio) {
            let reason = "must be at least 0 and at most 1: the last learning rate over optimizer.lr";
            return Err(InvalidValue::new("schedule.min_ratio", schedule.min_ratio, reason));
        }
        if !(schedule.decay_fraction > 0.0 && schedule.decay_fraction <= 1.0) {
            let reason = "must be above 0 and at most 1: the share of the steps that wsd decays over";
            return Err(InvalidValue::new("schedule.decay_fraction", schedule.decay_fraction, reason));
        }
        countable("schedule.warmup_steps", schedule.warmup_steps)
    }

    fn validate_train(&self, world: usize) -> Result<(), InvalidValue> {
        let train = &self.train;
        at_least_one("train.steps", train.steps)?;
        at_least_one("train.global_batch", train.global_batch as u64)?;
        at_least_one("train.micro_batch", train.micro_batch.unwrap_or(1) as u64)?;
        at_least_one("train.sequence_length", train.sequence_length as u64)?;
        at_least_one("train.keep_checkpoints", train.keep_checkpoints as u64)?;
        at_least_one("train.log_every", train.log_every)?;
        countable("train.seed", train.seed)?;
        if train.sequence_length > self.model.max_positions {
            let reason = format!("must be at most model.max_positions = {}", self.model.max_positions);
            return Err(InvalidValue::new("train.sequence_length", train.sequence_length, reason));
        }
        let samples = train.steps.saturating_mul(train.global_batch as u64);
        if samples > LARGEST {
            let reason = format!(
                "train.steps = {} of so many sequences are more than {LARGEST}, which cannot be counted",
                train.steps
            );
            return Err(InvalidValue::new("train.global_batch", train.global_batch, reason));
        }
        let pass = train.micro_batch_for(world);
        if pass.saturating_mul(train.sequence_length) > i32::MAX as usize {
            let most = i32::MAX as usize / train.sequence_length;
            let reason =
                format!("a rank's pass of train.sequence_length = {} takes at most {most}", train.sequence_length);
            return Err(InvalidValue::new("train.micro_batch", pass, reason));
        }
        Ok(())
    }
}

impl RunConfig {
    /// How long a collective waits for its peers. Of a validated configuration.
    pub fn collective_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.collective_timeout_s.clamp(0.0, LONGEST_TIMEOUT_S))
    }
}

fn at_least_one(key: &str, value: u64) -> Result<(), InvalidValue> {
    if value == 0 { Err(InvalidValue::new(key, value, "must be at least 1")) } else { countable(key, value) }
}

fn countable(key: &str, value: u64) -> Result<(), InvalidValue> {
    at_most(key, value, LARGEST)
}

fn at_most(key: &str, value: u64, most: u64) -> Result<(), InvalidValue> {
    if value > most { Err(InvalidValue::new(key, value, format!("must be at most {most}"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SourceConfig;

    fn source(weight: Option<f64>) -> SourceConfig {
        SourceConfig { paths: vec!["a.txt".into()], weight, tag: None }
    }

    #[test]
    fn each_impossible_value_is_refused_by_its_key() {
        type Break = fn(&mut Config);
        let table: [(&str, Break); 50] = [
            ("data.tokenizer", |c| c.data.tokenizer = "words".into()),
            ("data.validation_fraction", |c| c.data.validation_fraction = 1.0),
            ("data.validation_fraction", |c| c.data.validation_fraction = f64::NAN),
            ("data.tokenizer", |c| (c.data.tokenizer, c.model.vocab_size) = ("absent/tokenizer.json".into(), 0)),
            ("data.text_field", |c| c.data.text_field.clear()),
            ("data.validation_paths", |c| c.data.validation_paths = vec!["v.txt".into()]),
            ("data.paths", |c| {
                c.data.paths.push("a".into());
                c.data.sources.insert("web".into(), source(None));
            }),
            ("data.sources.web.paths", |c| drop(c.data.sources.insert("web".into(), SourceConfig::default()))),
            ("data.sources.web.weight", |c| drop(c.data.sources.insert("web".into(), source(Some(0.0))))),
            ("data.sources.web.weight", |c| {
                c.data.sources.extend([("code".into(), source(Some(1.0))), ("web".into(), source(None))]);
            }),
            ("model.vocab_size", |c| c.model.vocab_size = 255),
            ("model.top_k", |c| c.model.top_k = 9),
            ("router.balance_coefficient", |c| c.router.balance_coefficient = -1.0),
            ("parallel.chunks", |c| c.parallel.chunks = 0),
            ("parallel.chunks", |c| c.parallel.chunks = 1_000_000_000),
            ("run.threads", |c| c.run.threads = 1_000_000),
            ("model.layers", |c| c.model.layers = 1_000_000_000),
            ("model.experts", |c| c.model.experts = 100_000_000),
            ("model.experts", |c| (c.model.layers, c.model.experts) = (4096, 16384)),
            ("model.hidden_size", |c| c.model.hidden_size = 1_000_000_000),
            ("model.vocab_size", |c| c.model.vocab_size = 100_000_000_000),
            ("parallel.receive_headroom", |c| c.parallel.receive_headroom = 0.9),
            ("parallel.ep", |c| c.parallel.ep = Some(3)),
            ("parallel.ep", |c| c.parallel.ep = Some(8)),
            ("parallel.ep", |c| c.parallel.ep = Some(0)),
            ("optimizer.lr", |c| c.optimizer.lr = 0.0),
            ("optimizer.lr", |c| c.optimizer.lr = f64::NAN),
            ("optimizer.eps", |c| c.optimizer.eps = -1e-8),
            ("optimizer.beta1", |c| c.optimizer.beta1 = 1.0),
            ("optimizer.beta2", |c| c.optimizer.beta2 = f64::INFINITY),
            ("optimizer.weight_decay", |c| c.optimizer.weight_decay = -0.1),
            ("optimizer.clip_grad_norm", |c| c.optimizer.clip_grad_norm = f64::NAN),
            ("schedule.steps", |c| c.schedule.steps = Some(0)),
            ("schedule.min_ratio", |c| c.schedule.min_ratio = 1.5),
            ("schedule.decay_fraction", |c| c.schedule.decay_fraction = 0.0),
            ("schedule.warmup_steps", |c| c.schedule.warmup_steps = u64::MAX),
            ("train.steps", |c| c.train.steps = 0),
            ("train.seed", |c| c.train.seed = u64::MAX),
            ("train.global_batch", |c| c.train.global_batch = 0),
            ("train.global_batch", |c| c.train.global_batch = usize::MAX / 2),
            ("train.micro_batch", |c| c.train.micro_batch = Some(0)),
            ("train.micro_batch", |c| c.train.micro_batch = Some(1 << 40)),
            ("train.sequence_length", |c| c.train.sequence_length = 0),
            ("train.sequence_length", |c| c.train.sequence_length = 4097),
            ("train.freeze", |c| c.train.freeze = vec!["model.layers.7.*".into()]),
            ("train.trainable", |c| c.train.trainable = vec!["[".into()]),
            ("train.keep_checkpoints", |c| c.train.keep_checkpoints = 0),
            ("train.log_every", |c| c.train.log_every = 0),
            ("run.collective_timeout_s", |c| c.run.collective_timeout_s = 0.0),
            ("run.collective_timeout_s", |c| c.run.collective_timeout_s = f64::INFINITY),
        ];
        for (key, breaks) in table {
            let mut config = Config::preset("tiny").unwrap();
            breaks(&mut config);
            assert_eq!(config.validate(4).unwrap_err().key, key);
        }
    }

    #[test]
    fn an_illegal_ep_names_the_nearest_legal_ones() {
        let mut config = Config::preset("tiny").unwrap();
        config.parallel.ep = Some(3);
        assert!(config.validate(4).unwrap_err().reason.contains("[2, 4]"));
        config.model.experts = 0;
        config.model.ffn_size = 8;
        config.parallel.ep = Some(2);
        assert!(config.validate(4).unwrap_err().reason.contains("[1]"), "a dense model has nothing to share");
    }

    #[test]
    fn a_run_shorter_than_its_warm_up_is_legal() {
        let mut config = Config::preset("tiny").unwrap();
        (config.train.steps, config.schedule.steps) = (1, Some(1));
        config.validate(16).unwrap();
    }
}
