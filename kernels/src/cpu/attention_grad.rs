//! Causal attention, backward.
//!
//! Owns the recomputation of the probabilities from the saved log-sum-exp, and the five products (FlashAttention-2, Dao 2023):
//! P = exp(QKᵀ − lse), dP = dO·Vᵀ, dS = P∘(dP − δ) with δ = Σ dO·O, then dV += Pᵀ·dO, dQ = dS·K, dK += dSᵀ·Q. P and dS are made
//! of the products' sums while those are in registers. Packing and the forward pass are in `attention`. It never allocates once
//! a thread has its scratch.

use super::attention::{Head, HeadRows, Layout};
use super::panel::{Left, Sink, TILE_ROWS};
use super::parallel::{SharedRows, with_scratch};
use super::vector::{LANES, Task, Vector, dispatch};
use crate::AttentionDims;

/// Queries whose probabilities are held at once: long reductions for dK and dV, and still small enough for the cache.
const BLOCK: usize = 32;

/// What the forward pass left: its input and its results.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    /// `[B·S]`: the first position that each token sees; None: the sequence's.
    pub(super) starts: Option<&'a [i32]>,
    /// `[B·S, (heads + 2·kv_heads)·D]`.
    pub(super) qkv: &'a [f32],
    /// `[B·S, heads·D]`.
    pub(super) out: &'a [f32],
    /// `[B·S, heads]`.
    pub(super) lse: &'a [f32],
}

/// Scratch of one task, cut up. Rows are `padded_dim` wide but for the scores.
struct Workspace<'a> {
    /// Keys, scaled, and values, transposed in panels.
    keys_t: &'a mut [f32],
    values_t: &'a mut [f32],
    /// Keys as rows.
    keys: &'a mut [f32],
    /// Sums over the group's query heads.
    dkeys: &'a mut [f32],
    dvalues: &'a mut [f32],
    /// One block's queries and its part of the output's gradient.
    queries: &'a mut [f32],
    dout: &'a mut [f32],
    /// P and dS of one block.
    scores: &'a mut [f32],
    dscores: &'a mut [f32],
}

impl<'a> Workspace<'a> {
    fn lengths(layout: &Layout) -> [usize; 9] {
        let transposed = layout.dims.head_dim * layout.padded_seq;
        let rows = layout.padded_seq * layout.padded_dim;
        let block = BLOCK * layout.padded_dim;
        let scores = BLOCK * layout.score_stride;
        [transposed, transposed, rows, rows, rows, block, block, scores, scores]
    }

    fn cut(layout: &Layout, mut scratch: &'a mut [f32]) -> Self {
        let [keys_t, values_t, keys, dkeys, dvalues, queries, dout, scores, dscores] =
            Self::lengths(layout).map(|len| {
                let (head, tail) = std::mem::take(&mut scratch).split_at_mut(len);
                scratch = tail;
                head
            });
        Self { keys_t, values_t, keys, dkeys, dvalues, queries, dout, scores, dscores }
    }
}

/// `dqkv`, overwritten, from what the forward pass saved and the output's gradient.
pub(super) fn attention_grad(dims: AttentionDims, saved: Saved<'_>, dout: &[f32], dqkv: &mut [f32]) {
    let (tokens, out_width, qkv_width) = (dims.tokens(), dims.heads * dims.head_dim, dims.qkv_width());
    for (name, len, width) in [
        ("qkv", saved.qkv.len(), qkv_width),
        ("out", saved.out.len(), out_width),
        ("lse", saved.lse.len(), dims.heads),
        ("dout", dout.len(), out_width),
        ("dqkv", dqkv.len(), qkv_width),
    ] {
        assert!(len >= tokens * width, "{name} of {len} elements for {dims:?}");
    }
    let starts = saved.starts.map_or(tokens, <[_]>::len);
    assert!(starts >= tokens, "starts of {starts} tokens for {dims:?}");
    let layout = Layout::new(dims);
    let dqkv = SharedRows::new(dqkv, qkv_width);
    layout.for_tasks(|b, kv| {
        with_scratch(Workspace::lengths(&layout).iter().sum(), |scratch| {
            let work = Workspace::cut(&layout, scratch);
            dispatch(Backward { layout, saved, dout, dqkv: &dqkv, b, kv, work });
        });
    });
}

/// The gradients of one key/value head of a sequence and of the query heads that share it.
struct Backward<'a> {
    layout: Layout,
    saved: Saved<'a>,
    dout: &'a [f32],
    dqkv: &'a SharedRows<'a>,
    b: usize,
    kv: usize,
    work: Workspace<'a>,
}

impl Task for Backward<'_> {
    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let Self { layout, b, kv, .. } = self;
        let (dims, qkv_width) = (layout.dims, layout.dims.qkv_width());
        let key = layout.head(self.saved.qkv, qkv_width, b, dims.heads + kv);
        key.pack_transposed::<V>(layout.scale, self.work.keys_t);
        key.pack::<V>(0, layout.padded_dim, self.work.keys);
        let value = layout.head(self.saved.qkv, qkv_width, b, dims.heads + dims.kv_heads + kv);
        value.pack_transposed::<V>(1.0, self.work.values_t);
        self.work.dkeys.fill(0.0);
        self.work.dvalues.fill(0.0);
        for head in kv * layout.group..(kv + 1) * layout.group {
            for first in (0..dims.seq).step_by(BLOCK) {
                self.block::<V>(head, first);
            }
        }
        for first in (0..dims.seq).step_by(TILE_ROWS) {
            let at = first * layout.padded_dim..(first + TILE_ROWS) * layout.padded_dim;
            let (dkeys, dvalues) = (&self.work.dkeys[at.clone()], &self.work.dvalues[at]);
            copy_strip::<V>(dkeys, layout.padded_dim, &mut self.rows(dims.heads + kv, first, layout.scale));
            let head = dims.heads + dims.kv_heads + kv;
            copy_strip::<V>(dvalues, layout.padded_dim, &mut self.rows(head, first, 1.0));
        }
    }
}

impl<'a> Backward<'a> {
    /// Where the gradients of eight positions of a head go.
    #[inline(always)]
    fn rows(&self, head: usize, first: usize, scale: f32) -> HeadRows<'a> {
        let seq = self.layout.dims.seq;
        HeadRows {
            to: self.dqkv,
            first: self.b * seq + first,
            rows: TILE_ROWS.min(seq - first),
            from: self.layout.column(head),
            width: self.layout.dims.head_dim,
            factors: [scale; TILE_ROWS],
        }
    }

    /// All that the queries from `first` on contribute: their own gradient, and sums to those of the keys and values they see.
    #[inline(always)]
    fn block<V: Vector>(&mut self, head: usize, first: usize) {
        let layout = self.layout;
        let (dims, padded_dim, stride) = (layout.dims, layout.padded_dim, layout.score_stride);
        let width = dims.heads * dims.head_dim;
        let queries = layout.head(self.saved.qkv, dims.qkv_width(), self.b, head);
        let dout = layout.head(self.dout, width, self.b, head);
        let out = layout.head(self.saved.out, width, self.b, head);
        let next = layout.next_keys_values(self.saved.qkv, self.b, self.kv);
        queries.pack::<V>(first, padded_dim, self.work.queries);
        dout.pack::<V>(first, padded_dim, self.work.dout);
        let rows = BLOCK.min((dims.seq - first).next_multiple_of(TILE_ROWS));
        // The first key that each strip computes; no strip begins to see keys that an earlier one has stopped to see.
        let mut first_keys = [usize::MAX; BLOCK / TILE_ROWS];
        for strip in (0..rows).step_by(TILE_ROWS) {
            let first_row = first + strip;
            // What the same strip of the next block needs.
            for head in [queries, dout, out] {
                head.prefetch(first_row + BLOCK..first_row + BLOCK + TILE_ROWS);
            }
            for head in next.iter().flatten() {
                head.prefetch(first_row..first_row + TILE_ROWS);
            }
            // Positions past the end: a probability of e^−∞.
            let (mut lse, mut deltas) = ([f32::INFINITY; TILE_ROWS], [0.0; TILE_ROWS]);
            for r in 0..TILE_ROWS.min(dims.seq - first_row) {
                lse[r] = self.saved.lse[(self.b * dims.seq + first_row + r) * dims.heads + head];
                deltas[r] = dot::<V>(dout, out, first_row + r);
            }
            let sight = layout.sight(self.saved.starts, self.b, first_row);
            first_keys[strip / TILE_ROWS] = sight.keys.start;
            let mut dqueries = self.rows(head, first_row, layout.scale);
            let at = strip * stride..(strip + TILE_ROWS) * stride;
            let scores: &mut [[f32; LANES]] = self.work.scores[at.clone()].as_chunks_mut().0;
            let dscores = self.work.dscores[at].as_chunks_mut().0;
            let strip = strip * padded_dim..(strip + TILE_ROWS) * padded_dim;
            let mut probabilities = Probabilities { to: scores, stride: stride / LANES, lse, first: first_row };
            layout.strip_times_panels::<V>(
                sight.keys.clone(),
                &self.work.queries[strip.clone()],
                self.work.keys_t,
                &mut probabilities,
            );
            sight.hide(scores, stride / LANES, 0.0);
            let mut gradients = ScoreGrads { probabilities: scores, to: dscores, stride: stride / LANES, deltas };
            let keys = sight.keys;
            layout.strip_times_panels::<V>(keys.clone(), &self.work.dout[strip], self.work.values_t, &mut gradients);
            let left = Left { data: &dscores.as_flattened()[keys.start..], row_stride: stride, depth_stride: 1 };
            let rows = &self.work.keys[keys.start * padded_dim..];
            layout.strip_times_rows::<V>(keys.len(), left, rows, &mut dqueries);
        }
        for key in (first_keys[0]..first + rows).step_by(TILE_ROWS) {
            // Earlier strips do not see these keys, and neither do later ones whose documents start behind them.
            let skipped = key.saturating_sub(first);
            let end = first_keys.iter().take_while(|&&start| start <= key).count() * TILE_ROWS;
            let at = skipped * stride + key;
            let left = |data| Left { data, row_stride: 1, depth_stride: stride };
            let (depth, from) = (end.saturating_sub(skipped), skipped * padded_dim);
            let to = key * padded_dim..(key + TILE_ROWS) * padded_dim;
            let mut sums = Sums { to: self.work.dvalues[to.clone()].as_chunks_mut().0, stride: padded_dim / LANES };
            layout.strip_times_rows::<V>(depth, left(&self.work.scores[at..]), &self.work.dout[from..], &mut sums);
            let mut sums = Sums { to: self.work.dkeys[to].as_chunks_mut().0, stride: padded_dim / LANES };
            layout.strip_times_rows::<V>(depth, left(&self.work.dscores[at..]), &self.work.queries[from..], &mut sums);
        }
    }
}

/// Turns scores into probabilities, zero where causality hides the key.
struct Probabilities<'a> {
    to: &'a mut [[f32; LANES]],
    /// Vectors from one row to the next.
    stride: usize,
    lse: [f32; TILE_ROWS],
    /// Position of row 0.
    first: usize,
}

impl<V: Vector> Sink<V> for Probabilities<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, column: usize, sums: V) {
        let mut power = sums.sub(V::splat(self.lse[row])).exp();
        let visible = self.first + row + 1 - column;
        if visible < LANES {
            power = power.keep_first(visible, 0.0);
        }
        power.store(&mut self.to[row * self.stride + column / LANES]);
    }
}

/// Turns dP into dS, zero wherever the probability is.
struct ScoreGrads<'a> {
    probabilities: &'a [[f32; LANES]],
    to: &'a mut [[f32; LANES]],
    /// Vectors from one row to the next, of both.
    stride: usize,
    deltas: [f32; TILE_ROWS],
}

impl<V: Vector> Sink<V> for ScoreGrads<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, column: usize, sums: V) {
        let at = row * self.stride + column / LANES;
        let power = V::load(&self.probabilities[at]);
        power.mul(sums.sub(V::splat(self.deltas[row]))).store(&mut self.to[at]);
    }
}

/// Adds the sums to rows of `stride` vectors.
struct Sums<'a> {
    to: &'a mut [[f32; LANES]],
    stride: usize,
}

impl<V: Vector> Sink<V> for Sums<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, column: usize, sums: V) {
        let to = &mut self.to[row * self.stride + column / LANES];
        V::load(to).add(sums).store(to);
    }
}

#[inline(always)]
fn copy_strip<V: Vector>(strip: &[f32], padded_dim: usize, to: &mut impl Sink<V>) {
    for (row, values) in strip.chunks_exact(padded_dim).enumerate() {
        for (vector, values) in values.as_chunks().0.iter().enumerate() {
            to.take(row, vector * LANES, V::load(values));
        }
    }
}

/// Σ a·b over one row of both heads.
#[inline(always)]
fn dot<V: Vector>(a: Head<'_>, b: Head<'_>, row: usize) -> f32 {
    let mut sums = V::splat(0.0);
    for column in (0..a.row(row).len()).step_by(LANES) {
        sums = a.vector::<V>(row, column).mul_add(b.vector(row, column), sums);
    }
    sums.sum()
}
