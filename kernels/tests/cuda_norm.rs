//! RMSNorm on a GPU, against the CPU.

#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{assert_close, download, gpu, poisoned, random, rounded, upload, upload_act, written};
use half::bf16;
use moe_kernels::cuda::{Cuda, CudaAct};
use moe_kernels::{Accumulate, Cpu, DenseOps, Device, NormDims, View, ViewMut};

/// (tokens, groups, width, token stride): none, one, every shape of kernel for both types, heads inside wider rows, rows off 16 bytes.
const NORMS: [(usize, usize, usize, usize); 14] = [
    (0, 1, 8, 8),
    (1, 1, 1, 1),
    (3, 1, 7, 7),
    (5, 1, 64, 64),
    (33, 4, 64, 320),
    (100, 3, 128, 512),
    (70, 1, 256, 256),
    (7, 2, 33, 70),
    (9, 1, 1000, 1000),
    (1500, 1, 1024, 1024),
    (37, 1, 2048, 2048),
    (5, 1, 4096, 4096),
    (3, 1, 8192, 8192),
    (3, 1, 5001, 5001),
];

fn dims((tokens, groups, width, token_stride): (usize, usize, usize, usize)) -> NormDims {
    NormDims { tokens, groups, width, token_stride, eps: 1e-5 }
}

/// Whether an element of a tensor belongs to a normalised row.
fn normalised(dims: NormDims, at: usize) -> bool {
    at % dims.token_stride < dims.groups * dims.width
}

/// Random where rows are normalised, NaN between them.
fn input<A: CudaAct>(dims: NormDims, seed: u64) -> Vec<f32> {
    let mut data = rounded::<A>(&random(seed, dims.tokens * dims.token_stride));
    for (at, x) in data.iter_mut().enumerate() {
        if !normalised(dims, at) {
            *x = f32::NAN;
        }
    }
    data
}

/// The normalised elements; panics where one between them was written.
fn inside(what: &str, dims: NormDims, data: &[f32]) -> Vec<f32> {
    let between = (0..data.len()).find(|at| !normalised(dims, *at) && !data[*at].is_nan());
    assert_eq!(between, None, "{what}: written between the rows");
    (0..data.len()).filter(|at| normalised(dims, *at)).map(|at| data[at]).collect()
}

fn cpu(data: &Vec<f32>) -> View<'_, Cpu, f32> {
    View::of(data)
}

fn cpu_mut(data: &mut Vec<f32>) -> ViewMut<'_, Cpu, f32> {
    ViewMut::of(data)
}

#[test]
fn rms_norm_and_its_gradients_match_the_cpu() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        let unit = if A::HOLDS_F32 { 0.0 } else { 1.0 / 256.0 };
        for dims in NORMS.map(dims) {
            let (what, rows) = (format!("{} {dims:?}", A::NAME), dims.tokens * dims.groups);
            let (x, dy, old) = (input::<A>(dims, 1), input::<A>(dims, 2), input::<A>(dims, 3));
            let w = rounded::<A>(&random(4, dims.width));
            let [gx, gdy, gw] = [&x, &dy, &w].map(|data| upload_act(&gpu, data));

            let (mut y, mut rstd) = (vec![f32::NAN; x.len()], vec![f32::NAN; rows]);
            Cpu.rms_norm(dims, cpu(&x), cpu(&w), cpu_mut(&mut y), cpu_mut(&mut rstd));
            let (mut gy, mut grstd) = (poisoned::<A, A>(&gpu, x.len()), poisoned::<A, f32>(&gpu, rows));
            gpu.rms_norm(dims, View::of(&gx), View::of(&gw), ViewMut::of(&mut gy), ViewMut::of(&mut grstd));
            let expected = inside(&what, dims, &y);
            let got = inside(&what, dims, &written(&gpu, &gy));
            assert_close(&format!("y {what}"), &got, &expected, |i| {
                (16.0 * f32::EPSILON + unit) * (0.1 + expected[i].abs())
            });
            assert_close(&format!("rstd {what}"), &written(&gpu, &grstd), &rstd, |i| 16.0 * f32::EPSILON * rstd[i]);

            // The gradient grows with rstd, and so do its roundings.
            let largest = rstd.iter().copied().fold(1.0, f32::max);
            for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
                let (mut dx, mut dw) = (old.clone(), random(5, dims.width));
                let (mut gdx, mut gdw) = (upload_act(&gpu, &old), upload(&gpu, &dw));
                let grstd = upload(&gpu, &rstd);
                Cpu.rms_norm_grad(
                    dims,
                    cpu(&dy),
                    cpu(&x),
                    cpu(&w),
                    cpu(&rstd),
                    cpu_mut(&mut dx),
                    cpu_mut(&mut dw),
                    accumulate,
                );
                gpu.rms_norm_grad(
                    dims,
                    View::of(&gdy),
                    View::of(&gx),
                    View::of(&gw),
                    View::of(&grstd),
                    ViewMut::of(&mut gdx),
                    ViewMut::of(&mut gdw),
                    accumulate,
                );
                let got: Vec<f32> = download(&gpu, &gdx).iter().map(|x| x.to_f32()).collect();
                let (got, expected) = (inside(&what, dims, &got), inside(&what, dims, &dx));
                let allowed = |i: usize| 64.0 * f32::EPSILON * largest + unit * expected[i].abs();
                assert_close(&format!("dx {what}, {accumulate:?}"), &got, &expected, allowed);
                let allowed = 4.0 * f32::EPSILON * (16 + rows) as f32;
                assert_close(&format!("dw {what}"), &download(&gpu, &gdw), &dw, |_| allowed);
            }
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn the_weights_gradient_has_the_same_bits_in_every_run() {
    fn bits(gpu: &Cuda<bf16>) -> Vec<u32> {
        let dims = NormDims { tokens: 5000, groups: 1, width: 768, token_stride: 768, eps: 1e-5 };
        let [x, dy] = [1, 2].map(|seed| upload_act(gpu, &random(seed, 5000 * 768)));
        let (w, rstd) = (upload_act(gpu, &random(3, 768)), upload(gpu, &vec![1.7_f32; 5000]));
        let (mut dx, mut dw) = (poisoned::<bf16, bf16>(gpu, 5000 * 768), upload(gpu, &vec![0.0_f32; 768]));
        let (dx_view, dw_view) = (ViewMut::of(&mut dx), ViewMut::of(&mut dw));
        let (dy, x, w, rstd) = (View::of(&dy), View::of(&x), View::of(&w), View::of(&rstd));
        gpu.rms_norm_grad(dims, dy, x, w, rstd, dx_view, dw_view, Accumulate::Overwrite);
        download(gpu, &dw).iter().map(|x| x.to_bits()).collect()
    }
    let Some(gpu) = gpu::<bf16>() else { return };
    assert!(bits(&gpu) == bits(&gpu.fork()), "other bits in the second run");
}
