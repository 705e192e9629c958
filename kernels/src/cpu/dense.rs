//! Dense layers: linear and its gradients; norms, activations and embedding are in the modules beside.
//!
//! Owns the `DenseOps` implementation, which unwraps views, and the cutting of matrix products over threads: an output's rows
//! in contiguous parts, one single-threaded product each, so that no sum is ever shared between threads.

use super::gemm::{Mat, MatMut, gemm, sum_outer_products};
use super::parallel::{for_parts, parts, rows_mut};
use super::{activation, embedding, norm, slice, slice_mut};
use crate::{Accumulate, ActivationKind, Cpu, DenseOps, GemmDims, NormDims, Rows, View, ViewMut};

type Read<'a> = View<'a, Cpu, f32>;
type Write<'a> = ViewMut<'a, Cpu, f32>;

impl DenseOps for Cpu {
    fn linear(&self, dims: GemmDims, x: Read<'_>, w: Read<'_>, bias: Option<Read<'_>>, y: Write<'_>) {
        linear(dims, slice(x), slice(w), bias.map(slice), slice_mut(y));
    }

    fn linear_grad_input(&self, dims: GemmDims, dy: Read<'_>, w: Read<'_>, dx: Write<'_>, accumulate: Accumulate) {
        linear_grad_input(dims, slice(dy), slice(w), slice_mut(dx), accumulate);
    }

    fn linear_grad_weight(&self, dims: GemmDims, dy: Read<'_>, x: Read<'_>, dw: Write<'_>) {
        linear_grad_weight(dims, slice(dy), slice(x), slice_mut(dw));
    }

    fn bias_grad(&self, rows: usize, columns: usize, dy: Read<'_>, db: Write<'_>) {
        bias_grad(rows, columns, slice(dy), slice_mut(db));
    }

    fn linear_f32(&self, dims: GemmDims, x: Read<'_>, w: Read<'_>, y: Write<'_>) {
        linear(dims, slice(x), slice(w), None, slice_mut(y));
    }

    fn linear_f32_grad_input(&self, dims: GemmDims, dy: Read<'_>, w: Read<'_>, dx: Write<'_>, accumulate: Accumulate) {
        linear_grad_input(dims, slice(dy), slice(w), slice_mut(dx), accumulate);
    }

    fn linear_f32_grad_weight(&self, dims: GemmDims, dy: Read<'_>, x: Read<'_>, dw: Write<'_>) {
        linear_grad_weight(dims, slice(dy), slice(x), slice_mut(dw));
    }

    fn rms_norm(&self, dims: NormDims, x: Read<'_>, w: Read<'_>, y: Write<'_>, rstd: Write<'_>) {
        norm::rms_norm(dims, slice(x), slice(w), slice_mut(y), slice_mut(rstd));
    }

    fn rms_norm_grad(
        &self,
        dims: NormDims,
        dy: Read<'_>,
        x: Read<'_>,
        w: Read<'_>,
        rstd: Read<'_>,
        dx: Write<'_>,
        dw: Write<'_>,
        accumulate: Accumulate,
    ) {
        let saved = norm::Saved { dy: slice(dy), x: slice(x), w: slice(w), rstd: slice(rstd) };
        norm::rms_norm_grad(dims, saved, slice_mut(dx), slice_mut(dw), accumulate);
    }

    fn swiglu(&self, rows: Rows<'_, Self>, f: usize, h: Read<'_>, a: Write<'_>) {
        activation::swiglu(counted(rows), f, slice(h), slice_mut(a));
    }

    fn swiglu_grad(&self, rows: Rows<'_, Self>, f: usize, da: Read<'_>, h: Read<'_>, dh: Write<'_>) {
        activation::swiglu_grad(counted(rows), f, slice(da), slice(h), slice_mut(dh));
    }

    fn activation(&self, kind: ActivationKind, x: Read<'_>, y: Write<'_>) {
        activation::apply(kind, slice(x), slice_mut(y));
    }

    fn activation_grad(&self, kind: ActivationKind, x: Read<'_>, dy: Read<'_>, dx: Write<'_>) {
        activation::apply_grad(kind, slice(x), slice(dy), slice_mut(dx));
    }

    fn embedding(&self, h: usize, ids: View<'_, Self, i32>, table: Read<'_>, out: Write<'_>) {
        embedding::embedding(h, slice(ids), slice(table), slice_mut(out));
    }

    fn embedding_grad(&self, h: usize, ids: View<'_, Self, i32>, dout: Read<'_>, dtable: Write<'_>) {
        embedding::embedding_grad(h, slice(ids), slice(dout), slice_mut(dtable));
    }

    fn add(&self, x: Read<'_>, y: Write<'_>) {
        activation::add(slice(x), slice_mut(y));
    }

    fn add_f32(&self, x: Read<'_>, y: Write<'_>) {
        self.add(x, y);
    }

    fn sigmoid_gate(&self, h: usize, gate: Read<'_>, shared: Read<'_>, out: Write<'_>) {
        activation::sigmoid_gate(h, slice(gate), slice(shared), slice_mut(out));
    }

    fn sigmoid_gate_grad(
        &self,
        h: usize,
        dout: Read<'_>,
        gate: Read<'_>,
        shared: Read<'_>,
        dshared: Write<'_>,
        dgate: Write<'_>,
    ) {
        activation::sigmoid_gate_grad(h, slice(dout), slice(gate), slice(shared), slice_mut(dshared), slice_mut(dgate));
    }
}

/// The rows that count. Panics if the device's number exceeds the host's bound.
fn counted(rows: Rows<'_, Cpu>) -> usize {
    let Some(count) = rows.count else { return rows.bound };
    let count = slice(count)[0];
    match usize::try_from(count) {
        Ok(count) if count <= rows.bound => count,
        _ => panic!("{count} rows counted, at most {} expected", rows.bound),
    }
}

/// The first `rows · columns` elements of an operand. Panics if there are fewer.
fn matrix<'a>(name: &str, data: &'a [f32], rows: usize, columns: usize) -> &'a [f32] {
    assert!(data.len() >= rows * columns, "{name} has {} elements for {rows}x{columns}", data.len());
    &data[..rows * columns]
}

/// As [`matrix`], writable.
fn matrix_mut<'a>(name: &str, data: &'a mut [f32], rows: usize, columns: usize) -> &'a mut [f32] {
    assert!(data.len() >= rows * columns, "{name} has {} elements for {rows}x{columns}", data.len());
    &mut data[..rows * columns]
}

fn linear(dims: GemmDims, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let GemmDims { m, n, k } = dims;
    let (x, w, y) = (matrix("x", x, m, k), matrix("w", w, n, k), matrix_mut("y", y, m, n));
    let bias = bias.map(|bias| matrix("bias", bias, 1, n));
    let accumulate = if bias.is_some() { Accumulate::Add } else { Accumulate::Overwrite };
    if m == 1 {
        // One row has no rows to share out: generation shares its columns.
        for_parts(n, parts(n * k), rows_mut(y, 1), |range, y| {
            if let Some(bias) = bias {
                y.data.copy_from_slice(&bias[range.clone()]);
            }
            let w = Mat::rows(&w[range.start * k..range.end * k], range.len(), k, k);
            gemm(MatMut::rows(y.data, 1, range.len(), n), accumulate, 1.0, Mat::rows(x, 1, k, k), w.t());
        });
        return;
    }
    for_parts(m, parts(m * n * k), rows_mut(y, n), |range, y| {
        if let Some(bias) = bias {
            for row in y.data.chunks_exact_mut(n.max(1)) {
                row.copy_from_slice(bias);
            }
        }
        let x = Mat::rows(&x[range.start * k..range.end * k], range.len(), k, k);
        gemm(MatMut::rows(y.data, range.len(), n, n), accumulate, 1.0, x, Mat::rows(w, n, k, k).t());
    });
}

fn linear_grad_input(dims: GemmDims, dy: &[f32], w: &[f32], dx: &mut [f32], accumulate: Accumulate) {
    let GemmDims { m, n, k } = dims;
    let (dy, w, dx) = (matrix("dy", dy, m, n), matrix("w", w, n, k), matrix_mut("dx", dx, m, k));
    for_parts(m, parts(m * n * k), rows_mut(dx, k), |range, dx| {
        let dy = Mat::rows(&dy[range.start * n..range.end * n], range.len(), n, n);
        gemm(MatMut::rows(dx.data, range.len(), k, k), accumulate, 1.0, dy, Mat::rows(w, n, k, k));
    });
}

fn linear_grad_weight(dims: GemmDims, dy: &[f32], x: &[f32], dw: &mut [f32]) {
    let GemmDims { m, n, k } = dims;
    let (dy, x, dw) = (matrix("dy", dy, m, n), matrix("x", x, m, k), matrix_mut("dw", dw, n, k));
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    for_parts(n, parts(m * n * k), rows_mut(dw, k), |range, dw| {
        sum_outer_products((dw.data, Accumulate::Add), &dy[range.start..], n, x, k);
    });
}

/// Columns whose sums are kept in registers.
const BIAS_COLUMNS: usize = 32;
/// Rows that are summed before the sum joins the gradient, so that rounding grows with the root of the rows, not with them.
const BIAS_ROWS: usize = 128;

fn bias_grad(rows: usize, columns: usize, dy: &[f32], db: &mut [f32]) {
    let (dy, db) = (matrix("dy", dy, rows, columns), matrix_mut("db", db, 1, columns));
    if rows == 0 || columns == 0 {
        return;
    }
    let blocks = columns.div_ceil(BIAS_COLUMNS);
    for_parts(columns, parts(rows * columns).min(blocks), rows_mut(db, 1), |range, db| {
        for (block, db) in db.data.chunks_mut(BIAS_COLUMNS).enumerate() {
            column_sums(&dy[range.start + block * BIAS_COLUMNS..], columns, db);
        }
    });
}

/// Adds the column sums of rows that lie `stride` apart; the last row may end with its last column.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn column_sums(dy: &[f32], stride: usize, db: &mut [f32]) {
    for block in dy.chunks(BIAS_ROWS * stride) {
        let mut sums = [0.0; BIAS_COLUMNS];
        for row in block.chunks(stride) {
            if let Some(row) = row.first_chunk::<BIAS_COLUMNS>() {
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += x;
                }
            } else {
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += x;
                }
            }
        }
        for (db, sum) in db.iter_mut().zip(sums) {
            *db += sum;
        }
    }
}
