//! Row movement: gather, weighted sums of rows, and the way of the weights' gradients home.
//!
//! Owns the memory-bound loops between shuffle and experts, and how rows are shared out to threads: even ranges of output rows,
//! so that no two threads write one row. It never decides where a row goes.
//!
//! Products and sums are rounded separately (no fused multiply-add), so that every instruction set gives the same bits.

#[cfg(test)]
mod tests;

use multiversion::multiversion;
use rayon::prelude::*;

use crate::CombineDims;

/// Elements below which waking another thread costs more than it saves.
const MIN_ELEMENTS_PER_TASK: usize = 16 * 1024;
/// Columns summed at once in registers and the first-level cache.
const COLUMNS: usize = 128;

/// Rows of each task when `rows`, each touching `elements`, are shared out.
fn rows_per_task(rows: usize, elements: usize) -> usize {
    rows.div_ceil(rayon::current_num_threads()).max(MIN_ELEMENTS_PER_TASK.div_ceil(elements.max(1))).max(1)
}

fn row(data: &[f32], width: usize, index: i32) -> &[f32] {
    let rows = data.len().checked_div(width).unwrap_or(0);
    assert!(index >= 0 && (index as usize) < rows, "row {index} of {rows}");
    let start = index as usize * width;
    &data[start..start + width]
}

/// See [`crate::ExpertOps::gather_rows`]; `dst` is as many rows as `index` has entries.
pub(super) fn gather(width: usize, index: &[i32], src: &[f32], dst: &mut [f32]) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(index.len(), width);
    dst.par_chunks_mut(rows * width).zip(index.par_chunks(rows)).for_each(|(dst, index)| {
        for (dst, &i) in dst.chunks_exact_mut(width).zip(index) {
            dst.copy_from_slice(row(src, width, i));
        }
    });
}

/// The operands of a weighted sum of rows.
pub(super) struct Reduction<'a> {
    /// Sizes.
    pub(super) dims: CombineDims,
    /// `[R, slots]`.
    pub(super) slots: &'a [i32],
    /// `[R, slots]`; none: all 1.
    pub(super) weights: Option<&'a [f32]>,
    /// `[N, width]`.
    pub(super) y: &'a [f32],
}

/// See [`crate::ExpertOps::weighted_reduce`]; `out` is as many rows as there are rows of slots.
pub(super) fn reduce(reduction: &Reduction<'_>, out: &mut [f32]) {
    let CombineDims { slots: k, width } = reduction.dims;
    if width == 0 {
        return;
    }
    let rows = rows_per_task(out.len() / width, width * (k + 1));
    out.par_chunks_mut(rows * width).enumerate().for_each(|(task, out)| {
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            let choices = (task * rows + i) * k..(task * rows + i + 1) * k;
            let weights = reduction.weights.map(|weights| &weights[choices.clone()]);
            reduce_row(&reduction.slots[choices], weights, reduction.y, out);
        }
    });
}

/// One output row, a block of columns at a time.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw", "x86_64+avx2+fma", "aarch64+neon"))]
fn reduce_row(slots: &[i32], weights: Option<&[f32]>, y: &[f32], out: &mut [f32]) {
    let width = out.len();
    for (block, out) in out.chunks_mut(COLUMNS).enumerate() {
        let columns = block * COLUMNS..block * COLUMNS + out.len();
        let mut sums = [0.0f32; COLUMNS];
        for (j, &slot) in slots.iter().enumerate().filter(|&(_, &slot)| slot >= 0) {
            let weight = weights.map_or(1.0, |weights| weights[j]);
            let y = &row(y, width, slot)[columns.clone()];
            sums.iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
        }
        out.copy_from_slice(&sums[..out.len()]);
    }
}

/// See [`crate::ExpertOps::scatter_choices`].
pub(super) fn scatter(row_choice: &[i32], row_dweights: &[f32], dweights: &mut [f32]) {
    dweights.fill(0.0);
    for (&choice, &dweight) in row_choice.iter().zip(row_dweights) {
        if choice >= 0 {
            dweights[choice as usize] = dweight;
        }
    }
}
