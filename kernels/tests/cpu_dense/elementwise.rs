//! Activations, SwiGLU, residual sums, the shared expert's gate, embedding.

use super::support::{
    assert_close, assert_reproducible, inner, numeric_gradient, random, tolerance, view, view_mut, wide,
};
use moe_kernels::{ActivationKind, Cpu, DenseOps, Rows};

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn swiglu(f: usize, h: &[f64]) -> Vec<f64> {
    h.chunks(2 * f).flat_map(|row| (0..f).map(|i| row[i] * sigmoid(row[i]) * row[f + i]).collect::<Vec<_>>()).collect()
}

/// Numbers large enough for both tails of the sigmoid, then `poison` NaNs.
fn poisoned(seed: u64, len: usize, poison: usize) -> Vec<f32> {
    random(seed, len).into_iter().map(|x| 12.0 * x).chain(std::iter::repeat_n(f32::NAN, poison)).collect()
}

#[test]
fn swiglu_works_on_the_counted_rows_only() {
    for (bound, counted, f) in [(0, 0, 4), (3, 0, 4), (1, 1, 1), (5, 3, 7), (8, 8, 33), (9, 5, 64), (200, 130, 96)] {
        let h = poisoned(1, counted * 2 * f, (bound - counted) * 2 * f);
        let da: Vec<f32> = [random(2, counted * f), vec![f32::NAN; (bound - counted) * f]].concat();
        let count = vec![counted as i32];
        let rows = Rows { bound, count: Some(view(&count)) };
        let (mut a, mut dh) = (vec![f32::NAN; bound * f], vec![f32::NAN; bound * 2 * f]);
        Cpu.swiglu(rows, f, view(&h), view_mut(&mut a));
        Cpu.swiglu_grad(rows, f, view(&da), view(&h), view_mut(&mut dh));
        let exact = swiglu(f, &wide(&h[..counted * 2 * f]));
        assert_close(&format!("a {counted}x{f}"), &a[..counted * f], &exact, 144.0 * tolerance(0));
        let exact = analytic_swiglu_grad(f, &da, &h[..counted * 2 * f]);
        assert_close(&format!("dh {counted}x{f}"), &dh[..counted * 2 * f], &exact, 144.0 * tolerance(0));
        assert!(
            a[counted * f..].iter().chain(&dh[counted * 2 * f..]).all(|x| x.is_nan()),
            "wrote beyond {counted} rows"
        );
    }
}

fn analytic_swiglu_grad(f: usize, da: &[f32], h: &[f32]) -> Vec<f64> {
    let mut dh = vec![0.0; h.len()];
    for (row, (h, dh)) in h.chunks(2 * f).zip(dh.chunks_mut(2 * f)).enumerate() {
        for i in 0..f {
            let (da, g, u) = (f64::from(da[row * f + i]), f64::from(h[i]), f64::from(h[f + i]));
            let s = sigmoid(g);
            dh[i] = da * u * (s + g * s * (1.0 - s));
            dh[f + i] = da * g * s;
        }
    }
    dh
}

#[test]
fn the_swiglu_reference_gradient_is_that_of_the_reference() {
    let (h, da) = (poisoned(1, 20, 0), random(2, 10));
    let exact = analytic_swiglu_grad(5, &da, &h);
    for (a, b) in numeric_gradient(&wide(&h), |h| inner(&swiglu(5, h), &da)).iter().zip(exact) {
        assert!((a - b).abs() < 1e-7, "{a} {b}");
    }
}

fn exact_activation(kind: ActivationKind, x: f64) -> f64 {
    match kind {
        ActivationKind::Relu => x.max(0.0),
        ActivationKind::Gelu => {
            // Φ = 1/2 + φ·(x + x³/3 + x⁵/15 + …).
            let (mut term, mut sum) = (x, 0.0);
            for n in 1..400 {
                sum += term;
                term *= x * x / f64::from(2 * n + 1);
            }
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            x * (0.5 + density * sum)
        }
        ActivationKind::Silu => x * sigmoid(x),
        ActivationKind::Tanh => x.tanh(),
    }
}

#[test]
fn activations_match_f64_and_their_gradients_finite_differences() {
    for kind in ActivationKind::ALL {
        for len in [0, 1, 7, 100, 40_000] {
            let (x, dy) = (poisoned(1, len, 0), random(2, len));
            let (mut y, mut dx) = (vec![f32::NAN; len], vec![f32::NAN; len]);
            Cpu.activation(kind, view(&x), view_mut(&mut y));
            Cpu.activation_grad(kind, view(&x), view(&dy), view_mut(&mut dx));
            let exact: Vec<f64> = wide(&x).into_iter().map(|x| exact_activation(kind, x)).collect();
            assert_close(&format!("{kind:?} of {len}"), &y, &exact, 12.0 * tolerance(0));
            let slope = |x: f64| (exact_activation(kind, x + 1e-6) - exact_activation(kind, x - 1e-6)) / 2e-6;
            let exact: Vec<f64> = x.iter().zip(&dy).map(|(x, dy)| f64::from(*dy) * slope(f64::from(*x))).collect();
            // Differences of functions up to 12 in f64 lose 12·2⁻⁵³ / 10⁻⁶.
            assert_close(&format!("{kind:?}'s slope, {len}"), &dx, &exact, 12.0 * tolerance(0) + 2e-9);
        }
    }
}

#[test]
fn an_activation_keeps_nan_and_the_slope_of_relu_at_zero_is_zero() {
    for kind in ActivationKind::ALL {
        let (x, dy) = (vec![f32::NAN, 0.0], vec![1.0, 1.0]);
        let (mut y, mut dx) = (vec![0.0; 2], vec![0.0; 2]);
        Cpu.activation(kind, view(&x), view_mut(&mut y));
        Cpu.activation_grad(kind, view(&x), view(&dy), view_mut(&mut dx));
        assert!(y[0].is_nan(), "{kind:?}: {y:?}");
        let slope = match kind {
            ActivationKind::Relu => 0.0,
            ActivationKind::Gelu | ActivationKind::Silu => 0.5,
            ActivationKind::Tanh => 1.0,
        };
        assert_eq!(y[1], 0.0, "{kind:?}");
        assert!((dx[1] - slope).abs() < 2e-7, "{kind:?}: {}", dx[1]);
    }
}

#[test]
#[should_panic(expected = "4 rows counted, at most 3 expected")]
fn more_rows_than_the_bound_are_refused() {
    let (h, mut a, count) = (vec![0.0; 12], vec![0.0; 6], vec![4]);
    Cpu.swiglu(Rows { bound: 3, count: Some(view(&count)) }, 2, view(&h), view_mut(&mut a));
}

#[test]
fn the_gate_of_the_shared_expert_and_its_gradient() {
    for (tokens, h) in [(0, 4), (1, 1), (7, 5), (65, 48), (300, 100)] {
        let (gate, shared, out) = (poisoned(1, tokens, 0), random(2, tokens * h), random(3, tokens * h));
        let dout = random(4, tokens * h);
        let s = |t: usize| sigmoid(f64::from(gate[t]));
        let mut gated = out.clone();
        Cpu.sigmoid_gate(h, view(&gate), view(&shared), view_mut(&mut gated));
        let exact: Vec<f64> = (0..tokens * h).map(|i| f64::from(out[i]) + s(i / h) * f64::from(shared[i])).collect();
        assert_close("out", &gated, &exact, tolerance(0));
        let (mut dshared, mut dgate) = (vec![f32::NAN; tokens * h], vec![f32::NAN; tokens]);
        let (dshared_view, dgate_view) = (view_mut(&mut dshared), view_mut(&mut dgate));
        Cpu.sigmoid_gate_grad(h, view(&dout), view(&gate), view(&shared), dshared_view, dgate_view);
        let exact: Vec<f64> = (0..tokens * h).map(|i| s(i / h) * f64::from(dout[i])).collect();
        assert_close("dshared", &dshared, &exact, tolerance(0));
        let inner = |t: usize| (t * h..(t + 1) * h).map(|i| f64::from(dout[i]) * f64::from(shared[i])).sum::<f64>();
        let exact: Vec<f64> = (0..tokens).map(|t| inner(t) * s(t) * (1.0 - s(t))).collect();
        assert_close("dgate", &dgate, &exact, tolerance(h));
    }
}

#[test]
fn embedding_copies_rows_and_its_gradient_adds_them() {
    for (tokens, rows, h) in [(0, 3, 4), (1, 1, 1), (40, 5, 7), (300, 11, 96)] {
        let ids: Vec<i32> = (0..tokens).map(|t| ((t * 7 + t / 3) % rows) as i32).collect();
        let (table, dout, old) = (random(1, rows * h), random(2, tokens * h), random(3, rows * h));
        let mut out = vec![f32::NAN; tokens * h];
        Cpu.embedding(h, view(&ids), view(&table), view_mut(&mut out));
        let mut dtable = old.clone();
        Cpu.embedding_grad(h, view(&ids), view(&dout), view_mut(&mut dtable));
        let mut exact = wide(&old);
        for (t, id) in ids.iter().enumerate() {
            let from = *id as usize * h;
            assert_eq!(out[t * h..(t + 1) * h], table[from..from + h]);
            for c in 0..h {
                exact[from + c] += f64::from(dout[t * h + c]);
            }
        }
        assert_close(&format!("{tokens} tokens"), &dtable, &exact, tolerance(tokens));
    }
}

#[test]
#[should_panic(expected = "token id 3 is not in a table of 3 rows")]
fn an_id_beyond_the_table_is_refused() {
    let (ids, table, mut out) = (vec![0, 3], vec![0.0; 6], vec![0.0; 4]);
    Cpu.embedding(2, view(&ids), view(&table), view_mut(&mut out));
}

#[test]
fn add_adds() {
    for len in [0, 1, 100, 40_000] {
        let (x, old) = (random(1, len), random(2, len));
        let mut y = old.clone();
        Cpu.add(view(&x), view_mut(&mut y));
        assert!(y.iter().zip(x).zip(old).all(|((y, x), old)| *y == x + old));
    }
}

#[test]
fn element_wise_layers_are_reproducible() {
    let (h, da) = (random(1, 200 * 2 * 100), random(2, 200 * 100));
    let (gate, ids) = (random(3, 200), (0..200).map(|t| t % 9).collect::<Vec<i32>>());
    assert_reproducible("element-wise", tolerance(100), || {
        let (mut a, mut dh) = (vec![0.0; 20_000], vec![0.0; 40_000]);
        let (mut dshared, mut dgate, mut dtable) = (vec![0.0; 20_000], vec![0.0; 200], vec![0.0; 900]);
        Cpu.swiglu(Rows::exactly(200), 100, view(&h), view_mut(&mut a));
        Cpu.swiglu_grad(Rows::exactly(200), 100, view(&da), view(&h), view_mut(&mut dh));
        let (dshared_view, dgate_view) = (view_mut(&mut dshared), view_mut(&mut dgate));
        Cpu.sigmoid_gate_grad(100, view(&da), view(&gate), view(&a), dshared_view, dgate_view);
        Cpu.embedding_grad(100, view(&ids), view(&da), view_mut(&mut dtable));
        [a, dh, dshared, dgate, dtable].concat()
    });
}
