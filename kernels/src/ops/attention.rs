//! Rotary embedding and causal attention with grouped key/value heads.

use crate::{Device, View, ViewMut};

/// Sizes of attention over a fused `qkv[B·S, (heads + 2·kv_heads)·head_dim]`: query heads first, then key, then value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionDims {
    /// Sequences.
    pub batch: usize,
    /// Positions of a sequence.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`. Query head h reads key/value head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionDims {
    /// Elements of one token's fused row.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// B·S.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }
}

/// Rotation by the position's angle, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryDirection {
    /// Forward pass.
    Forward,
    /// Backward pass: the transposed rotation.
    Inverse,
}

/// Attention and its backward pass.
pub trait AttentionOps: Device {
    /// Rotary position embedding (Su et al. 2021) in place on query and key heads; pairs are `(i, i + D/2)`, as in Llama.
    /// `cos`, `sin` are `[S, D/2]` f32; position of token `b·S + s` is s.
    fn rotary(
        &self,
        dims: AttentionDims,
        direction: RotaryDirection,
        cos: View<'_, Self, f32>,
        sin: View<'_, Self, f32>,
        qkv: ViewMut<'_, Self, Self::Act>,
    );
    /// Causal softmax attention with scale 1/√D: `out[B·S, heads·D]`, and `lse[B·S, heads]`, the log of each row's sum of
    /// exponentials, kept for the backward pass (FlashAttention-2, Dao 2023).
    ///
    /// `starts[B·S]`, where given, keeps documents of a packed sequence apart: token `b·S + s` sees the positions
    /// `starts[b·S + s]..=s` of its sequence and no others. Along a sequence they never fall, and none is above its position.
    /// Without them it sees `0..=s`.
    fn attention(
        &self,
        dims: AttentionDims,
        starts: Option<View<'_, Self, i32>>,
        qkv: View<'_, Self, Self::Act>,
        out: ViewMut<'_, Self, Self::Act>,
        lse: ViewMut<'_, Self, f32>,
    );
    /// Backward of [`AttentionOps::attention`] with the same `starts`: `dqkv` has the shape of `qkv` and is overwritten.
    #[allow(clippy::too_many_arguments)] // three saved tensors and the mask, one gradient in, one out
    fn attention_grad(
        &self,
        dims: AttentionDims,
        starts: Option<View<'_, Self, i32>>,
        qkv: View<'_, Self, Self::Act>,
        out: View<'_, Self, Self::Act>,
        lse: View<'_, Self, f32>,
        dout: View<'_, Self, Self::Act>,
        dqkv: ViewMut<'_, Self, Self::Act>,
    );
}
