//! The built-in configurations.
//!
//! Owns their names and values. The names stay, since scripts rely on them.

use super::{Config, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig};
use crate::model::ModelConfig;

/// The preset of a run that names none.
pub const DEFAULT_PRESET: &str = "tiny";

/// Every preset with what it is for.
pub const PRESETS: [(&str, &str); 4] = [
    ("tiny", "learns something in seconds on any machine; the default"),
    ("shakespeare", "a good small language model of one small text, in minutes on two cores"),
    ("moe-15m", "15 million parameters, 8 experts: the CPU benchmark"),
    ("moe-3b", "3 billion parameters, 64 experts: for GPUs"),
];

/// The preset `name`, as written below.
pub(super) fn preset(name: &str) -> Option<Config> {
    match name {
        "tiny" => Some(tiny()),
        "shakespeare" => Some(shakespeare()),
        "moe-15m" => Some(moe_15m()),
        "moe-3b" => Some(moe_3b()),
        _ => None,
    }
}

fn tiny() -> Config {
    Config {
        model: ModelConfig {
            hidden_size: 64,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            experts: 8,
            top_k: 2,
            expert_ffn_size: 128,
            ..ModelConfig::default()
        },
        optimizer: OptimizerConfig { lr: 3e-3, ..OptimizerConfig::default() },
        train: TrainConfig {
            steps: 200,
            global_batch: 16,
            sequence_length: 128,
            eval_every: 50,
            eval_batches: 4,
            checkpoint_every: 100,
            ..TrainConfig::default()
        },
        ..Config::default()
    }
}

fn shakespeare() -> Config {
    Config {
        model: ModelConfig {
            hidden_size: 128,
            layers: 4,
            heads: 4,
            kv_heads: 4,
            experts: 8,
            top_k: 2,
            expert_ffn_size: 192,
            max_positions: 1024,
            ..ModelConfig::default()
        },
        optimizer: OptimizerConfig { lr: 3e-3, beta2: 0.99, ..OptimizerConfig::default() },
        schedule: ScheduleConfig { warmup_steps: 50, ..ScheduleConfig::default() },
        train: TrainConfig {
            steps: 1500,
            global_batch: 16,
            sequence_length: 256,
            eval_every: 250,
            // The whole held-out tenth, so that the figure is one of the text and not of a sample.
            eval_batches: 0,
            checkpoint_every: 500,
            log_every: 10,
            ..TrainConfig::default()
        },
        ..Config::default()
    }
}

fn moe_15m() -> Config {
    Config {
        model: ModelConfig {
            // A text in bytes uses the first 256; the size is the benchmark's.
            vocab_size: 4096,
            hidden_size: 256,
            layers: 4,
            heads: 8,
            kv_heads: 4,
            experts: 8,
            top_k: 2,
            expert_ffn_size: 512,
            ..ModelConfig::default()
        },
        schedule: ScheduleConfig { warmup_steps: 100, ..ScheduleConfig::default() },
        train: TrainConfig {
            steps: 1000,
            global_batch: 8,
            sequence_length: 256,
            eval_every: 250,
            checkpoint_every: 500,
            ..TrainConfig::default()
        },
        data: DataConfig::default(),
        ..Config::default()
    }
}

fn moe_3b() -> Config {
    Config {
        model: ModelConfig {
            vocab_size: 32_000,
            hidden_size: 2048,
            layers: 8,
            heads: 16,
            kv_heads: 4,
            experts: 64,
            top_k: 8,
            expert_ffn_size: 1024,
            ..ModelConfig::default()
        },
        optimizer: OptimizerConfig { lr: 3e-4, ..OptimizerConfig::default() },
        schedule: ScheduleConfig { warmup_steps: 200, ..ScheduleConfig::default() },
        train: TrainConfig {
            steps: 10_000,
            global_batch: 8,
            sequence_length: 2048,
            eval_every: 1000,
            checkpoint_every: 1000,
            ..TrainConfig::default()
        },
        ..Config::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_exists_under_its_name_and_is_legal_alone_and_on_sixteen_ranks() {
        for (name, _) in PRESETS {
            let config = Config::preset(name).unwrap();
            for world in [1, 2, 4, 16] {
                config.validate(world).unwrap_or_else(|error| panic!("{name}: {error}"));
            }
        }
        assert!(Config::preset(DEFAULT_PRESET).is_some());
        assert!(Config::preset("huge").is_none());
    }

    #[test]
    fn every_preset_survives_toml_exactly() {
        for (name, _) in PRESETS {
            let config = Config::preset(name).unwrap();
            let text = config.to_toml().unwrap();
            assert_eq!(toml::from_str::<Config>(&text).unwrap(), config, "{name}");
            assert!(text.contains("ep = \"auto\"") && text.contains("balance_coefficient = 0.01\n"), "{text}");
        }
    }
}
