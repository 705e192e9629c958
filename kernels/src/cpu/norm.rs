//! RMSNorm, forward and backward.
//!
//! Owns the arithmetic of one normalised row and the order in which the weight's gradient is summed: each part over its own
//! tokens, then the parts in order.

use multiversion::multiversion;

use super::parallel::{for_parts, parts, parts_mut, rows_mut, with_scratch};
use super::simd::{dot, dot3};
use crate::{Accumulate, NormDims};

/// What the backward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    /// Gradient of the output.
    pub(super) dy: &'a [f32],
    /// Input of the forward pass.
    pub(super) x: &'a [f32],
    /// Weight.
    pub(super) w: &'a [f32],
    /// Reciprocal root mean squares of the forward pass.
    pub(super) rstd: &'a [f32],
}

/// Elements up to the end of the last normalised row. Panics where rows would overlap.
fn extent(dims: NormDims) -> usize {
    let row = dims.groups * dims.width;
    assert!(row <= dims.token_stride || dims.tokens <= 1, "rows of {row} at a stride of {}", dims.token_stride);
    if dims.tokens == 0 { 0 } else { (dims.tokens - 1) * dims.token_stride + row }
}

fn check(dims: NormDims, buffers: &[(&str, usize, usize)]) {
    for (name, len, needed) in buffers {
        assert!(len >= needed, "{name} has {len} elements, {dims:?} needs {needed}");
    }
}

pub(super) fn rms_norm(dims: NormDims, x: &[f32], w: &[f32], y: &mut [f32], rstd: &mut [f32]) {
    let (extent, rows) = (extent(dims), dims.tokens * dims.groups);
    check(
        dims,
        &[("x", x.len(), extent), ("w", w.len(), dims.width), ("y", y.len(), extent), ("rstd", rstd.len(), rows)],
    );
    let outputs = (rows_mut(&mut y[..extent], dims.token_stride), rows_mut(&mut rstd[..rows], dims.groups));
    for_parts(dims.tokens, parts(rows * dims.width), outputs, |range, (y, rstd)| {
        let x = &x[(range.start * dims.token_stride).min(extent)..extent];
        forward(dims, x, &w[..dims.width], y.data, rstd.data);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn forward(dims: NormDims, x: &[f32], w: &[f32], y: &mut [f32], rstd: &mut [f32]) {
    for (row, rstd) in rstd.iter_mut().enumerate() {
        let from = row / dims.groups * dims.token_stride + row % dims.groups * dims.width;
        let x = &x[from..from + dims.width];
        let mean_square = dot(x, x) / dims.width as f32;
        let scale = 1.0 / (mean_square + dims.eps).sqrt();
        *rstd = scale;
        for ((y, x), w) in y[from..from + dims.width].iter_mut().zip(x).zip(w) {
            *y = x * scale * w;
        }
    }
}

pub(super) fn rms_norm_grad(dims: NormDims, saved: Saved<'_>, dx: &mut [f32], dw: &mut [f32], accumulate: Accumulate) {
    let (extent, rows) = (extent(dims), dims.tokens * dims.groups);
    check(
        dims,
        &[
            ("dy", saved.dy.len(), extent),
            ("x", saved.x.len(), extent),
            ("w", saved.w.len(), dims.width),
            ("rstd", saved.rstd.len(), rows),
            ("dx", dx.len(), extent),
            ("dw", dw.len(), dims.width),
        ],
    );
    let parts = parts(rows * dims.width).clamp(1, dims.tokens.max(1));
    with_scratch(parts * dims.width, |partial| {
        let outputs = (rows_mut(&mut dx[..extent], dims.token_stride), parts_mut(partial, dims.width));
        for_parts(dims.tokens, parts, outputs, |range, (dx, dw)| {
            let from = (range.start * dims.token_stride).min(extent);
            let part = Saved {
                dy: &saved.dy[from..extent],
                x: &saved.x[from..extent],
                w: &saved.w[..dims.width],
                rstd: &saved.rstd[range.start * dims.groups..range.end * dims.groups],
            };
            dw.data.fill(0.0);
            backward(dims, part, dx.data, dw.data, accumulate);
        });
        for part in partial.chunks_exact(dims.width.max(1)) {
            for (dw, sum) in dw.iter_mut().zip(part) {
                *dw += sum;
            }
        }
    });
}

/// dx = rstd·(dy·w − x·rstd²·mean(dy·w·x)), dw += dy·x·rstd.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn backward(dims: NormDims, saved: Saved<'_>, dx: &mut [f32], dw: &mut [f32], accumulate: Accumulate) {
    let w = saved.w;
    for (row, rstd) in saved.rstd.iter().enumerate() {
        let from = row / dims.groups * dims.token_stride + row % dims.groups * dims.width;
        let range = from..from + dims.width;
        let (dy, x, dx) = (&saved.dy[range.clone()], &saved.x[range.clone()], &mut dx[range]);
        let slope = rstd * rstd * rstd * dot3(dy, w, x) / dims.width as f32;
        match accumulate {
            Accumulate::Overwrite => {
                for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
                    *dx = dy * w * rstd - x * slope;
                }
            }
            Accumulate::Add => {
                for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
                    *dx += dy * w * rstd - x * slope;
                }
            }
        }
        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
            *dw += dy * x * rstd;
        }
    }
}
