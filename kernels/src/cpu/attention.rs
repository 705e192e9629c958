//! Rotary embedding and causal attention, forward; the backward pass is in `attention_grad`.
//!
//! Owns the layout of the fused rows and of the packed operands. One task is one sequence and one key/value head: it packs the
//! keys and values once and uses them for all query heads of the group, so that the backward pass can add their gradients up
//! without atomics. Queries go in strips of eight, and a strip computes only the keys that causality lets it see. It never
//! allocates once a thread has its scratch.

use std::slice::ChunksExactMut;

use multiversion::multiversion;

use super::panel::{Left, Right, TILE_COLUMNS, TILE_ROWS, multiply_tile};
use super::parallel::{SharedRows, for_parts, parts, rows_mut, with_scratch};
use super::simd::{LANES, exp, max, sum};
use super::{attention_grad, slice, slice_mut};
use crate::{Accumulate, AttentionDims, AttentionOps, Cpu, RotaryDirection, View, ViewMut};

impl AttentionOps for Cpu {
    fn rotary(
        &self,
        dims: AttentionDims,
        direction: RotaryDirection,
        cos: View<'_, Self, f32>,
        sin: View<'_, Self, f32>,
        qkv: ViewMut<'_, Self, f32>,
    ) {
        rotary(dims, direction, slice(cos), slice(sin), slice_mut(qkv));
    }

    fn attention(
        &self,
        dims: AttentionDims,
        qkv: View<'_, Self, f32>,
        out: ViewMut<'_, Self, f32>,
        lse: ViewMut<'_, Self, f32>,
    ) {
        attention(dims, slice(qkv), slice_mut(out), slice_mut(lse));
    }

    fn attention_grad(
        &self,
        dims: AttentionDims,
        qkv: View<'_, Self, f32>,
        out: View<'_, Self, f32>,
        lse: View<'_, Self, f32>,
        dout: View<'_, Self, f32>,
        dqkv: ViewMut<'_, Self, f32>,
    ) {
        let saved = attention_grad::Saved { qkv: slice(qkv), out: slice(out), lse: slice(lse) };
        attention_grad::attention_grad(dims, saved, slice(dout), slice_mut(dqkv));
    }
}

fn rotary(dims: AttentionDims, direction: RotaryDirection, cos: &[f32], sin: &[f32], qkv: &mut [f32]) {
    let (tokens, width, half) = (dims.tokens(), dims.qkv_width(), dims.head_dim / 2);
    assert_eq!(dims.head_dim, 2 * half, "rotary embedding pairs the halves of a head");
    assert!(cos.len() >= dims.seq * half && sin.len() >= dims.seq * half, "angles of {} positions x {half}", dims.seq);
    assert!(qkv.len() >= tokens * width, "qkv of {} elements for {tokens} tokens x {width}", qkv.len());
    let sign = if direction == RotaryDirection::Forward { 1.0 } else { -1.0 };
    let rotated = (dims.heads + dims.kv_heads) * dims.head_dim;
    for_parts(tokens, parts(tokens * rotated), rows_mut(&mut qkv[..tokens * width], width), |range, part| {
        for (token, row) in range.zip(part.data.chunks_exact_mut(width)) {
            let angles = (token % dims.seq) * half..(token % dims.seq + 1) * half;
            rotate_row(&mut row[..rotated], &cos[angles.clone()], &sin[angles], sign);
        }
    });
}

/// Rotates every head of a row; heads are twice as wide as the angles are many.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn rotate_row(row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    for head in row.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let s = sign * s;
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

/// Where the pieces of one sequence lie, in the caller's rows and in the packed copies.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) dims: AttentionDims,
    /// Head width, rounded up to whole tiles; the surplus columns are zero.
    pub(super) padded_dim: usize,
    /// Positions, rounded up to whole tiles; the surplus keys are zero.
    pub(super) padded_seq: usize,
    /// Elements from one row of scores to the next. Not a power of two, which would put a column into one cache set.
    pub(super) score_stride: usize,
    /// Query heads that share a key/value head.
    pub(super) group: usize,
    /// 1/√D.
    pub(super) scale: f32,
}

impl Layout {
    pub(super) fn new(dims: AttentionDims) -> Self {
        let AttentionDims { heads, kv_heads, head_dim, .. } = dims;
        assert!(kv_heads > 0 && heads % kv_heads == 0, "{heads} query heads over {kv_heads} key/value heads");
        let padded_seq = dims.seq.next_multiple_of(TILE_COLUMNS);
        Self {
            dims,
            padded_dim: head_dim.next_multiple_of(TILE_COLUMNS),
            padded_seq,
            score_stride: padded_seq + LANES,
            group: heads / kv_heads,
            scale: 1.0 / (head_dim as f32).sqrt(),
        }
    }

    /// One task a sequence and key/value head; each gets both numbers. Tasks are independent, so a thread that is done early
    /// takes another without changing any result.
    pub(super) fn for_tasks(&self, work: impl Fn(usize, usize) + Sync) {
        let tasks = self.dims.batch * self.dims.kv_heads;
        let scores = tasks * self.group * self.dims.seq * self.dims.seq;
        let parts = if parts(scores * self.dims.head_dim) == 1 { 1 } else { tasks };
        for_parts(tasks, parts, (), |range, ()| {
            for task in range {
                work(task / self.dims.kv_heads, task % self.dims.kv_heads);
            }
        });
    }

    /// Where a head of the fused row starts: query heads, then key heads, then value heads.
    pub(super) fn column(&self, head: usize) -> usize {
        head * self.dims.head_dim
    }

    /// One head of the rows of sequence `b` inside rows of `width` elements.
    pub(super) fn head<'a>(&self, rows: &'a [f32], width: usize, b: usize, head: usize) -> Head<'a> {
        let from = b * self.dims.seq * width + self.column(head);
        Head { data: &rows[from..], stride: width, rows: self.dims.seq, width: self.dims.head_dim }
    }

    pub(super) fn strips(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.dims.seq).step_by(TILE_ROWS)
    }
}

/// One head of one sequence, in rows that hold other heads too.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    data: &'a [f32],
    stride: usize,
    rows: usize,
    width: usize,
}

impl<'a> Head<'a> {
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..row * self.stride + self.width]
    }

    /// All rows times `scale` into rows of `padded` elements, zeros where there is nothing. Whole heads at once, because the
    /// rows lie far apart: the loads wait for memory together and not strip by strip.
    pub(super) fn pack(&self, scale: f32, padded: usize, to: &mut [f32]) {
        let (rows, surplus) = to.split_at_mut(self.rows * padded);
        pack_rows(self.data, self.stride, self.width, scale, rows.chunks_exact_mut(padded));
        surplus.fill(0.0);
    }

    /// All rows transposed, in panels `[positions / TILE_COLUMNS][width][TILE_COLUMNS]`, zeros where there is nothing.
    pub(super) fn pack_transposed(&self, to: &mut [f32]) {
        for (panel, to) in to.chunks_exact_mut(self.width * TILE_COLUMNS).enumerate() {
            for lane in 0..TILE_COLUMNS {
                let row = panel * TILE_COLUMNS + lane;
                if row < self.rows {
                    for (column, x) in self.row(row).iter().enumerate() {
                        to[column * TILE_COLUMNS + lane] = *x;
                    }
                } else {
                    for column in 0..self.width {
                        to[column * TILE_COLUMNS + lane] = 0.0;
                    }
                }
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn pack_rows(from: &[f32], stride: usize, width: usize, scale: f32, to: ChunksExactMut<'_, f32>) {
    for (row, to) in to.enumerate() {
        let (values, surplus) = to.split_at_mut(width);
        for (to, from) in values.iter_mut().zip(&from[row * stride..]) {
            *to = from * scale;
        }
        surplus.fill(0.0);
    }
}

/// `out[8, keys] = rows[8, width] · panelsᵀ` for all panels that hold any of the first `keys` keys.
pub(super) fn strip_times_panels(layout: &Layout, keys: usize, strip: &[f32], panels: &[f32], out: &mut [f32]) {
    let left = Left { data: strip, row_stride: layout.padded_dim, depth_stride: 1 };
    for (panel, data) in panels.chunks_exact(layout.dims.head_dim * TILE_COLUMNS).enumerate() {
        if panel * TILE_COLUMNS >= keys {
            break;
        }
        let (right, out) = (Right { data, stride: TILE_COLUMNS }, &mut out[panel * TILE_COLUMNS..]);
        multiply_tile(Accumulate::Overwrite, layout.dims.head_dim, left, right, out, layout.score_stride);
    }
}

/// `out[8, padded_dim] (+)= Σ_k left[8, k] · rows[k, padded_dim]` for `k < depth`.
pub(super) fn tiles_times_rows(
    layout: &Layout,
    accumulate: Accumulate,
    depth: usize,
    left: Left<'_>,
    rows: &[f32],
    out: &mut [f32],
) {
    for column in (0..layout.padded_dim).step_by(TILE_COLUMNS) {
        let right = Right { data: &rows[column..], stride: layout.padded_dim };
        multiply_tile(accumulate, depth, left, right, &mut out[column..], layout.padded_dim);
    }
}

fn attention(dims: AttentionDims, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let (tokens, out_width) = (dims.tokens(), dims.heads * dims.head_dim);
    assert!(qkv.len() >= tokens * dims.qkv_width(), "qkv of {} elements for {dims:?}", qkv.len());
    assert!(out.len() >= tokens * out_width, "out of {} elements for {dims:?}", out.len());
    assert!(lse.len() >= tokens * dims.heads, "lse of {} elements for {dims:?}", lse.len());
    let layout = Layout::new(dims);
    let (out, lse) = (SharedRows::new(out, out_width), SharedRows::new(lse, dims.heads));
    layout.for_tasks(|b, kv| {
        let Layout { padded_dim, padded_seq, score_stride, group, .. } = layout;
        let keys_len = dims.head_dim * padded_seq;
        let values_len = padded_seq * padded_dim;
        let strip_len = TILE_ROWS * padded_dim;
        with_scratch(keys_len + 2 * values_len + strip_len + TILE_ROWS * score_stride, |scratch| {
            let (keys, scratch) = scratch.split_at_mut(keys_len);
            let (values, scratch) = scratch.split_at_mut(values_len);
            let (queries, scratch) = scratch.split_at_mut(values_len);
            let (sums, scores) = scratch.split_at_mut(strip_len);
            layout.head(qkv, dims.qkv_width(), b, dims.heads + kv).pack_transposed(keys);
            layout.head(qkv, dims.qkv_width(), b, dims.heads + dims.kv_heads + kv).pack(1.0, padded_dim, values);
            for head in kv * group..(kv + 1) * group {
                layout.head(qkv, dims.qkv_width(), b, head).pack(layout.scale, padded_dim, queries);
                for first in layout.strips() {
                    let visible = first + TILE_ROWS;
                    strip_times_panels(&layout, visible, &queries[first * padded_dim..], keys, scores);
                    let statistics = softmax_strip(scores, score_stride, first);
                    let left = Left { data: scores, row_stride: score_stride, depth_stride: 1 };
                    tiles_times_rows(&layout, Accumulate::Overwrite, visible, left, values, sums);
                    for (r, (total, log)) in statistics.into_iter().enumerate().take(dims.seq - first) {
                        let token = b * dims.seq + first + r;
                        // SAFETY: this task alone writes this head's columns of this sequence's rows, one segment at a time.
                        let (out, lse) = unsafe {
                            let columns = layout.column(head)..layout.column(head + 1);
                            (out.segment(token, columns), lse.segment(token, head..head + 1))
                        };
                        let inverse = 1.0 / total;
                        for (out, sum) in out.iter_mut().zip(&sums[r * padded_dim..]) {
                            *out = sum * inverse;
                        }
                        lse[0] = log;
                    }
                }
            }
        });
    });
}

/// Exponentials of eight rows of scores in place, each less its row's largest; row r sees the first `first + r + 1` keys, and
/// zeros follow up to where the strip ends. Returns each row's sum, and its log of the sum of exponentials.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn softmax_strip(scores: &mut [f32], stride: usize, first: usize) -> [(f32, f32); TILE_ROWS] {
    // Row after row within each pass, because a row's passes wait for one another and rows do not.
    let row = |r: usize| r * stride..r * stride + (first + r + 1).next_multiple_of(LANES);
    let (mut largest, mut statistics) = ([0.0; TILE_ROWS], [(0.0, 0.0); TILE_ROWS]);
    for (r, largest) in largest.iter_mut().enumerate() {
        // Whole lanes: the strip's scores reach beyond, and e^−∞ is the zero that the product with the values needs.
        let row = &mut scores[row(r)];
        row[first + r + 1..].fill(f32::NEG_INFINITY);
        *largest = max(row);
    }
    for (r, largest) in largest.into_iter().enumerate() {
        for x in &mut scores[row(r)] {
            *x = exp(*x - largest);
        }
    }
    for (r, (statistics, largest)) in statistics.iter_mut().zip(largest).enumerate() {
        let total = sum(&scores[row(r)]);
        *statistics = (total, largest + total.ln());
    }
    statistics
}
