//! The shape of a model: what the layers are made from, and which combinations exist.
//!
//! Owns sizes and their rules. It knows no device, no rank and no file format; Hugging Face names are `checkpoint`'s.

use serde::{Deserialize, Serialize};

use super::rotary::RopeScaling;
use crate::experts::ExpertActivation;
use crate::invalid::InvalidValue;
use crate::routing::{RouterConfig, RouterKind};

/// Which published family a model belongs to: decides tensor names on disk, nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Dense Llama.
    Llama,
    /// Mixtral: `block_sparse_moe.experts.N.w1`.
    #[default]
    Mixtral,
    /// OLMoE.
    Olmoe,
    /// Qwen2-MoE, with a gated shared expert.
    Qwen2Moe,
    /// Qwen3-MoE.
    Qwen3Moe,
}

/// RMSNorm on queries and keys before the rotary embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// One weight of a head's width, shared by the heads (Qwen3).
    PerHead,
    /// Over all heads at once (OLMoE).
    FullWidth,
}

/// Where the norms of a block stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockNorm {
    /// Before each half: x + f(norm(x)).
    #[default]
    Pre,
    /// Behind each residual sum: norm(x + f(x)) (Vaswani et al. 2017).
    Post,
}

/// What the backward pass computes again instead of what the forward pass would keep: memory for operations, the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// Nothing that layers could keep.
    #[default]
    None,
    /// The experts' gate and up projections, from rows that are expanded once more.
    Experts,
}

/// A decoder-only transformer with Mixture-of-Experts feed-forward blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Names on disk.
    pub family: Family,
    /// V. The tokenizer decides it where it is 0.
    pub vocab_size: usize,
    /// H.
    pub hidden_size: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; 0: `hidden_size / heads`.
    pub head_dim: usize,
    /// Feed-forward size of dense blocks.
    pub ffn_size: usize,
    /// E; 0: every block is dense.
    pub experts: usize,
    /// Experts of each MoE block, from below, where they differ (DeepSpeed's pyramid); none: `experts` in all.
    pub experts_by_layer: Vec<usize>,
    /// k.
    pub top_k: usize,
    /// F: feed-forward size of one expert.
    pub expert_ffn_size: usize,
    /// What an expert does between its projections; `gelu`: experts have no gate.
    pub expert_activation: ExpertActivation,
    /// Feed-forward size of the shared expert; 0: none.
    pub shared_expert_ffn_size: usize,
    /// Whether a sigmoid gate scales the shared expert (Qwen2-MoE).
    pub shared_expert_gate: bool,
    /// Parts that a token is cut into, each of which is routed by itself (MH-MoE, Wu et al. 2024); 1: none.
    pub sub_tokens: usize,
    /// Every n-th block is an MoE block, the others are dense; 1: all.
    pub moe_every: usize,
    /// Blocks that are dense all the same.
    pub dense_layers: Vec<usize>,
    /// Where the norms of a block stand.
    pub block_norm: BlockNorm,
    /// Norm on queries and keys.
    pub qk_norm: QkNorm,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// How they are stretched for longer texts; absent: not at all.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the head's weights are the embedding's.
    pub tie_embeddings: bool,
    /// Added to the mean square in every norm.
    pub norm_eps: f32,
    /// Longest sequence the model is meant for.
    pub max_positions: usize,
    /// A token whose embedding gets no gradient (`pad_token_id` of Hugging Face); absent: none.
    pub padding_token: Option<usize>,
    /// Standard deviation of initial weights; output projections get it divided by √(2·layers), as in GPT-2.
    pub init_std: f32,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            family: Family::Mixtral,
            vocab_size: 0,
            hidden_size: 64,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 0,
            ffn_size: 0,
            experts: 8,
            experts_by_layer: Vec::new(),
            top_k: 2,
            expert_ffn_size: 128,
            expert_activation: ExpertActivation::Swiglu,
            shared_expert_ffn_size: 0,
            shared_expert_gate: false,
            sub_tokens: 1,
            moe_every: 1,
            dense_layers: Vec::new(),
            block_norm: BlockNorm::Pre,
            qk_norm: QkNorm::None,
            qkv_bias: false,
            rope_theta: 10_000.0,
            rope_scaling: None,
            tie_embeddings: false,
            norm_eps: 1e-5,
            max_positions: 4096,
            padding_token: None,
            init_std: 0.02,
        }
    }
}

/// Experts of all layers together.
const MOST_EXPERTS: usize = 1 << 20;

impl ModelConfig {
    /// Width of a head.
    pub fn head_width(&self) -> usize {
        if self.head_dim == 0 { self.hidden_size / self.heads.max(1) } else { self.head_dim }
    }

    /// Width of the fused query, key and value rows.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_width()
    }

    /// Width of attention's output before its projection.
    pub fn attention_width(&self) -> usize {
        self.heads * self.head_width()
    }

    /// Width of what the experts see: of a token, or of a part of it.
    pub fn routed_width(&self) -> usize {
        self.hidden_size / self.sub_tokens.max(1)
    }

    /// Whether block `layer` routes to experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.experts > 0 && (layer + 1).is_multiple_of(self.moe_every.max(1)) && !self.dense_layers.contains(&layer)
    }

    /// Experts of block `layer`; 0: it is dense.
    pub fn experts_in(&self, layer: usize) -> usize {
        if !self.is_moe(layer) {
            return 0;
        }
        let index = self.moe_layers().take_while(|&moe| moe < layer).count();
        self.experts_by_layer.get(index).copied().unwrap_or(self.experts)
    }

    /// Experts of each MoE block, ascending.
    pub fn layer_experts(&self) -> Vec<usize> {
        self.moe_layers().map(|layer| self.experts_in(layer)).collect()
    }

    /// The keys that say how many experts there are, with their values.
    pub fn experts_in_words(&self) -> String {
        match self.experts_by_layer.is_empty() {
            true => format!("model.experts = {}", self.experts),
            false => format!("each of model.experts_by_layer = {:?}", self.experts_by_layer),
        }
    }

    /// What EP must divide: every MoE block's experts; 0: there are none.
    pub fn divisible_experts(&self) -> usize {
        self.layer_experts().into_iter().fold(0, gcd)
    }

    /// The MoE blocks, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.layers).filter(|&layer| self.is_moe(layer))
    }

    /// Checks every size against the others and against the router.
    pub fn validate(&self, router: &RouterConfig) -> Result<(), InvalidValue> {
        // Upper ends are far beyond any model, and keep what is counted from them within 64 bits.
        for (key, value, least, most) in [
            ("model.vocab_size", self.vocab_size, 1, 1 << 30),
            ("model.hidden_size", self.hidden_size, 1, 1 << 20),
            ("model.layers", self.layers, 1, 1 << 12),
            ("model.heads", self.heads, 1, 1 << 14),
            ("model.kv_heads", self.kv_heads, 1, 1 << 14),
            ("model.head_dim", self.head_dim, 0, 1 << 14),
            ("model.moe_every", self.moe_every, 1, 1 << 12),
            ("model.max_positions", self.max_positions, 1, 1 << 30),
            ("model.experts", self.experts, 0, 1 << 14),
            ("model.expert_ffn_size", self.expert_ffn_size, 0, 1 << 20),
            ("model.shared_expert_ffn_size", self.shared_expert_ffn_size, 0, 1 << 20),
            ("model.ffn_size", self.ffn_size, 0, 1 << 20),
        ] {
            if value < least {
                return Err(InvalidValue::new(key, value, format!("must be at least {least}")));
            }
            if value > most {
                return Err(InvalidValue::new(key, value, format!("must be at most {most}")));
            }
        }
        if self.layers * self.experts > MOST_EXPERTS {
            let reason = format!("in {} layers are more than {MOST_EXPERTS} experts in all", self.layers);
            return Err(InvalidValue::new("model.experts", self.experts, reason));
        }
        if self.head_dim == 0 && !self.hidden_size.is_multiple_of(self.heads) {
            let nearest = nearest_divisors(self.hidden_size, self.heads);
            return Err(InvalidValue::new(
                "model.heads",
                self.heads,
                format!(
                    "model.hidden_size = {} cannot be cut into so many heads; nearest that work: {nearest:?} (or set model.head_dim)",
                    self.hidden_size
                ),
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let nearest = nearest_divisors(self.heads, self.kv_heads);
            let reason = format!("must divide model.heads = {}; nearest that work: {nearest:?}", self.heads);
            return Err(InvalidValue::new("model.kv_heads", self.kv_heads, reason));
        }
        if !self.head_width().is_multiple_of(2) {
            let reason = "the rotary embedding turns pairs: the width of a head must be even";
            return Err(InvalidValue::new("model.head_dim", self.head_width(), reason));
        }
        for (key, value) in [
            ("model.rope_theta", self.rope_theta),
            ("model.norm_eps", f64::from(self.norm_eps)),
            ("model.init_std", f64::from(self.init_std)),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(InvalidValue::new(key, value, "must be a positive number"));
            }
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate()?;
        }
        if let Some(&layer) = self.dense_layers.iter().find(|&&layer| layer >= self.layers) {
            let reason = format!("there is no block {layer}: blocks are numbered 0 to {}", self.layers - 1);
            return Err(InvalidValue::new("model.dense_layers", format!("{:?}", self.dense_layers), reason));
        }
        if let Some(token) = self.padding_token.filter(|&token| token >= self.vocab_size) {
            let reason = format!("must be a token below model.vocab_size = {}", self.vocab_size);
            return Err(InvalidValue::new("model.padding_token", token, reason));
        }
        if self.moe_layers().next().is_some() {
            self.validate_experts()?;
            self.validate_layer_experts(router)?;
            self.validate_sub_tokens(router)?;
            router.validate(self.experts, self.top_k)?;
        }
        if (0..self.layers).any(|layer| !self.is_moe(layer)) && self.ffn_size == 0 {
            return Err(InvalidValue::new("model.ffn_size", 0, "dense blocks need a feed-forward size of at least 1"));
        }
        Ok(())
    }

    fn validate_layer_experts(&self, router: &RouterConfig) -> Result<(), InvalidValue> {
        let (given, layers) = (&self.experts_by_layer, self.moe_layers().count());
        if given.is_empty() {
            return Ok(());
        }
        let refuse = |reason: String| Err(InvalidValue::new("model.experts_by_layer", format!("{given:?}"), reason));
        if given.len() != layers {
            return refuse(format!("must have a number for each of the {layers} MoE blocks"));
        }
        if given.iter().max() != Some(&self.experts) {
            return refuse(format!("the largest must be model.experts = {}", self.experts));
        }
        if router.balance_pooled && given.iter().any(|&experts| experts != self.experts) {
            return refuse("router.balance_pooled adds up layers of equally many experts".into());
        }
        given.iter().try_for_each(|&experts| {
            let fits = ModelConfig { experts, experts_by_layer: Vec::new(), ..self.clone() }.validate_experts();
            fits.and_then(|()| router.validate(experts, self.top_k))
        })
    }

    fn validate_sub_tokens(&self, router: &RouterConfig) -> Result<(), InvalidValue> {
        let key = "model.sub_tokens";
        let parts = self.sub_tokens;
        if parts == 0 || !self.hidden_size.is_multiple_of(parts) {
            let nearest = nearest_divisors(self.hidden_size, parts);
            let reason = format!("must divide model.hidden_size = {}; nearest that do: {nearest:?}", self.hidden_size);
            return Err(InvalidValue::new(key, parts, reason));
        }
        if parts > 1 && self.shared_expert_ffn_size > 0 {
            return Err(InvalidValue::new(
                key,
                parts,
                "a shared expert takes whole tokens: set model.shared_expert_ffn_size = 0",
            ));
        }
        if parts > 1 && router.kind == RouterKind::Hash {
            return Err(InvalidValue::new(
                key,
                parts,
                "router.kind = hash looks at whole tokens: set model.sub_tokens = 1",
            ));
        }
        Ok(())
    }

    fn validate_experts(&self) -> Result<(), InvalidValue> {
        if self.top_k == 0 || self.top_k > self.experts {
            let reason = format!("a token can choose 1 to {} of model.experts = {0} experts", self.experts);
            return Err(InvalidValue::new("model.top_k", self.top_k, reason));
        }
        if self.expert_ffn_size == 0 {
            return Err(InvalidValue::new("model.expert_ffn_size", 0, "must be at least 1"));
        }
        let others = self.shared_expert_ffn_size > 0 || (0..self.layers).any(|layer| !self.is_moe(layer));
        if self.expert_activation != ExpertActivation::Swiglu && others {
            let reason = "shared experts and dense blocks have a gate: accepted without them";
            return Err(InvalidValue::new("model.expert_activation", "gelu", reason));
        }
        if self.shared_expert_gate && self.shared_expert_ffn_size == 0 {
            let reason = "there is no shared expert to gate: set model.shared_expert_ffn_size";
            return Err(InvalidValue::new("model.shared_expert_gate", true, reason));
        }
        Ok(())
    }
}

/// The greatest common divisor.
fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The divisors of `whole` next to `wanted`, below and above.
fn nearest_divisors(whole: usize, wanted: usize) -> Vec<usize> {
    let divides = |&d: &usize| whole.is_multiple_of(d);
    let below = (1..wanted).rev().find(divides);
    let above = (wanted + 1..=whole).find(divides);
    below.into_iter().chain(above).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> ModelConfig {
        ModelConfig { vocab_size: 256, ..ModelConfig::default() }
    }

    #[test]
    fn the_default_shape_is_legal_once_the_vocabulary_is_known() {
        valid().validate(&RouterConfig::default()).unwrap();
    }

    #[test]
    fn each_impossible_size_is_refused_by_its_key() {
        type Break = fn(&mut ModelConfig);
        let table: [(&str, Break); 12] = [
            ("model.vocab_size", |c| c.vocab_size = 0),
            ("model.heads", |c| c.heads = 5),
            ("model.kv_heads", |c| c.kv_heads = 3),
            ("model.head_dim", |c| c.head_dim = 7),
            ("model.top_k", |c| c.top_k = 9),
            ("model.expert_ffn_size", |c| c.expert_ffn_size = 0),
            ("model.ffn_size", |c| c.moe_every = 2),
            ("model.expert_activation", |c| (c.expert_activation, c.moe_every) = (ExpertActivation::Gelu, 2)),
            ("model.dense_layers", |c| c.dense_layers = vec![2]),
            ("model.norm_eps", |c| c.norm_eps = f32::NAN),
            ("model.sub_tokens", |c| c.sub_tokens = 3),
            ("model.sub_tokens", |c| (c.sub_tokens, c.shared_expert_ffn_size) = (2, 8)),
        ];
        for (key, breaks) in table {
            let mut config = valid();
            breaks(&mut config);
            assert_eq!(config.validate(&RouterConfig::default()).unwrap_err().key, key);
        }
    }

    #[test]
    fn a_refused_number_of_heads_names_the_nearest_that_work() {
        let config = ModelConfig { heads: 5, ..valid() };
        assert!(config.validate(&RouterConfig::default()).unwrap_err().reason.contains("[4, 8]"));
    }
}
