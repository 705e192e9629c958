//! What two configurations must share: those of a run and of its continuation, and those of all ranks.
//!
//! Owns the list of keys that a resumed run may change. It compares values only; files are the caller's.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{Config, ConfigError};

/// Sections whose every key a resumed run may change: they decide where and how the same is computed.
const FREE_SECTIONS: [&str; 2] = ["parallel.", "run."];

/// Further keys it may change: where the text lies (that it is the same is seen by its hash), how long, in which numbers (checkpoints hold
/// the f32 ones), what is kept in memory, and how often what is written.
const FREE_KEYS: [&str; 9] = [
    "data.paths",
    "train.steps",
    "train.precision",
    "train.recompute",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
];

/// A key that differs though it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The key, dotted.
    pub key: String,
    /// Its value in the run that is resumed; None: not set.
    pub base: Option<String>,
    /// Its value now; None: not set.
    pub now: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".into());
        write!(f, "{} ({} then, {} now)", self.key, said(&self.base), said(&self.now))
    }
}

impl Config {
    /// The keys in which this configuration, that of a continuation, differs from `base`, that of the run, though they must not. What may
    /// differ is said in docs/configuration.md under "Resuming".
    pub fn differences_that_matter(&self, base: &Config) -> Result<Vec<Difference>, ConfigError> {
        let (now, base) = (self.flat()?, base.flat()?);
        let keys: std::collections::BTreeSet<_> = now.keys().chain(base.keys()).collect();
        Ok(keys
            .into_iter()
            .filter(|key| !FREE_SECTIONS.iter().any(|section| key.starts_with(section)))
            .filter(|key| !FREE_KEYS.contains(&key.as_str()) && now.get(*key) != base.get(*key))
            .map(|key| Difference { key: key.clone(), base: base.get(key).cloned(), now: now.get(key).cloned() })
            .collect())
    }

    /// Refuses to continue the run of `base`, read from `path`, with this configuration if anything that matters differs.
    pub fn check_resumes(&self, base: &Config, path: &Path) -> Result<(), ConfigError> {
        let differences = self.differences_that_matter(base)?;
        if differences.is_empty() { Ok(()) } else { Err(ConfigError::NotResumable { path: path.into(), differences }) }
    }

    /// SHA-256, in hexadecimal, of what all ranks must agree on: everything but `run.*`, which may suit each machine.
    pub fn fingerprint(&self) -> Result<String, ConfigError> {
        let mut hash = Sha256::new();
        for (key, value) in self.flat()?.iter().filter(|(key, _)| !key.starts_with("run.")) {
            hash.update(format!("{key}={value}\n"));
        }
        Ok(crate::data::hexadecimal(&hash.finalize()))
    }

    /// Every key that is set, dotted, with its value as TOML writes it.
    fn flat(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        // Through text: there an f32 has its own few digits, in a `toml::Value` those of the nearest f64.
        let table: toml::Table = self
            .to_toml()?
            .parse()
            .map_err(|e: toml::de::Error| ConfigError::NotToml { reason: e.message().into() })?;
        let mut flat = BTreeMap::new();
        for (section, values) in table {
            for (key, value) in values.as_table().into_iter().flatten() {
                flat.insert(format!("{section}.{key}"), value.to_string());
            }
        }
        Ok(flat)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Precision;
    use super::*;
    use crate::exit::{Classified, ExitCode};
    use crate::model::Recompute;

    fn tiny() -> Config {
        Config::preset("tiny").unwrap()
    }

    #[test]
    fn a_continuation_may_change_length_layout_and_pace_only() {
        let base = tiny();
        let mut now = base.clone();
        now.data.paths = vec!["elsewhere".into()];
        now.train.steps += 100;
        now.train.log_every = 7;
        now.train.eval_every = 7;
        now.train.eval_batches = 7;
        now.train.checkpoint_every = 7;
        now.train.keep_checkpoints = 7;
        now.train.precision = Precision::F32;
        now.train.recompute = Recompute::Experts;
        now.parallel.ep = Some(4);
        now.parallel.chunks = 2;
        now.run.threads = 3;
        now.run.collective_timeout_s = 5.0;
        now.check_resumes(&base, Path::new("runs/a/config.toml")).unwrap();

        now.optimizer.lr = 1.0;
        now.router.capacity_factor = Some(1.25);
        let error = now.check_resumes(&base, Path::new("runs/a/config.toml")).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.exit_code(), ExitCode::Usage);
        assert!(text.starts_with("runs/a/config.toml: "), "{text}");
        assert!(text.contains("optimizer.lr (0.003 then, 1.0 now)"), "{text}");
        assert!(text.contains("router.capacity_factor (not set then, 1.25 now)"), "{text}");
    }

    #[test]
    fn every_key_outside_the_free_ones_matters() {
        type Change = fn(&mut Config);
        let table: [(&str, Change); 8] = [
            ("model.experts", |c| c.model.experts = 16),
            ("router.balance_coefficient", |c| c.router.balance_coefficient = 0.02),
            ("optimizer.decay", |c| c.optimizer.decay = super::super::DecayGroups::All),
            ("schedule.steps", |c| c.schedule.steps = Some(1)),
            ("train.seed", |c| c.train.seed = 9),
            ("train.global_batch", |c| c.train.global_batch = 9),
            ("train.micro_batch", |c| c.train.micro_batch = Some(1)),
            ("data.tokenizer", |c| c.data.tokenizer = "b.json".into()),
        ];
        for (key, change) in table {
            let mut now = tiny();
            change(&mut now);
            let keys: Vec<_> = now.differences_that_matter(&tiny()).unwrap().into_iter().map(|d| d.key).collect();
            assert_eq!(keys, [key]);
            assert_ne!(now.fingerprint().unwrap(), tiny().fingerprint().unwrap(), "{key}");
        }
    }

    #[test]
    fn ranks_may_differ_in_how_they_run_and_in_nothing_else() {
        let mut other = tiny();
        other.run.threads = 9;
        assert_eq!(other.fingerprint().unwrap(), tiny().fingerprint().unwrap());
        other.parallel.ep = Some(2);
        assert_ne!(other.fingerprint().unwrap(), tiny().fingerprint().unwrap());
        assert_eq!(tiny().fingerprint().unwrap().len(), 64);
    }
}
