//! The weighted SwiGLU's backward pass against finite differences and f64, on poisoned buffers and on one and more threads.

use crate::cpu::testkit::{assert_close, finite_differences, on_threads, rng, rounding, uniform};
use crate::{Cpu, ExpertOps, Rows, View, ViewMut};

/// (N, F): none, one by one, off every register, several tasks.
const SIZES: [(usize, usize); 6] = [(0, 4), (1, 1), (5, 7), (9, 31), (40, 130), (700, 64)];
/// Rows beyond the count.
const SPARE: usize = 2;
/// What an entry of `dweights` that no row has must keep.
const KEPT: f32 = 5.0;

/// Rows whose weights stand in every other place, in descending order.
struct Case {
    count: Vec<i32>,
    f: usize,
    origin: Vec<i32>,
    weights: Vec<f32>,
    da: Vec<f32>,
    h: Vec<f32>,
}

struct Gradients {
    dh: Vec<f32>,
    a: Vec<f32>,
    dweights: Vec<f32>,
}

fn case((rows, f): (usize, usize)) -> Case {
    let mut rng = rng(51);
    let mut poisoned = |width: usize, scale: f32| {
        let mut data = uniform(&mut rng, rows * width, scale);
        data.resize((rows + SPARE) * width, f32::NAN);
        data
    };
    let (da, h, row_weights) = (poisoned(f, 1.0), poisoned(2 * f, 3.0), poisoned(1, 1.0));
    let mut weights = vec![f32::NAN; 2 * rows];
    (0..rows).for_each(|i| weights[2 * (rows - 1 - i)] = row_weights[i]);
    // A choice of no row: reading its place would panic.
    let origin = (0..rows).rev().map(|i| 2 * i as i32).chain([999; SPARE]).collect();
    Case { count: vec![rows as i32], f, origin, weights, da, h }
}

impl Case {
    fn rows(&self) -> usize {
        self.count[0] as usize
    }

    fn run(&self) -> Gradients {
        let (dh, a) = (vec![f32::NAN; self.h.len()], vec![f32::NAN; self.da.len()]);
        let mut got = Gradients { dh, a, dweights: vec![KEPT; self.weights.len()] };
        Cpu.weighted_swiglu_grad(
            Rows { bound: self.rows() + SPARE, count: Some(View::of(&self.count)) },
            self.f,
            View::of(&self.origin),
            View::of(&self.weights),
            View::of(&self.da),
            View::of(&self.h),
            ViewMut::of(&mut got.dh),
            ViewMut::of(&mut got.a),
            ViewMut::of(&mut got.dweights),
        );
        got
    }

    fn weight(&self, row: usize) -> f64 {
        f64::from(self.weights[self.origin[row] as usize])
    }

    /// `⟨da[row], swiglu(h)⟩`.
    fn inner(&self, row: usize, h: &[f64]) -> f64 {
        let da = &self.da[row * self.f..(row + 1) * self.f];
        swiglu(h).iter().zip(da).map(|(a, da)| a * f64::from(*da)).sum()
    }

    fn h_of(&self, row: usize) -> &[f32] {
        &self.h[row * 2 * self.f..(row + 1) * 2 * self.f]
    }
}

fn swiglu(h: &[f64]) -> Vec<f64> {
    let (gate, up) = h.split_at(h.len() / 2);
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

#[test]
fn the_gradients_are_those_of_the_weighted_output() {
    for size in SIZES {
        let (case, (rows, f)) = (case(size), size);
        let got = case.run();
        for row in 0..rows {
            let h: Vec<f64> = case.h_of(row).iter().map(|&h| f64::from(h)).collect();
            let weighted: Vec<f64> = swiglu(&h).iter().map(|a| case.weight(row) * a).collect();
            assert_close("a", &got.a[row * f..(row + 1) * f], &weighted, rounding(4, 9.0));
            let dweight = &got.dweights[case.origin[row] as usize..][..1];
            assert_close("dweights", dweight, &[case.inner(row, &h)], rounding(f + 4, 9.0 * f as f64));
            let want = finite_differences(case.h_of(row), |h| case.weight(row) * case.inner(row, h));
            // Central differences of a sum of F terms of up to 9 are good to a few 1e-16 · 9 F / step.
            let numeric = 1e-10 * (10 + f) as f64;
            let dh = &got.dh[row * 2 * f..(row + 1) * 2 * f];
            assert_close("dh", dh, &want, rounding(8, 12.0) + numeric);
        }
        assert!(got.dweights.iter().skip(1).step_by(2).all(|&d| d == KEPT), "weights without a row were written");
        assert!(got.dh[rows * 2 * f..].iter().chain(&got.a[rows * f..]).all(|v| v.is_nan()), "rows beyond {rows}");
    }
}

#[test]
fn every_thread_count_gives_the_same_bits() {
    let case = case((700, 64));
    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let run = |threads| on_threads(threads, || case.run());
    let [one, two, five] = [1, 2, 5].map(run).map(|got| [bits(&got.dh), bits(&got.a), bits(&got.dweights)]);
    assert!(one == two && one == five);
}
