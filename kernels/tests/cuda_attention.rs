//! Rotary embedding and attention on a GPU against the CPU's, which gets the same rounded inputs.
#![cfg(feature = "cuda")]
#![allow(clippy::expect_used)] // a test ends where a GPU fails

mod cuda_support;

use cuda_support::{assert_close, download, gpu, poisoned, random, rounded, upload, upload_act, written};
use half::bf16;
use moe_kernels::cuda::{Cuda, CudaAct};
use moe_kernels::{AttentionDims, AttentionOps, Cpu, RotaryDirection, View, ViewMut};

const SEQUENCES: [usize; 5] = [1, 7, 64, 65, 200];
/// Query heads, key/value heads.
const HEADS: [(usize, usize); 3] = [(4, 4), (4, 2), (6, 1)];
const WIDTHS: [usize; 3] = [32, 64, 128];
const BATCHES: [usize; 2] = [1, 3];
/// Widths between the compiled ones, above the most common, and off the tensor cores' grid (20, 264).
const ODD_WIDTHS: [usize; 9] = [8, 20, 24, 80, 96, 112, 160, 256, 264];

fn sizes() -> Vec<AttentionDims> {
    let mut sizes = Vec::new();
    for seq in SEQUENCES {
        for (heads, kv_heads) in HEADS {
            for head_dim in WIDTHS {
                sizes.extend(BATCHES.map(|batch| AttentionDims { batch, seq, heads, kv_heads, head_dim }));
            }
        }
    }
    sizes.extend(ODD_WIDTHS.map(|head_dim| AttentionDims { batch: 2, seq: 130, heads: 2, kv_heads: 1, head_dim }));
    sizes
}

/// Documents of 1, 2, … positions one after another, begun anew in each sequence.
fn documents(dims: AttentionDims) -> Vec<i32> {
    let one: Vec<i32> = (1..)
        .scan(0, |start, len| Some(vec![std::mem::replace(start, *start + len); len as usize]))
        .flatten()
        .take(dims.seq)
        .collect();
    one.repeat(dims.batch)
}

/// Inputs of both passes and the CPU's results. The backward pass gets the CPU's `out`, rounded, and `lse`.
struct Case {
    dims: AttentionDims,
    starts: Option<Vec<i32>>,
    qkv: Vec<f32>,
    dout: Vec<f32>,
    out: Vec<f32>,
    lse: Vec<f32>,
    dqkv: Vec<f32>,
}

impl Case {
    fn new<A: CudaAct>(dims: AttentionDims, starts: Option<Vec<i32>>) -> Self {
        let (tokens, out_width) = (dims.tokens(), dims.heads * dims.head_dim);
        let qkv = rounded::<A>(&random(1, tokens * dims.qkv_width()));
        let dout = rounded::<A>(&random(2, tokens * out_width));
        let (mut out, mut lse) = (vec![0.0; tokens * out_width], vec![0.0; tokens * dims.heads]);
        let mut dqkv = vec![0.0; qkv.len()];
        let seen = starts.as_ref().map(View::of);
        Cpu.attention(dims, seen, View::of(&qkv), ViewMut::of(&mut out), ViewMut::of(&mut lse));
        let saved = rounded::<A>(&out);
        let (qkv_view, saved, dout_view) = (View::of(&qkv), View::of(&saved), View::of(&dout));
        Cpu.attention_grad(dims, seen, qkv_view, saved, View::of(&lse), dout_view, ViewMut::of(&mut dqkv));
        Self { dims, starts, qkv, dout, out, lse, dqkv }
    }

    fn forward<A: CudaAct>(&self, gpu: &Cuda<A>) -> (Vec<f32>, Vec<f32>) {
        let qkv = upload_act(gpu, &self.qkv);
        let mut out = poisoned::<A, A>(gpu, self.out.len());
        let mut lse = poisoned::<A, f32>(gpu, self.lse.len());
        let starts = self.starts.as_ref().map(|starts| upload(gpu, starts));
        let seen = starts.as_ref().map(View::of);
        gpu.attention(self.dims, seen, View::of(&qkv), ViewMut::of(&mut out), ViewMut::of(&mut lse));
        (written(gpu, &out), written(gpu, &lse))
    }

    fn backward<A: CudaAct>(&self, gpu: &Cuda<A>) -> Vec<f32> {
        let (qkv, out, dout) = (upload_act(gpu, &self.qkv), upload_act(gpu, &self.out), upload_act(gpu, &self.dout));
        let lse = upload(gpu, &self.lse);
        let mut dqkv = poisoned::<A, A>(gpu, self.dqkv.len());
        let (qkv, out, lse, dout) = (View::of(&qkv), View::of(&out), View::of(&lse), View::of(&dout));
        let starts = self.starts.as_ref().map(|starts| upload(gpu, starts));
        let seen = starts.as_ref().map(View::of);
        gpu.attention_grad(self.dims, seen, qkv, out, lse, dout, ViewMut::of(&mut dqkv));
        written(gpu, &dqkv)
    }

    /// What sums in f32 in another order may differ by: as many roundings as a score, a row and a group have terms.
    fn f32_error(&self) -> f32 {
        let AttentionDims { seq, heads, kv_heads, head_dim, .. } = self.dims;
        4.0 * f32::EPSILON * (8 + head_dim + seq * heads / kv_heads) as f32
    }

    /// Of `out`: the weights add up to 1, the values are at most 1, and both the weights and the result are rounded once.
    fn out_error<A: CudaAct>(&self, expected: f32) -> f32 {
        self.f32_error() + unit::<A>() * (1.0 + expected.abs())
    }

    /// Of `dqkv`. P and dS are rounded, and the result. For numbers in −1..1 a term dS/√D is at most about 2·P, and the squares of a
    /// key's weights add up to at most 1 + 1/4 + 1/9 + … = π²/6 a head; roundings are independent, so six standard deviations are
    /// 6/√3 · √(π²/6 · group) · 2 units.
    fn grad_error<A: CudaAct>(&self, expected: f32) -> f32 {
        let group = (self.dims.heads / self.dims.kv_heads) as f32;
        self.f32_error() + unit::<A>() * (9.0 * group.sqrt() + expected.abs())
    }
}

/// The largest relative error of rounding to bf16; f32's is counted apart.
fn unit<A: CudaAct>() -> f32 {
    if A::HOLDS_F32 { 0.0 } else { 2.0_f32.powi(-8) }
}

/// Root mean square of the differences over that of what is expected. 0 over 0 is 0: one position alone has no gradient of q and k.
fn relative_error(got: &[f32], expected: &[f32]) -> f32 {
    let error: f32 = got.iter().zip(expected).map(|(got, expected)| (got - expected).powi(2)).sum();
    let size: f32 = expected.iter().map(|x| x * x).sum();
    (error / size.max(f32::MIN_POSITIVE)).sqrt()
}

fn attention_agrees<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for (dims, starts) in sizes().into_iter().flat_map(|dims| [(dims, None), (dims, Some(documents(dims)))]) {
        let case = Case::new::<A>(dims, starts);
        let (out, lse) = case.forward(&gpu);
        assert_close(&format!("{} out, {dims:?}", A::NAME), &out, &case.out, |i| case.out_error::<A>(case.out[i]));
        assert_close(&format!("{} lse, {dims:?}", A::NAME), &lse, &case.lse, |_| case.f32_error());
    }
}

fn gradients_agree<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for (dims, starts) in sizes().into_iter().flat_map(|dims| [(dims, None), (dims, Some(documents(dims)))]) {
        let case = Case::new::<A>(dims, starts);
        let dqkv = case.backward(&gpu);
        let what = format!("{} dqkv, {dims:?}", A::NAME);
        assert_close(&what, &dqkv, &case.dqkv, |i| case.grad_error::<A>(case.dqkv[i]));
        // Each of three roundings adds at most a unit, most of them much less.
        let (error, allowed) = (relative_error(&dqkv, &case.dqkv), 4.0 * unit::<A>() + 8.0 * case.f32_error());
        assert!(error <= allowed, "{what}: relative error {error:e}, allowed {allowed:e}");
    }
}

fn rotary_agrees<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    let mut sizes = sizes();
    // Halves that are no whole vectors: 1 and 3 columns.
    sizes.extend([2, 6].map(|head_dim| AttentionDims { batch: 2, seq: 9, heads: 3, kv_heads: 1, head_dim }));
    for dims in sizes {
        let angles = random(3, dims.seq * dims.head_dim / 2);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|x| ((3.0 * x).cos(), (3.0 * x).sin())).unzip();
        let before = rounded::<A>(&random(4, dims.tokens() * dims.qkv_width()));
        let (cos_there, sin_there) = (upload(&gpu, &cos), upload(&gpu, &sin));
        for direction in [RotaryDirection::Forward, RotaryDirection::Inverse] {
            let mut expected = before.clone();
            Cpu.rotary(dims, direction, View::of(&cos), View::of(&sin), ViewMut::of(&mut expected));
            let mut qkv = upload_act(&gpu, &before);
            gpu.rotary(dims, direction, View::of(&cos_there), View::of(&sin_there), ViewMut::of(&mut qkv));
            let got: Vec<f32> = download(&gpu, &qkv).into_iter().map(A::to_f32).collect();
            let tolerance = |i: usize| 4.0 * f32::EPSILON + unit::<A>() * expected[i].abs();
            assert_close(&format!("{} {direction:?}, {dims:?}", A::NAME), &got, &expected, tolerance);
        }
    }
}

#[test]
fn attention_agrees_with_the_cpu_f32() {
    attention_agrees::<f32>();
}

#[test]
fn attention_agrees_with_the_cpu_bf16() {
    attention_agrees::<bf16>();
}

#[test]
fn attention_gradients_agree_with_the_cpu_f32() {
    gradients_agree::<f32>();
}

#[test]
fn attention_gradients_agree_with_the_cpu_bf16() {
    gradients_agree::<bf16>();
}

#[test]
fn rotary_agrees_with_the_cpu_f32() {
    rotary_agrees::<f32>();
}

#[test]
fn rotary_agrees_with_the_cpu_bf16() {
    rotary_agrees::<bf16>();
}

#[test]
fn attention_takes_rows_off_16_bytes() {
    let Some(gpu) = gpu::<bf16>() else { return };
    let case = Case::new::<bf16>(AttentionDims { batch: 1, seq: 40, heads: 2, kv_heads: 1, head_dim: 64 }, None);
    let shifted: Vec<f32> = [0.0].iter().chain(&case.qkv).copied().collect();
    let qkv = upload_act(&gpu, &shifted);
    let mut out = poisoned::<bf16, bf16>(&gpu, case.out.len());
    let mut lse = poisoned::<bf16, f32>(&gpu, case.lse.len());
    let view = View::range(&qkv, 1..shifted.len());
    gpu.attention(case.dims, None, view, ViewMut::of(&mut out), ViewMut::of(&mut lse));
    assert_close("out", &written(&gpu, &out), &case.out, |i| case.out_error::<bf16>(case.out[i]));
}

#[test]
fn attention_gives_the_same_bits_again() {
    let Some(gpu) = gpu::<bf16>() else { return };
    let case = Case::new::<bf16>(AttentionDims { batch: 3, seq: 200, heads: 6, kv_heads: 2, head_dim: 128 }, None);
    assert!(case.forward(&gpu) == case.forward(&gpu), "forward");
    assert!(case.backward(&gpu) == case.backward(&gpu), "backward");
}

/// Milliseconds: the median of ten, after two to warm up.
fn median_ms(gpu: &Cuda<bf16>, mut work: impl FnMut()) -> f32 {
    let mut times: Vec<f32> = (0..12).map(|_| gpu.time(&mut work).expect("a run of the kernels")).skip(2).collect();
    times.sort_by(f32::total_cmp);
    times[times.len() / 2]
}

#[test]
#[ignore = "prints rates, for a GPU that does nothing else: --ignored --nocapture"]
fn rates() {
    let Some(gpu) = gpu::<bf16>() else { return };
    for (head_dim, heads, kv_heads) in [(128, 16, 4), (64, 32, 8)] {
        let dims = AttentionDims { batch: 8, seq: 2048, heads, kv_heads, head_dim };
        let out_len = dims.tokens() * heads * head_dim;
        let qkv = upload_act(&gpu, &random(1, dims.tokens() * dims.qkv_width()));
        let dout = upload_act(&gpu, &random(2, out_len));
        let mut out = poisoned::<bf16, bf16>(&gpu, out_len);
        let mut lse = poisoned::<bf16, f32>(&gpu, dims.tokens() * heads);
        let mut dqkv = poisoned::<bf16, bf16>(&gpu, dims.tokens() * dims.qkv_width());
        let forward = median_ms(&gpu, || {
            gpu.attention(dims, None, View::of(&qkv), ViewMut::of(&mut out), ViewMut::of(&mut lse));
        });
        let backward = median_ms(&gpu, || {
            let (qkv, out, lse, dout) = (View::of(&qkv), View::of(&out), View::of(&lse), View::of(&dout));
            gpu.attention_grad(dims, None, qkv, out, lse, dout, ViewMut::of(&mut dqkv));
        });
        let flops = 2.0 * (dims.tokens() * dims.seq * heads * head_dim) as f32;
        println!("{dims:?}");
        println!("  forward  {forward:.3} ms, {:.0} TFLOP/s", flops / forward / 1e9);
        println!("  backward {backward:.3} ms, {:.0} TFLOP/s", 2.5 * flops / backward / 1e9);
    }
}
