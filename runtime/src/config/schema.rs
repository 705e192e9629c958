//! The keys there are, asked of the types themselves, and the known key nearest to an unknown one.
//!
//! Owns no list of keys: serde's derived code names the fields of each section, so a new field is known here at once.

use serde::Deserialize;
use serde::de::value::Error as ProbeError;
use serde::de::{Deserializer, Error as _, Visitor};

use super::Config;
use super::sections::{DataConfig, OptimizerConfig, ParallelConfig, RunConfig, ScheduleConfig, TrainConfig};
use crate::model::ModelConfig;
use crate::routing::RouterConfig;

/// The top-level key that names a preset.
pub(super) const PRESET_KEY: &str = "preset";

/// Below this similarity a suggestion would only mislead.
const NEAR: f64 = 0.75;

/// Every section with its keys.
pub(super) struct Schema {
    sections: Vec<(&'static str, &'static [&'static str])>,
}

impl Schema {
    /// The schema of [`Config`].
    pub(super) fn new() -> Self {
        let sections = fields_of::<Config>()
            .iter()
            .map(|&section| {
                let fields = match section {
                    "model" => fields_of::<ModelConfig>(),
                    "router" => fields_of::<RouterConfig>(),
                    "parallel" => fields_of::<ParallelConfig>(),
                    "optimizer" => fields_of::<OptimizerConfig>(),
                    "schedule" => fields_of::<ScheduleConfig>(),
                    "train" => fields_of::<TrainConfig>(),
                    "data" => fields_of::<DataConfig>(),
                    "run" => fields_of::<RunConfig>(),
                    _ => &[],
                };
                (section, fields)
            })
            .collect();
        Self { sections }
    }

    /// The keys of `section`; None: there is no such section.
    pub(super) fn section(&self, section: &str) -> Option<&'static [&'static str]> {
        self.sections.iter().find(|(name, _)| *name == section).map(|(_, fields)| *fields)
    }

    /// Whether `key`, dotted, is known.
    pub(super) fn knows(&self, key: &str) -> bool {
        key.split_once('.').is_some_and(|(section, field)| self.section(section).is_some_and(|f| f.contains(&field)))
    }

    /// What to do about the unknown `key`: the nearest known one, or where to look.
    pub(super) fn advice(&self, key: &str) -> String {
        match &self.nearest(key)[..] {
            nearest @ [_, ..] => format!("did you mean {}?", nearest.join(" or ")),
            [] => match key.split_once('.').and_then(|(section, _)| Some((section, self.section(section)?))) {
                Some((section, fields)) => format!("[{section}] has {}", fields.join(", ")),
                None => {
                    let names: Vec<_> = self.sections.iter().map(|(name, _)| format!("[{name}]")).collect();
                    format!("there are {} and {PRESET_KEY}", names.join(", "))
                }
            },
        }
    }

    /// The known keys or sections most like `key`, if any is like it: several where they are equally like it. A key without its
    /// section, or in another one, finds its full name.
    fn nearest(&self, key: &str) -> Vec<String> {
        let last = key.rsplit('.').next().unwrap_or(key);
        let mut best = (NEAR, Vec::new());
        let mut offer = |likeness: f64, name: String| {
            if likeness > best.0 {
                best = (likeness, vec![name]);
            } else if likeness == best.0 {
                best.1.push(name);
            }
        };
        for (section, fields) in &self.sections {
            if !key.contains('.') {
                offer(strsim::normalized_damerau_levenshtein(key, section), format!("[{section}]"));
            }
            for field in *fields {
                let name = format!("{section}.{field}");
                let tail = strsim::normalized_damerau_levenshtein(last, field);
                // Within one section the section's own letters say nothing about the likeness of two keys; elsewhere a
                // well-known name in another section is a little less likely than one in the same.
                let likeness = match key.split_once('.') {
                    Some((given, _)) if given == *section => tail,
                    Some(_) => strsim::normalized_damerau_levenshtein(key, &name).max(tail - 0.01),
                    None => tail,
                };
                offer(likeness, name);
            }
        }
        best.1
    }
}

/// The names among `known` nearest to `given`, for words that are no keys.
pub(super) fn nearest_word<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|word| (strsim::normalized_damerau_levenshtein(given, word), word))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, word)| word)
}

/// The field names of a struct that derives `Deserialize`.
fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // The probe always ends in an error, once it has seen the names.
    drop(T::deserialize(Probe(&mut fields)));
    fields
}

/// A deserializer that holds nothing and only listens to which fields it is asked for.
struct Probe<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = ProbeError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ProbeError> {
        Err(ProbeError::custom("no struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, ProbeError> {
        *self.0 = fields;
        Err(ProbeError::custom("seen"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_of_the_configuration_has_keys() {
        let schema = Schema::new();
        assert_eq!(schema.sections.len(), 8);
        for (section, fields) in &schema.sections {
            assert!(!fields.is_empty(), "[{section}] is not listed in Schema::new");
        }
        assert!(schema.knows("router.capacity_factor"), "a key that is absent by default is known all the same");
        assert!(!schema.knows("train"));
    }

    #[test]
    fn an_unknown_key_finds_the_nearest_known_one() {
        let schema = Schema::new();
        let table = [
            ("train.step", "did you mean train.steps?"),
            ("train.stpes", "did you mean train.steps?"),
            ("schedule.step", "did you mean schedule.steps?"),
            ("model.expert", "did you mean model.experts?"),
            ("model.topk", "did you mean model.top_k?"),
            ("training.seed", "did you mean train.seed?"),
            ("lr", "did you mean optimizer.lr?"),
            ("steps", "did you mean schedule.steps or train.steps?"),
            ("optimiser.lr", "did you mean optimizer.lr?"),
            ("optimiser", "did you mean [optimizer]?"),
            ("parallel.zzzzzz", "[parallel] has ep, chunks, receive_headroom, direct, reduce_early, shard_optimizer"),
        ];
        for (key, advice) in table {
            assert_eq!(schema.advice(key), advice, "{key}");
        }
        assert!(schema.advice("qqqq").starts_with("there are [model], [router]"));
    }
}
