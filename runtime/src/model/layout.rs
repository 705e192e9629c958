//! Where every parameter lies: one flat buffer, a range for each tensor, a name for each logical part of it.
//!
//! Owns offsets and ownership. It holds no numbers, knows no device and no name on disk; `checkpoint` translates [`PartId`].
//!
//! The flat buffer has three regions, so that gradients are reduced and updated in few long runs:
//! replicated tensors with weight decay, replicated tensors that may go without (norms, biases), and this rank's experts.

use std::fmt;
use std::ops::Range;

use super::config::{ModelConfig, QkNorm};
use crate::experts::ExpertActivation;
use crate::routing::{RouterConfig, RouterKind};

/// Elements that every tensor's offset is a multiple of: 256 bytes of f32, for aligned vector and bulk-copy access.
const ALIGNMENT: usize = 64;

/// What a part is inside its block or outside all blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // the names are the field's own
pub enum PartKind {
    Embedding,
    FinalNorm,
    Head,
    AttentionNorm,
    Query,
    Key,
    Value,
    QueryBias,
    KeyBias,
    ValueBias,
    QueryNorm,
    KeyNorm,
    AttentionOutput,
    FeedForwardNorm,
    Router,
    RouterNoise,
    RouterBias,
    ExpertGate,
    ExpertUp,
    ExpertDown,
    SharedGate,
    SharedUp,
    SharedDown,
    SharedRouter,
    DenseGate,
    DenseUp,
    DenseDown,
}

/// The identity of a logical tensor, the same under any layout. Its text keys the initial weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartId {
    /// What it is.
    pub kind: PartKind,
    /// Its block, where it is inside one.
    pub layer: Option<usize>,
    /// Its expert, counted over all ranks, where it belongs to one.
    pub expert: Option<usize>,
}

impl fmt::Display for PartId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layers.{layer}.")?;
        }
        if let Some(expert) = self.expert {
            write!(f, "experts.{expert}.")?;
        }
        write!(f, "{:?}", self.kind)
    }
}

/// A logical tensor inside a stored one: contiguous, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its identity.
    pub id: PartId,
    /// Its elements in the flat buffer.
    pub range: Range<usize>,
    /// Its logical shape.
    pub shape: Vec<usize>,
}

/// Who holds a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// Every rank; gradients are summed over the world.
    Replicated,
    /// The ranks of one replica group; gradients are summed over it.
    Expert,
}

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f32),
    /// All ones.
    Ones,
    /// All zeros.
    Zeros,
}

/// A stored tensor: what operations see.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its elements in the flat buffer.
    pub range: Range<usize>,
    /// Who holds it.
    pub ownership: Ownership,
    /// Initial values.
    pub init: Init,
    /// Its logical parts, in order; together they cover it.
    pub parts: Vec<Part>,
}

/// A tensor of the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorId(usize);

/// Gate and up projections fused row-wise, and the down projection.
#[derive(Clone, Copy, Debug)]
pub struct FeedForwardTensors {
    /// `[2F, H]`, or `[E_local, 2F, H]` of experts: gate rows first.
    pub gate_up: TensorId,
    /// `[H, F]`, or `[E_local, H, F]`.
    pub down: TensorId,
}

/// Tensors of an MoE block.
#[derive(Clone, Copy, Debug)]
pub struct MoeTensors {
    /// `[E, H]`.
    pub router: TensorId,
    /// `[E, H]`: noise scales of noisy top-k.
    pub router_noise: Option<TensorId>,
    /// This rank's experts.
    pub experts: FeedForwardTensors,
    /// The shared expert.
    pub shared: Option<FeedForwardTensors>,
    /// `[1, H]`: the shared expert's gate.
    pub shared_router: Option<TensorId>,
}

/// The feed-forward half of a block.
#[derive(Clone, Copy, Debug)]
pub enum FeedForward {
    /// One feed-forward for all tokens.
    Dense(FeedForwardTensors),
    /// Routed experts.
    Moe(MoeTensors),
}

/// Tensors of one block.
#[derive(Clone, Copy, Debug)]
pub struct BlockTensors {
    /// `[H]`.
    pub attention_norm: TensorId,
    /// `[(heads + 2·kv_heads)·D, H]`: query, key and value rows.
    pub qkv: TensorId,
    /// The same rows' biases.
    pub qkv_bias: Option<TensorId>,
    /// `[D]` or `[heads·D]`, and the key's.
    pub qk_norm: Option<(TensorId, TensorId)>,
    /// `[H, heads·D]`.
    pub attention_output: TensorId,
    /// `[H]`.
    pub feed_forward_norm: TensorId,
    /// The other half.
    pub feed_forward: FeedForward,
}

/// The three regions of the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    /// Replicated matrices.
    pub replicated: Range<usize>,
    /// Replicated vectors: norms and biases.
    pub replicated_vectors: Range<usize>,
    /// This rank's experts.
    pub experts: Range<usize>,
}

/// Every tensor of a model on a rank that holds the experts `local_experts`.
#[derive(Clone, Debug)]
pub struct Layout {
    tensors: Vec<Tensor>,
    /// `[V, H]`.
    pub embedding: TensorId,
    /// `[H]`.
    pub final_norm: TensorId,
    /// `[V, H]`; the embedding itself where the two are tied.
    pub head: TensorId,
    /// Blocks, in order.
    pub blocks: Vec<BlockTensors>,
    /// Regions of the flat buffer.
    pub regions: Regions,
}

impl Layout {
    /// The layout of `config` for a rank with these experts (of all `config.experts`).
    pub fn new(config: &ModelConfig, router: &RouterConfig, local_experts: Range<usize>) -> Self {
        let mut build = Builder { config, tensors: Vec::new() };
        let (v, h) = (config.vocab_size, config.hidden_size);
        let std = Init::Normal(config.init_std);
        let embedding = build.whole(PartKind::Embedding, None, &[v, h], std);
        let blocks = (0..config.layers).map(|layer| build.block(layer, router, local_experts.clone())).collect();
        let final_norm = build.whole(PartKind::FinalNorm, None, &[h], Init::Ones);
        let tied = config.tie_embeddings;
        let head = if tied { embedding } else { build.whole(PartKind::Head, None, &[v, h], std) };
        let mut tensors = build.tensors;
        let regions = assign_offsets(&mut tensors);
        Self { tensors, embedding, final_norm, head, blocks, regions }
    }

    /// Elements of the flat buffer.
    pub fn len(&self) -> usize {
        self.regions.experts.end
    }

    /// Where the matrices of a block lie: one stretch of the flat buffer for those of each ownership, with the gaps that alignment leaves.
    pub fn block_matrices(&self, block: usize) -> impl Iterator<Item = (Range<usize>, Ownership)> + use<'_> {
        let Regions { replicated, experts, .. } = &self.regions;
        let owned = [(replicated, Ownership::Replicated), (experts, Ownership::Expert)];
        owned.into_iter().filter_map(move |(region, ownership)| {
            let of_block = |t: &&Tensor| t.parts.iter().any(|part| part.id.layer == Some(block));
            let ranges = self.tensors.iter().filter(of_block).map(|t| &t.range).filter(|r| region.contains(&r.start));
            let (start, end) = ranges.fold((usize::MAX, 0), |(start, end), r| (start.min(r.start), end.max(r.end)));
            (start < end).then(|| (start..end.next_multiple_of(ALIGNMENT).min(region.end), ownership))
        })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A tensor's elements in the flat buffer.
    pub fn range(&self, id: TensorId) -> Range<usize> {
        self.tensors[id.0].range.clone()
    }

    /// All tensors.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// All logical parts with their tensor's ownership.
    pub fn parts(&self) -> impl Iterator<Item = (&Part, Ownership)> {
        self.tensors.iter().flat_map(|tensor| tensor.parts.iter().map(|part| (part, tensor.ownership)))
    }
}

/// Parameters of the whole model, and those that one token meets: dense layers, the router, k experts, the shared expert.
pub fn parameter_counts(config: &ModelConfig, router: &RouterConfig) -> (usize, usize) {
    let layout = Layout::new(config, router, 0..config.experts);
    let size =
        |ownership| layout.parts().filter(|(_, o)| *o == ownership).map(|(part, _)| part.range.len()).sum::<usize>();
    let (replicated, experts) = (size(Ownership::Replicated), size(Ownership::Expert));
    (replicated + experts, replicated + experts * config.top_k / config.experts.max(1))
}

fn assign_offsets(tensors: &mut [Tensor]) -> Regions {
    let is_vector = |t: &Tensor| t.parts.iter().all(|part| part.shape.len() == 1);
    let mut end = 0;
    let mut place = |belongs: &dyn Fn(&Tensor) -> bool| {
        let start = end;
        for tensor in tensors.iter_mut().filter(|t| belongs(t)) {
            let len = tensor.range.len();
            tensor.range = end..end + len;
            for part in &mut tensor.parts {
                part.range = part.range.start + end..part.range.end + end;
            }
            end += len.next_multiple_of(ALIGNMENT);
        }
        start..end
    };
    let replicated = place(&|t| t.ownership == Ownership::Replicated && !is_vector(t));
    let replicated_vectors = place(&|t| t.ownership == Ownership::Replicated && is_vector(t));
    let experts = place(&|t| t.ownership == Ownership::Expert);
    Regions { replicated, replicated_vectors, experts }
}

struct Builder<'a> {
    config: &'a ModelConfig,
    tensors: Vec<Tensor>,
}

impl Builder<'_> {
    /// A tensor of consecutive parts; ranges are relative to the tensor until offsets are assigned.
    fn tensor(&mut self, ownership: Ownership, init: Init, parts: Vec<(PartId, Vec<usize>)>) -> TensorId {
        let mut end = 0;
        let parts: Vec<Part> = parts
            .into_iter()
            .map(|(id, shape)| {
                let start = end;
                end += shape.iter().product::<usize>();
                Part { id, range: start..end, shape }
            })
            .collect();
        self.tensors.push(Tensor { range: 0..end, ownership, init, parts });
        TensorId(self.tensors.len() - 1)
    }

    fn whole(&mut self, kind: PartKind, layer: Option<usize>, shape: &[usize], init: Init) -> TensorId {
        self.tensor(Ownership::Replicated, init, vec![(PartId { kind, layer, expert: None }, shape.to_vec())])
    }

    fn block(&mut self, layer: usize, router: &RouterConfig, local_experts: Range<usize>) -> BlockTensors {
        let c = self.config;
        let (h, d) = (c.hidden_size, c.head_width());
        let (q, kv) = (c.heads * d, c.kv_heads * d);
        let at = Some(layer);
        let std = Init::Normal(c.init_std);
        let part = |kind| PartId { kind, layer: at, expert: None };
        let attention_norm = self.whole(PartKind::AttentionNorm, at, &[h], Init::Ones);
        let rows = [(PartKind::Query, q), (PartKind::Key, kv), (PartKind::Value, kv)];
        let qkv = rows.iter().map(|&(kind, n)| (part(kind), vec![n, h])).collect();
        let qkv = self.tensor(Ownership::Replicated, std, qkv);
        let qkv_bias = c.qkv_bias.then(|| {
            let rows = [(PartKind::QueryBias, q), (PartKind::KeyBias, kv), (PartKind::ValueBias, kv)];
            let parts = rows.iter().map(|&(kind, n)| (part(kind), vec![n])).collect();
            self.tensor(Ownership::Replicated, Init::Zeros, parts)
        });
        let widths = match c.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some((d, d)),
            QkNorm::FullWidth => Some((q, kv)),
        };
        let qk_norm = widths.map(|(q, k)| {
            (self.whole(PartKind::QueryNorm, at, &[q], Init::Ones), self.whole(PartKind::KeyNorm, at, &[k], Init::Ones))
        });
        let attention_output = self.whole(PartKind::AttentionOutput, at, &[h, q], self.output_init());
        let feed_forward_norm = self.whole(PartKind::FeedForwardNorm, at, &[h], Init::Ones);
        let feed_forward = if c.is_moe(layer) {
            FeedForward::Moe(self.moe(layer, router, local_experts))
        } else {
            let kinds = [PartKind::DenseGate, PartKind::DenseUp, PartKind::DenseDown];
            FeedForward::Dense(self.feed_forward(layer, kinds, c.ffn_size))
        };
        BlockTensors { attention_norm, qkv, qkv_bias, qk_norm, attention_output, feed_forward_norm, feed_forward }
    }

    /// Output projections start smaller, so that the residual stream's variance does not grow with depth (GPT-2).
    fn output_init(&self) -> Init {
        Init::Normal(self.config.init_std / (2.0 * self.config.layers as f32).sqrt())
    }

    fn feed_forward(&mut self, layer: usize, kinds: [PartKind; 3], f: usize) -> FeedForwardTensors {
        let h = self.config.hidden_size;
        let part = |kind| PartId { kind, layer: Some(layer), expert: None };
        let gate_up = vec![(part(kinds[0]), vec![f, h]), (part(kinds[1]), vec![f, h])];
        FeedForwardTensors {
            gate_up: self.tensor(Ownership::Replicated, Init::Normal(self.config.init_std), gate_up),
            down: self.whole(kinds[2], Some(layer), &[h, f], self.output_init()),
        }
    }

    fn moe(&mut self, layer: usize, router: &RouterConfig, local_experts: Range<usize>) -> MoeTensors {
        let c = self.config;
        let (h, f, at) = (c.hidden_size, c.expert_ffn_size, Some(layer));
        let std = Init::Normal(c.init_std);
        let part = |kind, expert| PartId { kind, layer: at, expert: Some(expert) };
        let router_weight = self.whole(PartKind::Router, at, &[c.experts, h], std);
        let router_noise = (router.kind == RouterKind::NoisyTopk)
            .then(|| self.whole(PartKind::RouterNoise, at, &[c.experts, h], Init::Zeros));
        let projections: &[PartKind] = match c.expert_activation {
            ExpertActivation::Swiglu => &[PartKind::ExpertGate, PartKind::ExpertUp],
            ExpertActivation::Gelu => &[PartKind::ExpertUp],
        };
        let of_expert = |e| projections.iter().map(move |&kind| (part(kind, e), vec![f, h]));
        let gate_up = local_experts.clone().flat_map(of_expert).collect();
        let gate_up = self.tensor(Ownership::Expert, std, gate_up);
        let down = local_experts.map(|e| (part(PartKind::ExpertDown, e), vec![h, f])).collect();
        let down = self.tensor(Ownership::Expert, self.output_init(), down);
        let kinds = [PartKind::SharedGate, PartKind::SharedUp, PartKind::SharedDown];
        let shared = (c.shared_expert_ffn_size > 0).then(|| self.feed_forward(layer, kinds, c.shared_expert_ffn_size));
        let shared_router = c.shared_expert_gate.then(|| self.whole(PartKind::SharedRouter, at, &[1, h], std));
        MoeTensors {
            router: router_weight,
            router_noise,
            experts: FeedForwardTensors { gate_up, down },
            shared,
            shared_router,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig { vocab_size: 11, qkv_bias: true, shared_expert_ffn_size: 24, ..ModelConfig::default() }
    }

    #[test]
    fn tensors_tile_the_flat_buffer_without_overlap() {
        let layout = Layout::new(&config(), &RouterConfig::default(), 2..4);
        let mut ranges: Vec<_> = layout.tensors().iter().map(|t| t.range.clone()).collect();
        ranges.sort_by_key(|r| r.start);
        assert!(ranges.windows(2).all(|w| w[0].end <= w[1].start && w[1].start - w[0].end < ALIGNMENT));
        assert!(layout.tensors().iter().all(|t| t.parts.iter().map(|p| p.range.len()).sum::<usize>() == t.range.len()));
    }

    #[test]
    fn shards_of_all_ranks_together_name_what_one_rank_alone_names() {
        let whole = Layout::new(&config(), &RouterConfig::default(), 0..8);
        let mut expected: Vec<PartId> = whole.parts().map(|(part, _)| part.id).collect();
        let mut found: Vec<PartId> = (0..4)
            .flat_map(|rank| {
                let layout = Layout::new(&config(), &RouterConfig::default(), rank * 2..rank * 2 + 2);
                let keep = move |o| rank == 0 || o == Ownership::Expert;
                layout.parts().filter(|(_, o)| keep(*o)).map(|(part, _)| part.id).collect::<Vec<_>>()
            })
            .collect();
        expected.sort();
        found.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_tied_head_is_the_embedding_and_no_part_of_its_own() {
        let tied = Layout::new(&ModelConfig { tie_embeddings: true, ..config() }, &RouterConfig::default(), 0..8);
        assert_eq!(tied.head, tied.embedding);
        assert!(tied.parts().all(|(part, _)| part.id.kind != PartKind::Head));
    }

    #[test]
    fn blocks_matrices_follow_one_another() {
        let layout = Layout::new(&config(), &RouterConfig::default(), 2..4);
        for ownership in [Ownership::Replicated, Ownership::Expert] {
            let of = |block| layout.block_matrices(block).filter(|(_, o)| *o == ownership).map(|(range, _)| range);
            let stretches: Vec<_> = (0..layout.blocks.len()).flat_map(of).collect();
            assert_eq!(stretches.len(), layout.blocks.len());
            assert!(stretches.windows(2).all(|pair| pair[0].end == pair[1].start), "{stretches:?}");
        }
        let all: usize = (0..layout.blocks.len()).flat_map(|b| layout.block_matrices(b)).map(|(r, _)| r.len()).sum();
        let outside = [layout.embedding, layout.head].map(|id| layout.range(id).len()).iter().sum::<usize>();
        assert_eq!(all + outside, layout.regions.replicated.len() + layout.regions.experts.len());
    }

    #[test]
    fn vectors_and_matrices_never_share_a_region() {
        let layout = Layout::new(&config(), &RouterConfig::default(), 0..8);
        for (part, ownership) in layout.parts() {
            let region = match (ownership, part.shape.len()) {
                (Ownership::Expert, _) => &layout.regions.experts,
                (_, 1) => &layout.regions.replicated_vectors,
                _ => &layout.regions.replicated,
            };
            assert!(region.contains(&part.range.start), "{} is outside its region", part.id);
        }
    }

    #[test]
    fn a_token_of_the_preset_sized_model_meets_a_quarter_of_the_experts() {
        let (all, active) = parameter_counts(&config(), &RouterConfig::default());
        let experts = 2 * 8 * 3 * 64 * 128;
        assert_eq!(all - active, experts - experts * 2 / 8);
    }
}
