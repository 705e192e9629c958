//! The rotary settings of a config.json, in the form of transformers 5 and in the older one.
//!
//! Owns the meaning of `rope_theta`, `rope_scaling` and `rope_parameters`, both ways. The angles are `model::rotary`'s.

use serde_json::{Map, Value, json};

use super::CheckpointError;
use super::hf_config::Keys;
use crate::model::rotary::yarn_amplitude;
use crate::model::{ModelConfig, RopeScaling};

/// The scalings that are read.
const ACCEPTED: &str = "accepted: \"default\", \"linear\", \"llama3\", \"yarn\"";

/// The keys of Llama 3's scaling.
const LLAMA3: [&str; 4] = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"];
/// The keys of YaRN.
const YARN: [&str; 8] = [
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "original_max_position_embeddings",
];

/// The base of the angles and their scaling. `default_theta` is what a family has without saying so.
///
/// # Errors
/// A setting that is not supported, or two that contradict each other.
pub(super) fn read(keys: &Keys<'_>, default_theta: f64) -> Result<(f64, Option<RopeScaling>), CheckpointError> {
    let mut theta = keys.number("rope_theta")?;
    let mut scaling = None;
    refuse_partial_rotation(keys)?;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(value) = keys.get(key) else { continue };
        let Some(map) = value.as_object() else {
            return Err(keys.refuse(key, "must be an object with rope_type \"default\", or null"));
        };
        let nested = Keys { path: keys.path, map, prefix: key };
        refuse_partial_rotation(&nested)?;
        let read = read_scaling(keys, &nested)?;
        if read.is_some() && scaling.is_some() && read != scaling {
            return Err(keys.refuse(key, "contradicts the rope_scaling beside it; accepted: one of them"));
        }
        scaling = scaling.or(read);
        if let Some(inner) = nested.number("rope_theta")? {
            if theta.is_some_and(|outer| outer != inner) {
                return Err(nested.refuse("rope_theta", "contradicts the rope_theta beside it; accepted: one of them"));
            }
            theta = Some(inner);
        }
    }
    Ok((theta.unwrap_or(default_theta), scaling))
}

fn refuse_partial_rotation(keys: &Keys<'_>) -> Result<(), CheckpointError> {
    if keys.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        let reason = "rotating part of a head is not supported; accepted: 1.0";
        return Err(keys.refuse("partial_rotary_factor", reason));
    }
    Ok(())
}

fn read_scaling(top: &Keys<'_>, keys: &Keys<'_>) -> Result<Option<RopeScaling>, CheckpointError> {
    let kind_key = if keys.get("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = keys.get(kind_key).map_or(Some("default"), Value::as_str);
    let needed = |key: &str| {
        let missing = || keys.refuse(key, "this kind of scaling needs it; accepted: a number");
        keys.number(key)?.ok_or_else(missing)
    };
    let (scaling, known): (_, &[&str]) = match kind {
        Some("default") => (None, &[]),
        Some("linear") => (Some(RopeScaling::Linear { factor: needed("factor")? }), &["factor"]),
        Some("llama3") => {
            let scaling = RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_positions: original_positions(top, keys)?,
            };
            (Some(scaling), &LLAMA3)
        }
        Some("yarn") => (Some(yarn(top, keys, needed("factor")?)?), &YARN),
        _ => return Err(keys.refuse(kind_key, format!("this scaling is not supported; {ACCEPTED}"))),
    };
    let common = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    let unknown = |(name, value): &(&String, &Value)| {
        !value.is_null() && !common.contains(&name.as_str()) && !known.contains(&name.as_str())
    };
    if let Some((name, _)) = keys.map.iter().find(unknown) {
        let reason = format!(
            "this rotary setting is not supported with rope_type {:?}; accepted: {}",
            kind.unwrap_or_default(),
            [&common[..], known].concat().join(", ")
        );
        return Err(keys.refuse(name, reason));
    }
    if let Some(invalid) = scaling.as_ref().and_then(|scaling| scaling.validate().err()) {
        let field = invalid.key.rsplit('.').next().unwrap_or_default();
        let field = if field == "original_positions" { "original_max_position_embeddings" } else { field };
        return Err(keys.refuse(field, invalid.reason));
    }
    Ok(scaling)
}

fn yarn(top: &Keys<'_>, keys: &Keys<'_>, factor: f64) -> Result<RopeScaling, CheckpointError> {
    // transformers takes a zero as if the key were not there.
    let weight = |key: &str| Ok::<_, CheckpointError>(keys.number(key)?.filter(|weight| *weight != 0.0));
    let by_weights = weight("mscale")?
        .zip(weight("mscale_all_dim")?)
        .map(|(all, dim)| yarn_amplitude(factor, all) / yarn_amplitude(factor, dim));
    Ok(RopeScaling::Yarn {
        factor,
        original_positions: original_positions(top, keys)?,
        attention_factor: keys.number("attention_factor")?.or(by_weights),
        beta_fast: weight("beta_fast")?.unwrap_or(32.0),
        beta_slow: weight("beta_slow")?.unwrap_or(1.0),
        truncate: keys.flag("truncate")?.unwrap_or(true),
    })
}

/// The length before scaling: beside the model's other sizes where it is there, as transformers has it.
fn original_positions(top: &Keys<'_>, keys: &Keys<'_>) -> Result<usize, CheckpointError> {
    let key = "original_max_position_embeddings";
    match (top.optional_size(key)?, keys.optional_size(key)?) {
        (Some(positions), _) | (None, Some(positions)) => Ok(positions),
        (None, None) => top.size("max_position_embeddings"),
    }
}

/// `rope_parameters` of a model, in the form of transformers 5.
pub(super) fn written(model: &ModelConfig) -> Map<String, Value> {
    let mut map = Map::new();
    let mut set = |key: &str, value: Value| drop(map.insert(key.to_owned(), value));
    set("rope_theta", json!(model.rope_theta));
    match model.rope_scaling {
        None => set("rope_type", json!("default")),
        Some(RopeScaling::Linear { factor }) => {
            set("rope_type", json!("linear"));
            set("factor", json!(factor));
        }
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions }) => {
            set("rope_type", json!("llama3"));
            set("factor", json!(factor));
            set("low_freq_factor", json!(low_freq_factor));
            set("high_freq_factor", json!(high_freq_factor));
            set("original_max_position_embeddings", json!(original_positions));
        }
        Some(RopeScaling::Yarn { factor, original_positions, attention_factor, beta_fast, beta_slow, truncate }) => {
            set("rope_type", json!("yarn"));
            set("factor", json!(factor));
            set("original_max_position_embeddings", json!(original_positions));
            if let Some(factor) = attention_factor {
                set("attention_factor", json!(factor));
            }
            set("beta_fast", json!(beta_fast));
            set("beta_slow", json!(beta_slow));
            set("truncate", json!(truncate));
        }
    }
    map
}
