//! Row movement on a GPU against the CPU: packs and single elements, counted rows, poison wherever nothing may be read or written.
#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{
    assert_matches, download, filled, gpu, narrow, random_below, random_within, tolerance, upload, widen,
};
use half::bf16;
use moe_kernels::cuda::CudaAct;
use moe_kernels::{CombineDims, Cpu, ExpertOps, Rows, View, ViewMut};

/// (bound, live rows, slots, width): none, one, off the pack, off the warp, off the block, more slots than are in flight at once.
const SIZES: [(usize, usize, usize, usize); 9] = [
    (0, 0, 2, 8),
    (3, 0, 2, 8),
    (1, 1, 1, 1),
    (9, 7, 3, 31),
    (20, 13, 2, 130),
    (40, 40, 8, 264),
    (70, 65, 20, 512),
    (33, 29, 8, 2048),
    (17, 16, 4, 5000),
];
/// A row that does not exist: reading it would fault.
const NOWHERE: i32 = 1 << 30;

/// `live` rows of data, then NaN up to `bound`.
fn poisoned(seed: u64, bound: usize, live: usize, width: usize, scale: f32) -> Vec<f32> {
    let mut data = random_within(seed, live * width, scale);
    data.resize(bound * width, f32::NAN);
    data
}

/// `live` numbers of a permutation of `0..n`, then rows that do not exist.
fn some_of(seed: u64, n: usize, live: usize, bound: usize) -> Vec<i32> {
    let mut order: Vec<i32> = (0..n as i32).collect();
    random_below(seed, n, n.max(1)).into_iter().enumerate().for_each(|(i, j)| order.swap(i, j));
    order.truncate(live);
    order.resize(bound, NOWHERE);
    order
}

fn gathers<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for (bound, live, _, width) in SIZES {
        let src: Vec<A> = narrow(&random_within(1, 50 * width, 1.0));
        let mut index: Vec<i32> = random_below(2, live, 50).into_iter().map(|i| i as i32).collect();
        index.resize(bound, NOWHERE);
        let mut want = vec![f32::NAN; bound * width];
        let count = vec![live as i32];
        let rows = Rows { bound, count: Some(View::of(&count)) };
        Cpu.gather_rows(rows, width, View::of(&index), View::of(&widen(&src)), ViewMut::of(&mut want));

        let (index, src, count) = (upload(&gpu, &index), upload(&gpu, &src), upload(&gpu, &count));
        let mut dst = filled(&gpu, bound * width, A::from_f32(f32::NAN));
        let rows = Rows { bound, count: Some(View::of(&count)) };
        gpu.gather_rows(rows, width, View::of(&index), View::of(&src), ViewMut::of(&mut dst));
        assert_matches(&format!("{live} of {bound} x {width}"), &widen(&download(&gpu, &dst)), &want, 0.0);
    }
}

/// Both forms of an expansion lead to the same rows; slots of −1 and rows beyond the live ones are left alone.
fn expansions<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for (arrived, live, k, width) in
        [(5, 5, 1, 8), (40, 33, 3, 64), (300, 299, 8, 100), (7, 0, 2, 16), (64, 64, 2, 2056)]
    {
        let src: Vec<A> = narrow(&random_within(1, arrived * width, 1.0));
        let mut slots = vec![NOWHERE; arrived * k];
        let mut source = Vec::new();
        // Every third slot is none; the others count down, so that no order is that of the rows.
        let taken: Vec<usize> = (0..live * k).filter(|slot| slot % 3 != 1).collect();
        for (i, slot) in taken.iter().rev().enumerate() {
            slots[*slot] = i as i32;
            source.push((slot / k) as i32);
        }
        for slot in &mut slots[..live * k] {
            *slot = if *slot == NOWHERE { -1 } else { *slot };
        }
        let mut want = vec![f32::NAN; (source.len() + 3) * width];
        for (i, row) in source.iter().enumerate() {
            let from = *row as usize * width;
            want[i * width..(i + 1) * width].copy_from_slice(&widen(&src)[from..from + width]);
        }
        let n = source.len();
        let (slots, source, src) = (upload(&gpu, &slots), upload(&gpu, &source), upload(&gpu, &src));
        let count = upload(&gpu, &[live as i32]);
        let mut dst = filled(&gpu, (n + 3) * width, A::from_f32(f32::NAN));
        let (rows, dims) = (Rows { bound: arrived, count: Some(View::of(&count)) }, CombineDims { slots: k, width });
        let (slots, source) = (View::of(&slots), View::of(&source));
        gpu.expand_rows(rows, Rows::exactly(n), dims, slots, source, View::of(&src), ViewMut::of(&mut dst));
        assert_matches(&format!("{live} of {arrived} x {width}"), &widen(&download(&gpu, &dst)), &want, 0.0);
    }
}

#[test]
fn expanded_rows_are_where_their_slots_say() {
    expansions::<f32>();
    expansions::<bf16>();
}

#[test]
fn gathered_rows_are_the_rows_asked_for() {
    gathers::<f32>();
    gathers::<bf16>();
}

#[test]
fn rows_off_sixteen_bytes_are_gathered_too() {
    let Some(gpu) = gpu::<bf16>() else { return };
    let src: Vec<bf16> = narrow(&random_within(1, 81, 1.0));
    let (on_gpu, index) = (upload(&gpu, &src), upload(&gpu, &[9, 0, 4]));
    let mut dst = filled(&gpu, 27, bf16::NAN);
    let (from, to) = (View::range(&on_gpu, 1..81), ViewMut::range(&mut dst, 3..27));
    gpu.gather_rows(Rows::exactly(3), 8, View::of(&index), from, to);
    let got = download(&gpu, &dst);
    assert_eq!([&src[73..81], &src[1..9], &src[33..41]].concat(), got[3..]);
    assert!(got[..3].iter().all(|x| x.is_nan()));
}

fn reduces<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for (bound, live, slots_per_row, width) in SIZES {
        let dims = CombineDims { slots: slots_per_row, width };
        let n = live * slots_per_row;
        let mut slots = some_of(3, n, n, bound * slots_per_row);
        (0..n).filter(|i| i % 5 == 3).for_each(|i| slots[i] = -1);
        let mut weights = poisoned(4, bound, live, slots_per_row, 1.0);
        (0..n).filter(|&i| slots[i] < 0).for_each(|i| weights[i] = f32::NAN);
        let mut y = random_within(5, n * width, 1.0);
        (0..n).filter(|&row| !slots.contains(&(row as i32))).for_each(|row| y[row * width..][..width].fill(f32::NAN));
        let y: Vec<A> = narrow(&y);
        let count = vec![live as i32];
        let on_gpu = (upload(&gpu, &slots), upload(&gpu, &weights), upload(&gpu, &y), upload(&gpu, &count));
        for weighted in [true, false] {
            let before = narrow(&vec![f32::NAN; bound * width]);
            let mut want = widen(&before);
            let rows = Rows { bound, count: Some(View::of(&count)) };
            let w = weighted.then(|| View::of(&weights));
            let (s, wide) = (View::of(&slots), widen(&y));
            Cpu.weighted_reduce(rows, dims, s, w, View::of(&wide), ViewMut::of(&mut want));

            let (slots, weights, y, count) = &on_gpu;
            let mut out = upload(&gpu, &before);
            let rows = Rows { bound, count: Some(View::of(count)) };
            let w = weighted.then(|| View::of(weights));
            gpu.weighted_reduce(rows, dims, View::of(slots), w, View::of(y), ViewMut::of(&mut out));
            let what = format!("{live} of {bound} x {width}, {slots_per_row} slots, {weighted}");
            let allowed = tolerance::<A>(slots_per_row, slots_per_row as f32 + 1.0);
            assert_matches(&what, &widen(&download(&gpu, &out)), &want, allowed);
        }
    }
}

#[test]
fn weighted_sums_agree_with_the_cpu() {
    reduces::<f32>();
    reduces::<bf16>();
}

fn swiglu_gradients<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for (bound, live, _, f) in SIZES {
        let origin = some_of(7, 2 * live, live, bound);
        let mut weights = random_within(8, 2 * live, 1.0);
        (0..2 * live).filter(|&i| !origin.contains(&(i as i32))).for_each(|i| weights[i] = f32::NAN);
        let da: Vec<A> = narrow(&poisoned(9, bound, live, f, 1.0));
        let h: Vec<A> = narrow(&poisoned(10, bound, live, 2 * f, 8.0));
        let count = vec![live as i32];
        let nan = |len: usize| vec![f32::NAN; len];
        let (mut dh, mut a, mut dweights) = (nan(h.len()), nan(da.len()), nan(weights.len()));
        Cpu.weighted_swiglu_grad(
            Rows { bound, count: Some(View::of(&count)) },
            f,
            View::of(&origin),
            View::of(&weights),
            View::of(&widen(&da)),
            View::of(&widen(&h)),
            ViewMut::of(&mut dh),
            ViewMut::of(&mut a),
            ViewMut::of(&mut dweights),
        );

        let (origin, weights, count) = (upload(&gpu, &origin), upload(&gpu, &weights), upload(&gpu, &count));
        let (da, h) = (upload(&gpu, &da), upload(&gpu, &h));
        let mut got_dh = filled(&gpu, dh.len(), A::from_f32(f32::NAN));
        let mut got_a = filled(&gpu, a.len(), A::from_f32(f32::NAN));
        let mut got_dweights = filled(&gpu, dweights.len(), f32::NAN);
        gpu.weighted_swiglu_grad(
            Rows { bound, count: Some(View::of(&count)) },
            f,
            View::of(&origin),
            View::of(&weights),
            View::of(&da),
            View::of(&h),
            ViewMut::of(&mut got_dh),
            ViewMut::of(&mut got_a),
            ViewMut::of(&mut got_dweights),
        );
        let what = |name: &str| format!("{name}, {live} of {bound} x {f}");
        // |silu| and |u| go up to 8, the slope of silu to 1.1.
        assert_matches(&what("dh"), &widen(&download(&gpu, &got_dh)), &dh, tolerance::<A>(16, 9.0));
        assert_matches(&what("a"), &widen(&download(&gpu, &got_a)), &a, tolerance::<A>(16, 64.0));
        // The dot product is f32 in both types; the GPU's exponential is good to 1e-6.
        let allowed = tolerance::<f32>(16, 8.0 * (f + 8) as f32);
        assert_matches(&what("dweights"), &download(&gpu, &got_dweights), &dweights, allowed);
    }
}

#[test]
fn weighted_swiglu_gradients_agree_with_the_cpu() {
    swiglu_gradients::<f32>();
    swiglu_gradients::<bf16>();
}

fn gelu_gradients<A: CudaAct>() {
    let Some(gpu) = gpu::<A>() else { return };
    for (bound, live, _, f) in SIZES {
        let origin = some_of(7, 2 * live, live, bound);
        let mut weights = random_within(8, 2 * live, 1.0);
        (0..2 * live).filter(|&i| !origin.contains(&(i as i32))).for_each(|i| weights[i] = f32::NAN);
        let da: Vec<A> = narrow(&poisoned(9, bound, live, f, 1.0));
        let h: Vec<A> = narrow(&poisoned(10, bound, live, f, 8.0));
        let count = vec![live as i32];
        let nan = |len: usize| vec![f32::NAN; len];
        let (mut dh, mut a, mut dweights) = (nan(h.len()), nan(da.len()), nan(weights.len()));
        Cpu.weighted_gelu_grad(
            Rows { bound, count: Some(View::of(&count)) },
            f,
            View::of(&origin),
            View::of(&weights),
            View::of(&widen(&da)),
            View::of(&widen(&h)),
            ViewMut::of(&mut dh),
            ViewMut::of(&mut a),
            ViewMut::of(&mut dweights),
        );

        let (origin, weights, count) = (upload(&gpu, &origin), upload(&gpu, &weights), upload(&gpu, &count));
        let (da, h) = (upload(&gpu, &da), upload(&gpu, &h));
        let mut got_dh = filled(&gpu, dh.len(), A::from_f32(f32::NAN));
        let mut got_a = filled(&gpu, a.len(), A::from_f32(f32::NAN));
        let mut got_dweights = filled(&gpu, dweights.len(), f32::NAN);
        gpu.weighted_gelu_grad(
            Rows { bound, count: Some(View::of(&count)) },
            f,
            View::of(&origin),
            View::of(&weights),
            View::of(&da),
            View::of(&h),
            ViewMut::of(&mut got_dh),
            ViewMut::of(&mut got_a),
            ViewMut::of(&mut got_dweights),
        );
        let what = |name: &str| format!("{name}, {live} of {bound} x {f}");
        // GELU goes up to 8, its slope to 1.13.
        assert_matches(&what("dh"), &widen(&download(&gpu, &got_dh)), &dh, tolerance::<A>(16, 1.2));
        assert_matches(&what("a"), &widen(&download(&gpu, &got_a)), &a, tolerance::<A>(16, 8.0));
        let allowed = tolerance::<f32>(16, 8.0 * (f + 8) as f32);
        assert_matches(&what("dweights"), &download(&gpu, &got_dweights), &dweights, allowed);
    }
}

#[test]
fn weighted_gelu_gradients_agree_with_the_cpu() {
    gelu_gradients::<f32>();
    gelu_gradients::<bf16>();
}

#[test]
fn scattered_choices_reach_their_places_and_the_others_are_zero() {
    let Some(gpu) = gpu::<f32>() else { return };
    for (bound, live, top_k) in [(0, 0, 2), (2, 0, 2), (3, 1, 2), (900, 700, 8)] {
        let slots = live * top_k;
        let mut choice = some_of(11, slots + 5, slots, bound * top_k);
        (0..slots).filter(|i| i % 7 == 2).for_each(|i| choice[i] = -1);
        let from = poisoned(12, bound, live, top_k, 1.0);
        let count = vec![live as i32];
        let mut want = vec![f32::NAN; slots + 5];
        let rows = Rows { bound, count: Some(View::of(&count)) };
        Cpu.scatter_choices(rows, top_k, View::of(&choice), View::of(&from), ViewMut::of(&mut want));

        let (choice, from, count) = (upload(&gpu, &choice), upload(&gpu, &from), upload(&gpu, &count));
        let mut dweights = filled(&gpu, slots + 5, f32::NAN);
        let rows = Rows { bound, count: Some(View::of(&count)) };
        gpu.scatter_choices(rows, top_k, View::of(&choice), View::of(&from), ViewMut::of(&mut dweights));
        assert_eq!(download(&gpu, &dweights), want, "{live} of {bound} x {top_k}");
    }
}
