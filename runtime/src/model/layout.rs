//! Where every parameter lies: one flat buffer, a range for each tensor, a name for each logical part of it.
//!
//! Owns offsets and ownership. It holds no numbers, knows no device and no name on disk; `checkpoint` translates [`PartId`].
//!
//! The flat buffer has three regions, so that gradients are reduced and updated in few long runs:
//! replicated tensors with weight decay, replicated tensors that may go without (norms, biases), and this rank's experts.

use std::fmt;
use std::ops::Range;

use moe_kernels::Fold;

use super::config::{ModelConfig, QkNorm};
use crate::experts::ExpertActivation;
use crate::routing::{GateForm, Logits, RouterConfig};

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
    GroupRouter,
    RouterHidden(u8),
    RouterNoise,
    RouterBias,
    TokenSplit,
    TokenMerge,
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

/// Tensors of a router. H' is the width of its last hidden layer, or H.
#[derive(Clone, Copy, Debug)]
pub struct RouterTensors {
    /// `[rows, H']`, where the gate has a matrix: a row an expert, after those of groups, or E rows for each of several routers.
    pub matrix: Option<TensorId>,
    /// `[E, H]`: noise scales of noisy top-k.
    pub noise: Option<TensorId>,
    /// `[M, H]`, `[M', M]`, …: hidden layers.
    pub hidden: [Option<TensorId>; RouterConfig::MOST_HIDDEN],
}

/// Tensors of an MoE block.
#[derive(Clone, Copy, Debug)]
pub struct MoeTensors {
    /// The router.
    pub router: RouterTensors,
    /// `[H, H]` each: before a token is cut into parts, and behind the parts' outputs.
    pub parts: Option<(TensorId, TensorId)>,
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
    /// The layout of `config` for a rank with these experts (of all `config.experts`; of fewer in blocks that have fewer).
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
    let all_experts = config.layer_experts().iter().sum::<usize>().max(1);
    (replicated + experts, replicated + experts * config.top_k * config.moe_layers().count() / all_experts)
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

    fn router(&mut self, layer: usize, (router, experts): (&RouterConfig, usize)) -> RouterTensors {
        let (h, at) = (self.config.routed_width(), Some(layer));
        let std = Init::Normal(self.config.init_std);
        let mut hidden = [None; RouterConfig::MOST_HIDDEN];
        let mut width = h;
        for (number, (slot, &size)) in hidden.iter_mut().zip(&router.hidden_sizes).enumerate() {
            // The next layer's numbers are as large as these, so that logits are as large as without.
            let init = Init::Normal(1.0 / (width as f32).sqrt());
            *slot = Some(self.whole(PartKind::RouterHidden(number as u8), at, &[size, width], init));
            width = size;
        }
        let rows = router.rows(experts);
        let matrix = match GateForm::of(router).logits {
            Logits::Hashed => None,
            Logits::Folded(Fold::Groups(groups)) => {
                let part = |kind| PartId { kind, layer: at, expert: None };
                let parts = [(PartKind::GroupRouter, groups), (PartKind::Router, experts)];
                let parts = parts.map(|(kind, rows)| (part(kind), vec![rows, width])).to_vec();
                Some(self.tensor(Ownership::Replicated, std, parts))
            }
            Logits::Experts | Logits::Folded(Fold::Routers(_)) => {
                Some(self.whole(PartKind::Router, at, &[rows, width], std))
            }
        };
        let noise = router.is_noisy().then(|| self.whole(PartKind::RouterNoise, at, &[experts, h], Init::Zeros));
        RouterTensors { matrix, noise, hidden }
    }

    fn moe(&mut self, layer: usize, router: &RouterConfig, local_experts: Range<usize>) -> MoeTensors {
        let c = self.config;
        let (h, f, at) = (c.routed_width(), c.expert_ffn_size, Some(layer));
        let experts = c.experts_in(layer);
        let here = |expert: usize| expert * experts / c.experts.max(1);
        let local_experts = here(local_experts.start)..here(local_experts.end);
        let std = Init::Normal(c.init_std);
        let parts = (c.sub_tokens > 1).then(|| {
            let shape = [c.hidden_size; 2];
            let split = self.whole(PartKind::TokenSplit, at, &shape, std);
            (split, self.whole(PartKind::TokenMerge, at, &shape, self.output_init()))
        });
        let part = |kind, expert| PartId { kind, layer: at, expert: Some(expert) };
        let router = self.router(layer, (router, experts));
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
        MoeTensors { router, parts, experts: FeedForwardTensors { gate_up, down }, shared, shared_router }
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
