//! Grouped GEMM on a GPU against the CPU's, which gets the same rounded inputs.
#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{assert_close, download, gpu, poisoned, random, random_within, rounded, upload, upload_act};
use half::bf16;
use moe_kernels::cuda::{Cuda, CudaAct};
use moe_kernels::{Accumulate, Cpu, ExpertOps, GroupedDims, Rows, View, ViewMut, WeightedSwiglu};

/// Rows of each group; output and input width. One has more tiles than a GPU has multiprocessors; the last widths are none that the copy
/// engine takes.
const CASES: [(&[usize], usize, usize); 10] = [
    (&[1], 256, 64),
    (&[128], 256, 64),
    (&[0, 0, 0], 64, 64),
    (&[5, 0, 300, 129], 256, 192),
    (&[0, 0, 7], 512, 128),
    (&[0, 513, 0, 0], 144, 72),
    (&[300, 1, 127, 128, 129, 0], 384, 320),
    (&[64; 40], 128, 256),
    (&[70; 40], 384, 448),
    (&[33, 0, 70], 38, 21),
];
/// Rows behind the last group, which hold NaN and stay so.
const BEYOND: usize = 37;

struct Case<A: CudaAct> {
    gpu: Cuda<A>,
    dims: GroupedDims,
    rows: usize,
    offsets: Vec<i32>,
    x: Vec<f32>,
    dy: Vec<f32>,
    w: Vec<f32>,
}

impl<A: CudaAct> Case<A> {
    fn new(gpu: &Cuda<A>, (sizes, n, k): (&[usize], usize, usize)) -> Self {
        let mut offsets = vec![0];
        for size in sizes {
            offsets.push(offsets[offsets.len() - 1] + *size as i32);
        }
        let rows: usize = sizes.iter().sum();
        let dims = GroupedDims { experts: sizes.len(), n, k };
        let inputs = [(1, rows * k), (2, rows * n), (3, sizes.len() * n * k)];
        let [x, dy, w] = inputs.map(|(seed, len)| rounded::<A>(&random(seed, len)));
        Self { gpu: gpu.clone(), dims, rows, offsets, x, dy, w }
    }

    /// Rows on the GPU, with NaNs behind them.
    fn with_nans(&self, rows: &[f32], width: usize) -> moe_kernels::cuda::CudaBuffer<A> {
        upload_act(&self.gpu, &[rows, &vec![f32::NAN; BEYOND * width]].concat())
    }

    /// The rows that were to be written; those behind must be NaN still.
    fn rows_of(&self, buffer: &moe_kernels::cuda::CudaBuffer<A>, width: usize) -> Vec<f32> {
        let mut all: Vec<f32> = download(&self.gpu, buffer).into_iter().map(A::to_f32).collect();
        assert!(all.split_off(self.rows * width).iter().all(|x| x.is_nan()), "rows of no group were written");
        all
    }

    /// What a sum of `depth` products of numbers below 1 may be off by: f32 sums in another order, and one rounding of the result.
    fn tolerance(&self, depth: usize) -> impl Fn(f32) -> f32 {
        let ulp = if A::BYTES == 2 { 2.0f32.powi(-8) } else { f32::EPSILON };
        move |expected| f32::EPSILON * 2.0 * depth as f32 + ulp * expected.abs()
    }
}

fn forward_and_gradients<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for sizes in CASES {
        let case = Case::new(&gpu, sizes);
        let Case { dims, rows, ref offsets, ref x, ref dy, ref w, .. } = case;
        let (n, k, room) = (dims.n, dims.k, rows + BEYOND);
        let on_gpu = upload(&gpu, offsets);
        let (gx, gdy, gw) = (case.with_nans(x, k), case.with_nans(dy, n), upload_act(&gpu, w));
        let (mut y, mut dx) = (poisoned::<A, A>(&gpu, room * n), poisoned::<A, A>(&gpu, room * k));
        let before = random(4, w.len());
        let mut dw = upload(&gpu, &before);
        let mut replaced = upload(&gpu, &vec![f32::NAN; w.len()]);
        gpu.grouped_linear(dims, View::of(&on_gpu), View::of(&gx), View::of(&gw), ViewMut::of(&mut y));
        gpu.grouped_linear_grad_input(dims, View::of(&on_gpu), View::of(&gdy), View::of(&gw), ViewMut::of(&mut dx));
        for (dw, accumulate) in [(&mut dw, Accumulate::Add), (&mut replaced, Accumulate::Overwrite)] {
            let (offsets, dy, x) = (View::of(&on_gpu), View::of(&gdy), View::of(&gx));
            gpu.grouped_linear_grad_weight(dims, offsets, dy, x, ViewMut::of(dw), accumulate);
        }

        let (mut ry, mut rdx, mut rdw) = (vec![0.0; rows * n], vec![0.0; rows * k], before);
        Cpu.grouped_linear(dims, View::of(offsets), View::of(x), View::of(w), ViewMut::of(&mut ry));
        Cpu.grouped_linear_grad_input(dims, View::of(offsets), View::of(dy), View::of(w), ViewMut::of(&mut rdx));
        let mut rreplaced = vec![f32::NAN; w.len()];
        for (dw, accumulate) in [(&mut rdw, Accumulate::Add), (&mut rreplaced, Accumulate::Overwrite)] {
            let (offsets, dy, x) = (View::of(offsets), View::of(dy), View::of(x));
            Cpu.grouped_linear_grad_weight(dims, offsets, dy, x, ViewMut::of(dw), accumulate);
        }
        let what = format!("{} {sizes:?}", A::NAME);
        let (of_y, of_dx) = (case.tolerance(k), case.tolerance(n));
        assert_close(&format!("y, {what}"), &case.rows_of(&y, n), &ry, |i| of_y(ry[i]));
        assert_close(&format!("dx, {what}"), &case.rows_of(&dx, k), &rdx, |i| of_dx(rdx[i]));
        let deepest = sizes.0.iter().max().copied().unwrap_or(0) + 1;
        let of_dw = |_| f32::EPSILON * 2.0 * deepest as f32;
        assert_close(&format!("dw, {what}"), &download(&gpu, &dw), &rdw, of_dw);
        assert_close(&format!("dw that replaces, {what}"), &download(&gpu, &replaced), &rreplaced, of_dw);
    }
}

#[test]
fn products_and_gradients_in_bf16() {
    forward_and_gradients::<bf16>();
}

#[test]
fn products_and_gradients_in_f32() {
    forward_and_gradients::<f32>();
}

fn swiglu<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for sizes in CASES.into_iter().filter(|(_, n, _)| n % 2 == 0) {
        let case = Case::new(&gpu, sizes);
        let Case { dims, rows, ref offsets, ref x, ref w, .. } = case;
        let (f, room) = (dims.n / 2, rows + BEYOND);
        let on_gpu = upload(&gpu, offsets);
        let (gx, gw) = (case.with_nans(x, dims.k), upload_act(&gpu, w));
        let (mut h, mut a) = (poisoned::<A, A>(&gpu, room * 2 * f), poisoned::<A, A>(&gpu, room * f));
        let live = View::of(&on_gpu).slice(dims.experts..dims.experts + 1);
        let counted = Rows { bound: room, count: Some(live) };
        gpu.grouped_linear_swiglu(
            counted,
            dims,
            View::of(&on_gpu),
            View::of(&gx),
            View::of(&gw),
            ViewMut::of(&mut h),
            ViewMut::of(&mut a),
        );
        let (mut rh, mut ra) = (vec![0.0; rows * 2 * f], vec![0.0; rows * f]);
        Cpu.grouped_linear_swiglu(
            Rows::exactly(rows),
            dims,
            View::of(offsets),
            View::of(x),
            View::of(w),
            ViewMut::of(&mut rh),
            ViewMut::of(&mut ra),
        );
        let (what, of_h) = (format!("{} {sizes:?}", A::NAME), case.tolerance(dims.k));
        assert_close(&format!("h, {what}"), &case.rows_of(&h, 2 * f), &rh, |i| of_h(rh[i]));
        let got = case.rows_of(&a, f);
        // silu and the product pass an error of h on, at most times 1.1 and the other factor.
        assert_close(&format!("a, {what}"), &got, &ra, |i| {
            let (row, column) = (i / f, i % f);
            let (gate, up) = (rh[row * 2 * f + column], rh[row * 2 * f + f + column]);
            2.0 * (1.1 * of_h(gate) * up.abs() + of_h(up) * gate.abs()) + of_h(ra[i])
        });
    }
}

#[test]
fn swiglu_of_products_in_bf16() {
    swiglu::<bf16>();
}

#[test]
fn swiglu_of_products_in_f32() {
    swiglu::<f32>();
}

fn gelu<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for sizes in CASES {
        let case = Case::new(&gpu, sizes);
        let Case { dims, rows, ref offsets, ref x, ref w, .. } = case;
        let (f, room) = (dims.n, rows + BEYOND);
        let on_gpu = upload(&gpu, offsets);
        let (gx, gw) = (case.with_nans(x, dims.k), upload_act(&gpu, w));
        let (mut h, mut a) = (poisoned::<A, A>(&gpu, room * f), poisoned::<A, A>(&gpu, room * f));
        let live = View::of(&on_gpu).slice(dims.experts..dims.experts + 1);
        let counted = Rows { bound: room, count: Some(live) };
        let (gx, gw) = (View::of(&gx), View::of(&gw));
        gpu.grouped_linear_gelu(counted, dims, View::of(&on_gpu), gx, gw, ViewMut::of(&mut h), ViewMut::of(&mut a));
        let (mut rh, mut ra) = (vec![0.0; rows * f], vec![0.0; rows * f]);
        let (rx, rw, exactly) = (View::of(x), View::of(w), Rows::exactly(rows));
        Cpu.grouped_linear_gelu(exactly, dims, View::of(offsets), rx, rw, ViewMut::of(&mut rh), ViewMut::of(&mut ra));
        let (what, of_h) = (format!("{} {sizes:?}", A::NAME), case.tolerance(dims.k));
        assert_close(&format!("h, {what}"), &case.rows_of(&h, f), &rh, |i| of_h(rh[i]));
        // An error of h is passed on at most times 1.13, the steepest slope; Φ is good to 3e-7 on both.
        let got = case.rows_of(&a, f);
        assert_close(&format!("a, {what}"), &got, &ra, |i| 1.2 * of_h(rh[i]) + of_h(ra[i]) + 6e-7 * rh[i].abs());
    }
}

fn swiglu_gradient<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for sizes in CASES {
        let case = Case::new(&gpu, sizes);
        let Case { dims, rows, ref offsets, ref dy, ref w, .. } = case;
        let (f, room) = (dims.k, rows + BEYOND);
        let h = rounded::<A>(&random_within(5, rows * 2 * f, 4.0));
        // Every second weight is some row's, in another order.
        let origin: Vec<i32> = (0..rows).rev().map(|row| 2 * row as i32).collect();
        let weights = random(6, 2 * rows);

        let (mut rda, mut rdh) = (vec![0.0; rows * f], vec![0.0; rows * 2 * f]);
        let (mut ra, mut rdweights) = (vec![0.0; rows * f], vec![f32::NAN; 2 * rows]);
        let expected = WeightedSwiglu {
            origin: View::of(&origin),
            weights: View::of(&weights),
            h: View::of(&h),
            dh: ViewMut::of(&mut rdh),
            a: ViewMut::of(&mut ra),
            dweights: ViewMut::of(&mut rdweights),
        };
        let (on_cpu, rdy, rw) = (View::of(offsets), View::of(dy), View::of(w));
        Cpu.grouped_linear_grad_swiglu(Rows::exactly(rows), dims, on_cpu, rdy, rw, ViewMut::of(&mut rda), expected);

        let on_gpu = upload(&gpu, offsets);
        let (gdy, gw, gh) = (case.with_nans(dy, dims.n), upload_act(&gpu, w), case.with_nans(&h, 2 * f));
        let padded = [&origin[..], &[i32::MAX; BEYOND]].concat();
        let (gorigin, gweights) = (upload(&gpu, &padded), upload(&gpu, &weights));
        let mut da = poisoned::<A, A>(&gpu, room * f);
        let once = |da: &mut _| {
            let (mut dh, mut a) = (poisoned::<A, A>(&gpu, room * 2 * f), poisoned::<A, A>(&gpu, room * f));
            let mut dweights = upload(&gpu, &vec![f32::NAN; weights.len()]);
            let swiglu = WeightedSwiglu {
                origin: View::of(&gorigin),
                weights: View::of(&gweights),
                h: View::of(&gh),
                dh: ViewMut::of(&mut dh),
                a: ViewMut::of(&mut a),
                dweights: ViewMut::of(&mut dweights),
            };
            let live = View::of(&on_gpu).slice(dims.experts..dims.experts + 1);
            let counted = Rows { bound: room, count: Some(live) };
            let (offsets, dy, w) = (View::of(&on_gpu), View::of(&gdy), View::of(&gw));
            gpu.grouped_linear_grad_swiglu(counted, dims, offsets, dy, w, ViewMut::of(da), swiglu);
            (case.rows_of(&dh, 2 * f), case.rows_of(&a, f), download(&gpu, &dweights))
        };
        let (dh, a, dweights) = once(&mut da);

        let (what, of_da) = (format!("{} {sizes:?}", A::NAME), case.tolerance(dims.n));
        let (of_result, weight_of) = (case.tolerance(8), |row: usize| weights[origin[row] as usize].abs());
        assert_close(&format!("dh, {what}"), &dh, &rdh, |i| {
            let (row, column) = (i / (2 * f), i % f);
            let (gate, up) = (h[row * 2 * f + column].abs(), h[row * 2 * f + f + column].abs());
            // The slope of silu is at most 1.1, silu at most its argument.
            let slope = if i % (2 * f) < f { 1.1 * up } else { gate };
            weight_of(row) * slope * of_da(rda[row * f + column]) + of_result(rdh[i]) * 4.0
        });
        assert_close(&format!("a, {what}"), &a, &ra, |i| of_result(ra[i]) * 4.0);
        for (row, &at) in origin.iter().enumerate() {
            let columns = || (0..f).map(|c| (row * f + c, h[row * 2 * f + c].abs() * h[row * 2 * f + f + c].abs()));
            let of_sum: f32 = columns().map(|(i, most)| most * (of_da(rda[i]) + 4e-7 * f as f32 * rda[i].abs())).sum();
            let (got, want) = (dweights[at as usize], rdweights[at as usize]);
            assert!((got - want).abs() <= of_sum, "dweights of row {row}, {what}: {got}, expected {want} ± {of_sum}");
        }
        assert!(dweights.iter().skip(1).step_by(2).all(|x| x.is_nan()), "weights of no row were written, {what}");
        let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let again = once(&mut da);
        assert!([bits(&dh), bits(&a), bits(&dweights)] == [bits(&again.0), bits(&again.1), bits(&again.2)], "{what}");
    }
}

#[test]
fn gelu_of_products_in_bf16() {
    gelu::<bf16>();
}

#[test]
fn gelu_of_products_in_f32() {
    gelu::<f32>();
}

#[test]
fn swiglu_gradients_of_products_in_bf16() {
    swiglu_gradient::<bf16>();
}

#[test]
fn swiglu_gradients_of_products_in_f32() {
    swiglu_gradient::<f32>();
}

#[test]
fn the_same_bits_every_time() {
    let Some(gpu) = gpu::<bf16>() else { return };
    let case = Case::new(&gpu, (&[300, 1, 127, 128, 129, 0], 384, 320));
    let (offsets, x, dy) = (upload(&gpu, &case.offsets), upload_act(&gpu, &case.x), upload_act(&gpu, &case.dy));
    let once = || {
        let mut dw = upload(&gpu, &vec![0.0f32; case.w.len()]);
        gpu.grouped_linear_grad_weight(
            case.dims,
            View::of(&offsets),
            View::of(&dy),
            View::of(&x),
            ViewMut::of(&mut dw),
            Accumulate::Add,
        );
        download(&gpu, &dw).into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert!(once() == once());
}
