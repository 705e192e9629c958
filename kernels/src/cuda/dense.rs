//! Dense layers: linear and its gradients through cuBLASLt, element-wise layers, embedding.
//!
//! Owns the `DenseOps` implementation: the checks of shapes, and which kernel or product does what. RMSNorm is in the module beside.

use super::blas::{Number, Product};
use super::norm::Saved;
use super::shape::{Cut, PACK_BYTES, holds, int, items, packed};
use super::{Cuda, CudaAct, Grid, launch, pointer, pointer_mut, pointer_or_null};
use crate::{Accumulate, ActivationKind, DenseOps, GemmDims, NormDims, Rows, View, ViewMut};

type Read<'a, A> = View<'a, Cuda<A>, A>;
type Write<'a, A> = ViewMut<'a, Cuda<A>, A>;
type ReadF32<'a, A> = View<'a, Cuda<A>, f32>;
type WriteF32<'a, A> = ViewMut<'a, Cuda<A>, f32>;

/// Threads of a block of element-wise kernels.
const THREADS: u32 = 256;
/// Places in the sorted order that one block of `id_chunks` sums.
const CHUNK: usize = 32;

impl<A: CudaAct> DenseOps for Cuda<A> {
    fn linear(&self, dims: GemmDims, x: Read<'_, A>, w: Read<'_, A>, bias: Option<Read<'_, A>>, y: Write<'_, A>) {
        check(dims, x.len(), w.len(), y.len());
        let y = pointer_mut(y);
        if let Some(bias) = bias {
            holds("bias", bias.len(), dims.n);
            let n = dims.m * dims.n;
            let grid = Grid::cover(n, THREADS, self.facts());
            let (rows, columns) = (dims.m as i64, int("n", dims.n));
            if n > 0 {
                launch!(self, A::pick("bias_rows_f32", "bias_rows_bf16"), grid; rows, columns, pointer(bias), y);
            }
        }
        let product = Product { add: bias.is_some(), ..forward::<A>(dims, Number::of::<A>()) };
        self.multiply(product, pointer(w), pointer(x), y);
    }

    fn linear_grad_input(
        &self,
        dims: GemmDims,
        dy: Read<'_, A>,
        w: Read<'_, A>,
        dx: Write<'_, A>,
        accumulate: Accumulate,
    ) {
        check(dims, dx.len(), w.len(), dy.len());
        self.multiply(grad_input::<A>(dims, accumulate), pointer(w), pointer(dy), pointer_mut(dx));
    }

    fn linear_grad_weight(&self, dims: GemmDims, dy: Read<'_, A>, x: Read<'_, A>, dw: WriteF32<'_, A>) {
        check(dims, x.len(), dw.len(), dy.len());
        self.multiply(grad_weight::<A>(dims), pointer(x), pointer(dy), pointer_mut(dw));
    }

    fn bias_grad(&self, rows: usize, columns: usize, dy: Read<'_, A>, db: WriteF32<'_, A>) {
        holds("dy", dy.len(), rows * columns);
        holds("db", db.len(), columns);
        if rows == 0 || columns == 0 {
            return;
        }
        let (dy, db) = (pointer(dy), pointer_mut(db));
        let packed = packed::<A>(&[columns], &[dy]);
        let width = 32 * if packed == 1 { PACK_BYTES / A::BYTES } else { 1 };
        let blocks = columns.div_ceil(width);
        // Enough blocks to fill the GPU, each with rows enough to be worth its partial sums.
        let chunks = (8 * self.facts().multiprocessors).div_ceil(blocks).min(rows.div_ceil(32)).min(65_535);
        let Some(scratch) = self.scratch(chunks * columns * size_of::<f32>()) else { return };
        let (partial, grid) =
            (scratch.at(0), Grid { blocks: (blocks as u32, chunks as u32, 1), ..Grid::new(1, THREADS) });
        let (rows, columns_int) = (rows as i64, int("columns", columns));
        launch!(self, A::pick("bias_grad_f32", "bias_grad_bf16"), grid; rows, columns_int, dy, partial, packed);
        self.add_partials(chunks, columns, partial, db);
    }

    fn linear_f32(&self, dims: GemmDims, x: Read<'_, A>, w: Read<'_, A>, y: WriteF32<'_, A>) {
        check(dims, x.len(), w.len(), y.len());
        self.multiply(forward::<A>(dims, Number::F32), pointer(w), pointer(x), pointer_mut(y));
    }

    fn linear_f32_grad_input(
        &self,
        dims: GemmDims,
        dy: ReadF32<'_, A>,
        w: Read<'_, A>,
        dx: Write<'_, A>,
        accumulate: Accumulate,
    ) {
        check(dims, dx.len(), w.len(), dy.len());
        let (dy, w, dx) = (pointer(dy), pointer(w), pointer_mut(dx));
        if A::HOLDS_F32 {
            return self.multiply(grad_input::<A>(dims, accumulate), w, dy, dx);
        }
        let padded = parts(dims.n);
        let split_bytes = aligned(dims.m * padded * A::BYTES);
        let Some(scratch) = self.scratch(split_bytes + padded * dims.k * A::BYTES) else { return };
        let split = self.split_rows(dims, dy, scratch.at(0));
        self.split_grad_input(dims, split, scratch.at(split_bytes), w, (dx, accumulate));
    }

    fn linear_f32_grad_weight(&self, dims: GemmDims, dy: ReadF32<'_, A>, x: Read<'_, A>, dw: WriteF32<'_, A>) {
        check(dims, x.len(), dw.len(), dy.len());
        let (dy, x, dw) = (pointer(dy), pointer(x), pointer_mut(dw));
        if A::HOLDS_F32 {
            return self.multiply(grad_weight::<A>(dims), x, dy, dw);
        }
        if dims.m == 0 || dims.n == 0 || dims.k == 0 {
            return;
        }
        let padded = parts(dims.n);
        let split_bytes = aligned(dims.m * padded * A::BYTES);
        let Some(scratch) = self.scratch(split_bytes + padded * dims.k * size_of::<f32>()) else { return };
        let split = self.split_rows(dims, dy, scratch.at(0));
        self.split_grad_weight(dims, split, scratch.at(split_bytes), x, dw);
    }

    fn linear_f32_grads(
        &self,
        dims: GemmDims,
        dy: ReadF32<'_, A>,
        (x, w): (Read<'_, A>, Read<'_, A>),
        dw: WriteF32<'_, A>,
        (dx, accumulate): (Write<'_, A>, Accumulate),
    ) {
        if A::HOLDS_F32 || dims.m == 0 || dims.n == 0 || dims.k == 0 {
            self.linear_f32_grad_weight(dims, dy, x, dw);
            return self.linear_f32_grad_input(dims, dy, w, dx, accumulate);
        }
        check(dims, x.len(), w.len(), dy.len());
        check(dims, dx.len(), dw.len(), dy.len());
        let padded = parts(dims.n);
        let split_bytes = aligned(dims.m * padded * A::BYTES);
        // What follows the parts is the weight's gradient's first, then the input's.
        let Some(scratch) = self.scratch(split_bytes + padded * dims.k * size_of::<f32>()) else { return };
        let split = self.split_rows(dims, pointer(dy), scratch.at(0));
        let rest = scratch.at(split_bytes);
        self.split_grad_weight(dims, split, rest, pointer(x), pointer_mut(dw));
        self.split_grad_input(dims, split, rest, pointer(w), (pointer_mut(dx), accumulate));
    }

    fn rms_norm(&self, dims: NormDims, x: Read<'_, A>, w: Read<'_, A>, y: Write<'_, A>, rstd: WriteF32<'_, A>) {
        self.norm(dims, x, w, y, rstd);
    }

    fn rms_norm_grad(
        &self,
        dims: NormDims,
        dy: Read<'_, A>,
        x: Read<'_, A>,
        w: Read<'_, A>,
        rstd: ReadF32<'_, A>,
        dx: Write<'_, A>,
        dw: WriteF32<'_, A>,
        accumulate: Accumulate,
    ) {
        self.norm_grad(dims, Saved { dy, x, w, rstd }, dx, dw, accumulate);
    }

    fn swiglu(&self, rows: Rows<'_, Self>, f: usize, h: Read<'_, A>, a: Write<'_, A>) {
        holds("h", h.len(), rows.bound * 2 * f);
        holds("a", a.len(), rows.bound * f);
        let (bound, live, h, a) = (int("rows", rows.bound), pointer_or_null(rows.count), pointer(h), pointer_mut(a));
        let packed = packed::<A>(&[f], &[h, a]);
        let items = items::<A>(rows.bound, f, packed);
        if items > 0 {
            let grid = Grid::cover(items, THREADS, self.facts());
            launch!(self, A::pick("swiglu_f32", "swiglu_bf16"), grid; bound, live, int("f", f), h, a, packed);
        }
    }

    fn swiglu_grad(&self, rows: Rows<'_, Self>, f: usize, da: Read<'_, A>, h: Read<'_, A>, dh: Write<'_, A>) {
        holds("da", da.len(), rows.bound * f);
        holds("h", h.len(), rows.bound * 2 * f);
        holds("dh", dh.len(), rows.bound * 2 * f);
        let (bound, live) = (int("rows", rows.bound), pointer_or_null(rows.count));
        let (da, h, dh) = (pointer(da), pointer(h), pointer_mut(dh));
        let packed = packed::<A>(&[f], &[da, h, dh]);
        let items = items::<A>(rows.bound, f, packed);
        if items > 0 {
            let (kernel, grid) =
                (A::pick("swiglu_grad_f32", "swiglu_grad_bf16"), Grid::cover(items, THREADS, self.facts()));
            launch!(self, kernel, grid; bound, live, int("f", f), da, h, dh, packed);
        }
    }

    fn activation(&self, kind: ActivationKind, x: Read<'_, A>, y: Write<'_, A>) {
        let n = x.len();
        assert_eq!(n, y.len(), "lengths of an activation's x and y");
        let (x, y, width) = (pointer(x), pointer_mut(y), PACK_BYTES / A::BYTES);
        let cut = Cut::new(n, width, &[x, y].map(|operand| (operand, A::BYTES)));
        if n > 0 {
            let grid = Grid::cover(cut.threads(width), THREADS, self.facts());
            launch!(self, A::pick("activation_f32", "activation_bf16"), grid; number(kind), x, y, cut);
        }
    }

    fn activation_grad(&self, kind: ActivationKind, x: Read<'_, A>, dy: Read<'_, A>, dx: Write<'_, A>) {
        let n = x.len();
        assert_eq!((n, n), (dy.len(), dx.len()), "lengths of an activation's x, and of its dy and dx");
        let (x, dy, dx, width) = (pointer(x), pointer(dy), pointer_mut(dx), PACK_BYTES / A::BYTES);
        let cut = Cut::new(n, width, &[x, dy, dx].map(|operand| (operand, A::BYTES)));
        if n > 0 {
            let grid = Grid::cover(cut.threads(width), THREADS, self.facts());
            launch!(self, A::pick("activation_grad_f32", "activation_grad_bf16"), grid; number(kind), x, dy, dx, cut);
        }
    }

    fn embedding(&self, h: usize, ids: View<'_, Self, i32>, table: Read<'_, A>, out: Write<'_, A>) {
        let (tokens, vocab) = (ids.len(), table.len().checked_div(h).unwrap_or(0));
        holds("out", out.len(), tokens * h);
        let (ids, table, out) = (pointer(ids), pointer(table), pointer_mut(out));
        let packed = packed::<A>(&[h], &[table, out]);
        let items = items::<A>(tokens, h, packed);
        if items > 0 {
            let grid = Grid::cover(items, THREADS, self.facts());
            let (tokens, h, vocab) = (int("tokens", tokens), int("h", h), int("vocabulary", vocab));
            launch!(self, A::pick("embedding_f32", "embedding_bf16"), grid; tokens, h, vocab, ids, table, out, packed);
        }
    }

    fn embedding_grad(&self, h: usize, ids: View<'_, Self, i32>, dout: Read<'_, A>, dtable: WriteF32<'_, A>) {
        let (tokens, vocab) = (ids.len(), dtable.len().checked_div(h).unwrap_or(0));
        holds("dout", dout.len(), tokens * h);
        if tokens == 0 || h == 0 {
            return;
        }
        let (ids, dout, dtable) = (pointer(ids), pointer(dout), pointer_mut(dtable));
        let (list_bytes, chunks) = (aligned(tokens * size_of::<i32>()), tokens.div_ceil(CHUNK));
        let Some(scratch) = self.scratch(3 * list_bytes + 2 * chunks * h * size_of::<f32>()) else { return };
        let [keys, starts, order, partial] = [0, 1, 2, 3].map(|list| scratch.at(list * list_bytes));
        let packed = packed::<A>(&[h], &[dout, dtable]);
        let width = THREADS as usize * if packed == 1 { PACK_BYTES / A::BYTES } else { 1 };
        let over =
            |x: usize, width: usize| Grid { blocks: (x as u32, h.div_ceil(width) as u32, 1), ..Grid::new(1, THREADS) };
        let (grid, late_grid) = (over(tokens, width), over(chunks, THREADS as usize));
        let (tokens, h, vocab) = (int("tokens", tokens), int("h", h), int("vocabulary", vocab));
        launch!(self, "token_order", Grid::new(chunks, THREADS); tokens, vocab, ids, keys, starts, order);
        launch!(
            self, A::pick("id_chunks_f32", "id_chunks_bf16"), grid;
            tokens, h, vocab, keys, starts, order, dout, partial, dtable, packed
        );
        launch!(self, "id_totals", late_grid; tokens, h, vocab, keys, starts, partial, dtable);
    }

    fn add(&self, x: Read<'_, A>, y: Write<'_, A>) {
        assert_eq!(x.len(), y.len(), "lengths of a sum");
        let n = x.len();
        self.add_at(A::pick("add_f32", "add_bf16"), n, A::BYTES, (pointer(x), pointer_mut(y)));
    }

    fn add_f32(&self, x: ReadF32<'_, A>, y: WriteF32<'_, A>) {
        assert_eq!(x.len(), y.len(), "lengths of a sum");
        let n = x.len();
        self.add_at("add_f32", n, size_of::<f32>(), (pointer(x), pointer_mut(y)));
    }

    fn sigmoid_gate(&self, h: usize, gate: ReadF32<'_, A>, shared: Read<'_, A>, out: Write<'_, A>) {
        let tokens = gate.len();
        holds("shared", shared.len(), tokens * h);
        holds("out", out.len(), tokens * h);
        let (gate, shared, out) = (pointer(gate), pointer(shared), pointer_mut(out));
        let packed = packed::<A>(&[h], &[shared, out]);
        let items = items::<A>(tokens, h, packed);
        if items > 0 {
            let grid = Grid::cover(items, THREADS, self.facts());
            let (tokens, h) = (int("tokens", tokens), int("h", h));
            launch!(self, A::pick("sigmoid_gate_f32", "sigmoid_gate_bf16"), grid; tokens, h, gate, shared, out, packed);
        }
    }

    fn sigmoid_gate_grad(
        &self,
        h: usize,
        dout: Read<'_, A>,
        gate: ReadF32<'_, A>,
        shared: Read<'_, A>,
        dshared: Write<'_, A>,
        dgate: WriteF32<'_, A>,
    ) {
        let tokens = gate.len();
        for (name, len) in [("dout", dout.len()), ("shared", shared.len()), ("dshared", dshared.len())] {
            holds(name, len, tokens * h);
        }
        holds("dgate", dgate.len(), tokens);
        if tokens == 0 {
            return;
        }
        let (dout, gate, shared) = (pointer(dout), pointer(gate), pointer(shared));
        let (dshared, dgate) = (pointer_mut(dshared), pointer_mut(dgate));
        let packed = packed::<A>(&[h], &[dout, shared, dshared]);
        let grid = Grid::cover(32 * tokens, THREADS, self.facts());
        let (kernel, tokens, h) =
            (A::pick("sigmoid_gate_grad_f32", "sigmoid_gate_grad_bf16"), int("tokens", tokens), int("h", h));
        launch!(self, kernel, grid; tokens, h, dout, gate, shared, dshared, dgate, packed);
    }
}

impl<A: CudaAct> Cuda<A> {
    /// `out[columns] += Σ partial[chunks, columns]`, chunks in a fixed order, of the kernel before.
    pub(super) fn add_partials(&self, chunks: usize, columns: usize, partial: u64, out: u64) {
        let (chunks, columns_int) = (int("chunks", chunks), int("columns", columns));
        let grid = Grid::new(columns.div_ceil(32), 1024).early();
        launch!(self, "add_partials", grid; chunks, columns_int, partial, out);
    }

    fn add_at(&self, kernel: &'static str, n: usize, bytes: usize, (x, y): (u64, u64)) {
        let width = PACK_BYTES / bytes;
        let cut = Cut::new(n, width, &[(x, bytes), (y, bytes)]);
        if n > 0 {
            launch!(self, kernel, Grid::cover(cut.threads(width), THREADS, self.facts()); x, y, cut);
        }
    }

    /// `dy[m, n]` as its two bf16 parts, side by side, at `split`, which comes back.
    fn split_rows(&self, dims: GemmDims, dy: u64, split: u64) -> u64 {
        let padded = parts(dims.n);
        let grid = Grid::cover(dims.m * padded, THREADS, self.facts());
        launch!(self, "split_rows", grid; dims.m as i64, int("n", dims.n), int("2n", padded), dy, split);
        split
    }

    /// `dx (+)= [hi | lo] · [w; w]`, so that the sum over both parts is rounded once. `stacked` is scratch.
    fn split_grad_input(&self, dims: GemmDims, split: u64, stacked: u64, w: u64, (dx, accumulate): (u64, Accumulate)) {
        let padded = parts(dims.n);
        let grid = Grid::cover(padded * dims.k, THREADS, self.facts());
        launch!(self, "stack_twice", grid; int("n", dims.n), int("2n", padded), dims.k as i64, w, stacked);
        self.multiply(grad_input::<A>(GemmDims { n: padded, ..dims }, accumulate), stacked, split, dx);
    }

    /// `dw += [hi | lo]ᵀ · x`, which reads x once; the two halves of the result, which are formed in `halves`, are then added to dw.
    fn split_grad_weight(&self, dims: GemmDims, split: u64, halves: u64, x: u64, dw: u64) {
        let product = Product { add: false, ..grad_weight::<A>(GemmDims { n: parts(dims.n), ..dims }) };
        self.multiply(product, x, split, halves);
        let n = dims.n * dims.k;
        launch!(self, "add_halves", Grid::cover(n, THREADS, self.facts()); n as i64, halves, dw);
    }
}

/// The kind as `activation` of kernels/cuda/elementwise.cu knows it.
fn number(kind: ActivationKind) -> i32 {
    match kind {
        ActivationKind::Relu => 0,
        ActivationKind::Gelu => 1,
        ActivationKind::Silu => 2,
        ActivationKind::Tanh => 3,
    }
}

/// Columns that both bf16 parts of `n` columns take: a multiple of 8, so that rows begin at multiples of 16 bytes.
fn parts(n: usize) -> usize {
    (2 * n).next_multiple_of(8)
}

/// So many bytes that what follows lies as well as what went before.
fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

fn check(GemmDims { m, n, k }: GemmDims, x: usize, w: usize, y: usize) {
    for (name, len, rows, columns) in [("[m, k]", x, m, k), ("[n, k]", w, n, k), ("[m, n]", y, m, n)] {
        assert!(len >= rows * columns, "the {name} operand has {len} elements for {rows}x{columns}");
    }
}

/// yᵀ = w · xᵀ.
fn forward<A: CudaAct>(GemmDims { m, n, k }: GemmDims, output: Number) -> Product {
    let (a_turned, b_turned) = (true, false);
    Product { rows: n, columns: m, depth: k, a_turned, b_turned, input: Number::of::<A>(), output, add: false }
}

/// dxᵀ (+)= wᵀ · dyᵀ.
fn grad_input<A: CudaAct>(GemmDims { m, n, k }: GemmDims, accumulate: Accumulate) -> Product {
    let (number, add) = (Number::of::<A>(), accumulate == Accumulate::Add);
    let (a_turned, b_turned) = (false, false);
    Product { rows: k, columns: m, depth: n, a_turned, b_turned, input: number, output: number, add }
}

/// dwᵀ += xᵀ · dy.
fn grad_weight<A: CudaAct>(GemmDims { m, n, k }: GemmDims) -> Product {
    let (a_turned, b_turned) = (false, true);
    let input = Number::of::<A>();
    Product { rows: k, columns: n, depth: m, a_turned, b_turned, input, output: Number::F32, add: true }
}
