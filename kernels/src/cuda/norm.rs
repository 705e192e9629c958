//! RMSNorm, forward and backward.
//!
//! Owns which of the kernels' shapes a row goes to: how many threads hold it in registers.

use super::shape::{PACK_BYTES, holds, int, packed};
use super::{Cuda, CudaAct, Grid, launch, pointer, pointer_mut};
use crate::{Accumulate, NormDims, View, ViewMut};

/// What the backward pass reads.
pub(super) struct Saved<'a, A: CudaAct> {
    pub dy: View<'a, Cuda<A>, A>,
    pub x: View<'a, Cuda<A>, A>,
    pub w: View<'a, Cuda<A>, A>,
    pub rstd: View<'a, Cuda<A>, f32>,
}

/// A shape of the kernels of cuda/norm.cu.
struct Shape {
    /// The forward and the backward kernel.
    kernels: [&'static str; 2],
    /// Packs that a row may have.
    packs: usize,
    threads: u32,
    /// Rows that a block of the forward and of the backward kernel works on together.
    rows: [usize; 2],
    /// Blocks of the backward kernel that a multiprocessor has room for: more would only make more partial sums.
    blocks: usize,
}

macro_rules! shape {
    ($act:ident, $name:literal, $packs:literal, $threads:literal, $rows:expr, $blocks:literal) => {
        Shape {
            kernels: [
                $act::pick(concat!("rms_norm_", $name, "_f32"), concat!("rms_norm_", $name, "_bf16")),
                $act::pick(concat!("rms_norm_grad_", $name, "_f32"), concat!("rms_norm_grad_", $name, "_bf16")),
            ],
            packs: $packs,
            threads: $threads,
            rows: $rows,
            blocks: $blocks,
        }
    };
}

/// The kernels' own description of the rows.
#[repr(C)]
#[derive(Clone, Copy)]
struct NormRows {
    rows: i32,
    groups: i32,
    width: i32,
    eps: f32,
    token_stride: i64,
}

impl<A: CudaAct> Cuda<A> {
    pub(super) fn norm(
        &self,
        dims: NormDims,
        x: View<'_, Self, A>,
        w: View<'_, Self, A>,
        y: ViewMut<'_, Self, A>,
        rstd: ViewMut<'_, Self, f32>,
    ) {
        let (rows, extent) = (dims.tokens * dims.groups, extent(dims));
        holds("w", w.len(), dims.width);
        holds("x", x.len(), extent);
        holds("y", y.len(), extent);
        holds("rstd", rstd.len(), rows);
        if rows == 0 {
            return;
        }
        let (x, w, y, rstd) = (pointer(x), pointer(w), pointer_mut(y), pointer_mut(rstd));
        let shape = shape_of::<A>(dims, &[x, w, y]);
        let grid = Grid::new(rows.div_ceil(shape.rows[0]), shape.threads);
        launch!(self, shape.kernels[0], grid; NormRows::new(dims), x, w, y, rstd);
    }

    pub(super) fn norm_grad(
        &self,
        dims: NormDims,
        saved: Saved<'_, A>,
        dx: ViewMut<'_, Self, A>,
        dw: ViewMut<'_, Self, f32>,
        accumulate: Accumulate,
    ) {
        let (rows, extent) = (dims.tokens * dims.groups, extent(dims));
        for (name, len) in [("dy", saved.dy.len()), ("x", saved.x.len()), ("dx", dx.len())] {
            holds(name, len, extent);
        }
        holds("w", saved.w.len(), dims.width);
        holds("dw", dw.len(), dims.width);
        holds("rstd", saved.rstd.len(), rows);
        if rows == 0 {
            return;
        }
        let (dy, x, w, rstd) = (pointer(saved.dy), pointer(saved.x), pointer(saved.w), pointer(saved.rstd));
        let (dx, dw) = (pointer_mut(dx), pointer_mut(dw));
        let shape = shape_of::<A>(dims, &[dy, x, w, dx]);
        let blocks = rows.div_ceil(shape.rows[1]).min(self.facts().multiprocessors * shape.blocks);
        let sum_bytes = dims.width * size_of::<f32>();
        let Some(scratch) = self.scratch(blocks * sum_bytes) else { return };
        let partial = scratch.at(0);
        let add = i32::from(accumulate == Accumulate::Add);
        let grid = Grid::new(blocks, shape.threads).shared(sum_bytes);
        launch!(self, shape.kernels[1], grid; NormRows::new(dims), dy, x, w, rstd, dx, partial, add);
        self.add_partials(blocks, dims.width, partial, dw);
    }
}

impl NormRows {
    fn new(dims: NormDims) -> Self {
        Self {
            rows: int("rows", dims.tokens * dims.groups),
            groups: int("groups", dims.groups),
            width: int("width", dims.width),
            eps: dims.eps,
            token_stride: dims.token_stride as i64,
        }
    }
}

/// Elements up to the end of the last normalised row. Panics where rows would overlap.
fn extent(dims: NormDims) -> usize {
    let row = dims.groups * dims.width;
    assert!(row <= dims.token_stride || dims.tokens <= 1, "rows of {row} at a stride of {}", dims.token_stride);
    if dims.tokens == 0 { 0 } else { (dims.tokens - 1) * dims.token_stride + row }
}

/// The smallest shape that holds a row. Panics where none does.
fn shape_of<A: CudaAct>(dims: NormDims, addresses: &[u64]) -> Shape {
    let whole = packed::<A>(&[dims.width, dims.token_stride], addresses) == 1;
    let packs = if whole { dims.width * A::BYTES / PACK_BYTES } else { dims.width };
    let shapes = if whole {
        vec![
            shape!(A, "heads", 16, 128, [32, 32], 4),
            shape!(A, "narrow", 64, 128, [8, 8], 4),
            shape!(A, "row", 256, 256, [1, 2], 4),
            shape!(A, "wide", 512, 128, [1, 1], 4),
            shape!(A, "widest", 2048, 256, [1, 1], 1),
        ]
    } else {
        vec![shape!(A, "odd", 8192, 256, [1, 1], 2)]
    };
    let fitting = shapes.into_iter().find(|shape| packs <= shape.packs);
    fitting.unwrap_or_else(|| panic!("RMSNorm holds rows of up to 2048 packs of 16 bytes, or 8192 elements: {dims:?}"))
}
