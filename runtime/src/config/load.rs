//! From what a user said to a configuration: preset, then file, then `--set`, then flags.
//!
//! Owns the order of precedence, the memory of who set which key, and the reading of the one file. It checks keys and types;
//! what values may be is `validate`'s.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::error::{ConfigError, Origin};
use super::presets::{DEFAULT_PRESET, PRESETS, preset};
use super::schema::{PRESET_KEY, Schema, nearest_word};
use super::{Config, values};
use crate::invalid::InvalidValue;
use crate::model::ModelConfig;
use crate::routing::RouterConfig;

/// The value of a dedicated flag.
#[derive(Clone, Debug, PartialEq)]
pub enum FlagValue {
    /// A whole number.
    Whole(u64),
    /// A word or a path.
    Text(String),
    /// Paths.
    Paths(Vec<PathBuf>),
}

impl From<u64> for FlagValue {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<usize> for FlagValue {
    fn from(value: usize) -> Self {
        Self::Whole(value as u64)
    }
}

impl From<&str> for FlagValue {
    fn from(value: &str) -> Self {
        Self::Text(value.into())
    }
}

impl From<Vec<PathBuf>> for FlagValue {
    fn from(paths: Vec<PathBuf>) -> Self {
        Self::Paths(paths)
    }
}

/// Collects what a user said; [`ConfigBuilder::build`] makes a configuration of it.
///
/// ```
/// use moe_runtime::config::ConfigBuilder;
/// let resolved = ConfigBuilder::new().preset("tiny").set("model.top_k=1").flag("--steps", "train.steps", 20u64).build()?;
/// assert_eq!((resolved.config.model.top_k, resolved.config.train.steps), (1, 20));
/// # Ok::<(), moe_runtime::config::ConfigError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ConfigBuilder {
    preset: Option<String>,
    run: Option<(Config, PathBuf)>,
    model: Option<(ModelConfig, RouterConfig, PathBuf)>,
    tokenizer: Option<PathBuf>,
    file: Option<PathBuf>,
    sets: Vec<String>,
    flags: Vec<(&'static str, &'static str, FlagValue)>,
}

impl ConfigBuilder {
    /// Nothing said yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts from the preset `name` (`--preset`), whatever the file names.
    pub fn preset(mut self, name: impl Into<String>) -> Self {
        self.preset = Some(name.into());
        self
    }

    /// Starts from `config`, that of a run to be resumed, read from `path`, unless a preset is named. Where the schedule's
    /// length is left open it stays the run's.
    pub fn resume_from(mut self, config: Config, path: impl Into<PathBuf>) -> Self {
        self.run = Some((config, path.into()));
        self
    }

    /// Replaces the `model` and `router` sections of what it starts from by those of a model folder (`--model`).
    pub fn model(mut self, model: ModelConfig, router: RouterConfig, folder: impl Into<PathBuf>) -> Self {
        self.model = Some((model, router, folder.into()));
        self
    }

    /// The model's own tokenizer, where there is such a file: for a fresh run that names none.
    pub fn tokenizer_of_model(mut self, file: PathBuf) -> Self {
        self.tokenizer = Some(file).filter(|file| file.is_file());
        self
    }

    /// Reads a TOML file over it (`--config`).
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.file = Some(path.into());
        self
    }

    /// Sets one key over the file (`--set key=value`): the value as TOML writes it, or a bare word or path as text.
    pub fn set(mut self, assignment: impl Into<String>) -> Self {
        self.sets.push(assignment.into());
        self
    }

    /// What most commands take: `--preset`, `--config` and any number of `--set`, each where it was given.
    pub fn given(mut self, preset: Option<&str>, file: Option<&Path>, sets: &[String]) -> Self {
        if let Some(preset) = preset {
            self = self.preset(preset);
        }
        if let Some(file) = file {
            self = self.file(file);
        }
        sets.iter().fold(self, |builder, assignment| builder.set(assignment))
    }

    /// Sets `key` over everything else, on behalf of `flag` (`--steps`, `train.steps`).
    pub fn flag(mut self, flag: &'static str, key: &'static str, value: impl Into<FlagValue>) -> Self {
        self.flags.push((flag, key, value.into()));
        self
    }

    /// The configuration, resolved, with types checked and values not: [`Resolved::validate`] does that once the number of
    /// ranks is known.
    pub fn build(self) -> Result<Resolved, ConfigError> {
        let layers = self.layers()?;
        let (start, base) = self.start(&layers)?;
        let mut merged = Merged { table: table_of(&start)?, origins: Origins { base, keys: HashMap::new() } };
        if let Some((model, router, folder)) = &self.model {
            let replaced = table_of(&Config { model: model.clone(), router: router.clone(), ..Config::default() })?;
            for (section, values) in replaced.into_iter().filter(|(name, _)| name == "model" || name == "router") {
                for key in values.as_table().into_iter().flat_map(Table::keys) {
                    merged.origins.keys.insert(format!("{section}.{key}"), Origin::Model(folder.clone()));
                }
                merged.table.insert(section, values);
            }
        }
        let schema = Schema::new();
        if let (Some(file), None) = (&self.tokenizer, &self.run) {
            let layer = nested("data.tokenizer", Value::String(file.display().to_string()));
            merged.lay(&schema, &Origin::Model(file.clone()), layer)?;
        }
        for (origin, table) in layers {
            merged.lay(&schema, &origin, table)?;
        }
        let (mut config, origins) = merged.read()?;
        if let (None, Some((run, _))) = (config.schedule.steps, &self.run) {
            config.schedule.steps = run.schedule.steps;
        }
        config.resolve();
        Ok(Resolved { config, origins })
    }

    /// What the user said, lowest precedence first.
    fn layers(&self) -> Result<Vec<(Origin, Table)>, ConfigError> {
        let mut layers = Vec::new();
        if let Some(path) = &self.file {
            layers.push((Origin::File(path.clone()), read_table(path)?));
        }
        for text in &self.sets {
            layers.push((Origin::Set, assignment(text)?));
        }
        for (flag, key, value) in &self.flags {
            layers.push((Origin::Flag(flag), nested(key, flag_value(flag, key, value)?)));
        }
        Ok(layers)
    }

    /// The configuration underneath the layers, and its name.
    fn start(&self, layers: &[(Origin, Table)]) -> Result<(Config, Origin), ConfigError> {
        let mut named = None;
        for (origin, table) in layers {
            if let Some(value) = table.get(PRESET_KEY) {
                named = Some((origin.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_owned)));
            }
        }
        if let Some(name) = &self.preset {
            named = Some((Origin::Flag("--preset"), name.clone()));
        }
        match (named, &self.run) {
            (None, Some((run, path))) => Ok((run.clone(), Origin::Run(path.clone()))),
            (named, _) => {
                let (origin, name) = named.unwrap_or((Origin::Flag("--preset"), DEFAULT_PRESET.into()));
                match preset(&name) {
                    Some(config) => Ok((config, Origin::Preset(name))),
                    None => {
                        let names = PRESETS.map(|(name, _)| name);
                        let advice = match nearest_word(&name, names) {
                            Some(nearest) => format!("did you mean {nearest}?"),
                            None => format!("there are {}", names.join(", ")),
                        };
                        Err(ConfigError::UnknownPreset { origin, name, advice })
                    }
                }
            }
        }
    }
}

impl Config {
    /// Reads the `config.toml` of a run, as [`Config::to_toml`] wrote it: no preset stands behind it.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let origin = Origin::Run(path.into());
        let origins = Origins { base: origin.clone(), keys: HashMap::new() };
        let mut merged = Merged { table: table_of(&Config::default())?, origins };
        merged.lay(&Schema::new(), &origin, read_table(path)?)?;
        let (mut config, _) = merged.read()?;
        config.resolve();
        Ok(config)
    }
}

/// A configuration together with who set what.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The configuration.
    pub config: Config,
    origins: Origins,
}

impl Resolved {
    /// Checks every value for `world` ranks; the error says who set the one that cannot be.
    pub fn validate(&self, world: usize) -> Result<(), ConfigError> {
        self.config.validate(world).map_err(|invalid| self.blame(invalid))
    }

    /// The error of a value that another check refused, with who set it.
    pub fn blame(&self, invalid: InvalidValue) -> ConfigError {
        ConfigError::Value { origin: self.origin_of(&invalid.key).clone(), invalid }
    }

    /// Who set `key`.
    pub fn origin_of(&self, key: &str) -> &Origin {
        self.origins.of(key)
    }
}

/// Who set which key.
#[derive(Clone, Debug)]
struct Origins {
    base: Origin,
    keys: HashMap<String, Origin>,
}

impl Origins {
    /// Who set `key`, or what it is a part of.
    fn of(&self, key: &str) -> &Origin {
        let mut parts = std::iter::successors(Some(key), |key| Some(key.rsplit_once('.')?.0));
        parts.find_map(|key| self.keys.get(key)).unwrap_or(&self.base)
    }
}

/// The layers so far.
struct Merged {
    table: Table,
    origins: Origins,
}

impl Merged {
    /// Lays `layer` over what is there; every key must be known.
    fn lay(&mut self, schema: &Schema, origin: &Origin, layer: Table) -> Result<(), ConfigError> {
        for (section, values) in layer {
            if section == PRESET_KEY {
                continue;
            }
            let Some(_) = schema.section(&section) else {
                // Inside an unknown section its first key says best what was meant.
                let inner = values.as_table().and_then(|values| values.iter().next());
                let key = inner.map_or(section.clone(), |(key, _)| format!("{section}.{key}"));
                return Err(unknown(schema, origin, &key, inner.map_or(&values, |(_, value)| value)));
            };
            let Value::Table(values) = values else {
                let reason = format!("is a section; its keys are set as {section}.key or under [{section}]");
                let invalid = InvalidValue::new(&section, shown(&values), reason);
                return Err(ConfigError::Value { origin: origin.clone(), invalid });
            };
            let both = values.contains_key("paths") && values.contains_key("sources");
            for (key, value) in values {
                let name = format!("{section}.{key}");
                if !schema.knows(&name) {
                    return Err(unknown(schema, origin, &name, &value));
                }
                if let Some(Value::Table(below)) = self.table.get_mut(&section) {
                    // Named sources and plain paths stand for one another: what a higher layer says counts.
                    match name.as_str() {
                        "data.paths" if !both => drop(below.remove("sources")),
                        "data.sources" if !both => drop(below.insert("paths".into(), Value::Array(Vec::new()))),
                        _ => {}
                    }
                    merge(below, key, value);
                }
                self.origins.keys.insert(name, origin.clone());
            }
        }
        Ok(())
    }

    /// The configuration; the error of a wrong type names the key and what was found.
    fn read(self) -> Result<(Config, Origins), ConfigError> {
        match serde_path_to_error::deserialize(Value::Table(self.table.clone())) {
            Ok(config) => Ok((config, self.origins)),
            Err(error) => {
                let path = error.path().to_string();
                let key = path.split('[').next().unwrap_or_default();
                let found = key.split('.').try_fold(&Value::Table(self.table), |at, part| at.get(part)).map(shown);
                let reason = values::plain_reason(error.inner().message());
                let invalid = InvalidValue::new(key, found.unwrap_or_default(), reason);
                Err(ConfigError::Value { origin: self.origins.of(key).clone(), invalid })
            }
        }
    }
}

/// Puts `value` under `key`; a table goes into the one that is there, so that one key of it can be set alone.
fn merge(table: &mut Table, key: String, value: Value) {
    match (table.get_mut(&key), value) {
        (Some(Value::Table(below)), Value::Table(values)) => {
            values.into_iter().for_each(|(key, value)| merge(below, key, value));
        }
        (_, value) => drop(table.insert(key, value)),
    }
}

fn unknown(schema: &Schema, origin: &Origin, key: &str, value: &Value) -> ConfigError {
    ConfigError::UnknownKey { origin: origin.clone(), key: key.into(), value: shown(value), advice: schema.advice(key) }
}

/// A value on one line.
fn shown(value: &Value) -> String {
    match value {
        Value::Table(_) => "a table".into(),
        // TOML writes a text of several lines on several lines.
        Value::String(text) => format!("{text:?}"),
        value => value.to_string().replace('\n', " "),
    }
}

fn table_of(config: &Config) -> Result<Table, ConfigError> {
    config.to_toml()?.parse().map_err(|error: toml::de::Error| ConfigError::NotToml { reason: error.message().into() })
}

fn read_table(path: &Path) -> Result<Table, ConfigError> {
    let bytes = std::fs::read(path).map_err(|reason| ConfigError::Unreadable { path: path.into(), reason })?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|error| ConfigError::NotUtf8 { path: path.into(), offset: error.valid_up_to() })?;
    text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        ConfigError::Syntax { path: path.into(), line, column, reason: error.message().replace('\n', ", ") }
    })
}

/// `section.key=value` as a table.
fn assignment(text: &str) -> Result<Table, ConfigError> {
    let wrong = |reason| ConfigError::Assignment { text: text.into(), reason };
    let (key, raw) = text.split_once('=').ok_or_else(|| wrong("no = between key and value"))?;
    let (key, raw) = (key.trim(), raw.trim());
    if key.is_empty() {
        return Err(wrong("no key before ="));
    }
    if raw.is_empty() {
        return Err(wrong("no value after ="));
    }
    let parsed = format!("value = {raw}").parse::<Table>().ok().filter(|table| table.len() == 1);
    match parsed.and_then(|mut table| table.remove("value")) {
        Some(value) => Ok(nested(key, value)),
        None if raw.starts_with(['"', '\'', '[', '{']) => Err(wrong("the value begins like TOML but is not TOML")),
        None => Ok(nested(key, Value::String(raw.into()))),
    }
}

/// A table that holds `value` under the dotted `key`.
fn nested(key: &str, value: Value) -> Table {
    let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
    let value = match rest {
        Some(rest) => Value::Table(nested(rest, value)),
        None => value,
    };
    Table::from_iter([(first.to_owned(), value)])
}

fn flag_value(flag: &'static str, key: &str, value: &FlagValue) -> Result<Value, ConfigError> {
    let refuse = |value: &dyn std::fmt::Display, reason: String| ConfigError::Value {
        origin: Origin::Flag(flag),
        invalid: InvalidValue::new(key, value, reason),
    };
    match value {
        FlagValue::Whole(number) => i64::try_from(*number)
            .map(Value::Integer)
            .map_err(|_| refuse(number, format!("must be at most {}", i64::MAX))),
        FlagValue::Text(text) => Ok(Value::String(text.clone())),
        FlagValue::Paths(paths) => {
            let text = |path: &PathBuf| {
                let name = path.to_str().map(|text| Value::String(text.into()));
                name.ok_or_else(|| refuse(&path.display(), "must be a path in UTF-8".into()))
            };
            paths.iter().map(text).collect::<Result<_, _>>().map(Value::Array)
        }
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
