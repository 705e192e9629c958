//! Linear layers, their gradients and the bias.

use super::support::{assert_close, assert_reproducible, random, tolerance, view, view_mut};
use moe_kernels::{Accumulate, Cpu, DenseOps, GemmDims};

/// No rows, one row (with a width that is shared out), one output, sizes off and on the tile, more reduction than output.
const SIZES: [(usize, usize, usize); 9] = [
    (0, 5, 3),
    (1, 1, 1),
    (1, 700, 33),
    (3, 1, 40),
    (7, 9, 5),
    (65, 33, 17),
    (64, 64, 64),
    (130, 96, 70),
    (40, 8, 300),
];

fn each(test: impl Fn(GemmDims, Vec<f32>, Vec<f32>, Vec<f32>)) {
    for (m, n, k) in SIZES {
        test(GemmDims { m, n, k }, random(1, m * k), random(2, n * k), random(3, m * n));
    }
}

/// Σ over `depth` of `term` for every element of a `rows` x `columns` matrix, plus what was there.
fn product(
    rows: usize,
    columns: usize,
    depth: usize,
    before: &[f32],
    term: impl Fn(usize, usize, usize) -> f64,
) -> Vec<f64> {
    let element = |i: usize| (0..depth).map(|d| term(i / columns, i % columns, d)).sum::<f64>();
    (0..rows * columns).map(|i| element(i) + before.get(i).copied().map_or(0.0, f64::from)).collect()
}

fn times(a: f32, b: f32) -> f64 {
    f64::from(a) * f64::from(b)
}

#[test]
fn linear_is_x_times_w_transposed_plus_bias() {
    each(|dims, x, w, _| {
        let GemmDims { m, n, k } = dims;
        let bias = random(4, n);
        for with_bias in [false, true] {
            let mut y = vec![f32::NAN; m * n];
            Cpu.linear(dims, view(&x), view(&w), with_bias.then(|| view(&bias)), view_mut(&mut y));
            let before: Vec<f32> = if with_bias { bias.repeat(m) } else { vec![] };
            let exact = product(m, n, k, &before, |i, j, d| times(x[i * k + d], w[j * k + d]));
            assert_close(&format!("{dims:?}"), &y, &exact, tolerance(k));
        }
        let mut y = vec![f32::NAN; m * n];
        Cpu.linear_f32(dims, view(&x), view(&w), view_mut(&mut y));
        let exact = product(m, n, k, &[], |i, j, d| times(x[i * k + d], w[j * k + d]));
        assert_close(&format!("f32 {dims:?}"), &y, &exact, tolerance(k));
    });
}

#[test]
fn the_input_gradient_overwrites_or_adds() {
    each(|dims, _, w, dy| {
        let GemmDims { m, n, k } = dims;
        let old = random(5, m * k);
        for (accumulate, start, before) in
            [(Accumulate::Overwrite, vec![f32::NAN; m * k], vec![]), (Accumulate::Add, old.clone(), old)]
        {
            let exact = product(m, k, n, &before, |i, j, d| times(dy[i * n + d], w[d * k + j]));
            let (mut dx, mut dx_f32) = (start.clone(), start);
            Cpu.linear_grad_input(dims, view(&dy), view(&w), view_mut(&mut dx), accumulate);
            assert_close(&format!("{dims:?}"), &dx, &exact, tolerance(n));
            Cpu.linear_f32_grad_input(dims, view(&dy), view(&w), view_mut(&mut dx_f32), accumulate);
            assert_close(&format!("f32 {dims:?}"), &dx_f32, &exact, tolerance(n));
        }
    });
}

#[test]
fn the_weight_gradient_adds() {
    each(|dims, x, _, dy| {
        let GemmDims { m, n, k } = dims;
        let old = random(5, n * k);
        let exact = product(n, k, m, &old, |i, j, d| times(dy[d * n + i], x[d * k + j]));
        let (mut dw, mut dw_f32) = (old.clone(), old);
        Cpu.linear_grad_weight(dims, view(&dy), view(&x), view_mut(&mut dw));
        assert_close(&format!("{dims:?}"), &dw, &exact, tolerance(m));
        Cpu.linear_f32_grad_weight(dims, view(&dy), view(&x), view_mut(&mut dw_f32));
        assert_close(&format!("f32 {dims:?}"), &dw_f32, &exact, tolerance(m));
    });
}

#[test]
fn the_bias_gradient_adds_up_columns() {
    for (rows, columns) in [(0, 4), (1, 1), (7, 5), (130, 33), (300, 64), (500, 101)] {
        let (dy, old) = (random(1, rows * columns), random(2, columns));
        let exact = product(1, columns, rows, &old, |_, j, d| f64::from(dy[d * columns + j]));
        let mut db = old;
        Cpu.bias_grad(rows, columns, view(&dy), view_mut(&mut db));
        assert_close(&format!("{rows}x{columns}"), &db, &exact, tolerance(rows));
    }
}

#[test]
fn views_longer_than_the_shape_keep_their_surplus() {
    let dims = GemmDims { m: 3, n: 4, k: 5 };
    let poisoned = |used: usize| [random(1, used), vec![f32::NAN; 6]].concat();
    let (x, w, bias, mut y) = (poisoned(15), poisoned(20), poisoned(4), poisoned(12));
    Cpu.linear(dims, view(&x), view(&w), Some(view(&bias)), view_mut(&mut y));
    assert!(y[..12].iter().all(|y| y.is_finite()) && y[12..].iter().all(|y| y.is_nan()));
}

#[test]
fn linear_layers_are_reproducible() {
    let dims = GemmDims { m: 130, n: 70, k: 96 };
    let (x, w, dy) = (random(1, 130 * 96), random(2, 70 * 96), random(3, 130 * 70));
    assert_reproducible("linear", tolerance(96), || {
        let mut y = vec![0.0; 130 * 70];
        Cpu.linear(dims, view(&x), view(&w), None, view_mut(&mut y));
        y
    });
    assert_reproducible("gradients", tolerance(130), || {
        let (mut dx, mut dw, mut db) = (vec![0.0; 130 * 96], vec![0.0; 70 * 96], vec![0.0; 70]);
        Cpu.linear_grad_input(dims, view(&dy), view(&w), view_mut(&mut dx), Accumulate::Overwrite);
        Cpu.linear_grad_weight(dims, view(&dy), view(&x), view_mut(&mut dw));
        Cpu.bias_grad(130, 70, view(&dy), view_mut(&mut db));
        [dx, dw, db].concat()
    });
}

#[test]
#[should_panic(expected = "w has 5 elements for 2x3")]
fn an_operand_that_is_too_short_is_named_with_both_shapes() {
    let (x, w, mut y) = (random(1, 12), random(2, 5), vec![0.0; 8]);
    Cpu.linear(GemmDims { m: 4, n: 2, k: 3 }, view(&x), view(&w), None, view_mut(&mut y));
}
