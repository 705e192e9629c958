//! Products of small tiles whose operands already lie packed in cache: what attention is made of.
//!
//! Owns one microkernel that leaves its sums in registers, where attention goes on with them, and the walk over the columns of a
//! strip. A general matrix product packs its operands on every call, which for the short reductions of attention costs as much
//! as the product; here the caller packs once and multiplies many times. It never packs, never splits work, and always computes
//! whole tiles: callers pad.

use std::ops::Range;

use super::vector::{LANES, Vector};

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 8;
/// Columns of a tile: two vectors. A narrower tile of one vector ends a strip.
pub(super) const TILE_COLUMNS: usize = 2 * LANES;

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

/// What happens to the sums of a tile: one call per row and vector, with the row and the column that the vector begins at.
pub(super) trait Sink<V: Vector> {
    /// Must be `#[inline(always)]`, as the kernel is.
    fn take(&mut self, row: usize, column: usize, sums: V);
}

/// `sums[r, c] = Σ_k left[r, k] · right[k, c]` for eight rows, `columns` from a multiple of a tile's to one of sixteen, and
/// `k < depth`. Of columns `panel` apart the right operand is found `panel_stride` further on; sums go to `sink`.
#[inline(always)]
pub(super) fn multiply_strip<V: Vector>(
    columns: Range<usize>,
    depth: usize,
    left: Left<'_>,
    right: Right<'_>,
    panel_stride: usize,
    sink: &mut impl Sink<V>,
) {
    let mut column = columns.start;
    while column + TILE_COLUMNS <= columns.end {
        let right = Right { data: &right.data[column / TILE_COLUMNS * panel_stride..], stride: right.stride };
        multiply_tile::<V, 2>(depth, left, right, column, sink);
        column += TILE_COLUMNS;
    }
    if column < columns.end {
        let right = Right { data: &right.data[column / TILE_COLUMNS * panel_stride..], stride: right.stride };
        multiply_tile::<V, 1>(depth, left, right, column, sink);
    }
}

#[inline(always)]
fn multiply_tile<V: Vector, const VECTORS: usize>(
    depth: usize,
    left: Left<'_>,
    right: Right<'_>,
    column: usize,
    sink: &mut impl Sink<V>,
) {
    let last = depth.saturating_sub(1);
    assert!(left.data.len() > (TILE_ROWS - 1) * left.row_stride + last * left.depth_stride, "left operand of a tile");
    assert!(right.data.len() >= last * right.stride + VECTORS * LANES, "right operand of a tile");
    if V::MANY_REGISTERS {
        // SAFETY: the assertions above bound every access.
        unsafe { multiply_part::<V, TILE_ROWS, VECTORS>(depth, left, right, [0, column], sink) };
    } else {
        for row in (0..TILE_ROWS).step_by(TILE_ROWS / 2) {
            for vector in 0..VECTORS {
                let left = Left { data: &left.data[row * left.row_stride..], ..left };
                let right = Right { data: &right.data[vector * LANES..], ..right };
                // SAFETY: the assertions above bound every access of the whole tile, of which this is a part.
                unsafe {
                    multiply_part::<V, { TILE_ROWS / 2 }, 1>(depth, left, right, [row, column + vector * LANES], sink)
                };
            }
        }
    }
}

/// The sums of as many rows and vectors as registers hold. Of 8 x 2, each step of the reduction is two loads, eight broadcasts
/// and sixteen multiply-adds, which keep both of a processor's units busy while each waits for its own last sum.
///
/// # Safety
/// The operands must reach as far as [`multiply_tile`] asserts.
#[inline(always)]
unsafe fn multiply_part<V: Vector, const ROWS: usize, const VECTORS: usize>(
    depth: usize,
    left: Left<'_>,
    right: Right<'_>,
    [first_row, first_column]: [usize; 2],
    sink: &mut impl Sink<V>,
) {
    let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
    let (left_data, right_data) = (left.data.as_ptr(), right.data.as_ptr());
    for k in 0..depth {
        // SAFETY: `k < depth`, so by this function's contract the row of the right operand lies inside its slice; an array of
        // floats is aligned as a float is.
        let row: [V; VECTORS] = unsafe {
            let row = right_data.add(k * right.stride).cast::<[f32; LANES]>();
            let mut vectors = [V::splat(0.0); VECTORS];
            for (c, vector) in vectors.iter_mut().enumerate() {
                *vector = V::load(&*row.add(c));
            }
            vectors
        };
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above, for the elements of the left operand.
            let x = V::splat(unsafe { *left_data.add(k * left.depth_stride + r * left.row_stride) });
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = x.mul_add(row[c], *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (c, sum) in sums.iter().enumerate() {
            sink.take(first_row + r, first_column + c * LANES, *sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::vector::{Task, dispatch_to_each};
    use super::*;

    /// Rows of 50 of which the strip takes up to 48.
    struct Rows<'a>(&'a mut [f32]);

    impl<V: Vector> Sink<V> for Rows<'_> {
        #[inline(always)]
        fn take(&mut self, row: usize, column: usize, sums: V) {
            sums.store_first(&mut self.0[row * 50 + column..][..LANES]);
        }
    }

    #[derive(Clone, Copy)]
    struct Product<'a> {
        skipped: usize,
        columns: usize,
        depth: usize,
        left: Left<'a>,
        right: Right<'a>,
    }

    impl Task for Product<'_> {
        #[inline(always)]
        fn run<V: Vector>(self) {
            let Self { skipped, columns, depth, left, right } = self;
            let mut out = vec![0.5; TILE_ROWS * 50];
            multiply_strip::<V>(skipped..columns, depth, left, right, TILE_COLUMNS, &mut Rows(&mut out));
            for (r, row) in out.chunks_exact(50).enumerate() {
                let untouched = row[..skipped].iter().chain(&row[columns..]);
                assert!(untouched.copied().all(|x| x == 0.5), "wrote outside of {skipped}..{columns}");
                for (c, got) in (skipped..).zip(&row[skipped..columns]) {
                    let product = |k| {
                        let left = left.data[r * left.row_stride + k * left.depth_stride];
                        f64::from(left) * f64::from(right.data[k * right.stride + c])
                    };
                    let error = (f64::from(*got) - (0..depth).map(product).sum::<f64>()).abs();
                    assert!(error <= f64::from(f32::EPSILON) * (depth + 1) as f64, "{columns} {depth} {r} {c}");
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_product_and_leaves_its_surroundings() {
        let value = |i: usize| ((i * 61 % 127) as f32 - 63.0) / 64.0;
        let a: Vec<f32> = (0..1000).map(value).collect();
        let b: Vec<f32> = (0..100 * 56).map(|i| value(i + 17)).collect();
        // Left rows contiguous, left columns contiguous; strips of a narrow tile, a whole one and both; depths around nothing,
        // one and many.
        for (row_stride, depth_stride) in [(100, 1), (1, 9)] {
            let columns = [(0, 16), (0, 32), (0, 48), (32, 48), (32, 32)];
            for ((skipped, columns), depth) in columns.into_iter().flat_map(|c| [0, 1, 7, 32, 96].map(|d| (c, d))) {
                let (left, right) = (Left { data: &a, row_stride, depth_stride }, Right { data: &b, stride: 56 });
                dispatch_to_each(Product { skipped, columns, depth, left, right });
            }
        }
    }
}
