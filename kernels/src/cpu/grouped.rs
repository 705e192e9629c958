//! Grouped GEMM: every expert's rows against that expert's matrix.
//!
//! Owns the sharing-out of groups of any skew to threads. Each thread gets one contiguous part of the output, of equal cost, and
//! walks the groups in it with single-threaded products: no two threads write one element, and which thread computes what
//! depends on the sizes and the number of threads alone. It never looks inside a product (`gemm` does).

#[cfg(test)]
mod tests;

use std::ops::Range;

use super::gemm::{Mat, MatMut, gemm, sum_outer_products};
use crate::{Accumulate, GroupedDims};

/// Multiplications below which another thread is not worth waking.
const MIN_PRODUCTS_PER_PART: u64 = 1 << 19;
/// Rows of a weight gradient come in multiples of this, the narrow side of the product's register tile.
const TILE: u64 = 8;
/// What reading and writing one row of a weight gradient costs, in rows of input reduced into it.
const UPDATE_COST: u64 = 8;

/// How many parts to cut the work into.
fn parts(products: u64) -> usize {
    let worthwhile = (products / MIN_PRODUCTS_PER_PART).max(1);
    rayon::current_num_threads().min(usize::try_from(worthwhile).unwrap_or(usize::MAX))
}

/// `y[i] = x[i] · w[e]ᵀ`.
pub(super) fn linear(dims: GroupedDims, offsets: &[i32], x: &[f32], w: &[f32], y: &mut [f32]) {
    let GroupedDims { n, k, .. } = dims;
    over_rows(offsets, n, n * k, y, &|e, rows, y| {
        let x = Mat::rows(&x[rows.start * k..rows.end * k], rows.len(), k, k);
        let w = Mat::rows(&w[e * n * k..(e + 1) * n * k], n, k, k);
        gemm(MatMut::rows(y, rows.len(), n, n), Accumulate::Overwrite, 1.0, x, w.t());
    });
}

/// `dx[i] = dy[i] · w[e]`.
pub(super) fn grad_input(dims: GroupedDims, offsets: &[i32], dy: &[f32], w: &[f32], dx: &mut [f32]) {
    let GroupedDims { n, k, .. } = dims;
    over_rows(offsets, k, n * k, dx, &|e, rows, dx| {
        let dy = Mat::rows(&dy[rows.start * n..rows.end * n], rows.len(), n, n);
        let w = Mat::rows(&w[e * n * k..(e + 1) * n * k], n, k, k);
        gemm(MatMut::rows(dx, rows.len(), k, k), Accumulate::Overwrite, 1.0, dy, w);
    });
}

/// Runs `product(e, rows, out of those rows)` over all groups. Every row costs the same, so each part is the same number of rows
/// wherever the groups' borders are.
fn over_rows(
    offsets: &[i32],
    width: usize,
    products_per_row: usize,
    out: &mut [f32],
    product: &(impl Fn(usize, Range<usize>, &mut [f32]) + Sync),
) {
    let (first, last) = (offsets[0] as usize, offsets[offsets.len() - 1] as usize);
    let rows = last - first;
    let parts = parts(rows as u64 * products_per_row as u64).min(rows.max(1));
    let cut = |part: usize| first + rows * part / parts;
    let run = |rows: Range<usize>, mut out: &mut [f32]| {
        for (e, group) in offsets.windows(2).enumerate() {
            let group = rows.start.max(group[0] as usize)..rows.end.min(group[1] as usize);
            if group.is_empty() {
                continue;
            }
            let (head, tail) = out.split_at_mut(group.len() * width);
            product(e, group, head);
            out = tail;
        }
    };
    share(0..parts, width, &mut out[first * width..last * width], &cut, &run);
}

/// `dw[e] (+)= dyᵀ · x`.
pub(super) fn grad_weight(
    dims: GroupedDims,
    offsets: &[i32],
    (dy, x): (&[f32], &[f32]),
    dw: &mut [f32],
    accumulate: Accumulate,
) {
    let GroupedDims { experts, n, k } = dims;
    let group = |e: usize| offsets[e] as usize..offsets[e + 1] as usize;
    let run = |rows: Range<usize>, mut dw: &mut [f32]| {
        for e in rows.start / n..rows.end.div_ceil(n) {
            let mine = rows.start.max(e * n) - e * n..rows.end.min((e + 1) * n) - e * n;
            let (head, tail) = dw.split_at_mut(mine.len() * k);
            dw = tail;
            let tokens = group(e);
            if tokens.is_empty() || mine.is_empty() {
                if accumulate == Accumulate::Overwrite {
                    head.fill(0.0);
                }
                continue;
            }
            let dy = &dy[tokens.start * n + mine.start..(tokens.end - 1) * n + mine.end];
            sum_outer_products((head, accumulate), dy, n, &x[tokens.start * k..tokens.end * k], k);
        }
    };
    if n == 0 || k == 0 {
        return;
    }
    let costs = || (0..experts).map(|e| row_cost(group(e).len()));
    let total: u64 = costs().sum::<u64>() * n as u64;
    let parts = parts(total * k as u64);
    // The ends are fixed: groups without rows cost nothing and would belong to no part.
    let cut = |part: usize| match part {
        0 => 0,
        _ if part == parts => experts * n,
        _ => cut_by_cost(costs(), n, total * part as u64 / parts as u64),
    };
    share(0..parts, k, dw, &cut, &run);
}

/// The cost of one row of a weight gradient whose group has that many rows of input.
fn row_cost(tokens: usize) -> u64 {
    if tokens == 0 { 0 } else { tokens as u64 + UPDATE_COST }
}

/// The row, counted over all experts' gradients of n rows each, before which the given share of the total cost lies.
fn cut_by_cost(costs: impl Iterator<Item = u64>, n: usize, mut share: u64) -> usize {
    let mut row = 0;
    for cost in costs {
        if share < cost * n as u64 {
            return row + (share / cost).next_multiple_of(TILE).min(n as u64) as usize;
        }
        share -= cost * n as u64;
        row += n;
    }
    row
}

/// Cuts `out`, rows of `width`, before the rows `cut(1)`, `cut(2)`, … and runs each part on some thread. `cut` ascends; a part's rows
/// are `cut(part) .. cut(part + 1)`.
fn share(
    parts: Range<usize>,
    width: usize,
    out: &mut [f32],
    cut: &(impl Fn(usize) -> usize + Sync),
    run: &(impl Fn(Range<usize>, &mut [f32]) + Sync),
) {
    if parts.len() <= 1 {
        return run(cut(parts.start)..cut(parts.end), out);
    }
    let middle = parts.start + parts.len() / 2;
    let (left, right) = out.split_at_mut((cut(middle) - cut(parts.start)) * width);
    rayon::join(
        || share(parts.start..middle, width, left, cut, run),
        || share(middle..parts.end, width, right, cut, run),
    );
}
