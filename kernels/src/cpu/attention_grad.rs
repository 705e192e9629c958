//! Causal attention, backward.
//!
//! Owns the recomputation of the probabilities from the saved log-sum-exp, and the five products (FlashAttention-2, Dao 2023):
//! P = exp(QKᵀ − lse), dP = dO·Vᵀ, dS = P∘(dP − δ) with δ = Σ dO·O, then dV += Pᵀ·dO, dQ = dS·K, dK += dSᵀ·Q. Packing and the
//! forward pass are in `attention`. It never allocates once a thread has its scratch.

use multiversion::multiversion;

use super::attention::{Head, Layout, strip_times_panels, tiles_times_rows};
use super::panel::{Left, TILE_ROWS};
use super::parallel::{SharedRows, with_scratch};
use super::simd::{LANES, dot, exp};
use crate::{Accumulate, AttentionDims};

/// Queries whose probabilities are held at once: long reductions for dK and dV, and still small enough for the cache.
const BLOCK: usize = 32;

/// What the forward pass left: its input and its results.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    /// `[B·S, (heads + 2·kv_heads)·D]`.
    pub(super) qkv: &'a [f32],
    /// `[B·S, heads·D]`.
    pub(super) out: &'a [f32],
    /// `[B·S, heads]`.
    pub(super) lse: &'a [f32],
}

/// Scratch of one task, cut up. Rows are `padded_dim` wide but for the scores.
struct Workspace<'a> {
    /// Keys and values, transposed in panels.
    keys_t: &'a mut [f32],
    values_t: &'a mut [f32],
    /// Keys as rows.
    keys: &'a mut [f32],
    /// Sums over the group's query heads.
    dkeys: &'a mut [f32],
    dvalues: &'a mut [f32],
    /// One head's queries, scaled, and its part of the output's gradient.
    queries: &'a mut [f32],
    dout: &'a mut [f32],
    /// δ of each position.
    deltas: &'a mut [f32],
    /// One strip of the queries' gradient.
    dqueries: &'a mut [f32],
    /// P and dS of one block.
    scores: &'a mut [f32],
    dscores: &'a mut [f32],
}

impl<'a> Workspace<'a> {
    fn lengths(layout: &Layout) -> [usize; 11] {
        let transposed = layout.dims.head_dim * layout.padded_seq;
        let rows = layout.padded_seq * layout.padded_dim;
        let scores = BLOCK * layout.score_stride;
        let strip = TILE_ROWS * layout.padded_dim;
        [transposed, transposed, rows, rows, rows, rows, rows, layout.padded_seq, strip, scores, scores]
    }

    fn cut(layout: &Layout, mut scratch: &'a mut [f32]) -> Self {
        let [keys_t, values_t, keys, dkeys, dvalues, queries, dout, deltas, dqueries, scores, dscores] =
            Self::lengths(layout).map(|len| {
                let (head, tail) = std::mem::take(&mut scratch).split_at_mut(len);
                scratch = tail;
                head
            });
        Self { keys_t, values_t, keys, dkeys, dvalues, queries, dout, deltas, dqueries, scores, dscores }
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
    let layout = Layout::new(dims);
    let dqkv = SharedRows::new(dqkv, qkv_width);
    layout.for_tasks(|b, kv| {
        with_scratch(Workspace::lengths(&layout).iter().sum(), |scratch| {
            let work = &mut Workspace::cut(&layout, scratch);
            let key = layout.head(saved.qkv, qkv_width, b, dims.heads + kv);
            key.pack_transposed(work.keys_t);
            key.pack(1.0, layout.padded_dim, work.keys);
            layout.head(saved.qkv, qkv_width, b, dims.heads + dims.kv_heads + kv).pack_transposed(work.values_t);
            work.dkeys.fill(0.0);
            work.dvalues.fill(0.0);
            // SAFETY (of both uses below): a task alone writes the columns of its key/value head and of that head's query heads
            // in the rows of its sequence, and holds one segment at a time.
            let write = |row: usize, head: usize, values: &[f32], scale: f32| {
                let columns = layout.column(head)..layout.column(head + 1);
                // SAFETY: as said above.
                let to = unsafe { dqkv.segment(b * dims.seq + row, columns) };
                for (to, value) in to.iter_mut().zip(values) {
                    *to = value * scale;
                }
            };
            for head in kv * layout.group..(kv + 1) * layout.group {
                layout.head(saved.qkv, qkv_width, b, head).pack(layout.scale, layout.padded_dim, work.queries);
                let (dout, out) = (layout.head(dout, out_width, b, head), layout.head(saved.out, out_width, b, head));
                dout.pack(1.0, layout.padded_dim, work.dout);
                row_deltas(dout, out, &mut work.deltas[..dims.seq]);
                let lse = &saved.lse[b * dims.seq * dims.heads + head..];
                for first in (0..dims.seq).step_by(BLOCK) {
                    let rows = BLOCK.min(dims.seq - first);
                    block(&layout, work, lse, first, |row, values| write(row, head, values, layout.scale));
                    add_key_value_grads(&layout, work, first, rows.next_multiple_of(TILE_ROWS));
                }
            }
            for row in 0..dims.seq {
                let at = row * layout.padded_dim;
                write(row, dims.heads + kv, &work.dkeys[at..], 1.0);
                write(row, dims.heads + dims.kv_heads + kv, &work.dvalues[at..], 1.0);
            }
        });
    });
}

/// P and dS of the block that begins at query `first`, and its dQ, unscaled, row by row to `write`. `lse` starts at this head's
/// first position, one position a row of `heads` elements.
fn block(layout: &Layout, work: &mut Workspace<'_>, lse: &[f32], first: usize, write: impl Fn(usize, &[f32])) {
    let (seq, padded_dim, stride) = (layout.dims.seq, layout.padded_dim, layout.score_stride);
    for first_row in (first..seq.min(first + BLOCK)).step_by(TILE_ROWS) {
        let (visible, in_block) = (first_row + TILE_ROWS, first_row - first);
        let rows = TILE_ROWS.min(seq - first_row);
        let scores = &mut work.scores[in_block * stride..(in_block + TILE_ROWS) * stride];
        let dscores = &mut work.dscores[in_block * stride..(in_block + TILE_ROWS) * stride];
        strip_times_panels(layout, visible, &work.queries[first_row * padded_dim..], work.keys_t, scores);
        strip_times_panels(layout, visible, &work.dout[first_row * padded_dim..], work.values_t, dscores);
        for r in 0..rows {
            let row = first_row + r;
            let range = r * stride..(r + 1) * stride;
            let (lse, delta) = (lse[row * layout.dims.heads], work.deltas[row]);
            score_row_grad(&mut scores[range.clone()], &mut dscores[range], lse, delta, row + 1..visible);
        }
        for r in rows..TILE_ROWS {
            scores[r * stride..r * stride + visible].fill(0.0);
            dscores[r * stride..r * stride + visible].fill(0.0);
        }
        let left = Left { data: dscores, row_stride: stride, depth_stride: 1 };
        tiles_times_rows(layout, Accumulate::Overwrite, visible, left, work.keys, work.dqueries);
        for (r, values) in work.dqueries.chunks_exact(padded_dim).enumerate().take(rows) {
            write(first_row + r, values);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn row_deltas(dout: Head<'_>, out: Head<'_>, deltas: &mut [f32]) {
    for (row, delta) in deltas.iter_mut().enumerate() {
        *delta = dot(dout.row(row), out.row(row));
    }
}

/// Turns a row of scores into probabilities and a row of dP into dS, both zero in the `hidden` keys. Whole lanes are computed,
/// which both rows have room for.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn score_row_grad(scores: &mut [f32], dscores: &mut [f32], lse: f32, delta: f32, hidden: std::ops::Range<usize>) {
    let len = hidden.start.next_multiple_of(LANES);
    for (score, dscore) in scores[..len].iter_mut().zip(&mut dscores[..len]) {
        *score = exp(*score - lse);
        *dscore = *score * (*dscore - delta);
    }
    scores[hidden.clone()].fill(0.0);
    dscores[hidden].fill(0.0);
}

/// Adds a block's Pᵀ·dO and dSᵀ·Q to the gradients of the values and keys that it sees. The queries are scaled, so dK is whole.
fn add_key_value_grads(layout: &Layout, work: &mut Workspace<'_>, first: usize, rows: usize) {
    let (padded_dim, stride) = (layout.padded_dim, layout.score_stride);
    for key in (0..first + rows).step_by(TILE_ROWS) {
        // Earlier strips do not see these keys.
        let skipped = key.saturating_sub(first);
        let at = skipped * stride + key;
        let left = |data| Left { data, row_stride: 1, depth_stride: stride };
        let (rows, from, to) = (rows - skipped, (first + skipped) * padded_dim, key * padded_dim);
        let (p, ds) = (left(&work.scores[at..]), left(&work.dscores[at..]));
        tiles_times_rows(layout, Accumulate::Add, rows, p, &work.dout[from..], &mut work.dvalues[to..]);
        tiles_times_rows(layout, Accumulate::Add, rows, ds, &work.queries[from..], &mut work.dkeys[to..]);
    }
}
