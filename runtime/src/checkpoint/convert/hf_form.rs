//! A model's config.json, as transformers writes it for the family.
//!
//! Owns which class of transformers computes which of our models, and its keys. It is the counterpart of `hf_config`, which
//! reads them.

use serde_json::{Map, Value, json};

use super::companions::Companions;
use crate::checkpoint::hf_rope;
use crate::experts::ExpertActivation;
use crate::model::{BlockNorm, Family, ModelConfig, QkNorm};
use crate::routing::{RouterConfig, RouterKind};

const FAMILIES: [Family; 5] = [Family::Mixtral, Family::Qwen3Moe, Family::Qwen2Moe, Family::Olmoe, Family::Llama];

/// The family's `model_type`.
pub(super) fn model_type(family: Family) -> &'static str {
    match family {
        Family::Llama => "llama",
        Family::Mixtral => "mixtral",
        Family::Olmoe => "olmoe",
        Family::Qwen2Moe => "qwen2_moe",
        Family::Qwen3Moe => "qwen3_moe",
    }
}

fn class(family: Family) -> &'static str {
    match family {
        Family::Llama => "LlamaForCausalLM",
        Family::Mixtral => "MixtralForCausalLM",
        Family::Olmoe => "OlmoeForCausalLM",
        Family::Qwen2Moe => "Qwen2MoeForCausalLM",
        Family::Qwen3Moe => "Qwen3MoeForCausalLM",
    }
}

/// The families whose class computes what the model does.
pub fn families_for(model: &ModelConfig, router: &RouterConfig) -> Vec<Family> {
    FAMILIES.into_iter().filter(|&family| reasons_against(family, model, router).is_empty()).collect()
}

/// Why the family's class does not compute what the model does: each key with its value and what the class has instead.
pub fn reasons_against(family: Family, model: &ModelConfig, router: &RouterConfig) -> Vec<String> {
    let mut reasons = Vec::new();
    let mut require = |holds: bool, key: &str, found: String, has: &str| {
        if !holds {
            reasons.push(format!("{key} = {found}: the class has {has}"));
        }
    };
    let moe_layers = model.moe_layers().count();
    let shown = |norm: QkNorm| format!("{norm:?}");
    let (norm, norm_name) = match family {
        Family::Olmoe => (QkNorm::FullWidth, "full-width"),
        Family::Qwen3Moe => (QkNorm::PerHead, "per-head"),
        _ => (QkNorm::None, "none"),
    };
    require(model.qk_norm == norm, "model.qk_norm", shown(model.qk_norm), norm_name);
    let qwen = matches!(family, Family::Qwen2Moe | Family::Qwen3Moe);
    if family == Family::Llama {
        require(moe_layers == 0, "model.experts", model.experts.to_string(), "dense blocks only");
    } else if qwen {
        require(moe_layers > 0, "model.experts", model.experts.to_string(), "blocks with experts");
    } else {
        let has = "experts in every block";
        require(moe_layers == model.layers, "MoE blocks", format!("{moe_layers} of {}", model.layers), has);
    }
    let gated = moe_layers == 0 || model.expert_activation == ExpertActivation::Swiglu;
    require(gated, "model.expert_activation", format!("{:?}", model.expert_activation), "experts with a gate (swiglu)");
    let qkv_bias = family == Family::Qwen2Moe;
    require(
        qkv_bias || !model.qkv_bias,
        "model.qkv_bias",
        model.qkv_bias.to_string(),
        "none without one of the output",
    );
    if family == Family::Qwen2Moe {
        let gated = model.shared_expert_ffn_size > 0 && model.shared_expert_gate;
        let found = if model.shared_expert_ffn_size > 0 { "not gated" } else { "absent" };
        require(gated, "the shared expert", found.to_owned(), "a gated one");
    } else {
        let size = model.shared_expert_ffn_size;
        require(size == 0, "model.shared_expert_ffn_size", size.to_string(), "no shared expert");
    }
    require(model.block_norm == BlockNorm::Pre, "model.block_norm", "post".into(), "norms before a block's halves");
    if moe_layers > 0 && family != Family::Llama {
        require(model.sub_tokens == 1, "model.sub_tokens", model.sub_tokens.to_string(), "whole tokens");
        let even = model.layer_experts().iter().all(|&experts| experts == model.experts);
        require(
            even,
            "model.experts_by_layer",
            format!("{:?}", model.experts_by_layer),
            "as many experts in every block",
        );
        let kind = format!("{:?}", router.kind);
        match divides_by_sum(router) {
            None if router.expert_groups > 1 => {
                require(false, "router.expert_groups", router.expert_groups.to_string(), "no groups of experts");
            }
            None if !router.hidden_sizes.is_empty() => {
                require(false, "router.hidden_sizes", format!("{:?}", router.hidden_sizes), "routers of one matrix");
            }
            None => require(false, "router.kind", kind, "softmax and top-k only"),
            Some(divides) => {
                let has = "weights divided by their sum";
                require(family != Family::Mixtral || divides || model.top_k == model.experts, "router.kind", kind, has);
            }
        }
    }
    reasons
}

/// Whether the chosen weights sum to 1; None: the gate is none of transformers'.
fn divides_by_sum(router: &RouterConfig) -> Option<bool> {
    if router.expert_groups > 1 || !router.hidden_sizes.is_empty() {
        return None;
    }
    match router.kind {
        RouterKind::TopkSoftmax => Some(true),
        RouterKind::SoftmaxTopk => Some(router.renormalize),
        RouterKind::Switch => Some(false),
        RouterKind::Gshard
        | RouterKind::NoisyTopk
        | RouterKind::SigmoidBias
        | RouterKind::TopP
        | RouterKind::Sinkhorn
        | RouterKind::ExpertChoice
        | RouterKind::Hash
        | RouterKind::Hierarchical
        | RouterKind::MultiGate
        | RouterKind::Custom => None,
    }
}

/// config.json of a model that [`reasons_against`] has nothing against. `dtype` is PyTorch's name of the tensors' type.
pub(super) fn config_json(
    family: Family,
    model: &ModelConfig,
    router: &RouterConfig,
    dtype: &str,
    companions: &Companions,
) -> Value {
    let rope = hf_rope::written(model);
    let scaled = model.rope_scaling.is_some().then(|| {
        // The older form has the base outside.
        let inner: Map<_, _> =
            rope.iter().filter(|(key, _)| *key != "rope_theta").map(|(k, v)| (k.clone(), v.clone())).collect();
        Value::Object(inner)
    });
    let mut config = Map::new();
    let mut set = |entries: Value| {
        if let Value::Object(entries) = entries {
            config.extend(entries);
        }
    };
    let dense_size = if model.ffn_size > 0 { model.ffn_size } else { model.expert_ffn_size };
    let moe = matches!(family, Family::Mixtral | Family::Olmoe);
    set(json!({
        "architectures": [class(family)],
        "model_type": model_type(family),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": if moe { model.expert_ffn_size } else { dense_size },
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": decimal(model.init_std),
        "rms_norm_eps": decimal(model.norm_eps),
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaled,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": true,
        "bos_token_id": companions.special_token("bos_token_id"),
        "eos_token_id": companions.special_token("eos_token_id"),
        "pad_token_id": model.padding_token,
        "dtype": dtype,
        "torch_dtype": dtype,
    }));
    // Where it follows from the other sizes transformers needs no number, but its YaRN reads the key in every class.
    if model.head_dim > 0 || model.rope_scaling.is_some() {
        set(json!({"head_dim": model.head_width()}));
    }
    if family != Family::Llama {
        set(json!({
            "num_experts_per_tok": model.top_k,
            "router_aux_loss_coef": decimal(router.balance_coefficient),
            "output_router_logits": false,
        }));
    }
    let norm_topk_prob = divides_by_sum(router).unwrap_or(false);
    let qwen = json!({
        "num_experts": model.experts,
        "moe_intermediate_size": model.expert_ffn_size,
        "decoder_sparse_step": model.moe_every,
        "mlp_only_layers": model.dense_layers,
        "norm_topk_prob": norm_topk_prob,
        "sliding_window": null,
        "use_sliding_window": false,
    });
    match family {
        Family::Llama => set(json!({"attention_bias": false, "mlp_bias": false})),
        Family::Mixtral => {
            set(json!({"num_local_experts": model.experts, "router_jitter_noise": 0.0, "sliding_window": null}));
        }
        Family::Olmoe => {
            let experts = model.experts;
            set(
                json!({"num_experts": experts, "norm_topk_prob": norm_topk_prob, "attention_bias": false, "clip_qkv": null}),
            );
        }
        Family::Qwen3Moe => {
            set(qwen);
            set(json!({"attention_bias": false}));
        }
        Family::Qwen2Moe => {
            set(qwen);
            let size = model.shared_expert_ffn_size;
            set(json!({"shared_expert_intermediate_size": size, "qkv_bias": model.qkv_bias}));
        }
    }
    Value::Object(config)
}

/// The number with an f32's own few digits.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::HfConfig;
    use crate::model::RopeScaling;

    /// A model that `family` can express, with what is special about it.
    fn of(family: Family) -> (ModelConfig, RouterConfig) {
        let model =
            ModelConfig { family, vocab_size: 64, norm_eps: 1e-6, padding_token: Some(3), ..ModelConfig::default() };
        let router = RouterConfig { kind: RouterKind::SoftmaxTopk, renormalize: true, ..RouterConfig::default() };
        let mixed = ModelConfig { ffn_size: 96, moe_every: 2, layers: 6, dense_layers: vec![3], ..model.clone() };
        match family {
            Family::Llama => (ModelConfig { experts: 0, top_k: 0, expert_ffn_size: 0, ffn_size: 96, ..model }, router),
            Family::Mixtral => (model, RouterConfig { kind: RouterKind::TopkSoftmax, ..RouterConfig::default() }),
            Family::Olmoe => {
                (ModelConfig { qk_norm: QkNorm::FullWidth, ..model }, RouterConfig { renormalize: false, ..router })
            }
            Family::Qwen3Moe => (ModelConfig { qk_norm: QkNorm::PerHead, head_dim: 32, ..mixed }, router),
            Family::Qwen2Moe => {
                let shared =
                    ModelConfig { shared_expert_ffn_size: 24, shared_expert_gate: true, qkv_bias: true, ..mixed };
                (shared, router)
            }
        }
    }

    #[test]
    fn what_is_written_is_read_as_the_same_model() {
        let scalings = [
            None,
            Some(RopeScaling::Linear { factor: 2.0 }),
            Some(RopeScaling::Yarn {
                factor: 4.0,
                original_positions: 64,
                attention_factor: Some(1.25),
                beta_fast: 16.0,
                beta_slow: 2.0,
                truncate: false,
            }),
        ];
        for (family, rope_scaling) in FAMILIES.into_iter().flat_map(|family| scalings.clone().map(|s| (family, s))) {
            let (model, router) = of(family);
            let model = ModelConfig { rope_scaling, tie_embeddings: true, ..model };
            assert_eq!(reasons_against(family, &model, &router), Vec::<String>::new(), "{family:?}");
            let text = config_json(family, &model, &router, "float32", &Companions::default()).to_string();
            let read = HfConfig::parse(Path::new("config.json"), &text).unwrap();
            assert_eq!(read.model, model, "{family:?}");
            if family != Family::Llama {
                assert_eq!(
                    (read.router.kind, read.router.renormalize),
                    (router.kind, router.renormalize),
                    "{family:?}"
                );
            }
        }
    }

    #[test]
    fn what_a_class_does_not_compute_is_named_by_its_key() {
        let (mixtral, topk) = of(Family::Mixtral);
        let against =
            |family, model: &ModelConfig, router: &RouterConfig| reasons_against(family, model, router).join("; ");
        let noisy = RouterConfig { kind: RouterKind::NoisyTopk, ..topk.clone() };
        assert!(against(Family::Mixtral, &mixtral, &noisy).starts_with("router.kind = NoisyTopk: "));
        let undivided = RouterConfig { kind: RouterKind::SoftmaxTopk, ..topk.clone() };
        assert!(against(Family::Mixtral, &mixtral, &undivided).contains("divided by their sum"));
        let every_other = ModelConfig { moe_every: 2, ffn_size: 8, ..mixtral.clone() };
        assert!(against(Family::Mixtral, &every_other, &topk).starts_with("MoE blocks = 1 of 2: "));
        let shared = ModelConfig { shared_expert_ffn_size: 8, ..mixtral.clone() };
        assert!(against(Family::Qwen2Moe, &shared, &topk).starts_with("the shared expert = not gated: "));
        let ungated = ModelConfig { expert_activation: ExpertActivation::Gelu, ..mixtral.clone() };
        assert!(against(Family::Mixtral, &ungated, &topk).starts_with("model.expert_activation = Gelu: "));
        assert!(families_for(&ungated, &topk).is_empty());
        assert!(against(Family::Llama, &mixtral, &topk).starts_with("model.experts = 8: "));
        assert_eq!(families_for(&mixtral, &topk), [Family::Mixtral]);
    }
}
