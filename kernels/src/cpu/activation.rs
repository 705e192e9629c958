//! Element-wise layers: activations, SwiGLU, GELU, residual sums, the shared expert's gate.
//!
//! Owns their arithmetic, row by row. Rows beyond the number it is given are never touched.

#[cfg(test)]
mod tests;

use multiversion::multiversion;

use super::parallel::{for_parts, parts, rows_mut, with_scratch};
use super::simd::{dot, normal, sigmoid, tanh};
use crate::ActivationKind;

pub(super) fn swiglu(rows: usize, f: usize, h: &[f32], a: &mut [f32]) {
    assert!(h.len() >= rows * 2 * f, "h has {} elements for {rows} rows x 2·{f}", h.len());
    assert!(a.len() >= rows * f, "a has {} elements for {rows} rows x {f}", a.len());
    for_parts(rows, parts(rows * f), rows_mut(&mut a[..rows * f], f), |range, a| {
        swiglu_rows(f, &h[range.start * 2 * f..range.end * 2 * f], a.data);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn swiglu_rows(f: usize, h: &[f32], a: &mut [f32]) {
    if f == 0 {
        return;
    }
    for (h, a) in h.chunks_exact(2 * f).zip(a.chunks_exact_mut(f)) {
        let (gate, up) = h.split_at(f);
        for ((a, g), u) in a.iter_mut().zip(gate).zip(up) {
            *a = g * sigmoid(*g) * u;
        }
    }
}

pub(super) fn swiglu_grad(rows: usize, f: usize, da: &[f32], h: &[f32], dh: &mut [f32]) {
    assert!(da.len() >= rows * f, "da has {} elements for {rows} rows x {f}", da.len());
    assert!(h.len() >= rows * 2 * f, "h has {} elements for {rows} rows x 2·{f}", h.len());
    assert!(dh.len() >= rows * 2 * f, "dh has {} elements for {rows} rows x 2·{f}", dh.len());
    for_parts(rows, parts(rows * f), rows_mut(&mut dh[..rows * 2 * f], 2 * f), |range, dh| {
        let h = &h[range.start * 2 * f..range.end * 2 * f];
        swiglu_grad_rows(f, &da[range.start * f..range.end * f], h, dh.data);
    });
}

/// With s = sigmoid(g): d(g·s)/dg = s·(1 + g·(1 − s)).
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn swiglu_grad_rows(f: usize, da: &[f32], h: &[f32], dh: &mut [f32]) {
    if f == 0 {
        return;
    }
    for ((da, h), dh) in da.chunks_exact(f).zip(h.chunks_exact(2 * f)).zip(dh.chunks_exact_mut(2 * f)) {
        let (gate, up) = h.split_at(f);
        let (dgate, dup) = dh.split_at_mut(f);
        for ((((dg, du), da), g), u) in dgate.iter_mut().zip(dup).zip(da).zip(gate).zip(up) {
            let s = sigmoid(*g);
            *du = da * g * s;
            *dg = da * u * s * (1.0 + g * (1.0 - s));
        }
    }
}

pub(super) fn gelu(h: &[f32], a: &mut [f32]) {
    assert_eq!(h.len(), a.len(), "elements before GELU, and after");
    for_parts(a.len(), parts(a.len()), rows_mut(a, 1), |range, a| gelu_part(&h[range], a.data));
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn gelu_part(h: &[f32], a: &mut [f32]) {
    for (a, h) in a.iter_mut().zip(h) {
        *a = h * normal(*h).0;
    }
}

/// What [`weighted_swiglu_grad`] and [`weighted_gelu_grad`] work from.
pub(super) struct Weighted<'a> {
    /// F.
    pub(super) f: usize,
    /// `[N]`: where a row's weight, and the weight's gradient, stand.
    pub(super) origin: &'a [i32],
    /// The weights.
    pub(super) weights: &'a [f32],
    /// `[N, F]`.
    pub(super) da: &'a [f32],
    /// `[N, 2F]`; of GELU `[N, F]`.
    pub(super) h: &'a [f32],
}

/// One row of a weighted gradient: weight, da and h in, dh and a out; returns the weight's gradient.
type GradRow = fn(f32, &[f32], &[f32], &mut [f32], &mut [f32]) -> f32;

/// See [`crate::ExpertOps::weighted_swiglu_grad`].
pub(super) fn weighted_swiglu_grad(given: &Weighted<'_>, dh: &mut [f32], a: &mut [f32], dweights: &mut [f32]) {
    weighted_grad((2 * given.f, weighted_swiglu_grad_row), given, dh, a, dweights);
}

/// See [`crate::ExpertOps::weighted_gelu_grad`].
pub(super) fn weighted_gelu_grad(given: &Weighted<'_>, dh: &mut [f32], a: &mut [f32], dweights: &mut [f32]) {
    weighted_grad((given.f, weighted_gelu_grad_row), given, dh, a, dweights);
}

/// Rows of `h` and `dh` are `wide`. The rows' dot products are collected in memory of this thread and then scattered by
/// it alone, since no cut of `dweights` follows a cut of the rows.
fn weighted_grad(
    (wide, grad_row): (usize, GradRow),
    given: &Weighted<'_>,
    dh: &mut [f32],
    a: &mut [f32],
    dweights: &mut [f32],
) {
    let (rows, f) = (given.origin.len(), given.f);
    with_scratch(rows, |dots| {
        let outputs = ((rows_mut(dh, wide), rows_mut(a, f)), rows_mut(dots, 1));
        for_parts(rows, parts(rows * f), outputs, |range, ((dh, a), dots)| {
            for ((i, dot), at) in range.zip(dots.data).zip(0..) {
                let weight = given.weights[given.origin[i] as usize];
                let (da, h) = (&given.da[i * f..(i + 1) * f], &given.h[i * wide..(i + 1) * wide]);
                let (dh, a) = (&mut dh.data[at * wide..(at + 1) * wide], &mut a.data[at * f..(at + 1) * f]);
                *dot = grad_row(weight, da, h, dh, a);
            }
        });
        for (&origin, &dot) in given.origin.iter().zip(&*dots) {
            dweights[origin as usize] = dot;
        }
    });
}

/// One row; returns the weight's gradient. `a` holds the activations without the weight until their product with `da` is summed.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn weighted_swiglu_grad_row(weight: f32, da: &[f32], h: &[f32], dh: &mut [f32], a: &mut [f32]) -> f32 {
    let f = da.len();
    let (gate, up) = h.split_at(f);
    let (dgate, dup) = dh.split_at_mut(f);
    for (((((dg, du), a), da), g), u) in dgate.iter_mut().zip(dup).zip(a.iter_mut()).zip(da).zip(gate).zip(up) {
        let (s, da) = (sigmoid(*g), weight * da);
        *a = g * s * u;
        *du = da * g * s;
        *dg = da * u * s * (1.0 + g * (1.0 - s));
    }
    let dweight = dot(da, a);
    a.iter_mut().for_each(|a| *a *= weight);
    dweight
}

/// As [`weighted_swiglu_grad_row`]; with Φ and φ at h: d(h·Φ)/dh = Φ + h·φ.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn weighted_gelu_grad_row(weight: f32, da: &[f32], h: &[f32], dh: &mut [f32], a: &mut [f32]) -> f32 {
    for (((dh, a), da), h) in dh.iter_mut().zip(a.iter_mut()).zip(da).zip(h) {
        let (below, density) = normal(*h);
        *a = h * below;
        *dh = weight * da * (below + h * density);
    }
    let dweight = dot(da, a);
    a.iter_mut().for_each(|a| *a *= weight);
    dweight
}

pub(super) fn apply(kind: ActivationKind, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "lengths of an activation's x and y");
    for_parts(y.len(), parts(y.len()), rows_mut(y, 1), |range, y| apply_part(kind, &x[range], y.data));
}

pub(super) fn apply_grad(kind: ActivationKind, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    assert_eq!((x.len(), dy.len()), (dx.len(), dx.len()), "lengths of an activation's x and dy, and of its dx");
    for_parts(dx.len(), parts(dx.len()), rows_mut(dx, 1), |range, dx| {
        apply_grad_part(kind, &x[range.clone()], &dy[range], dx.data);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn apply_part(kind: ActivationKind, x: &[f32], y: &mut [f32]) {
    let of = x.iter().zip(y);
    match kind {
        // Comparisons written so that NaN passes through.
        ActivationKind::Relu => of.for_each(|(x, y)| *y = if *x < 0.0 { 0.0 } else { *x }),
        ActivationKind::Gelu => of.for_each(|(x, y)| *y = *x * normal(*x).0),
        ActivationKind::Silu => of.for_each(|(x, y)| *y = *x * sigmoid(*x)),
        ActivationKind::Tanh => of.for_each(|(x, y)| *y = tanh(*x)),
    }
}

/// Of x·s with s = sigmoid(x): s·(1 + x·(1 − s)).
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn apply_grad_part(kind: ActivationKind, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let of = x.iter().zip(dy).zip(dx);
    match kind {
        ActivationKind::Relu => of.for_each(|((x, dy), dx)| *dx = if *x <= 0.0 { 0.0 } else { *dy }),
        ActivationKind::Gelu => of.for_each(|((x, dy), dx)| {
            let (below, density) = normal(*x);
            *dx = dy * (below + x * density);
        }),
        ActivationKind::Silu => of.for_each(|((x, dy), dx)| {
            let s = sigmoid(*x);
            *dx = dy * (s * (1.0 + x * (1.0 - s)));
        }),
        ActivationKind::Tanh => of.for_each(|((x, dy), dx)| {
            let t = tanh(*x);
            *dx = dy * (1.0 - t * t);
        }),
    }
}

pub(super) fn add(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "lengths of a sum");
    for_parts(y.len(), parts(y.len()), rows_mut(y, 1), |range, y| add_part(&x[range], y.data));
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn add_part(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

pub(super) fn sigmoid_gate(h: usize, gate: &[f32], shared: &[f32], out: &mut [f32]) {
    let tokens = gate.len();
    assert!(shared.len() >= tokens * h, "shared has {} elements for {tokens} tokens x {h}", shared.len());
    assert!(out.len() >= tokens * h, "out has {} elements for {tokens} tokens x {h}", out.len());
    for_parts(tokens, parts(tokens * h), rows_mut(&mut out[..tokens * h], h), |range, out| {
        gate_rows(h, &gate[range.clone()], &shared[range.start * h..range.end * h], out.data);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn gate_rows(h: usize, gate: &[f32], shared: &[f32], out: &mut [f32]) {
    for (t, g) in gate.iter().enumerate() {
        let (s, row) = (sigmoid(*g), t * h..(t + 1) * h);
        for (out, x) in out[row.clone()].iter_mut().zip(&shared[row]) {
            *out += s * x;
        }
    }
}

pub(super) fn sigmoid_gate_grad(
    h: usize,
    dout: &[f32],
    gate: &[f32],
    shared: &[f32],
    dshared: &mut [f32],
    dgate: &mut [f32],
) {
    let tokens = gate.len();
    for (name, len) in [("dout", dout.len()), ("shared", shared.len()), ("dshared", dshared.len())] {
        assert!(len >= tokens * h, "{name} has {len} elements for {tokens} tokens x {h}");
    }
    assert!(dgate.len() >= tokens, "dgate has {} elements for {tokens} tokens", dgate.len());
    let outputs = (rows_mut(&mut dshared[..tokens * h], h), rows_mut(&mut dgate[..tokens], 1));
    for_parts(tokens, parts(tokens * h), outputs, |range, (dshared, dgate)| {
        let row = range.start * h..range.end * h;
        gate_grad_rows(&dout[row.clone()], &gate[range], &shared[row], dshared.data, dgate.data);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn gate_grad_rows(dout: &[f32], gate: &[f32], shared: &[f32], dshared: &mut [f32], dgate: &mut [f32]) {
    let Some(h) = dout.len().checked_div(gate.len()) else { return };
    for (t, (g, dg)) in gate.iter().zip(dgate).enumerate() {
        let (s, row) = (sigmoid(*g), t * h..(t + 1) * h);
        for (dx, dy) in dshared[row.clone()].iter_mut().zip(&dout[row.clone()]) {
            *dx = s * dy;
        }
        *dg = dot(&dout[row.clone()], &shared[row]) * s * (1.0 - s);
    }
}
