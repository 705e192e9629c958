//! RMSNorm: plain rows, and heads inside wider rows.

use super::support::{
    assert_close, assert_reproducible, inner, numeric_gradient, random, tolerance, view, view_mut, wide,
};
use moe_kernels::{Accumulate, Cpu, DenseOps, NormDims};

const EPS: f32 = 1e-5;

/// No token, one, widths off and on the lanes, heads inside rows that hold more.
fn sizes() -> Vec<NormDims> {
    [(0, 1, 8, 8), (1, 1, 1, 1), (3, 1, 7, 7), (5, 1, 64, 64), (4, 3, 16, 60), (7, 2, 33, 70), (130, 1, 256, 256)]
        .map(|(tokens, groups, width, token_stride)| NormDims { tokens, groups, width, token_stride, eps: EPS })
        .to_vec()
}

/// Elements of `dims` that are normalised, as (row, element) → index.
fn normalised(dims: NormDims) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..dims.tokens * dims.groups).flat_map(move |row| {
        let from = row / dims.groups * dims.token_stride + row % dims.groups * dims.width;
        (0..dims.width).map(move |i| (row, i, from + i))
    })
}

/// Random where normalised, NaN between.
fn input(dims: NormDims, seed: u64) -> Vec<f32> {
    let values = random(seed, dims.tokens * dims.token_stride);
    let mut poisoned = vec![f32::NAN; values.len()];
    for (_, _, at) in normalised(dims) {
        poisoned[at] = values[at];
    }
    poisoned
}

fn reference(dims: NormDims, x: &[f64], w: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut squares = vec![0.0; dims.tokens * dims.groups];
    for (row, _, at) in normalised(dims) {
        squares[row] += x[at] * x[at];
    }
    let rstd: Vec<f64> = squares.iter().map(|s| 1.0 / (s / dims.width as f64 + f64::from(EPS)).sqrt()).collect();
    let mut y = vec![f64::NAN; x.len()];
    for (row, i, at) in normalised(dims) {
        y[at] = x[at] * rstd[row] * w[i];
    }
    (y, rstd)
}

fn pick<T: Copy>(dims: NormDims, data: &[T]) -> Vec<T> {
    normalised(dims).map(|(_, _, at)| data[at]).collect()
}

fn surplus_is_poison(dims: NormDims, data: &[f32]) {
    let mut touched = vec![false; data.len()];
    normalised(dims).for_each(|(_, _, at)| touched[at] = true);
    assert!(data.iter().zip(touched).all(|(x, t)| t || x.is_nan()), "{dims:?} wrote between the normalised rows");
}

#[test]
fn rows_and_heads_are_normalised_and_nothing_else_is_touched() {
    for dims in sizes() {
        let (x, w) = (input(dims, 1), random(2, dims.width));
        let (mut y, mut rstd) = (vec![f32::NAN; x.len()], vec![f32::NAN; dims.tokens * dims.groups]);
        Cpu.rms_norm(dims, view(&x), view(&w), view_mut(&mut y), view_mut(&mut rstd));
        let (exact, exact_rstd) = reference(dims, &wide(&x), &wide(&w));
        // A row of one tiny element has a large rstd: compare relative to it.
        let largest = exact_rstd.iter().copied().fold(1.0, f64::max);
        assert_close(&format!("{dims:?}"), &pick(dims, &y), &pick(dims, &exact), tolerance(8));
        assert_close(&format!("rstd {dims:?}"), &rstd, &exact_rstd, largest * tolerance(8));
        surplus_is_poison(dims, &y);
    }
}

#[test]
fn gradients_match_finite_differences() {
    for dims in sizes().into_iter().filter(|dims| dims.tokens < 100) {
        let (x, w, dy) = (input(dims, 1), random(2, dims.width), input(dims, 3));
        let rows = dims.tokens * dims.groups;
        let (mut y, mut rstd) = (vec![f32::NAN; x.len()], vec![f32::NAN; rows]);
        Cpu.rms_norm(dims, view(&x), view(&w), view_mut(&mut y), view_mut(&mut rstd));
        let loss = |x: &[f64], w: &[f64]| inner(&pick(dims, &reference(dims, x, w).0), &pick(dims, &dy));
        let exact_dx = pick(dims, &numeric_gradient(&wide(&x), |x| loss(x, &wide(&w))));
        let exact_dw = numeric_gradient(&wide(&w), |w| loss(&wide(&x), w));
        for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
            let old = if accumulate == Accumulate::Add { input(dims, 4) } else { vec![f32::NAN; x.len()] };
            let (mut dx, mut dw) = (old.clone(), vec![0.25; dims.width]);
            let (dx_view, dw_view) = (view_mut(&mut dx), view_mut(&mut dw));
            Cpu.rms_norm_grad(dims, view(&dy), view(&x), view(&w), view(&rstd), dx_view, dw_view, accumulate);
            let before = if accumulate == Accumulate::Add { pick(dims, &old) } else { vec![0.0; rows * dims.width] };
            let expected: Vec<f64> = exact_dx.iter().zip(before).map(|(dx, old)| dx + f64::from(old)).collect();
            let largest = rstd.iter().copied().fold(1.0, f32::max);
            // Central differences of a function with curvature up to rstd³ are good to about 1e-8 of that.
            let allowed = f64::from(largest) * tolerance(8) + 1e-8 * f64::from(largest).powi(3);
            assert_close(&format!("dx {dims:?}"), &pick(dims, &dx), &expected, allowed);
            let expected: Vec<f64> = exact_dw.iter().map(|dw| dw + 0.25).collect();
            assert_close(&format!("dw {dims:?}"), &dw, &expected, f64::from(largest) * tolerance(rows) + 1e-8);
            surplus_is_poison(dims, &dx);
        }
    }
}

#[test]
fn the_norm_is_reproducible() {
    let dims = NormDims { tokens: 300, groups: 2, width: 48, token_stride: 100, eps: EPS };
    let (x, w, dy) = (random(1, 30_000), random(2, 48), random(3, 30_000));
    assert_reproducible("rms_norm", 4.0 * tolerance(600), || {
        let (mut y, mut rstd, mut dx, mut dw) = (vec![0.0; 30_000], vec![0.0; 600], vec![0.0; 30_000], vec![0.0; 48]);
        Cpu.rms_norm(dims, view(&x), view(&w), view_mut(&mut y), view_mut(&mut rstd));
        let (dx_view, dw_view) = (view_mut(&mut dx), view_mut(&mut dw));
        Cpu.rms_norm_grad(dims, view(&dy), view(&x), view(&w), view(&rstd), dx_view, dw_view, Accumulate::Overwrite);
        [y, rstd, dx, dw].concat()
    });
}
