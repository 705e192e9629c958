//! AdamW, and the norm that clips it.
//!
//! Owns one fused pass over a range of a parameter and its state. It knows no parameter by name and no schedule.

use multiversion::multiversion;

use super::loss::blocked_sum;
use super::parallel::{RowsMut, for_parts, parts, rows_mut};
use super::simd::sum_f64;
use super::{slice, slice_mut};
use crate::ops::AdamWFactors;
use crate::{AdamW, Cpu, OptimizerOps, View, ViewMut};

impl OptimizerOps for Cpu {
    fn adamw(
        &self,
        settings: AdamW,
        grad: ViewMut<'_, Self, f32>,
        m: ViewMut<'_, Self, f32>,
        v: ViewMut<'_, Self, f32>,
        master: Option<ViewMut<'_, Self, f32>>,
        compute: ViewMut<'_, Self, f32>,
    ) {
        let (compute, step) = (slice_mut(compute), settings.factors());
        let len = compute.len();
        let (grad, m, v) = (slice_mut(grad), slice_mut(m), slice_mut(v));
        for (name, other) in [("gradient", grad.len()), ("m", m.len()), ("v", v.len())] {
            assert_eq!(other, len, "lengths of {name} and of the compute copy");
        }
        let state = (rows_mut(grad, 1), rows_mut(m, 1), rows_mut(v, 1), rows_mut(compute, 1));
        match master.map(slice_mut) {
            None => for_parts(len, parts(len), state, |_, (g, m, v, w)| update(step, g.data, m.data, v.data, w.data)),
            Some(master) => {
                assert_eq!(master.len(), len, "lengths of the master and of the compute copy");
                let state = (state, rows_mut(master, 1));
                for_parts(len, parts(len), state, |_, ((g, m, v, w), master)| {
                    update_with_master(step, (g, m, v), master.data, w.data);
                });
            }
        }
    }

    fn sum_of_squares(&self, x: View<'_, Self, f32>, total: ViewMut<'_, Self, f64>) {
        slice_mut(total)[0] += blocked_sum(slice(x), squares);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn squares(x: &[f32]) -> f64 {
    sum_f64(x, |x| f64::from(x) * f64::from(x))
}

impl AdamWFactors {
    /// The new weight; the moments and the gradient are updated in place.
    #[inline(always)]
    fn apply(self, grad: &mut f32, m: &mut f32, v: &mut f32, weight: f32) -> f32 {
        let g = *grad * self.grad_scale;
        *grad = 0.0;
        *m += (g - *m) * self.beta1_rest;
        *v = *v * self.beta2 + g * g * self.beta2_rest;
        weight * self.keep - self.rate * *m / (v.sqrt() * self.root_correction + self.eps)
    }
}

/// One step where the compute copy is itself the master.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn update(step: AdamWFactors, grad: &mut [f32], m: &mut [f32], v: &mut [f32], weights: &mut [f32]) {
    for (((g, m), v), w) in grad.iter_mut().zip(m).zip(v).zip(weights) {
        *w = step.apply(g, m, v, *w);
    }
}

type State<'a> = (RowsMut<'a, f32>, RowsMut<'a, f32>, RowsMut<'a, f32>);

/// One step on the master, copied to the compute copy while it is at hand.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn update_with_master(step: AdamWFactors, (grad, m, v): State<'_>, master: &mut [f32], compute: &mut [f32]) {
    for ((((g, m), v), w), compute) in grad.data.iter_mut().zip(m.data).zip(v.data).zip(master).zip(compute) {
        *w = step.apply(g, m, v, *w);
        *compute = *w;
    }
}
