//! Row movement on the device: kernels of `rows.cu`.
//!
//! Owns the choice between packs of 16 bytes and single elements, and the checks of shapes. The host never learns how many rows count.

use super::launch::{Grid, launch};
use super::shape::{holds, packed};
use super::{Cuda, CudaAct, pointer, pointer_mut, pointer_or_null};
use crate::{CombineDims, Device, Rows, View, ViewMut};

/// Threads of a block, and rows of it where each warp has one.
const THREADS: u32 = 256;
const ROWS_PER_BLOCK: usize = 8;
/// Slots of a row, one a lane.
pub(super) const MOST_SLOTS: usize = 32;

/// Names of a kernel: in packs for f32 and bf16, then in single elements.
type Names = [&'static str; 4];

macro_rules! names {
    ($name:literal) => {
        [concat!($name, "_wide_f32"), concat!($name, "_wide_bf16"), concat!($name, "_f32"), concat!($name, "_bf16")]
    };
}

/// The kernel for rows of `width` at these addresses.
pub(super) fn packs<A: CudaAct>(names: Names, width: usize, at: &[u64]) -> &'static str {
    if packed::<A>(&[width], at) == 1 { A::pick(names[0], names[1]) } else { A::pick(names[2], names[3]) }
}

pub(super) use names;

fn warp_a_row(rows: usize) -> Grid {
    Grid::new(rows.div_ceil(ROWS_PER_BLOCK), THREADS)
}

/// See [`crate::ExpertOps::gather_rows`].
pub(super) fn gather<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    width: usize,
    index: View<'_, Cuda<A>, i32>,
    src: View<'_, Cuda<A>, A>,
    dst: ViewMut<'_, Cuda<A>, A>,
) {
    holds("index", index.len(), rows.bound);
    holds("dst", dst.len(), rows.bound * width);
    let (src, dst) = (pointer(src), pointer_mut(dst));
    let name = packs::<A>(names!("gather_rows"), width, &[src, dst]);
    launch!(
        queue, name, warp_a_row(rows.bound);
        rows.bound as i32, pointer_or_null(rows.count), width as i32, pointer(index), src, dst
    );
}

/// See [`crate::ExpertOps::expand_rows`]: by slots.
pub(super) fn expand<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    dims: CombineDims,
    slots: View<'_, Cuda<A>, i32>,
    src: View<'_, Cuda<A>, A>,
    dst: ViewMut<'_, Cuda<A>, A>,
) {
    let CombineDims { slots: per_row, width } = dims;
    assert!(per_row <= MOST_SLOTS, "{per_row} slots of a row, at most {MOST_SLOTS}");
    holds("slots", slots.len(), rows.bound * per_row);
    holds("src", src.len(), rows.bound * width);
    let (src, dst) = (pointer(src), pointer_mut(dst));
    let name = packs::<A>(names!("expand_rows"), width, &[src, dst]);
    launch!(
        queue, name, warp_a_row(rows.bound);
        rows.bound as i32, pointer_or_null(rows.count), per_row as i32, width as i32, pointer(slots), src, dst
    );
}

/// What [`reduce`] sums.
pub(super) struct Reduction<'a, A: CudaAct> {
    /// Sizes.
    pub(super) dims: CombineDims,
    /// `[R, slots]`.
    pub(super) slots: View<'a, Cuda<A>, i32>,
    /// `[R, slots]`; none: all 1.
    pub(super) weights: Option<View<'a, Cuda<A>, f32>>,
    /// `[N, width]`.
    pub(super) y: View<'a, Cuda<A>, A>,
}

/// See [`crate::ExpertOps::weighted_reduce`].
pub(super) fn reduce<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    reduction: Reduction<'_, A>,
    out: ViewMut<'_, Cuda<A>, A>,
) {
    let CombineDims { slots: per_row, width } = reduction.dims;
    assert!(per_row <= MOST_SLOTS, "{per_row} slots of a row, at most {MOST_SLOTS}");
    holds("slots", reduction.slots.len(), rows.bound * per_row);
    holds("out", out.len(), rows.bound * width);
    if let Some(weights) = reduction.weights {
        holds("weights", weights.len(), rows.bound * per_row);
    }
    let (y, out) = (pointer(reduction.y), pointer_mut(out));
    let name = packs::<A>(names!("weighted_reduce"), width, &[y, out]);
    launch!(
        queue, name, warp_a_row(rows.bound);
        rows.bound as i32, pointer_or_null(rows.count), per_row as i32, width as i32, pointer(reduction.slots),
        pointer_or_null(reduction.weights), y, out
    );
}

/// What [`weighted_swiglu_grad`] and [`weighted_gelu_grad`] work from.
pub(super) struct Weighted<'a, A: CudaAct> {
    /// F.
    pub(super) f: usize,
    /// `[N]`.
    pub(super) origin: View<'a, Cuda<A>, i32>,
    /// The weights, where `origin` points.
    pub(super) weights: View<'a, Cuda<A>, f32>,
    /// `[N, F]`.
    pub(super) da: View<'a, Cuda<A>, A>,
    /// `[N, 2F]`; of GELU `[N, F]`.
    pub(super) h: View<'a, Cuda<A>, A>,
}

/// `a[N, F]` = GELU of `h[N, F]`.
pub(super) fn gelu<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    f: usize,
    h: View<'_, Cuda<A>, A>,
    a: ViewMut<'_, Cuda<A>, A>,
) {
    holds("h", h.len(), rows.bound * f);
    holds("a", a.len(), rows.bound * f);
    let (h, a) = (pointer(h), pointer_mut(a));
    let name = packs::<A>(names!("gelu_rows"), f, &[h, a]);
    launch!(queue, name, warp_a_row(rows.bound); rows.bound as i32, pointer_or_null(rows.count), f as i32, h, a);
}

/// See [`crate::ExpertOps::weighted_swiglu_grad`].
pub(super) fn weighted_swiglu_grad<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    given: Weighted<'_, A>,
    dh: ViewMut<'_, Cuda<A>, A>,
    a: ViewMut<'_, Cuda<A>, A>,
    dweights: ViewMut<'_, Cuda<A>, f32>,
) {
    weighted_grad(queue, rows, (2 * given.f, names!("weighted_swiglu_grad")), given, dh, a, dweights);
}

/// See [`crate::ExpertOps::weighted_gelu_grad`].
pub(super) fn weighted_gelu_grad<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    given: Weighted<'_, A>,
    dh: ViewMut<'_, Cuda<A>, A>,
    a: ViewMut<'_, Cuda<A>, A>,
    dweights: ViewMut<'_, Cuda<A>, f32>,
) {
    weighted_grad(queue, rows, (given.f, names!("weighted_gelu_grad")), given, dh, a, dweights);
}

/// Rows of `h` and `dh` are `wide`.
#[allow(clippy::too_many_arguments)] // what is saved, what comes in, and three gradients
fn weighted_grad<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    (wide, names): (usize, Names),
    given: Weighted<'_, A>,
    dh: ViewMut<'_, Cuda<A>, A>,
    a: ViewMut<'_, Cuda<A>, A>,
    dweights: ViewMut<'_, Cuda<A>, f32>,
) {
    let (bound, f) = (rows.bound, given.f);
    holds("origin", given.origin.len(), bound);
    holds("da", given.da.len(), bound * f);
    holds("h", given.h.len(), bound * wide);
    holds("dh", dh.len(), bound * wide);
    holds("a", a.len(), bound * f);
    holds("dweights", dweights.len(), given.weights.len());
    let (da, h, dh, a) = (pointer(given.da), pointer(given.h), pointer_mut(dh), pointer_mut(a));
    let name = packs::<A>(names, f, &[da, h, dh, a]);
    launch!(
        queue, name, warp_a_row(bound);
        bound as i32, pointer_or_null(rows.count), f as i32, pointer(given.origin), pointer(given.weights), da, h, dh, a,
        pointer_mut(dweights)
    );
}

/// `dweights[origin[i]]` = the sum of row i of `dots`, `[N, parts]`, ascending. The addresses are those of `dots` and `origin`.
pub(super) fn sum_dots<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    parts: usize,
    (dots, origin): (u64, u64),
    dweights: ViewMut<'_, Cuda<A>, f32>,
) {
    let grid = Grid::new(rows.bound.div_ceil(THREADS as usize), THREADS);
    launch!(
        queue, "sum_dots", grid;
        rows.bound as i32, pointer_or_null(rows.count), parts as i32, dots, origin, pointer_mut(dweights)
    );
}

/// See [`crate::ExpertOps::scatter_choices`].
pub(super) fn scatter_choices<A: CudaAct>(
    queue: &Cuda<A>,
    rows: Rows<'_, Cuda<A>>,
    top_k: usize,
    row_choice: View<'_, Cuda<A>, i32>,
    row_dweights: View<'_, Cuda<A>, f32>,
    mut dweights: ViewMut<'_, Cuda<A>, f32>,
) {
    let slots = rows.bound * top_k;
    holds("row_choice", row_choice.len(), slots);
    holds("row_dweights", row_dweights.len(), slots);
    let choices = dweights.len();
    queue.fill(dweights.reborrow(), 0.0);
    if slots == 0 {
        return;
    }
    launch!(
        queue, "scatter_choices", Grid::cover(slots, THREADS, queue.facts());
        rows.bound as i32, pointer_or_null(rows.count), top_k as i32, choices as i32, pointer(row_choice),
        pointer(row_dweights), pointer_mut(dweights)
    );
}
