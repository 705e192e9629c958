//! Matrix products on one thread, over strided matrices; callers split work across threads.
//!
//! Owns the only call into the `gemm` crate. It never allocates and never spawns.

use crate::Accumulate;

/// A readable strided matrix.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Rows of `cols` elements, `row_stride` apart.
    pub(super) fn rows(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed matrix, without moving anything.
    pub(super) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// A writable matrix with contiguous columns in each row.
pub(super) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// Rows of `cols` elements, `row_stride` apart.
    pub(super) fn rows(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride }
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) {
    assert!(cols <= row_stride || rows <= 1, "rows of {cols} elements overlap at a stride of {row_stride}");
    let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(len >= needed, "a {rows}x{cols} matrix of stride {row_stride} needs {needed} elements, got {len}");
}

/// `dst (+)= alpha · a · b` on the calling thread.
pub(super) fn gemm(dst: MatMut<'_>, accumulate: Accumulate, alpha: f32, a: Mat<'_>, b: Mat<'_>) {
    assert_eq!((dst.rows, dst.cols, a.cols), (a.rows, b.cols, b.rows), "shapes of a matrix product");
    if dst.rows == 0 || dst.cols == 0 {
        return;
    }
    // SAFETY: `check` held for all three matrices when they were made, so every element that the product reads or writes lies
    // inside its slice; `dst` is borrowed mutably, so it overlaps neither operand, and its rows do not overlap each other.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            a.cols,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            accumulate == Accumulate::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Below this width of a weight gradient, packing dy is not paid for by the multiplications that follow.
const NARROW: usize = 512;
/// Tokens that one product of a narrow weight gradient reduces over. The product packs dy in strips of a few columns, reading one
/// short piece of every token's row: with more rows than the first-level cache has room for pieces (rows of 4 KiB and more all fall
/// into the same few sets) and the TLB for pages, each piece is fetched again for the next strip. On one thread at k = 256 the rates
/// of 64 tokens against all at once were 100 against 78 GF/s at n = 4096 and 111 against 94 at n = 1024.
const TOKENS_AT_ONCE: usize = 64;
/// Elements of a narrow weight gradient that are worked on at once, since every few tokens they are read and written again:
/// 1 MiB, half of a second-level cache.
pub(super) const BLOCK_ELEMENTS: usize = 256 * 1024;

/// `dw (+)= dyᵀ · x` on the calling thread: `dw[n', k]`, `x[tokens, k]` with at least one token; `dy[tokens, n']` has rows `dy_stride`
/// apart.
pub(super) fn sum_outer_products(
    (dw, accumulate): (&mut [f32], Accumulate),
    dy: &[f32],
    dy_stride: usize,
    x: &[f32],
    k: usize,
) {
    let (tokens, rows) = (x.len() / k, dw.len() / k);
    let (rows_at_once, tokens_at_once) =
        if k < NARROW { (BLOCK_ELEMENTS.div_ceil(k), TOKENS_AT_ONCE) } else { (rows, tokens) };
    for (block, dw) in dw.chunks_mut(rows_at_once * k).enumerate() {
        let height = dw.len() / k;
        for (chunk, x) in x.chunks(tokens_at_once * k).enumerate() {
            let depth = x.len() / k;
            let first = chunk * tokens_at_once * dy_stride + block * rows_at_once;
            let dy = Mat::rows(&dy[first..first + (depth - 1) * dy_stride + height], depth, height, dy_stride);
            let accumulate = if chunk == 0 { accumulate } else { Accumulate::Add };
            gemm(MatMut::rows(dw, height, k, k), accumulate, 1.0, dy.t(), Mat::rows(x, depth, k, k));
        }
    }
}
