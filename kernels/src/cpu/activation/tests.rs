//! The weighted activations' backward passes against finite differences and f64, on poisoned buffers and on one and more threads.

use crate::cpu::testkit::{assert_close, finite_differences, on_threads, rng, rounding, uniform};
use crate::{Cpu, ExpertOps, Rows, View, ViewMut};

/// (N, F): none, one by one, off every register, several tasks.
const SIZES: [(usize, usize); 6] = [(0, 4), (1, 1), (5, 7), (9, 31), (40, 130), (700, 64)];
/// Rows beyond the count.
const SPARE: usize = 2;
/// What an entry of `dweights` that no row has must keep.
const KEPT: f32 = 5.0;

/// An activation with its weighted backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Swiglu,
    Gelu,
}

impl Form {
    const ALL: [Self; 2] = [Self::Swiglu, Self::Gelu];

    /// Widths of F in a row of `h`.
    fn widths(self) -> usize {
        if self == Self::Swiglu { 2 } else { 1 }
    }

    fn of(self, h: &[f64]) -> Vec<f64> {
        match self {
            Self::Swiglu => {
                let (gate, up) = h.split_at(h.len() / 2);
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
            }
            Self::Gelu => h.iter().map(|h| h * 0.5 * (1.0 + erf(h / 2.0_f64.sqrt()))).collect(),
        }
    }
}

/// By its power series: to 1e-13 for the numbers of these tests, of at most 3.
fn erf(x: f64) -> f64 {
    let (mut power, mut sum) = (x, x);
    for n in 1..80 {
        power *= -x * x / f64::from(n);
        sum += power / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// Rows whose weights stand in every other place, in descending order.
struct Case {
    form: Form,
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

fn case(form: Form, (rows, f): (usize, usize)) -> Case {
    let mut rng = rng(51);
    let mut poisoned = |width: usize, scale: f32| {
        let mut data = uniform(&mut rng, rows * width, scale);
        data.resize((rows + SPARE) * width, f32::NAN);
        data
    };
    let (da, h, row_weights) = (poisoned(f, 1.0), poisoned(form.widths() * f, 3.0), poisoned(1, 1.0));
    let mut weights = vec![f32::NAN; 2 * rows];
    (0..rows).for_each(|i| weights[2 * (rows - 1 - i)] = row_weights[i]);
    // A choice of no row: reading its place would panic.
    let origin = (0..rows).rev().map(|i| 2 * i as i32).chain([999; SPARE]).collect();
    Case { form, count: vec![rows as i32], f, origin, weights, da, h }
}

impl Case {
    fn rows(&self) -> usize {
        self.count[0] as usize
    }

    fn run(&self) -> Gradients {
        let (dh, a) = (vec![f32::NAN; self.h.len()], vec![f32::NAN; self.da.len()]);
        let mut got = Gradients { dh, a, dweights: vec![KEPT; self.weights.len()] };
        let rows = Rows { bound: self.rows() + SPARE, count: Some(View::of(&self.count)) };
        let (origin, weights, da, h) =
            (View::of(&self.origin), View::of(&self.weights), View::of(&self.da), View::of(&self.h));
        let (dh, a, dweights) = (ViewMut::of(&mut got.dh), ViewMut::of(&mut got.a), ViewMut::of(&mut got.dweights));
        match self.form {
            Form::Swiglu => Cpu.weighted_swiglu_grad(rows, self.f, origin, weights, da, h, dh, a, dweights),
            Form::Gelu => Cpu.weighted_gelu_grad(rows, self.f, origin, weights, da, h, dh, a, dweights),
        }
        got
    }

    fn weight(&self, row: usize) -> f64 {
        f64::from(self.weights[self.origin[row] as usize])
    }

    /// `⟨da[row], activation(h)⟩`.
    fn inner(&self, row: usize, h: &[f64]) -> f64 {
        let da = &self.da[row * self.f..(row + 1) * self.f];
        self.form.of(h).iter().zip(da).map(|(a, da)| a * f64::from(*da)).sum()
    }

    fn h_of(&self, row: usize) -> &[f32] {
        let wide = self.form.widths() * self.f;
        &self.h[row * wide..(row + 1) * wide]
    }
}

#[test]
fn the_gradients_are_those_of_the_weighted_output() {
    for (form, size) in Form::ALL.into_iter().flat_map(|form| SIZES.map(|size| (form, size))) {
        let (case, (rows, f), wide) = (case(form, size), size, form.widths() * size.1);
        let got = case.run();
        for row in 0..rows {
            let h: Vec<f64> = case.h_of(row).iter().map(|&h| f64::from(h)).collect();
            let weighted: Vec<f64> = form.of(&h).iter().map(|a| case.weight(row) * a).collect();
            assert_close("a", &got.a[row * f..(row + 1) * f], &weighted, rounding(4, 9.0));
            let dweight = &got.dweights[case.origin[row] as usize..][..1];
            assert_close("dweights", dweight, &[case.inner(row, &h)], rounding(f + 4, 9.0 * f as f64));
            let want = finite_differences(case.h_of(row), |h| case.weight(row) * case.inner(row, h));
            // Central differences of a sum of F terms of up to 9 are good to a few 1e-16 · 9 F / step.
            let numeric = 1e-10 * (10 + f) as f64;
            let dh = &got.dh[row * wide..(row + 1) * wide];
            assert_close("dh", dh, &want, rounding(8, 12.0) + numeric);
        }
        assert!(got.dweights.iter().skip(1).step_by(2).all(|&d| d == KEPT), "weights without a row were written");
        assert!(got.dh[rows * wide..].iter().chain(&got.a[rows * f..]).all(|v| v.is_nan()), "rows beyond {rows}");
    }
}

#[test]
fn every_thread_count_gives_the_same_bits() {
    for form in Form::ALL {
        let case = case(form, (700, 64));
        let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let run = |threads| on_threads(threads, || case.run());
        let [one, two, five] = [1, 2, 5].map(run).map(|got| [bits(&got.dh), bits(&got.a), bits(&got.dweights)]);
        assert!(one == two && one == five, "{form:?}");
    }
}
