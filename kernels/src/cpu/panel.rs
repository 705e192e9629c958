//! Products of small tiles whose operands already lie packed in cache: what attention is made of.
//!
//! Owns one fixed-size microkernel per instruction set. A general matrix product packs its operands on every call, which for
//! the short reductions of attention costs as much as the product; here the caller packs once and multiplies many times. It
//! never packs, never splits work, and always computes whole tiles: callers pad.

use crate::Accumulate;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 8;
/// Columns of a tile.
pub(super) const TILE_COLUMNS: usize = 32;

/// The left operand: element (row r, depth k) is `data[r · row_stride + k · depth_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    /// Starts at the tile's first element.
    pub(super) data: &'a [f32],
    /// Elements from one row to the next.
    pub(super) row_stride: usize,
    /// Elements from one step of the reduction to the next.
    pub(super) depth_stride: usize,
}

/// The right operand: element (depth k, column c) is `data[k · stride + c]`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    /// Starts at the tile's first element.
    pub(super) data: &'a [f32],
    /// Elements from one step of the reduction to the next.
    pub(super) stride: usize,
}

/// `out[r · out_stride + c] (+)= Σ_k left[r, k] · right[k, c]` for a whole tile and `k < depth`.
#[inline]
pub(super) fn multiply_tile(
    accumulate: Accumulate,
    depth: usize,
    left: Left<'_>,
    right: Right<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    let last = depth.saturating_sub(1);
    assert!(left.data.len() > (TILE_ROWS - 1) * left.row_stride + last * left.depth_stride, "left operand of a tile");
    assert!(right.data.len() >= last * right.stride + TILE_COLUMNS, "right operand of a tile");
    assert!(out.len() >= (TILE_ROWS - 1) * out_stride + TILE_COLUMNS, "output of a tile");
    let add = accumulate == Accumulate::Add;
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the instruction set was detected on the line above, and the assertions bound every access.
            return unsafe { tile_avx512(depth, left, right, out, out_stride, add) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { tile_avx2(depth, left, right, out, out_stride, add) };
        }
    }
    tile_portable(depth, left, right, out, out_stride, add);
}

/// The tile in sixteen accumulators of sixteen lanes; each step of the reduction is two loads, eight broadcasts, sixteen FMAs.
///
/// # Safety
/// The operands and the output must reach as far as [`multiply_tile`] asserts.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512(depth: usize, left: Left<'_>, right: Right<'_>, out: &mut [f32], out_stride: usize, add: bool) {
    use std::arch::x86_64::{
        _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };
    let mut sums = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
    for k in 0..depth {
        // SAFETY: `k < depth`, so by this function's contract the row of the right operand and the eight elements of the left
        // one lie inside their slices.
        unsafe {
            let row = right.data.as_ptr().add(k * right.stride);
            let halves = [_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(16))];
            let column = left.data.as_ptr().add(k * left.depth_stride);
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*column.add(r * left.row_stride));
                sums[0] = _mm512_fmadd_ps(x, halves[0], sums[0]);
                sums[1] = _mm512_fmadd_ps(x, halves[1], sums[1]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (half, mut sum) in sums.into_iter().enumerate() {
            // SAFETY: `r < TILE_ROWS` and `half < 2`, so by this function's contract the sixteen elements lie inside `out`.
            unsafe {
                let at = out.as_mut_ptr().add(r * out_stride + 16 * half);
                if add {
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(at));
                }
                _mm512_storeu_ps(at, sum);
            }
        }
    }
}

/// The tile as four quarters of four rows and sixteen columns, since sixteen registers hold no more.
///
/// # Safety
/// The operands and the output must reach as far as [`multiply_tile`] asserts.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2(depth: usize, left: Left<'_>, right: Right<'_>, out: &mut [f32], out_stride: usize, add: bool) {
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    const QUARTER_ROWS: usize = TILE_ROWS / 2;
    for (first_row, first_column) in [(0, 0), (0, 16), (QUARTER_ROWS, 0), (QUARTER_ROWS, 16)] {
        let mut sums = [[_mm256_setzero_ps(); 2]; QUARTER_ROWS];
        for k in 0..depth {
            // SAFETY: `k < depth`, so by this function's contract this quarter of the right operand's row and its four elements
            // of the left one lie inside their slices.
            unsafe {
                let row = right.data.as_ptr().add(k * right.stride + first_column);
                let halves = [_mm256_loadu_ps(row), _mm256_loadu_ps(row.add(8))];
                let column = left.data.as_ptr().add(k * left.depth_stride + first_row * left.row_stride);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*column.add(r * left.row_stride));
                    sums[0] = _mm256_fmadd_ps(x, halves[0], sums[0]);
                    sums[1] = _mm256_fmadd_ps(x, halves[1], sums[1]);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (half, mut sum) in sums.into_iter().enumerate() {
                // SAFETY: the row and the eight columns belong to the tile, which by this function's contract lies inside `out`.
                unsafe {
                    let at = out.as_mut_ptr().add((first_row + r) * out_stride + first_column + 8 * half);
                    if add {
                        sum = _mm256_add_ps(sum, _mm256_loadu_ps(at));
                    }
                    _mm256_storeu_ps(at, sum);
                }
            }
        }
    }
}

/// The tile row by row, for processors without the above.
fn tile_portable(depth: usize, left: Left<'_>, right: Right<'_>, out: &mut [f32], out_stride: usize, add: bool) {
    for r in 0..TILE_ROWS {
        let mut sums = [0.0; TILE_COLUMNS];
        for k in 0..depth {
            let x = left.data[r * left.row_stride + k * left.depth_stride];
            for (sum, y) in sums.iter_mut().zip(&right.data[k * right.stride..]) {
                *sum += x * y;
            }
        }
        for (out, sum) in out[r * out_stride..].iter_mut().zip(sums) {
            *out = if add { *out + sum } else { sum };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Tile = unsafe fn(usize, Left<'_>, Right<'_>, &mut [f32], usize, bool);

    fn available() -> Vec<(&'static str, Tile)> {
        let mut tiles: Vec<(&'static str, Tile)> = vec![("portable", tile_portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                tiles.push(("avx2", tile_avx2));
            }
            if is_x86_feature_detected!("avx512f") {
                tiles.push(("avx512", tile_avx512));
            }
        }
        tiles
    }

    #[test]
    fn every_instruction_set_gives_the_product_and_leaves_its_surroundings() {
        let value = |i: usize| ((i * 61 % 127) as f32 - 63.0) / 64.0;
        // Left rows contiguous, left columns contiguous; depths around nothing, one and many.
        for (row_stride, depth_stride) in [(100, 1), (1, 9)] {
            for depth in [0, 1, 7, 32, 96] {
                let a: Vec<f32> = (0..1000).map(value).collect();
                let b: Vec<f32> = (0..100 * 40).map(|i| value(i + 17)).collect();
                for (name, tile) in available() {
                    for add in [false, true] {
                        let mut out = vec![0.5; 8 * 33];
                        let (left, right) =
                            (Left { data: &a, row_stride, depth_stride }, Right { data: &b, stride: 40 });
                        // SAFETY: 1000 and 4000 elements exceed the farthest access of depth 96, and `out` has 8 rows of 33.
                        unsafe { tile(depth, left, right, &mut out, 33, add) };
                        for r in 0..8 {
                            assert_eq!(out[r * 33 + 32], 0.5, "{name} wrote beyond its columns");
                            for c in 0..32 {
                                let product =
                                    |k| f64::from(a[r * row_stride + k * depth_stride]) * f64::from(b[k * 40 + c]);
                                let exact = (0..depth).map(product).sum::<f64>() + if add { 0.5 } else { 0.0 };
                                let error = (f64::from(out[r * 33 + c]) - exact).abs();
                                assert!(
                                    error <= f64::from(f32::EPSILON) * (depth + 1) as f64,
                                    "{name} {depth} {r} {c}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
