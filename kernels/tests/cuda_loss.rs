//! Cross-entropy and sums on a GPU, against the CPU.

#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{assert_close, download, gpu, poisoned, random, rounded, upload, upload_act, written};
use half::bf16;
use moe_kernels::cuda::{Cuda, CudaAct};
use moe_kernels::{Cpu, Device, Element, LossOps, View, ViewMut};

/// (rows, V): no row, one column, vocabularies off 16 bytes, rows that fit in half the shared memory, in all of it, and in none.
const LOGITS: [(usize, usize); 10] = [
    (0, 8),
    (1, 1),
    (5, 7),
    (300, 256),
    (33, 1001),
    (9, 32_000),
    (6, 50_257),
    (4, 100_003),
    (3, 151_936),
    (2, 262_144),
];
const LENGTHS: [usize; 6] = [0, 1, 3, 1000, 65_537, 1_000_003];

/// Logits with a few NaN rows behind, and targets of which every third is none.
fn problem<A: CudaAct>(rows: usize, vocab: usize) -> (Vec<f32>, Vec<i32>) {
    let logits: Vec<f32> = random(1, rows * vocab).iter().map(|x| 6.0 * x).collect();
    let target = |row: usize| if row % 3 == 1 { -1 } else { (row * 7919 % vocab) as i32 };
    (rounded::<A>(&logits), (0..rows).map(target).collect())
}

#[test]
fn cross_entropy_and_its_gradient_match_the_cpu() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        let (scale, unit) = (0.125, if A::HOLDS_F32 { 0.0 } else { 1.0 / 256.0 });
        for (rows, vocab) in LOGITS {
            let what = format!("{} {rows} x {vocab}", A::NAME);
            let (logits, targets) = problem::<A>(rows, vocab);
            let (mut gradient, mut losses) = (logits.clone(), vec![f32::NAN; rows]);
            let cpu_targets = View::of(&targets);
            Cpu.cross_entropy(vocab, scale, cpu_targets, ViewMut::of(&mut gradient), ViewMut::of(&mut losses));

            let poison = vec![f32::NAN; 64];
            let mut on_gpu = upload_act(&gpu, &[logits.clone(), poison].concat());
            let gtargets = upload(&gpu, &targets);
            let close = |got: &[f32]| {
                assert_close(&format!("losses {what}"), got, &losses, |i| 3e-5 + 4.0 * f32::EPSILON * losses[i].abs());
            };
            let mut alone = poisoned::<A, f32>(&gpu, rows);
            gpu.cross_entropy_loss(vocab, View::of(&gtargets), View::of(&on_gpu), ViewMut::of(&mut alone));
            close(&written(&gpu, &alone));

            let mut got = poisoned::<A, f32>(&gpu, rows);
            let (logits_view, losses_view) = (ViewMut::of(&mut on_gpu), ViewMut::of(&mut got));
            gpu.cross_entropy(vocab, scale, View::of(&gtargets), logits_view, losses_view);
            close(&written(&gpu, &got));
            assert_close(&format!("gradient {what}"), &written(&gpu, &on_gpu), &gradient, |i| {
                (3e-5 + unit) * gradient[i].abs() + scale * 2.0 * f32::EPSILON
            });
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn a_target_outside_of_the_vocabulary_gives_nan_in_its_row_alone() {
    let Some(gpu) = gpu::<bf16>() else { return };
    let targets = upload(&gpu, &[1, 9, -2, 0]);
    let mut logits = upload_act(&gpu, &[0.0; 36]);
    let mut losses = poisoned::<bf16, f32>(&gpu, 4);
    gpu.cross_entropy(9, 1.0, View::of(&targets), ViewMut::of(&mut logits), ViewMut::of(&mut losses));
    let nan: Vec<bool> = written(&gpu, &losses).iter().map(|x| x.is_nan()).collect();
    assert_eq!(nan, [false, true, true, false]);
    let nan: Vec<bool> = download(&gpu, &logits).chunks(9).map(|row| row.iter().all(|x| x.is_nan())).collect();
    assert_eq!(nan, [false, true, true, false]);
}

#[test]
fn large_logits_neither_overflow_nor_lose_the_loss() {
    let Some(gpu) = gpu::<f32>() else { return };
    let targets = upload(&gpu, &[0, 1]);
    let logits = upload(&gpu, &[80_000.0_f32, -80_000.0, 3.0e38, f32::NEG_INFINITY]);
    let mut losses = poisoned::<f32, f32>(&gpu, 2);
    gpu.cross_entropy_loss(2, View::of(&targets), View::of(&logits), ViewMut::of(&mut losses));
    assert_eq!(written(&gpu, &losses), [0.0, f32::INFINITY]);
}

#[test]
fn sums_match_the_cpu_and_have_the_same_bits_in_every_run() {
    fn check<T: Element + Into<f64>>(gpu: &Cuda<bf16>, number: impl Fn(f32) -> T) {
        for len in LENGTHS {
            for from in [0, 1] {
                let data: Vec<T> = random(1, from + len).iter().map(|x| number(*x)).collect();
                let expected = data[from..].iter().fold(0.5, |sum: f64, x| sum + (*x).into());
                let on_gpu = upload(gpu, &data);
                let total = |queue: &Cuda<bf16>| {
                    let mut total = upload(queue, &[0.5_f64]);
                    queue.sum(View::range(&on_gpu, from..from + len), ViewMut::of(&mut total));
                    download(queue, &total)[0]
                };
                let (got, again) = (total(gpu), total(&gpu.fork()));
                let allowed = 1e-15 * len as f64 * data.iter().fold(1.0, |most: f64, x| most.max((*x).into().abs()));
                assert!((got - expected).abs() <= allowed, "{} sum of {len}: {got}, expected {expected}", T::NAME);
                assert_eq!(got.to_bits(), again.to_bits(), "{} sum of {len}: other bits in the second run", T::NAME);
            }
        }
    }
    let Some(gpu) = gpu::<bf16>() else { return };
    check(&gpu, |x| x);
    check(&gpu, f64::from);
    check(&gpu, bf16::from_f32);
    check(&gpu, |x| (x * 1e9) as i32);
}
