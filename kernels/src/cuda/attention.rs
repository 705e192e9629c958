//! Rotary embedding and causal attention on a GPU.
//!
//! Owns the choice of kernels. bf16 heads of up to 256 columns, a multiple of 8, in rows that begin on 16 bytes go to the tensor cores
//! (`attention.cu`, `attention_grad.cu`, on Hopper their namesakes in `_sm90.cu`), rounded up to the nearest width that is compiled; everything else, f32 first of all, goes to
//! `attention_plain.cu`. The backward pass borrows `[B·S, heads]` f32 of the queue's scratch.

use super::gpu::Facts;
use super::launch::{Grid, launch};
use super::{Cuda, CudaAct, pointer, pointer_mut, pointer_or_null};
use crate::{AttentionDims, AttentionOps, Element, RotaryDirection, View, ViewMut};

/// Rows of a block of the plain kernels, one a warp.
const PLAIN_ROWS: usize = 4;
/// The widest head of the plain kernels: four warps' vectors in the shared memory that needs no asking.
const PLAIN_DIM_MOST: usize = 736;
/// Threads of a rotary block.
const ROTARY_THREADS: u32 = 256;

/// The sizes as the kernels take them: `AttentionShape` of `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    batch: i32,
    seq: i32,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    scale: f32,
}

impl Shape {
    fn of(dims: AttentionDims) -> Self {
        let AttentionDims { batch, seq, heads, kv_heads, head_dim } = dims;
        let [batch, seq, heads, kv_heads, dim] = [batch, seq, heads, kv_heads, head_dim].map(|size| size as i32);
        Self { batch, seq, heads, kv_heads, dim, scale: 1.0 / (head_dim as f32).sqrt() }
    }
}

/// Tensor-core kernels for heads of at most `dim` columns.
struct Tiled {
    dim: usize,
    /// Whether they are Hopper's own.
    hopper: bool,
    forward: &'static str,
    grad_queries: &'static str,
    grad_keys: &'static str,
}

macro_rules! tiled {
    ($hopper:literal, $family:literal, $($dim:literal)+) => {
        [$(Tiled {
            dim: $dim,
            hopper: $hopper,
            forward: concat!("attention_", $family, $dim, "_bf16"),
            grad_queries: concat!("attention_grad_queries_", $family, $dim, "_bf16"),
            grad_keys: concat!("attention_grad_keys_", $family, $dim, "_bf16"),
        }),+]
    };
}

const TILED: [Tiled; 5] = tiled!(false, "", 32 64 96 128 256);
const HOPPER: [Tiled; 2] = tiled!(true, "hopper_", 64 128);
/// Heads up to here are not worth Hopper's narrowest kernels.
const NARROW: usize = 32;

/// The launches. Rows, tiles and buffers are those of the kernels' files.
impl Tiled {
    /// The kernels for these heads, if there are any for rows at these addresses.
    fn pick<A: CudaAct>(dims: AttentionDims, addresses: &[u64], facts: &Facts) -> Option<&'static Self> {
        let dim = dims.head_dim;
        if A::BYTES != 2 || !dim.is_multiple_of(8) || !addresses.iter().all(|at| at.is_multiple_of(16)) {
            return None;
        }
        let hopper = HOPPER.iter().filter(|_| facts.is_hopper() && dim > NARROW);
        hopper.chain(&TILED).find(|tiled| dim <= tiled.dim)
    }

    fn is_wide(&self) -> bool {
        self.dim > 128
    }

    fn row_bytes(&self) -> usize {
        2 * self.dim
    }

    /// One block for some query rows of a head, with shared memory for `rows_beside` other rows.
    fn query_grid(&self, dims: AttentionDims, own_copies: usize, rows_beside: usize) -> Grid {
        let own = if self.is_wide() { 64 } else { 128 };
        let blocks = (dims.batch * dims.heads, dims.seq.div_ceil(own), 1);
        grid(blocks, if self.hopper { 256 } else { 128 }).shared((own_copies * own + rows_beside) * self.row_bytes())
    }

    /// Queries; keys and values twice.
    fn forward_grid(&self, dims: AttentionDims) -> Grid {
        let keys = match (self.hopper, self.is_wide()) {
            (true, _) => 128,
            (false, false) => 64,
            (false, true) => 32,
        };
        self.query_grid(dims, 1, 4 * keys)
    }

    /// Queries and their part of the gradient; keys and values twice, or once where heads are wide.
    fn grad_queries_grid(&self, dims: AttentionDims) -> Grid {
        let keys = if self.hopper { 64 } else { 32 };
        self.query_grid(dims, 2, if self.is_wide() { 2 } else { 4 } * keys)
    }

    /// Keys and values; queries, their part of the gradient and three numbers a query, as often as fit, at most twice. Says how often,
    /// too.
    fn grad_keys_grid(&self, dims: AttentionDims, facts: &Facts) -> (Grid, i32) {
        let (split, warps, rows) = if self.is_wide() { (2, 4, 32) } else { (1, 8, 64) };
        let keys = 16 * warps;
        let buffer = (2 * rows * self.row_bytes() + 3 * rows * 4).next_multiple_of(128);
        let bytes = |buffers| 2 * keys * self.row_bytes() + buffers * buffer;
        let buffers = if bytes(2) <= facts.shared_bytes { 2 } else { 1 };
        let blocks = (dims.batch * dims.kv_heads, dims.seq.div_ceil(keys), split);
        (grid(blocks, 32 * warps).shared(bytes(buffers)), buffers as i32)
    }
}

fn grid(blocks: (usize, usize, usize), threads: usize) -> Grid {
    let (x, y, z) = blocks;
    Grid { blocks: (x as u32, y as u32, z as u32), ..Grid::new(0, threads as u32) }
}

/// Of the plain kernels: one warp for each token and head, with `vectors` heads' worth of shared memory.
fn plain_grid(dims: AttentionDims, heads: usize, vectors: usize) -> Grid {
    assert!(
        dims.head_dim <= PLAIN_DIM_MOST,
        "heads of {} columns; attention takes up to {PLAIN_DIM_MOST}",
        dims.head_dim
    );
    let floats = PLAIN_ROWS * (64 + vectors * dims.head_dim);
    grid((dims.tokens().div_ceil(PLAIN_ROWS), heads, 1), 32 * PLAIN_ROWS).shared(floats * f32::BYTES)
}

/// That every buffer holds its rows.
fn check(dims: AttentionDims, buffers: &[(&str, usize, usize)]) {
    let AttentionDims { heads, kv_heads, .. } = dims;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} query heads over {kv_heads} key/value heads");
    for &(name, len, width) in buffers {
        assert!(len >= dims.tokens() * width, "{name} of {len} elements for {dims:?}");
    }
}

/// The address of each position's first visible one; null where every position sees its whole past.
fn starts_of<A: CudaAct>(dims: AttentionDims, starts: Option<View<'_, Cuda<A>, i32>>) -> u64 {
    let len = starts.map_or(dims.tokens(), |starts| starts.len());
    assert!(len >= dims.tokens(), "starts of {len} elements for {dims:?}");
    pointer_or_null(starts)
}

impl<A: CudaAct> AttentionOps for Cuda<A> {
    fn rotary(
        &self,
        dims: AttentionDims,
        direction: RotaryDirection,
        cos: View<'_, Self, f32>,
        sin: View<'_, Self, f32>,
        qkv: ViewMut<'_, Self, A>,
    ) {
        let (half, heads) = (dims.head_dim / 2, dims.heads + dims.kv_heads);
        assert_eq!(dims.head_dim, 2 * half, "rotary embedding pairs the halves of a head");
        assert!(
            cos.len() >= dims.seq * half && sin.len() >= dims.seq * half,
            "angles of {} positions x {half}",
            dims.seq
        );
        check(dims, &[("qkv", qkv.len(), dims.qkv_width())]);
        let (cos, sin, qkv) = (pointer(cos), pointer(sin), pointer_mut(qkv));
        let lanes = 16 / A::BYTES;
        let whole = half.is_multiple_of(lanes) && [cos, sin, qkv].iter().all(|at| at.is_multiple_of(16));
        let (name, items) = if whole {
            (A::pick("rotary_f32", "rotary_bf16"), dims.tokens() * heads * half / lanes)
        } else {
            (A::pick("rotary_single_f32", "rotary_single_bf16"), dims.tokens() * heads * half)
        };
        if items == 0 {
            return;
        }
        assert!(items <= i32::MAX as usize, "rotary embedding of {items} pieces; the kernel counts to 2^31");
        let sign = if direction == RotaryDirection::Forward { 1.0_f32 } else { -1.0 };
        let grid = Grid::cover(items, ROTARY_THREADS, &self.gpu.facts);
        let (tokens, seq) = (dims.tokens() as i32, dims.seq as i32);
        launch!(self, name, grid; qkv, cos, sin, sign, tokens, seq, heads as i32, half as i32, dims.qkv_width() as i64);
    }

    fn attention(
        &self,
        dims: AttentionDims,
        starts: Option<View<'_, Self, i32>>,
        qkv: View<'_, Self, A>,
        out: ViewMut<'_, Self, A>,
        lse: ViewMut<'_, Self, f32>,
    ) {
        let out_width = dims.heads * dims.head_dim;
        check(
            dims,
            &[("qkv", qkv.len(), dims.qkv_width()), ("out", out.len(), out_width), ("lse", lse.len(), dims.heads)],
        );
        let starts = starts_of(dims, starts);
        let (qkv, out, lse) = (pointer(qkv), pointer_mut(out), pointer_mut(lse));
        let (name, grid) = match Tiled::pick::<A>(dims, &[qkv, out], &self.gpu.facts) {
            Some(tiled) => (tiled.forward, tiled.forward_grid(dims)),
            None => (A::pick("attention_plain_f32", "attention_plain_bf16"), plain_grid(dims, dims.heads, 2)),
        };
        launch!(self, name, grid; qkv, starts, out, lse, Shape::of(dims));
    }

    fn attention_grad(
        &self,
        dims: AttentionDims,
        starts: Option<View<'_, Self, i32>>,
        qkv: View<'_, Self, A>,
        out: View<'_, Self, A>,
        lse: View<'_, Self, f32>,
        dout: View<'_, Self, A>,
        dqkv: ViewMut<'_, Self, A>,
    ) {
        let out_width = dims.heads * dims.head_dim;
        check(
            dims,
            &[
                ("qkv", qkv.len(), dims.qkv_width()),
                ("out", out.len(), out_width),
                ("lse", lse.len(), dims.heads),
                ("dout", dout.len(), out_width),
                ("dqkv", dqkv.len(), dims.qkv_width()),
            ],
        );
        let rows = dims.tokens() * dims.heads;
        let Some(scratch) = self.scratch(rows * f32::BYTES) else { return };
        let (delta, shape) = (scratch.at(0), Shape::of(dims));
        let (qkv, out, lse, dout, dqkv) = (pointer(qkv), pointer(out), pointer(lse), pointer(dout), pointer_mut(dqkv));
        let starts = starts_of(dims, starts);
        let Some(tiled) = Tiled::pick::<A>(dims, &[qkv, out, dout, dqkv], &self.gpu.facts) else {
            let (queries, keys) = (plain_grid(dims, dims.heads, 3), plain_grid(dims, dims.kv_heads, 4));
            let name = A::pick("attention_grad_queries_plain_f32", "attention_grad_queries_plain_bf16");
            launch!(self, name, queries; qkv, starts, out, lse, dout, delta, dqkv, shape);
            let name = A::pick("attention_grad_keys_plain_f32", "attention_grad_keys_plain_bf16");
            launch!(self, name, keys; qkv, starts, lse, delta, dout, dqkv, shape);
            return;
        };
        let lanes = (dims.head_dim / 8).next_power_of_two().min(32);
        let delta_grid = Grid::new((rows * lanes).div_ceil(128), 128);
        launch!(self, "attention_delta_bf16", delta_grid; out, dout, delta, rows as i64, dims.head_dim as i32, lanes as i32);
        let grid = tiled.grad_queries_grid(dims);
        launch!(self, tiled.grad_queries, grid; qkv, starts, lse, delta, dout, dqkv, shape);
        let (grid, buffers) = tiled.grad_keys_grid(dims, &self.gpu.facts);
        if tiled.hopper {
            launch!(self, tiled.grad_keys, grid; qkv, starts, lse, delta, dout, dqkv, shape);
        } else {
            launch!(self, tiled.grad_keys, grid; qkv, starts, lse, delta, dout, dqkv, shape, buffers);
        }
    }
}
