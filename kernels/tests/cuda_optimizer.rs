//! AdamW and the norm that clips it on a GPU, against the CPU.

#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{assert_close, download, gpu, random, rounded, upload, upload_act};
use half::bf16;
use moe_kernels::cuda::CudaAct;
use moe_kernels::{AdamW, Cpu, Device, OptimizerOps, View, ViewMut};

/// (elements, where the f32 tensors begin, where the compute copy begins): none, one, ranges off 16 bytes that agree and that do not.
const TENSORS: [(usize, usize, usize); 8] =
    [(0, 0, 0), (1, 0, 0), (3, 1, 1), (4, 3, 3), (1000, 2, 2), (1001, 0, 1), (4099, 1, 5), (100_003, 0, 0)];

fn settings(step: u64) -> AdamW {
    AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.7 }
}

#[test]
fn adamw_matches_the_cpu_and_leaves_the_gradient_zero() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        for (n, from, compute_from) in TENSORS {
            let (what, range) = (format!("{} {n} from {from}, {compute_from}", A::NAME), from..from + n);
            // One element more on either side, which stays what it is.
            let len = from + n + 1;
            let weights = random(1, len);
            let start =
                if A::HOLDS_F32 { vec![0.25; compute_from + n + 1] } else { vec![f32::NAN; compute_from + n + 1] };
            let mut compute = upload_act(&gpu, &start);
            if A::HOLDS_F32 {
                let own: Vec<A> = weights[range.clone()].iter().map(|x| A::from_f32(*x)).collect();
                gpu.upload(&own, ViewMut::range(&mut compute, compute_from..compute_from + n));
            }
            let (mut w, mut m, mut v) = (weights.clone(), vec![0.0; len], vec![0.0; len]);
            let (mut gw, mut gm, mut gv) = (upload(&gpu, &w), upload(&gpu, &m), upload(&gpu, &v));
            for step in 1..=3 {
                let mut grad = random(10 + step, len);
                let mut ggrad = upload(&gpu, &grad);
                Cpu.adamw(
                    settings(step),
                    ViewMut::range(&mut grad, range.clone()),
                    ViewMut::range(&mut m, range.clone()),
                    ViewMut::range(&mut v, range.clone()),
                    None,
                    ViewMut::range(&mut w, range.clone()),
                );
                gpu.adamw(
                    settings(step),
                    ViewMut::range(&mut ggrad, range.clone()),
                    ViewMut::range(&mut gm, range.clone()),
                    ViewMut::range(&mut gv, range.clone()),
                    (!A::HOLDS_F32).then(|| ViewMut::range(&mut gw, range.clone())),
                    ViewMut::range(&mut compute, compute_from..compute_from + n),
                );
                assert_eq!(download(&gpu, &ggrad), grad, "gradient {what}");
            }
            let close = |name: &str, got: &[f32], expected: &[f32]| {
                let allowed = |i: usize| 16.0 * f32::EPSILON * (expected[i].abs() + 0.02);
                assert_close(&format!("{name} {what}"), got, expected, allowed);
            };
            close("m", &download(&gpu, &gm), &m);
            close("v", &download(&gpu, &gv), &v);
            let copy: Vec<f32> = download(&gpu, &compute).iter().map(|x| x.to_f32()).collect();
            let (before, updated, after) =
                (&copy[..compute_from], &copy[compute_from..compute_from + n], &copy[compute_from + n..]);
            if A::HOLDS_F32 {
                close("weights", updated, &w[range.clone()]);
                assert!(before.iter().chain(after).all(|x| *x == 0.25), "{what}: written beside the compute copy");
            } else {
                let master = download(&gpu, &gw);
                close("master", &master, &w);
                assert_eq!(updated, rounded::<A>(&master[range]), "compute copy {what}");
                assert!(before.iter().chain(after).all(|x| x.is_nan()), "{what}: written beside the compute copy");
            }
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn squares_are_summed_in_f64() {
    let Some(gpu) = gpu::<bf16>() else { return };
    for (from, n) in [(0, 0), (0, 1), (1, 3), (3, 1001), (0, 1_000_003)] {
        let data = random(1, from + n);
        // In short runs: a long sum's own roundings would be seen before the GPU's.
        let squares = |run: &[f32]| run.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
        let expected = data[from..].chunks(1000).map(squares).sum::<f64>() + 2.0;
        let (x, mut total) = (upload(&gpu, &data), upload(&gpu, &[2.0_f64]));
        gpu.sum_of_squares(View::range(&x, from..from + n), ViewMut::of(&mut total));
        let got = download(&gpu, &total)[0];
        assert!((got - expected).abs() <= 1e-14 * expected, "{n} squares: {got}, expected {expected}");
    }
}
