//! Causal attention, forward; the backward pass is in `attention_grad`, the rotary embedding in `rotary`.
//!
//! Owns the layout of the fused rows and of the packed operands. One task is one sequence and one key/value head: it packs the
//! keys and values once and uses them for all query heads of the group, so that the backward pass can add their gradients up
//! without atomics. Queries go in strips of eight, whose scores stay in the nearest cache, and a strip computes only the keys
//! that causality and the documents' starts let it see, from a whole tile on. It never allocates once a thread has its scratch.

use std::ops::Range;

use super::panel::{Left, Right, Sink, TILE_COLUMNS, TILE_ROWS, multiply_strip};
use super::parallel::{SharedRows, for_parts, parts, with_scratch};
use super::vector::{LANES, Task, Vector, dispatch, prefetch};
use super::{attention_grad, rotary, slice, slice_mut};
use crate::{AttentionDims, AttentionOps, Cpu, RotaryDirection, View, ViewMut};

impl AttentionOps for Cpu {
    fn rotary(
        &self,
        dims: AttentionDims,
        direction: RotaryDirection,
        cos: View<'_, Self, f32>,
        sin: View<'_, Self, f32>,
        qkv: ViewMut<'_, Self, f32>,
    ) {
        rotary::rotary(dims, direction, slice(cos), slice(sin), slice_mut(qkv));
    }

    fn attention(
        &self,
        dims: AttentionDims,
        starts: Option<View<'_, Self, i32>>,
        qkv: View<'_, Self, f32>,
        out: ViewMut<'_, Self, f32>,
        lse: ViewMut<'_, Self, f32>,
    ) {
        attention(dims, starts.map(slice), slice(qkv), slice_mut(out), slice_mut(lse));
    }

    fn attention_grad(
        &self,
        dims: AttentionDims,
        starts: Option<View<'_, Self, i32>>,
        qkv: View<'_, Self, f32>,
        out: View<'_, Self, f32>,
        lse: View<'_, Self, f32>,
        dout: View<'_, Self, f32>,
        dqkv: ViewMut<'_, Self, f32>,
    ) {
        let saved =
            attention_grad::Saved { starts: starts.map(slice), qkv: slice(qkv), out: slice(out), lse: slice(lse) };
        attention_grad::attention_grad(dims, saved, slice(dout), slice_mut(dqkv));
    }
}

/// Where the pieces of one sequence lie, in the caller's rows and in the packed copies.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) dims: AttentionDims,
    /// Head width, rounded up to whole vectors; the surplus columns are zero.
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
            padded_dim: head_dim.next_multiple_of(LANES),
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
    #[inline(always)]
    pub(super) fn head<'a>(&self, rows: &'a [f32], width: usize, b: usize, head: usize) -> Head<'a> {
        let from = b * self.dims.seq * width + self.column(head);
        Head { data: &rows[from..], stride: width, rows: self.dims.seq, width: self.dims.head_dim }
    }

    /// Keys and values of the task that a thread usually does next, if there is one.
    #[inline(always)]
    pub(super) fn next_keys_values<'a>(&self, qkv: &'a [f32], b: usize, kv: usize) -> Option<[Head<'a>; 2]> {
        let AttentionDims { batch, heads, kv_heads, .. } = self.dims;
        let (b, kv) = if kv + 1 < kv_heads { (b, kv + 1) } else { (b + 1, 0) };
        let head = |head| self.head(qkv, self.dims.qkv_width(), b, head);
        (b < batch).then(|| [head(heads + kv), head(heads + kv_heads + kv)])
    }

    /// What the eight queries from `first` on of sequence `b` see.
    #[inline(always)]
    pub(super) fn sight(&self, starts: Option<&[i32]>, b: usize, first: usize) -> Sight {
        let seq = self.dims.seq;
        let rows = match starts {
            None => [0; TILE_ROWS],
            Some(starts) => std::array::from_fn(|r| {
                // Rows past the end see what the last one does.
                let position = (first + r).min(seq - 1);
                let start = starts[b * seq + position];
                assert!(
                    usize::try_from(start).is_ok_and(|s| s <= position),
                    "position {position} sees from {start} on"
                );
                start as usize
            }),
        };
        assert!(rows.is_sorted(), "documents start in order, not at {rows:?}");
        Sight { rows, keys: rows[0] / TILE_COLUMNS * TILE_COLUMNS..first + TILE_ROWS }
    }

    /// `out = strip[8, D] · panelsᵀ` for all vectors that hold any of `keys`, which begin at a panel.
    #[inline(always)]
    pub(super) fn strip_times_panels<V: Vector>(
        &self,
        keys: Range<usize>,
        strip: &[f32],
        panels: &[f32],
        out: &mut impl Sink<V>,
    ) {
        let left = Left { data: strip, row_stride: self.padded_dim, depth_stride: 1 };
        let right = Right { data: panels, stride: TILE_COLUMNS };
        let (depth, panel) = (self.dims.head_dim, self.dims.head_dim * TILE_COLUMNS);
        multiply_strip::<V>(keys.start..keys.end.next_multiple_of(LANES), depth, left, right, panel, out);
    }

    /// `out = Σ_k left[8, k] · rows[k, D]` for `k < depth`.
    #[inline(always)]
    pub(super) fn strip_times_rows<V: Vector>(
        &self,
        depth: usize,
        left: Left<'_>,
        rows: &[f32],
        out: &mut impl Sink<V>,
    ) {
        let right = Right { data: rows, stride: self.padded_dim };
        multiply_strip::<V>(0..self.padded_dim, depth, left, right, TILE_COLUMNS, out);
    }
}

/// What eight queries see.
#[derive(Clone)]
pub(super) struct Sight {
    /// The first key of each.
    rows: [usize; TILE_ROWS],
    /// All keys that any of them sees, from the tile on that holds the first.
    pub(super) keys: Range<usize>,
}

impl Sight {
    /// Overwrites with `hidden` what lies before each query's first key, of the keys that are computed, in rows of `stride`
    /// vectors. What causality hides is left as it is.
    #[inline(always)]
    pub(super) fn hide(&self, scores: &mut [[f32; LANES]], stride: usize, hidden: f32) {
        let (scores, stride) = (scores.as_flattened_mut(), stride * LANES);
        for (row, &start) in self.rows.iter().enumerate() {
            scores[row * stride..][self.keys.start..start].fill(hidden);
        }
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
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..row * self.stride + self.width]
    }

    /// Asks for rows ahead of their use. They lie far apart, where no processor looks ahead by itself.
    #[inline(always)]
    pub(super) fn prefetch(&self, rows: Range<usize>) {
        for row in rows.start..rows.end.min(self.rows) {
            prefetch(self.row(row));
        }
    }

    /// Rows from `first` on into rows of `padded` elements, zeros where there is nothing.
    #[inline(always)]
    pub(super) fn pack<V: Vector>(&self, first: usize, padded: usize, to: &mut [f32]) {
        for (row, to) in to.chunks_exact_mut(padded).enumerate() {
            let (to, _) = to.as_chunks_mut::<LANES>();
            for (vector, to) in to.iter_mut().enumerate() {
                self.vector::<V>(first + row, vector * LANES).store(to);
            }
        }
    }

    /// All rows times `scale`, transposed, in panels `[positions / TILE_COLUMNS][width][TILE_COLUMNS]`, zeros where there is
    /// nothing.
    #[inline(always)]
    pub(super) fn pack_transposed<V: Vector>(&self, scale: f32, to: &mut [f32]) {
        for (panel, to) in to.chunks_exact_mut(self.width * TILE_COLUMNS).enumerate() {
            let (to, _) = to.as_chunks_mut::<LANES>();
            for half in 0..TILE_COLUMNS / LANES {
                for first in (0..self.width).step_by(LANES) {
                    let mut rows = [V::splat(0.0); LANES];
                    for (lane, row) in rows.iter_mut().enumerate() {
                        *row = self.vector::<V>(panel * TILE_COLUMNS + half * LANES + lane, first).mul(V::splat(scale));
                    }
                    let columns = V::transpose(rows);
                    for (column, values) in (first..self.width).zip(&columns) {
                        values.store(&mut to[column * (TILE_COLUMNS / LANES) + half]);
                    }
                }
            }
        }
    }

    /// Sixteen elements of a row from `column` on, zeros where there is nothing.
    #[inline(always)]
    pub(super) fn vector<V: Vector>(&self, row: usize, column: usize) -> V {
        if row >= self.rows {
            return V::splat(0.0);
        }
        let row = &self.row(row)[column..];
        match row.first_chunk() {
            Some(whole) => V::load(whole),
            None => V::load_first(row),
        }
    }
}

/// Keeps the sums as rows of `stride` vectors.
struct Scores<'a> {
    to: &'a mut [[f32; LANES]],
    stride: usize,
}

impl<V: Vector> Sink<V> for Scores<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, column: usize, sums: V) {
        sums.store(&mut self.to[row * self.stride + column / LANES]);
    }
}

/// Writes each row times its factor to one head of a matrix, from row `first` on.
pub(super) struct HeadRows<'a> {
    pub(super) to: &'a SharedRows<'a>,
    /// Row of the matrix that row 0 goes to, and how many there are to write.
    pub(super) first: usize,
    pub(super) rows: usize,
    /// The head's columns.
    pub(super) from: usize,
    pub(super) width: usize,
    pub(super) factors: [f32; TILE_ROWS],
}

impl<V: Vector> Sink<V> for HeadRows<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, column: usize, sums: V) {
        if row >= self.rows {
            return;
        }
        let columns = self.from + column..self.from + self.width.min(column + LANES);
        // SAFETY: a task alone writes the columns of its heads in the rows of its sequence, one segment at a time.
        let to = unsafe { self.to.segment(self.first + row, columns) };
        let values = sums.mul(V::splat(self.factors[row]));
        match to.first_chunk_mut() {
            Some(whole) => values.store(whole),
            None => values.store_first(to),
        }
    }
}

fn attention(dims: AttentionDims, starts: Option<&[i32]>, qkv: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let (tokens, out_width) = (dims.tokens(), dims.heads * dims.head_dim);
    assert!(
        starts.is_none_or(|starts| starts.len() >= tokens),
        "starts of {:?} tokens for {dims:?}",
        starts.map(<[_]>::len)
    );
    assert!(qkv.len() >= tokens * dims.qkv_width(), "qkv of {} elements for {dims:?}", qkv.len());
    assert!(out.len() >= tokens * out_width, "out of {} elements for {dims:?}", out.len());
    assert!(lse.len() >= tokens * dims.heads, "lse of {} elements for {dims:?}", lse.len());
    let layout = Layout::new(dims);
    let (out, lse) = (SharedRows::new(out, out_width), SharedRows::new(lse, dims.heads));
    layout.for_tasks(|b, kv| {
        let rows = layout.padded_seq * layout.padded_dim;
        let strip = TILE_ROWS * layout.padded_dim;
        let keys = dims.head_dim * layout.padded_seq;
        with_scratch(keys + rows + strip + TILE_ROWS * layout.score_stride, |scratch| {
            let (keys, scratch) = scratch.split_at_mut(keys);
            let (values, scratch) = scratch.split_at_mut(rows);
            let (queries, scores) = scratch.split_at_mut(strip);
            let work = Workspace { keys, values, queries, scores: scores.as_chunks_mut().0 };
            dispatch(Forward { layout, starts, qkv, out: &out, lse: &lse, b, kv, work });
        });
    });
}

/// Scratch of one task: keys transposed in panels, values as rows, one strip of queries and of scores.
struct Workspace<'a> {
    keys: &'a mut [f32],
    values: &'a mut [f32],
    queries: &'a mut [f32],
    scores: &'a mut [[f32; LANES]],
}

/// The query heads of one sequence that share a key/value head.
struct Forward<'a> {
    layout: Layout,
    starts: Option<&'a [i32]>,
    qkv: &'a [f32],
    out: &'a SharedRows<'a>,
    lse: &'a SharedRows<'a>,
    b: usize,
    kv: usize,
    work: Workspace<'a>,
}

impl Task for Forward<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { layout, starts, qkv, out, lse, b, kv, work } = self;
        let (dims, stride) = (layout.dims, layout.score_stride / LANES);
        let head = |head| layout.head(qkv, dims.qkv_width(), b, head);
        head(dims.heads + kv).pack_transposed::<V>(layout.scale, work.keys);
        head(dims.heads + dims.kv_heads + kv).pack::<V>(0, layout.padded_dim, work.values);
        let next = layout.next_keys_values(qkv, b, kv);
        for query_head in kv * layout.group..(kv + 1) * layout.group {
            let queries = head(query_head);
            for first in (0..dims.seq).step_by(TILE_ROWS) {
                queries.prefetch(first + TILE_ROWS..first + 2 * TILE_ROWS);
                for head in next.iter().flatten() {
                    head.prefetch(first..first + TILE_ROWS);
                }
                queries.pack::<V>(first, layout.padded_dim, work.queries);
                let sight = layout.sight(starts, b, first);
                let mut scores = Scores { to: work.scores, stride };
                layout.strip_times_panels::<V>(sight.keys.clone(), work.queries, work.keys, &mut scores);
                sight.hide(work.scores, stride, f32::NEG_INFINITY);
                let (totals, logs) = softmax_strip::<V>(work.scores, stride, sight.keys.start..first);
                let rows = TILE_ROWS.min(dims.seq - first);
                let mut sums = HeadRows {
                    to: out,
                    first: b * dims.seq + first,
                    rows,
                    from: layout.column(query_head),
                    width: dims.head_dim,
                    factors: totals.map(|total| 1.0 / total),
                };
                let data = &work.scores.as_flattened()[sight.keys.start..];
                let left = Left { data, row_stride: layout.score_stride, depth_stride: 1 };
                let values = &work.values[sight.keys.start * layout.padded_dim..];
                layout.strip_times_rows::<V>(sight.keys.len(), left, values, &mut sums);
                for (r, log) in logs.into_iter().enumerate().take(rows) {
                    // SAFETY: a task alone writes the columns of its heads in the rows of its sequence, one at a time.
                    let lse = unsafe { lse.segment(b * dims.seq + first + r, query_head..query_head + 1) };
                    lse[0] = log;
                }
            }
        }
    }
}

/// Exponentials of eight rows of scores in place, each less its row's largest, of the keys from `whole.start` on; row r sees
/// them up to key `whole.end + r`, and zeros follow up to where the strip ends. Returns the rows' sums and the logs of their
/// sums of exponentials.
#[inline(always)]
fn softmax_strip<V: Vector>(
    scores: &mut [[f32; LANES]],
    stride: usize,
    whole: Range<usize>,
) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
    // All rows at once, because a row's steps wait for one another and rows do not. The strip's first query is a multiple of
    // eight, so the causal edges of all rows lie in one vector.
    let (start, edge) = (whole.start / LANES, whole.end / LANES);
    let mut largest = [V::splat(f32::NEG_INFINITY); TILE_ROWS];
    for at in start..edge {
        for (r, largest) in largest.iter_mut().enumerate() {
            *largest = V::load(&scores[r * stride + at]).larger(*largest);
        }
    }
    let mut maxima = [0.0; TILE_ROWS];
    for (r, largest) in largest.iter_mut().enumerate() {
        // e^−∞ is the zero that the product with the values needs.
        let scores = &mut scores[r * stride + edge];
        let masked = V::load(scores).keep_first(whole.end % LANES + r + 1, f32::NEG_INFINITY);
        masked.store(scores);
        maxima[r] = masked.larger(*largest).largest();
        *largest = V::splat(maxima[r]);
    }
    let mut sums = [V::splat(0.0); TILE_ROWS];
    for at in start..=edge {
        for r in 0..TILE_ROWS {
            let scores = &mut scores[r * stride + at];
            let power = V::load(scores).sub(largest[r]).exp();
            power.store(scores);
            sums[r] = sums[r].add(power);
        }
    }
    let (mut totals, mut logs) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
    for (r, sum) in sums.iter().enumerate() {
        totals[r] = sum.sum();
        logs[r] = maxima[r] + totals[r].ln();
    }
    (totals, logs)
}
