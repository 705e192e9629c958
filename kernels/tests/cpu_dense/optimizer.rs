//! AdamW and the sum of squares.

use super::support::{assert_close, assert_reproducible, random, tolerance, view, view_mut, wide, with_threads};
use moe_kernels::{AdamW, Cpu, OptimizerOps};

fn settings(step: u64) -> AdamW {
    AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 }
}

/// PyTorch's single-tensor AdamW, in f64.
fn reference(s: AdamW, grad: &[f32], m: &mut [f64], v: &mut [f64], w: &mut [f64]) {
    let [lr, beta1, beta2, eps, decay, scale] =
        [s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.grad_scale].map(f64::from);
    let (correction1, correction2) = (1.0 - beta1.powf(s.step as f64), 1.0 - beta2.powf(s.step as f64));
    for (i, g) in grad.iter().enumerate() {
        let g = f64::from(*g) * scale;
        w[i] *= 1.0 - lr * decay;
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        w[i] -= lr / correction1 * m[i] / (v[i].sqrt() / correction2.sqrt() + eps);
    }
}

#[test]
fn a_trajectory_follows_pytorch_with_and_without_a_master() {
    for len in [0, 1, 17, 100, 40_000] {
        for with_master in [false, true] {
            let start = random(1, len);
            let (mut m, mut v, mut master) = (vec![0.0; len], vec![0.0; len], start.clone());
            let mut compute = if with_master { vec![f32::NAN; len] } else { start.clone() };
            let (mut exact_m, mut exact_v, mut exact_w) = (vec![0.0; len], vec![0.0; len], wide(&start));
            for step in 1..=5 {
                let mut grad = random(step + 10, len);
                reference(settings(step), &grad, &mut exact_m, &mut exact_v, &mut exact_w);
                let (grad_view, m_view, v_view) = (view_mut(&mut grad), view_mut(&mut m), view_mut(&mut v));
                let master_view = with_master.then(|| view_mut(&mut master));
                Cpu.adamw(settings(step), grad_view, m_view, v_view, master_view, view_mut(&mut compute));
                assert!(grad.iter().all(|g| *g == 0.0), "the gradient is zeroed");
            }
            assert_close("m", &m, &exact_m, tolerance(5));
            assert_close("v", &v, &exact_v, tolerance(5));
            assert_close("weights", &compute, &exact_w, tolerance(5));
            if with_master {
                assert_eq!(compute, master);
            }
        }
    }
}

#[test]
fn a_gradient_of_zero_only_decays() {
    let (mut grad, mut m, mut v, mut w) = (vec![0.0; 3], vec![0.0; 3], vec![0.0; 3], vec![1.0, -2.0, 0.0]);
    let settings = AdamW { lr: 0.5, weight_decay: 0.5, ..settings(1) };
    Cpu.adamw(settings, view_mut(&mut grad), view_mut(&mut m), view_mut(&mut v), None, view_mut(&mut w));
    assert_eq!((w, m, v), (vec![0.75, -1.5, 0.0], vec![0.0; 3], vec![0.0; 3]));
}

#[test]
fn the_sum_of_squares_is_exact_to_f64_and_the_same_for_every_number_of_threads() {
    for len in [0, 1, 100, 70_001] {
        let x = random(1, len);
        let sum = |threads| {
            let mut total = vec![1.0_f64];
            with_threads(threads, || Cpu.sum_of_squares(view(&x), view_mut(&mut total)));
            total[0]
        };
        let exact = 1.0 + x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        assert!((sum(1) - exact).abs() <= 1e-12 * exact);
        assert_eq!(sum(1).to_bits(), sum(2).to_bits());
    }
}

#[test]
fn adamw_is_reproducible() {
    assert_reproducible("adamw", 0.0, || {
        let (mut grad, mut m, mut v) = (random(1, 50_001), random(2, 50_001), vec![0.5; 50_001]);
        let mut w = random(3, 50_001);
        Cpu.adamw(settings(7), view_mut(&mut grad), view_mut(&mut m), view_mut(&mut v), None, view_mut(&mut w));
        [m, v, w].concat()
    });
}
