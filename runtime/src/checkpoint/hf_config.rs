//! Hugging Face's config.json: what model it describes, and the refusal of what we do not compute.
//!
//! Owns the meaning of its keys for each family, in the form of transformers 5 (`rope_parameters`, `dtype`) and in the older
//! one (`rope_theta`, `rope_scaling`, `torch_dtype`). It reads no tensor.
//!
//! A feature that changes what the model computes and that we do not have is refused by its key, never passed over. Keys that
//! transformers itself does not read for a family (it takes a fixed set for each) have no effect there and none here. Keys that
//! concern only storage, generation or the library (`dtype`, `use_cache`, `eos_token_id`, `output_router_logits`…) are not read.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{CheckpointError, hf_rope};
use crate::model::{Family, ModelConfig, QkNorm};
use crate::routing::{BalanceScope, RouterConfig, RouterKind};

/// The model and the routing that a config.json describes.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    /// Sizes; valid.
    pub model: ModelConfig,
    /// Routing, with the balance loss formed as transformers forms it: all layers pooled, over the global batch.
    pub router: RouterConfig,
}

impl HfConfig {
    /// Reads and checks a config.json.
    ///
    /// # Errors
    /// The file cannot be read, is not JSON, lacks a size, or asks for a feature that is not supported; with file, key, value
    /// and what is accepted.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let text = std::fs::read_to_string(path).map_err(CheckpointError::io("read", path))?;
        Self::parse(path, &text)
    }

    /// [`HfConfig::read`] on text; `path` is for messages.
    ///
    /// # Errors
    /// As [`HfConfig::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, CheckpointError> {
        let map: Map<String, Value> =
            serde_json::from_str(text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })?;
        let keys = Keys { path, map: &map, prefix: "" };
        let traits = FamilyTraits::of(&keys)?;
        refuse_unsupported(&keys, &traits)?;
        let model = model_config(&keys, &traits)?;
        let router = router_config(&keys, &traits)?;
        model.validate(&router).map_err(|source| CheckpointError::ConfigSizes { path: path.to_owned(), source })?;
        Ok(Self { model, router })
    }
}

/// What transformers takes for a key that is absent, and what a family has without saying so.
struct FamilyTraits {
    family: Family,
    rope_theta: f64,
    norm_eps: f64,
    balance_coefficient: f64,
    /// Whether key/value heads default to the query heads.
    kv_heads_default: bool,
    qk_norm: QkNorm,
}

impl FamilyTraits {
    fn of(keys: &Keys<'_>) -> Result<Self, CheckpointError> {
        let base = Self {
            family: Family::Llama,
            rope_theta: 10_000.0,
            norm_eps: 1e-6,
            balance_coefficient: 0.001,
            kv_heads_default: false,
            qk_norm: QkNorm::None,
        };
        let accepted = "accepted: \"llama\", \"mixtral\", \"olmoe\", \"qwen2_moe\", \"qwen3_moe\"";
        let Some(model_type) = keys.get("model_type") else {
            return Err(keys.refuse("model_type", format!("says which family the model is of; {accepted}")));
        };
        Ok(match model_type.as_str() {
            Some("llama") => Self { kv_heads_default: true, ..base },
            Some("mixtral") => Self { family: Family::Mixtral, rope_theta: 1e6, norm_eps: 1e-5, ..base },
            Some("olmoe") => Self {
                family: Family::Olmoe,
                norm_eps: 1e-5,
                balance_coefficient: 0.01,
                kv_heads_default: true,
                qk_norm: QkNorm::FullWidth,
                ..base
            },
            Some("qwen2_moe") => Self { family: Family::Qwen2Moe, ..base },
            Some("qwen3_moe") => Self { family: Family::Qwen3Moe, qk_norm: QkNorm::PerHead, ..base },
            _ => return Err(keys.refuse("model_type", format!("this family is not supported; {accepted}"))),
        })
    }

    fn is_dense(&self) -> bool {
        self.family == Family::Llama
    }

    fn is_qwen(&self) -> bool {
        matches!(self.family, Family::Qwen2Moe | Family::Qwen3Moe)
    }
}

fn refuse_unsupported(keys: &Keys<'_>, traits: &FamilyTraits) -> Result<(), CheckpointError> {
    for (key, feature) in [
        ("attention_bias", "biases in all four attention projections are not supported"),
        ("mlp_bias", "biases in feed-forward layers are not supported"),
    ] {
        if keys.flag(key)?.unwrap_or(false) {
            return Err(keys.refuse(key, format!("{feature}; accepted: false")));
        }
    }
    for (key, feature) in [
        ("attention_dropout", "dropout is not supported"),
        ("router_jitter_noise", "noise on the router's input is not supported"),
    ] {
        if keys.number(key)?.is_some_and(|value| value != 0.0) {
            return Err(keys.refuse(key, format!("{feature}; accepted: 0.0")));
        }
    }
    for (key, feature) in [
        ("clip_qkv", "clipping queries, keys and values is not supported"),
        ("quantization_config", "quantized weights are not supported: take the original F32, BF16 or F16 files"),
    ] {
        if keys.get(key).is_some() {
            return Err(keys.refuse(key, format!("{feature}; accepted: null")));
        }
    }
    // transformers takes the window of the Qwen families only where a switch says so.
    let window_in_force = keys.flag("use_sliding_window")?.unwrap_or(!traits.is_qwen());
    if window_in_force && keys.get("sliding_window").is_some() {
        return Err(keys.refuse("sliding_window", "attention within a window is not supported; accepted: null"));
    }
    if let Some(types) = keys.get("layer_types") {
        let full = |types: &Vec<Value>| types.iter().all(|layer| layer == "full_attention");
        if !types.as_array().is_some_and(full) {
            return Err(keys.refuse("layer_types", "accepted: \"full_attention\" for every block"));
        }
    }
    match keys.get("hidden_act").map(Value::as_str) {
        None | Some(Some("silu" | "swish")) => Ok(()),
        Some(_) => Err(keys.refuse("hidden_act", "this activation is not supported; accepted: \"silu\"")),
    }
}

/// The token whose embedding transformers never trains; null: none.
fn padding_token(keys: &Keys<'_>) -> Result<Option<usize>, CheckpointError> {
    let Some(value) = keys.get("pad_token_id") else { return Ok(None) };
    let token = value.as_u64().and_then(|token| usize::try_from(token).ok());
    token.map(Some).ok_or_else(|| keys.refuse("pad_token_id", "accepted: a token id, or null"))
}

fn model_config(keys: &Keys<'_>, traits: &FamilyTraits) -> Result<ModelConfig, CheckpointError> {
    let heads = keys.size("num_attention_heads")?;
    let kv_heads = match keys.optional_size("num_key_value_heads")? {
        None if traits.kv_heads_default => heads,
        None => keys.size("num_key_value_heads")?,
        Some(kv_heads) => kv_heads,
    };
    let hidden_size = keys.size("hidden_size")?;
    let (rope_theta, rope_scaling) = hf_rope::read(keys, traits.rope_theta)?;
    let base = ModelConfig {
        family: traits.family,
        vocab_size: keys.size("vocab_size")?,
        hidden_size,
        layers: keys.size("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim: keys.optional_size("head_dim")?.filter(|dim| dim * heads != hidden_size).unwrap_or(0),
        experts: 0,
        top_k: 0,
        expert_ffn_size: 0,
        qk_norm: traits.qk_norm,
        rope_theta,
        rope_scaling,
        tie_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        padding_token: padding_token(keys)?,
        norm_eps: keys.number("rms_norm_eps")?.unwrap_or(traits.norm_eps) as f32,
        max_positions: keys.size("max_position_embeddings")?,
        init_std: keys.number("initializer_range")?.unwrap_or(0.02) as f32,
        ..ModelConfig::default()
    };
    let ffn_size = keys.size("intermediate_size")?;
    if traits.is_dense() {
        return Ok(ModelConfig { ffn_size, ..base });
    }
    let base = ModelConfig { experts: experts(keys)?, top_k: keys.size("num_experts_per_tok")?, ..base };
    if !traits.is_qwen() {
        return Ok(ModelConfig { expert_ffn_size: ffn_size, ..base });
    }
    let base = ModelConfig {
        ffn_size,
        expert_ffn_size: keys.size("moe_intermediate_size")?,
        moe_every: keys.optional_size("decoder_sparse_step")?.unwrap_or(1),
        dense_layers: keys.sizes("mlp_only_layers")?,
        ..base
    };
    if traits.family == Family::Qwen3Moe {
        return Ok(base);
    }
    let shared_expert_ffn_size = keys.size("shared_expert_intermediate_size")?;
    // The key came after the first models, which all have the biases.
    let qkv_bias = keys.flag("qkv_bias")?.unwrap_or(true);
    Ok(ModelConfig { shared_expert_ffn_size, shared_expert_gate: true, qkv_bias, ..base })
}

fn router_config(keys: &Keys<'_>, traits: &FamilyTraits) -> Result<RouterConfig, CheckpointError> {
    if traits.is_dense() {
        return Ok(RouterConfig::default());
    }
    let (kind, renormalize) = match traits.family {
        Family::Mixtral => (RouterKind::TopkSoftmax, false),
        _ => (RouterKind::SoftmaxTopk, keys.flag("norm_topk_prob")?.unwrap_or(false)),
    };
    let coefficient = keys.number("router_aux_loss_coef")?.unwrap_or(traits.balance_coefficient);
    Ok(RouterConfig {
        kind,
        renormalize,
        balance_coefficient: coefficient as f32,
        balance_scope: BalanceScope::Global,
        balance_pooled: true,
        ..RouterConfig::default()
    })
}

/// The number of experts, under the name that the family and the version give it.
fn experts(keys: &Keys<'_>) -> Result<usize, CheckpointError> {
    match (keys.optional_size("num_local_experts")?, keys.optional_size("num_experts")?) {
        (Some(local), Some(all)) if local != all => {
            Err(keys.refuse("num_experts", format!("contradicts num_local_experts = {local}; accepted: one of them")))
        }
        (Some(experts), _) | (None, Some(experts)) => Ok(experts),
        (None, None) => keys.size("num_experts"),
    }
}

/// Typed access to the keys of one JSON object; null counts as absent.
pub(super) struct Keys<'a> {
    /// The config.json.
    pub path: &'a Path,
    /// The object.
    pub map: &'a Map<String, Value>,
    /// The object's own key; empty at the top.
    pub prefix: &'a str,
}

impl Keys<'_> {
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn refuse(&self, key: &str, reason: impl Into<String>) -> CheckpointError {
        let dotted = if self.prefix.is_empty() { key.to_owned() } else { format!("{}.{key}", self.prefix) };
        let value = self.map.get(key).map_or("absent".to_owned(), Value::to_string);
        CheckpointError::Config { path: PathBuf::from(self.path), key: dotted, value, reason: reason.into() }
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if (1..=most(key)).contains(&size) => Ok(Some(size)),
            _ => Err(self.refuse(key, format!("accepted: a whole number from 1 to {}", most(key)))),
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, CheckpointError> {
        let needed =
            || self.refuse(key, format!("this family needs it; accepted: a whole number from 1 to {}", most(key)));
        self.optional_size(key)?.ok_or_else(needed)
    }

    fn sizes(&self, key: &str) -> Result<Vec<usize>, CheckpointError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let size = |value: &Value| usize::try_from(value.as_u64()?).ok();
        let list = value.as_array().and_then(|list| list.iter().map(size).collect::<Option<Vec<_>>>());
        list.ok_or_else(|| self.refuse(key, "accepted: a list of block numbers"))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        let number = |value: &Value| value.as_f64().ok_or_else(|| self.refuse(key, "accepted: a number"));
        self.get(key).map(number).transpose()
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        let flag = |value: &Value| value.as_bool().ok_or_else(|| self.refuse(key, "accepted: true or false"));
        self.get(key).map(flag).transpose()
    }
}

/// The largest value of a size: products of three of them still fit a usize. Positions are multiplied by nothing.
fn most(key: &str) -> usize {
    if key == "max_position_embeddings" { 1 << 40 } else { 1 << 20 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::RopeScaling;

    /// A config.json of Qwen3-MoE as the hub has it, in the older form.
    fn qwen3() -> Value {
        json!({
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
            "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
            "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
            "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
            "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
            "vocab_size": 151936,
        })
    }

    fn mixtral() -> Value {
        json!({
            "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
            "max_position_embeddings": 128, "vocab_size": 256, "hidden_act": "silu",
        })
    }

    fn with(mut config: Value, key: &str, value: Value) -> Value {
        config[key] = value;
        config
    }

    fn parse(config: &Value) -> Result<HfConfig, CheckpointError> {
        HfConfig::parse(Path::new("m/config.json"), &config.to_string())
    }

    #[test]
    fn a_config_of_the_hub_gives_its_model() {
        let HfConfig { model, router } = parse(&qwen3()).unwrap();
        assert_eq!((model.family, model.qk_norm), (Family::Qwen3Moe, QkNorm::PerHead));
        assert_eq!((model.head_dim, model.heads, model.kv_heads, model.layers), (128, 32, 4, 48));
        assert_eq!((model.experts, model.top_k, model.expert_ffn_size, model.ffn_size), (128, 8, 768, 6144));
        assert_eq!((model.rope_theta, model.norm_eps, model.max_positions), (1e6, 1e-6, 40_960));
        assert_eq!((router.kind, router.renormalize), (RouterKind::SoftmaxTopk, true));
        assert_eq!((router.balance_coefficient, router.balance_pooled), (0.001, true));
        assert_eq!(router.balance_scope, BalanceScope::Global);
    }

    #[test]
    fn absent_keys_mean_what_they_mean_to_transformers() {
        let HfConfig { model, router } = parse(&mixtral()).unwrap();
        assert_eq!((model.rope_theta, model.norm_eps, model.head_width()), (1e6, 1e-5, 16));
        assert_eq!((router.kind, router.balance_coefficient), (RouterKind::TopkSoftmax, 0.001));

        let shared =
            with(with(qwen3(), "model_type", json!("qwen2_moe")), "shared_expert_intermediate_size", json!(512));
        let HfConfig { model, .. } = parse(&shared).unwrap();
        assert!(model.qkv_bias && model.shared_expert_gate && model.shared_expert_ffn_size == 512);
        assert_eq!(model.qk_norm, QkNorm::None);
    }

    #[test]
    fn both_forms_of_the_rotary_settings_are_read() {
        for (key, value) in
            [("rope_theta", json!(5e5)), ("rope_parameters", json!({"rope_theta": 5e5, "rope_type": "default"}))]
        {
            assert_eq!(parse(&with(mixtral(), key, value)).unwrap().model.rope_theta, 5e5);
        }
    }

    #[test]
    fn scaled_rotary_embeddings_are_read_with_what_transformers_takes_for_absent_keys() {
        let scaling = |value| parse(&with(mixtral(), "rope_scaling", value)).unwrap().model.rope_scaling;
        let linear = scaling(json!({"type": "linear", "factor": 2.0}));
        assert_eq!(linear, Some(RopeScaling::Linear { factor: 2.0 }));
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
        let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
        let expected = RopeScaling::Llama3 { factor: 8.0, low_freq_factor, high_freq_factor, original_positions: 64 };
        assert_eq!(scaling(llama3), Some(expected));
        let expected = RopeScaling::Yarn {
            factor: 4.0,
            original_positions: 128,
            attention_factor: None,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
        };
        assert_eq!(scaling(json!({"type": "yarn", "factor": 4.0})), Some(expected));
    }

    #[test]
    fn sparse_steps_and_dense_layers_are_read() {
        let config = with(with(qwen3(), "decoder_sparse_step", json!(2)), "mlp_only_layers", json!([3, 5]));
        let model = parse(&config).unwrap().model;
        assert_eq!(model.moe_layers().take(3).collect::<Vec<_>>(), [1, 7, 9]);
    }

    #[test]
    fn every_feature_we_do_not_have_is_refused_by_its_key() {
        #[rustfmt::skip]
        let table = [
            ("sliding_window", json!(4096), "sliding_window"),
            ("rope_scaling", json!({"type": "linear"}), "rope_scaling.factor"),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "rope_scaling.type"),
            ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling.low_freq_factor"),
            ("rope_scaling", json!({"rope_type": "linear", "factor": 0.5}), "rope_scaling.factor"),
            ("rope_scaling", json!({"factor": 8.0}), "rope_scaling.factor"),
            ("rope_scaling", json!("yarn"), "rope_scaling"),
            ("rope_parameters", json!({"rope_type": "longrope"}), "rope_parameters.rope_type"),
            ("rope_parameters", json!({"partial_rotary_factor": 0.5}), "rope_parameters.partial_rotary_factor"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
            ("clip_qkv", json!(8.0), "clip_qkv"),
            ("attention_dropout", json!(0.1), "attention_dropout"),
            ("router_jitter_noise", json!(0.1), "router_jitter_noise"),
            ("attention_bias", json!(true), "attention_bias"),
            ("mlp_bias", json!(true), "mlp_bias"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types"),
            ("quantization_config", json!({"quant_method": "fp8"}), "quantization_config"),
            ("model_type", json!("gpt2"), "model_type"),
            ("model_type", json!(null), "model_type"),
            ("num_experts", json!(4), "num_experts"),
            ("hidden_size", json!(null), "hidden_size"),
            ("hidden_size", json!(-64), "hidden_size"),
            ("hidden_size", json!("64"), "hidden_size"),
            ("rms_norm_eps", json!("small"), "rms_norm_eps"),
            ("tie_word_embeddings", json!("no"), "tie_word_embeddings"),
        ];
        for (key, value, refused) in table {
            match parse(&with(mixtral(), key, value)) {
                Err(CheckpointError::Config { key, .. }) => assert_eq!(key, refused),
                other => panic!("{key}: {other:?}"),
            }
        }
        let windowed = with(with(qwen3(), "sliding_window", json!(4096)), "use_sliding_window", json!(true));
        assert!(matches!(parse(&windowed), Err(CheckpointError::Config { key, .. }) if key == "sliding_window"));
    }

    #[test]
    fn a_window_that_is_switched_off_is_no_window() {
        assert!(parse(&with(qwen3(), "sliding_window", json!(32_768))).is_ok());
    }

    #[test]
    fn a_refusal_names_file_key_value_and_what_is_accepted() {
        let refusal = parse(&with(mixtral(), "hidden_act", json!("gelu"))).unwrap_err();
        let text = "m/config.json: hidden_act = \"gelu\": this activation is not supported; accepted: \"silu\"";
        assert_eq!(refusal.to_string(), text);
    }

    #[test]
    fn sizes_that_do_not_fit_and_text_that_is_no_json_are_refused() {
        let sizes = parse(&with(mixtral(), "num_key_value_heads", json!(3))).unwrap_err();
        assert!(matches!(sizes, CheckpointError::ConfigSizes { source, .. } if source.key == "model.kv_heads"));
        let text = HfConfig::parse(Path::new("config.json"), "{\"a\": ").unwrap_err();
        assert!(matches!(text, CheckpointError::Json { .. }));
    }
}
