//! Grouped GEMM: which kernel, with which tensor maps.
//!
//! Owns the choice between the Hopper kernels and the plain ones. Group sizes are never read by the host.

use std::ffi::c_void;

use cudarc::driver::sys;
use cudarc::driver::sys::CUtensorMapDataType as Kind;

use super::launch::{Grid, launch};
use super::shape::holds;
use super::{Cuda, CudaAct, pointer, pointer_mut, rows};
use crate::{Accumulate, Element, GroupedDims, Rows, View, ViewMut, WeightedSwiglu};

/// Threads and shared memory of the Hopper kernels: four stages of (128 + 256) × 64 bf16, 64 bytes for each of 256 threads, where groups
/// begin, barriers, alignment.
const HOPPER_THREADS: u32 = 384;
/// Columns of their tiles.
const HOPPER_COLUMNS: usize = 256;
const HOPPER_SHARED_BYTES: usize = 4 * (128 + 256) * 64 * 2 + 256 * 64 + (MOST_GROUPS + 1) * 4 + 128 + 1024;
/// That of the weight gradients' kernel: four stages of (128 + 192) × 64 bf16, a box on its way out for each of eight warps, as above.
const GRADIENT_SHARED_BYTES: usize = 4 * (128 + 192) * 64 * 2 + 8 * 16 * 32 * 4 + 256 + 1024;
/// Threads of the plain kernels, and blocks of them that a multiprocessor runs at once.
const PLAIN_THREADS: u32 = 256;
const PLAIN_BLOCKS: usize = 2;
/// What the kernels' tables hold.
const MOST_GROUPS: usize = 1024;

/// `y[i] = x[i] · w[e]ᵀ`.
pub(super) fn linear<A: CudaAct>(
    queue: &Cuda<A>,
    dims: GroupedDims,
    offsets: View<'_, Cuda<A>, i32>,
    x: View<'_, Cuda<A>, A>,
    w: View<'_, Cuda<A>, A>,
    y: ViewMut<'_, Cuda<A>, A>,
) {
    let rows = check(dims, offsets.len(), x.len(), dims.k, w.len());
    assert!(y.len() >= rows * dims.n, "grouped linear: y has {} elements for {rows} rows of {}", y.len(), dims.n);
    let (x, w, offsets, y) = (pointer(x), pointer(w), pointer(offsets), pointer_mut(y));
    let (groups, n, k) = (dims.experts as i32, dims.n as i32, dims.k as i32);
    if !on_hopper(queue, dims, [x, w, y]) {
        let name = A::pick("grouped_linear_f32", "grouped_linear_bf16");
        return launch!(queue, name, plain(queue); x, w, offsets, groups, n, k, y);
    }
    let Some(x) = matrix(queue, x, [rows, dims.k], [128, 64]) else { return };
    let Some(w) = matrix(queue, w, [dims.experts * dims.n, dims.k], [256, 64]) else { return };
    launch!(queue, "grouped_linear_sm90", hopper(queue); x, w, offsets, groups, n, k, y);
}

/// `h[i] = x[i] · w[e]ᵀ` with the fused gate and up projection, `a` = SwiGLU of it. None of it is done, and false comes back, where the
/// Hopper kernel cannot do both at once.
pub(super) fn linear_swiglu<A: CudaAct>(
    queue: &Cuda<A>,
    dims: GroupedDims,
    offsets: View<'_, Cuda<A>, i32>,
    (x, w): (View<'_, Cuda<A>, A>, View<'_, Cuda<A>, A>),
    (h, a): (ViewMut<'_, Cuda<A>, A>, ViewMut<'_, Cuda<A>, A>),
) -> bool {
    let rows = check(dims, offsets.len(), x.len(), dims.k, w.len());
    let f = dims.n / 2;
    assert!(
        h.len() >= rows * dims.n && a.len() >= rows * f,
        "grouped SwiGLU: h has {} and a {} elements for {rows} rows of {} and {f}",
        h.len(),
        a.len(),
        dims.n
    );
    let (x, w, offsets, h, a) = (pointer(x), pointer(w), pointer(offsets), pointer_mut(h), pointer_mut(a));
    // Columns of gate and up lie F apart: each must begin on 16 bytes.
    if !f.is_multiple_of(8) || !on_hopper(queue, dims, [x, w, h]) || !a.is_multiple_of(16) {
        return false;
    }
    let (groups, f, k) = (dims.experts as i32, f as i32, dims.k as i32);
    let maps =
        matrix(queue, x, [rows, dims.k], [128, 64]).zip(matrix(queue, w, [dims.experts * dims.n, dims.k], [128, 64]));
    if let Some((x, w)) = maps {
        launch!(queue, "grouped_swiglu_sm90", hopper(queue); x, w, offsets, groups, f, k, h, a);
    }
    true
}

/// `h[i] = x[i] · w[e]ᵀ`, `a` = GELU of it. None of it is done, and false comes back, where the Hopper kernel cannot do both at once.
pub(super) fn linear_gelu<A: CudaAct>(
    queue: &Cuda<A>,
    dims: GroupedDims,
    offsets: View<'_, Cuda<A>, i32>,
    (x, w): (View<'_, Cuda<A>, A>, View<'_, Cuda<A>, A>),
    (h, a): (ViewMut<'_, Cuda<A>, A>, ViewMut<'_, Cuda<A>, A>),
) -> bool {
    let rows = check(dims, offsets.len(), x.len(), dims.k, w.len());
    let most = h.len().min(a.len());
    assert!(most >= rows * dims.n, "grouped GELU: h or a has {most} elements for {rows} rows of {}", dims.n);
    let (x, w, offsets, h, a) = (pointer(x), pointer(w), pointer(offsets), pointer_mut(h), pointer_mut(a));
    if !on_hopper(queue, dims, [x, w, h]) || !a.is_multiple_of(16) {
        return false;
    }
    let (groups, f, k) = (dims.experts as i32, dims.n as i32, dims.k as i32);
    let maps =
        matrix(queue, x, [rows, dims.k], [128, 64]).zip(matrix(queue, w, [dims.experts * dims.n, dims.k], [256, 64]));
    if let Some((x, w)) = maps {
        launch!(queue, "grouped_gelu_sm90", hopper(queue); x, w, offsets, groups, f, k, h, a);
    }
    true
}

/// `dx[i] = dy[i] · w[e]`.
pub(super) fn grad_input<A: CudaAct>(
    queue: &Cuda<A>,
    dims: GroupedDims,
    offsets: View<'_, Cuda<A>, i32>,
    dy: View<'_, Cuda<A>, A>,
    w: View<'_, Cuda<A>, A>,
    dx: ViewMut<'_, Cuda<A>, A>,
) {
    let rows = check(dims, offsets.len(), dy.len(), dims.n, w.len());
    assert!(dx.len() >= rows * dims.k, "grouped gradient: dx has {} elements for {rows} rows of {}", dx.len(), dims.k);
    let (dy, w, offsets, dx) = (pointer(dy), pointer(w), pointer(offsets), pointer_mut(dx));
    let (groups, n, k) = (dims.experts as i32, dims.n as i32, dims.k as i32);
    if !on_hopper(queue, dims, [dy, w, dx]) {
        let name = A::pick("grouped_grad_input_f32", "grouped_grad_input_bf16");
        return launch!(queue, name, plain(queue); dy, w, offsets, groups, n, k, dx);
    }
    let Some(dy) = matrix(queue, dy, [rows, dims.n], [128, 64]) else { return };
    let Some(w) = matrix(queue, w, [dims.experts * dims.n, dims.k], [64, 64]) else { return };
    launch!(queue, "grouped_grad_input_sm90", hopper(queue); dy, w, offsets, groups, k, n, dx);
}

/// [`grad_input`] with the gradient of the weighted SwiGLU in front. None of it is done, and false comes back, where the Hopper kernel
/// cannot do both at once.
pub(super) fn grad_swiglu<A: CudaAct>(
    queue: &Cuda<A>,
    counted: Rows<'_, Cuda<A>>,
    dims: GroupedDims,
    offsets: View<'_, Cuda<A>, i32>,
    (dy, w): (View<'_, Cuda<A>, A>, View<'_, Cuda<A>, A>),
    swiglu: &mut WeightedSwiglu<'_, Cuda<A>>,
) -> bool {
    let rows = check(dims, offsets.len(), dy.len(), dims.n, w.len());
    let (bound, f) = (counted.bound, dims.k);
    let (dy, w, h) = (pointer(dy), pointer(w), pointer(swiglu.h));
    let aligned = [h, pointer(swiglu.dh.as_view()), pointer(swiglu.a.as_view())].iter().all(|at| at.is_multiple_of(16));
    if !on_hopper(queue, dims, [dy, w, h]) || !aligned {
        return false;
    }
    let WeightedSwiglu { origin, weights, h: saved, dh, a, dweights } = swiglu;
    let (origin, weights) = (*origin, *weights);
    holds("origin", origin.len(), bound);
    holds("h", saved.len(), bound * 2 * f);
    holds("dh", dh.len(), bound * 2 * f);
    holds("a", a.len(), bound * f);
    holds("dweights", dweights.len(), weights.len());
    let maps = matrix(queue, dy, [rows, dims.n], [128, 64]).zip(matrix(queue, w, [dims.experts * dims.n, f], [64, 64]));
    let tiles = f.div_ceil(HOPPER_COLUMNS);
    let Some(((dy, w), dots)) = maps.zip(queue.scratch(bound * tiles * f32::BYTES)) else { return true };
    launch!(
        queue, "grouped_grad_swiglu_sm90", hopper(queue);
        dy, w, pointer(offsets), dims.experts as i32, f as i32, dims.n as i32, h, pointer(origin), pointer(weights),
        pointer_mut(dh.reborrow()), pointer_mut(a.reborrow()), dots.at(0)
    );
    rows::sum_dots(queue, counted, tiles, (dots.at(0), pointer(origin)), dweights.reborrow());
    true
}

/// `dw[e] (+)= dyᵀ · x` over the rows of group e.
pub(super) fn grad_weight<A: CudaAct>(
    queue: &Cuda<A>,
    dims: GroupedDims,
    offsets: View<'_, Cuda<A>, i32>,
    (dy, x): (View<'_, Cuda<A>, A>, View<'_, Cuda<A>, A>),
    dw: ViewMut<'_, Cuda<A>, f32>,
    accumulate: Accumulate,
) {
    let rows = check(dims, offsets.len(), dy.len(), dims.n, dw.len());
    assert!(x.len() >= rows * dims.k, "grouped gradient: x has {} elements for {rows} rows of {}", x.len(), dims.k);
    let (dy, x, offsets, dw) = (pointer(dy), pointer(x), pointer(offsets), pointer_mut(dw));
    let (groups, n, k, add) =
        (dims.experts as i32, dims.n as i32, dims.k as i32, i32::from(accumulate == Accumulate::Add));
    if !on_hopper(queue, dims, [dy, x, dw]) {
        let name = A::pick("grouped_grad_weight_f32", "grouped_grad_weight_bf16");
        return launch!(queue, name, plain(queue); dy, x, offsets, groups, n, k, dw, add);
    }
    let Some(dy) = matrix(queue, dy, [rows, dims.n], [64, 64]) else { return };
    let Some(x) = matrix(queue, x, [rows, dims.k], [64, 64]) else { return };
    let Some(dw) = matrices_f32(queue, dw, [dims.experts, dims.n, dims.k], [16, 32]) else { return };
    let Some(asked) = queue.counters() else { return };
    let grid = hopper(queue).shared(GRADIENT_SHARED_BYTES);
    launch!(queue, "grouped_grad_weight_sm90", grid; dy, x, dw, offsets, groups, n, k, add, asked.at(0));
}

/// The rows that the row operand, `width` wide, has room for.
fn check(dims: GroupedDims, offsets: usize, rows: usize, width: usize, weights: usize) -> usize {
    assert_eq!(offsets, dims.experts + 1, "grouped GEMM: offsets, and groups + 1");
    assert!(dims.experts <= MOST_GROUPS, "grouped GEMM: {} groups, at most {MOST_GROUPS}", dims.experts);
    assert_eq!(weights, dims.experts * dims.n * dims.k, "grouped GEMM: elements of the groups' matrices");
    rows / width
}

/// Whether the Hopper kernels can do it: the copy engine wants rows and bases on 16 bytes.
fn on_hopper<A: CudaAct>(queue: &Cuda<A>, dims: GroupedDims, bases: [u64; 3]) -> bool {
    A::BYTES == 2
        && queue.facts().is_hopper()
        && dims.n.is_multiple_of(8)
        && dims.k.is_multiple_of(8)
        && bases.iter().all(|base| *base != 0 && base.is_multiple_of(16))
}

fn hopper<A: CudaAct>(queue: &Cuda<A>) -> Grid {
    Grid::new(queue.facts().multiprocessors, HOPPER_THREADS).shared(HOPPER_SHARED_BYTES)
}

fn plain<A: CudaAct>(queue: &Cuda<A>) -> Grid {
    Grid::new(queue.facts().multiprocessors * PLAIN_BLOCKS, PLAIN_THREADS)
}

/// A row-major bf16 matrix `[rows, columns]`, copied in boxes of `[rows, columns]`.
fn matrix<A: CudaAct>(queue: &Cuda<A>, at: u64, size: [usize; 2], tile: [u32; 2]) -> Option<sys::CUtensorMap> {
    let [rows, columns] = size;
    let (sizes, strides) = ([columns as u64, rows as u64], [(columns * A::BYTES) as u64]);
    encode(queue, Kind::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, at, (&sizes, &strides), &[tile[1], tile[0]])
}

/// Row-major f32 matrices `[count, rows, columns]`, written in boxes of `[rows, columns]` of one of them.
fn matrices_f32<A: CudaAct>(queue: &Cuda<A>, at: u64, size: [usize; 3], tile: [u32; 2]) -> Option<sys::CUtensorMap> {
    let [count, rows, columns] = size;
    let sizes = [columns as u64, rows as u64, count as u64];
    let strides = [(columns * f32::BYTES) as u64, (rows * columns * f32::BYTES) as u64];
    encode(queue, Kind::CU_TENSOR_MAP_DATA_TYPE_FLOAT32, at, (&sizes, &strides), &[tile[1], tile[0], 1])
}

/// A tensor map in the 128-byte swizzle; what lies outside reads as zero. Sizes and the box are innermost first; strides are in bytes, from
/// the second dimension on. None: the driver refused, which is remembered.
fn encode<A: CudaAct>(
    queue: &Cuda<A>,
    kind: Kind,
    at: u64,
    (sizes, strides): (&[u64], &[u64]),
    tile: &[u32],
) -> Option<sys::CUtensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let steps = [1; 3];
    // SAFETY: the driver reads as many sizes, strides and steps as the rank says, which are there, and writes the map.
    let made = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            kind,
            sizes.len() as u32,
            at as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            tile.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    made.result().map_err(|error| queue.gpu.remember("cuTensorMapEncodeTiled", error)).ok().map(|()| map)
}
