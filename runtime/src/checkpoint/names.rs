//! What tensors are called on disk: Hugging Face's names, per family, and ours where it has none.
//!
//! Owns the translation between [`PartId`] and names, both ways. It opens no file and knows no shape.
//!
//! Names without a Hugging Face counterpart (`L` a block, `M` the block's MoE module, `block_sparse_moe` for Mixtral and `mlp`
//! for the others):
//! - `model.layers.L.M.noise_gate.weight`: noise scales of noisy top-k (Shazeer et al. 2017).
//! - `model.layers.L.M.gate.e_score_correction_bias`: the selection bias, as DeepSeek-V3 names it.
//! - `model.layers.L.M.shared_expert.*` and `M.shared_expert_gate.weight`: Qwen2-MoE's names, in any family.
//! - `model.layers.L.mlp.{gate,up,down}_proj.weight`: a dense block among MoE blocks: Llama's names, in any family.
//! - `optimizer.m.NAME` and `optimizer.v.NAME`: AdamW's first and second moment of the tensor NAME.

use crate::model::Family;
use crate::model::layout::{PartId, PartKind};

/// Stands before a tensor's name in that of its first moment.
pub const FIRST_MOMENT: &str = "optimizer.m.";
/// Stands before a tensor's name in that of its second moment.
pub const SECOND_MOMENT: &str = "optimizer.v.";

/// The embedding's name, in every family.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head's name, in every family.
pub(super) const HEAD: &str = "lm_head.weight";

/// Which module a name is inside.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Outside all blocks: the whole name.
    Model,
    /// After `model.layers.L.`.
    Block,
    /// After `model.layers.L.M.`.
    Moe,
    /// After `model.layers.L.M.experts.E.`.
    Expert,
}

const NAMES: [(PartKind, Place, &str); 33] = [
    (PartKind::Embedding, Place::Model, EMBEDDING),
    (PartKind::FinalNorm, Place::Model, "model.norm.weight"),
    (PartKind::Head, Place::Model, HEAD),
    (PartKind::AttentionNorm, Place::Block, "input_layernorm.weight"),
    (PartKind::Query, Place::Block, "self_attn.q_proj.weight"),
    (PartKind::Key, Place::Block, "self_attn.k_proj.weight"),
    (PartKind::Value, Place::Block, "self_attn.v_proj.weight"),
    (PartKind::QueryBias, Place::Block, "self_attn.q_proj.bias"),
    (PartKind::KeyBias, Place::Block, "self_attn.k_proj.bias"),
    (PartKind::ValueBias, Place::Block, "self_attn.v_proj.bias"),
    (PartKind::QueryNorm, Place::Block, "self_attn.q_norm.weight"),
    (PartKind::KeyNorm, Place::Block, "self_attn.k_norm.weight"),
    (PartKind::AttentionOutput, Place::Block, "self_attn.o_proj.weight"),
    (PartKind::FeedForwardNorm, Place::Block, "post_attention_layernorm.weight"),
    (PartKind::DenseGate, Place::Block, "mlp.gate_proj.weight"),
    (PartKind::DenseUp, Place::Block, "mlp.up_proj.weight"),
    (PartKind::DenseDown, Place::Block, "mlp.down_proj.weight"),
    (PartKind::Router, Place::Moe, "gate.weight"),
    (PartKind::TokenSplit, Place::Moe, "split.weight"),
    (PartKind::TokenMerge, Place::Moe, "merge.weight"),
    (PartKind::GroupRouter, Place::Moe, "group_gate.weight"),
    (PartKind::RouterHidden(0), Place::Moe, "gate.hidden.0.weight"),
    (PartKind::RouterHidden(1), Place::Moe, "gate.hidden.1.weight"),
    (PartKind::RouterHidden(2), Place::Moe, "gate.hidden.2.weight"),
    (PartKind::RouterNoise, Place::Moe, "noise_gate.weight"),
    (PartKind::RouterBias, Place::Moe, "gate.e_score_correction_bias"),
    (PartKind::SharedGate, Place::Moe, "shared_expert.gate_proj.weight"),
    (PartKind::SharedUp, Place::Moe, "shared_expert.up_proj.weight"),
    (PartKind::SharedDown, Place::Moe, "shared_expert.down_proj.weight"),
    (PartKind::SharedRouter, Place::Moe, "shared_expert_gate.weight"),
    (PartKind::ExpertGate, Place::Expert, "gate_proj.weight"),
    (PartKind::ExpertUp, Place::Expert, "up_proj.weight"),
    (PartKind::ExpertDown, Place::Expert, "down_proj.weight"),
];

/// Mixtral numbers an expert's matrices.
const MIXTRAL_EXPERT: [(PartKind, Place, &str); 3] = [
    (PartKind::ExpertGate, Place::Expert, "w1.weight"),
    (PartKind::ExpertUp, Place::Expert, "w3.weight"),
    (PartKind::ExpertDown, Place::Expert, "w2.weight"),
];

/// The name of a tensor in the files of a family.
///
/// Panics if a part that lies in a block or an expert does not say in which: no layout has such a part.
pub fn tensor_name(family: Family, id: PartId) -> String {
    let PartId { kind, layer, expert } = id;
    match (entry(family, kind), layer, expert) {
        ((Place::Model, name), ..) => name.to_owned(),
        ((Place::Block, name), Some(layer), _) => format!("model.layers.{layer}.{name}"),
        ((Place::Moe, name), Some(layer), _) => format!("model.layers.{layer}.{}.{name}", moe_module(family)),
        ((Place::Expert, name), Some(layer), Some(expert)) => {
            format!("model.layers.{layer}.{}.experts.{expert}.{name}", moe_module(family))
        }
        _ => panic!("{id:?} does not say where it is"),
    }
}

/// The tensor that `name` stands for in the files of a family, if it stands for one.
pub fn part_id(family: Family, name: &str) -> Option<PartId> {
    let find = |place, layer, expert, name: &str| {
        let kind = names(family).find(|entry| (entry.1, entry.2) == (place, name))?.0;
        Some(PartId { kind, layer, expert })
    };
    let Some(in_block) = name.strip_prefix("model.layers.") else {
        return find(Place::Model, None, None, name);
    };
    let (layer, name) = numbered(in_block)?;
    let in_moe = name.strip_prefix(moe_module(family)).and_then(|rest| rest.strip_prefix('.'));
    match in_moe {
        Some(rest) if rest.starts_with("experts.") => {
            let (expert, name) = numbered(rest.strip_prefix("experts.")?)?;
            find(Place::Expert, Some(layer), Some(expert), name)
        }
        // Both `mlp.gate.weight` of an MoE block and `mlp.gate_proj.weight` of a dense one begin with the module's name.
        Some(rest) => find(Place::Moe, Some(layer), None, rest).or_else(|| find(Place::Block, Some(layer), None, name)),
        None => find(Place::Block, Some(layer), None, name),
    }
}

/// Whether a tensor on disk holds values that follow from the configuration, so that not reading it loses nothing: rotary
/// frequencies, which early Llama files carry.
pub fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

fn moe_module(family: Family) -> &'static str {
    if family == Family::Mixtral { "block_sparse_moe" } else { "mlp" }
}

/// The names of a family.
fn names(family: Family) -> impl Iterator<Item = (PartKind, Place, &'static str)> {
    let own: &[_] = if family == Family::Mixtral { &MIXTRAL_EXPERT } else { &[] };
    let common = NAMES.iter().filter(|(kind, ..)| own.iter().all(|(other, ..)| other != kind));
    own.iter().chain(common).copied()
}

fn entry(family: Family, kind: PartKind) -> (Place, &'static str) {
    match names(family).find(|entry| entry.0 == kind) {
        Some((_, place, name)) => (place, name),
        None => unreachable!("every kind has a name: a test holds this"),
    }
}

/// Splits `12.rest` into 12 and `rest`; none where the number is not written as this module writes it.
fn numbered(text: &str) -> Option<(usize, &str)> {
    let (digits, rest) = text.split_once('.')?;
    let number: usize = digits.parse().ok()?;
    (number.to_string() == digits).then_some((number, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::layout::Layout;
    use crate::model::{ModelConfig, QkNorm};
    use crate::routing::{RouterConfig, RouterKind};

    const FAMILIES: [Family; 5] = [Family::Llama, Family::Mixtral, Family::Olmoe, Family::Qwen2Moe, Family::Qwen3Moe];

    fn part(kind: PartKind, layer: usize, expert: Option<usize>) -> PartId {
        PartId { kind, layer: Some(layer), expert }
    }

    #[test]
    fn names_are_those_of_the_hub() {
        use PartKind::*;
        #[rustfmt::skip]
        let table = [
            (Family::Mixtral, part(Router, 3, None), "model.layers.3.block_sparse_moe.gate.weight"),
            (Family::Mixtral, part(ExpertGate, 0, Some(7)), "model.layers.0.block_sparse_moe.experts.7.w1.weight"),
            (Family::Mixtral, part(ExpertUp, 0, Some(7)), "model.layers.0.block_sparse_moe.experts.7.w3.weight"),
            (Family::Mixtral, part(ExpertDown, 0, Some(7)), "model.layers.0.block_sparse_moe.experts.7.w2.weight"),
            (Family::Olmoe, part(Router, 1, None), "model.layers.1.mlp.gate.weight"),
            (Family::Qwen3Moe, part(ExpertUp, 1, Some(10)), "model.layers.1.mlp.experts.10.up_proj.weight"),
            (Family::Qwen3Moe, part(KeyNorm, 1, None), "model.layers.1.self_attn.k_norm.weight"),
            (Family::Qwen2Moe, part(SharedDown, 1, None), "model.layers.1.mlp.shared_expert.down_proj.weight"),
            (Family::Qwen2Moe, part(SharedRouter, 1, None), "model.layers.1.mlp.shared_expert_gate.weight"),
            (Family::Qwen2Moe, part(ValueBias, 1, None), "model.layers.1.self_attn.v_proj.bias"),
            (Family::Llama, part(DenseGate, 12, None), "model.layers.12.mlp.gate_proj.weight"),
        ];
        for (family, id, name) in table {
            assert_eq!(tensor_name(family, id), name);
        }
    }

    #[test]
    fn every_tensor_of_every_family_is_found_again_by_its_name() {
        let model = ModelConfig {
            vocab_size: 8,
            layers: 3,
            dense_layers: vec![1],
            ffn_size: 8,
            shared_expert_ffn_size: 8,
            shared_expert_gate: true,
            qk_norm: QkNorm::PerHead,
            qkv_bias: true,
            ..ModelConfig::default()
        };
        let router = RouterConfig { kind: RouterKind::NoisyTopk, ..RouterConfig::default() };
        let mut ids: Vec<_> = Layout::new(&model, &router, 0..8).parts().map(|(part, _)| part.id).collect();
        ids.push(part(PartKind::RouterBias, 0, None));
        let in_parts = ModelConfig { sub_tokens: 2, shared_expert_ffn_size: 0, ..model };
        let (kind, expert_groups, hidden_sizes) = (RouterKind::Hierarchical, 2, vec![4; RouterConfig::MOST_HIDDEN]);
        let two_levels = RouterConfig { kind, expert_groups, hidden_sizes, ..RouterConfig::default() };
        ids.extend(Layout::new(&in_parts, &two_levels, 0..8).parts().map(|(part, _)| part.id));
        assert!(NAMES.iter().all(|(kind, ..)| ids.iter().any(|id| id.kind == *kind)), "a kind is not covered");
        for family in FAMILIES {
            for id in &ids {
                assert_eq!(part_id(family, &tensor_name(family, *id)), Some(*id), "{family:?}");
            }
        }
    }

    #[test]
    fn names_of_other_families_and_misspelt_ones_stand_for_nothing() {
        for (family, name) in [
            (Family::Mixtral, "model.layers.0.mlp.experts.0.gate_proj.weight"),
            (Family::Mixtral, "model.layers.0.block_sparse_moe.experts.0.gate_proj.weight"),
            (Family::Olmoe, "model.layers.0.block_sparse_moe.gate.weight"),
            (Family::Olmoe, "model.layers.0.mlp.experts.w1.weight"),
            (Family::Llama, "model.layers.00.input_layernorm.weight"),
            (Family::Llama, "model.layers.+1.input_layernorm.weight"),
            (Family::Llama, "model.layers.0"),
            (Family::Llama, "model.norm"),
            (Family::Llama, ""),
        ] {
            assert_eq!(part_id(family, name), None, "{name}");
        }
    }
}
