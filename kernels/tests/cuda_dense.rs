//! Linear, element-wise layers and the embedding on a GPU, against the CPU.

#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{assert_close, download, gpu, poisoned, random, rounded, upload, upload_act, written};
use half::bf16;
use moe_kernels::cuda::{Cuda, CudaAct};
use moe_kernels::{Accumulate, ActivationKind, Cpu, DenseOps, Device, GemmDims, Rows, View, ViewMut};

/// (m, n, k): no row, one, sizes off every tile and off 16 bytes, the router's and the shared gate's narrow outputs.
const PRODUCTS: [(usize, usize, usize); 8] =
    [(0, 8, 8), (1, 16, 8), (3, 5, 7), (17, 24, 40), (64, 1, 64), (130, 257, 33), (300, 64, 256), (256, 128, 512)];
/// (bound, rows that count, F), on and off 16 bytes.
const ACTIVATIONS: [(usize, Option<usize>, usize); 6] =
    [(0, None, 8), (1, None, 1), (5, Some(0), 16), (9, Some(4), 7), (300, Some(299), 64), (257, None, 100)];
/// (vocabulary, H, tokens).
const EMBEDDINGS: [(usize, usize, usize); 8] = [
    (5, 8, 0),
    (1, 8, 1),
    (5, 7, 3),
    (300, 64, 1000),
    (300, 33, 1000),
    (17, 2100, 600),
    (50_000, 256, 4000),
    (256, 64, 16_400),
];
/// (columns, rows).
const BIASES: [(usize, usize); 6] = [(8, 0), (1, 1), (7, 100), (256, 1000), (2048, 333), (300, 5000)];

/// What rounding to `A` and an f32 sum of `depth` terms up to 1 may change.
fn off<A: CudaAct>(depth: usize, expected: &[f32]) -> impl Fn(usize) -> f32 + use<A> {
    let unit = if A::HOLDS_F32 { 0.0 } else { 1.0 / 256.0 };
    let sum = f32::EPSILON * (8 + depth) as f32;
    let expected = expected.to_vec();
    move |i| sum + unit * expected[i].abs()
}

/// As [`off`], where the product is added to `old`: for some shapes cuBLASLt rounds the product itself too.
fn off_added<A: CudaAct>(depth: usize, expected: &[f32], old: &[f32]) -> impl Fn(usize) -> f32 {
    let product: Vec<f32> = expected.iter().zip(old).map(|(sum, old)| sum - old).collect();
    let (of_sum, of_product) = (off::<A>(depth, expected), off::<A>(0, &product));
    move |i| of_sum(i) + of_product(i)
}

/// As [`off`], where an f32 gradient is split in two bf16 parts: 2⁻¹⁷ of each term is lost.
fn split<A: CudaAct>(depth: usize, expected: &[f32]) -> impl Fn(usize) -> f32 {
    let (rest, lost) = (off::<A>(depth, expected), if A::HOLDS_F32 { 0.0 } else { depth as f32 / 131_072.0 });
    move |i| rest(i) + lost
}

fn cpu(data: &Vec<f32>) -> View<'_, Cpu, f32> {
    View::of(data)
}

fn cpu_mut(data: &mut Vec<f32>) -> ViewMut<'_, Cpu, f32> {
    ViewMut::of(data)
}

/// Numbers that bf16 holds, small enough that f32 sums of them are exact in any order.
fn whole(seed: u64, len: usize) -> Vec<f32> {
    random(seed, len).iter().map(|x| (x * 8.0).round()).collect()
}

#[test]
fn linear_and_its_gradients_match_the_cpu() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        for (m, n, k) in PRODUCTS {
            let (what, dims) = (format!("{} {m} {n} {k}", A::NAME), GemmDims { m, n, k });
            let [x, w, bias, dy, old] = [(1, m * k), (2, n * k), (3, n), (4, m * n), (5, m * k)]
                .map(|(seed, len)| rounded::<A>(&random(seed, len)));
            let [gx, gw, gbias, gdy] = [&x, &w, &bias, &dy].map(|data| upload_act(&gpu, data));

            for with in [false, true] {
                let mut expected = vec![f32::NAN; m * n];
                Cpu.linear(dims, cpu(&x), cpu(&w), with.then(|| cpu(&bias)), cpu_mut(&mut expected));
                let mut y = poisoned::<A, A>(&gpu, m * n);
                gpu.linear(dims, View::of(&gx), View::of(&gw), with.then(|| View::of(&gbias)), ViewMut::of(&mut y));
                let added: Vec<f32> = (0..m * n).map(|i| if with { bias[i % n] } else { expected[i] }).collect();
                let allowed = off_added::<A>(k, &expected, &added);
                assert_close(&format!("y {what}, bias {with}"), &written(&gpu, &y), &expected, allowed);
            }

            let mut expected = old.clone();
            Cpu.linear_grad_input(dims, cpu(&dy), cpu(&w), cpu_mut(&mut expected), Accumulate::Add);
            let mut dx = upload_act(&gpu, &old);
            gpu.linear_grad_input(dims, View::of(&gdy), View::of(&gw), ViewMut::of(&mut dx), Accumulate::Add);
            let got = rounded::<f32>(&download(&gpu, &dx).iter().map(|x| x.to_f32()).collect::<Vec<_>>());
            assert_close(&format!("dx added {what}"), &got, &expected, off_added::<A>(n, &expected, &old));
            let mut dx = poisoned::<A, A>(&gpu, m * k);
            gpu.linear_grad_input(dims, View::of(&gdy), View::of(&gw), ViewMut::of(&mut dx), Accumulate::Overwrite);
            Cpu.linear_grad_input(dims, cpu(&dy), cpu(&w), cpu_mut(&mut expected), Accumulate::Overwrite);
            assert_close(&format!("dx {what}"), &written(&gpu, &dx), &expected, off::<A>(n, &expected));

            let mut expected = random(6, n * k);
            let mut dw = upload(&gpu, &expected);
            Cpu.linear_grad_weight(dims, cpu(&dy), cpu(&x), cpu_mut(&mut expected));
            gpu.linear_grad_weight(dims, View::of(&gdy), View::of(&gx), ViewMut::of(&mut dw));
            assert_close(&format!("dw {what}"), &download(&gpu, &dw), &expected, off::<f32>(m, &expected));
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn f32_logits_and_their_gradients_are_not_rounded() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        for (m, n, k) in PRODUCTS {
            let (what, dims) = (format!("{} {m} {n} {k}", A::NAME), GemmDims { m, n, k });
            let [x, w, old] = [(1, m * k), (2, n * k), (5, m * k)].map(|(seed, len)| rounded::<A>(&random(seed, len)));
            let dy = random(4, m * n);
            let [gx, gw] = [&x, &w].map(|data| upload_act(&gpu, data));
            let gdy = upload(&gpu, &dy);

            let mut expected = vec![f32::NAN; m * n];
            Cpu.linear_f32(dims, cpu(&x), cpu(&w), cpu_mut(&mut expected));
            let mut y = poisoned::<A, f32>(&gpu, m * n);
            gpu.linear_f32(dims, View::of(&gx), View::of(&gw), ViewMut::of(&mut y));
            assert_close(&format!("y {what}"), &written(&gpu, &y), &expected, off::<f32>(k, &expected));

            for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
                let mut expected = old.clone();
                let mut dx = upload_act(&gpu, &old);
                Cpu.linear_f32_grad_input(dims, cpu(&dy), cpu(&w), cpu_mut(&mut expected), accumulate);
                gpu.linear_f32_grad_input(dims, View::of(&gdy), View::of(&gw), ViewMut::of(&mut dx), accumulate);
                let got: Vec<f32> = download(&gpu, &dx).iter().map(|x| x.to_f32()).collect();
                let added = if accumulate == Accumulate::Add { &old } else { &expected };
                let (allowed, product) = (split::<A>(n, &expected), off_added::<A>(n, &expected, added));
                assert_close(&format!("dx {what}, {accumulate:?}"), &got, &expected, |i| allowed(i).max(product(i)));
            }

            let mut expected = random(6, n * k);
            let mut dw = upload(&gpu, &expected);
            Cpu.linear_f32_grad_weight(dims, cpu(&dy), cpu(&x), cpu_mut(&mut expected));
            gpu.linear_f32_grad_weight(dims, View::of(&gdy), View::of(&gx), ViewMut::of(&mut dw));
            let got = download(&gpu, &dw);
            let exact = off::<f32>(m, &expected);
            let lost = if A::HOLDS_F32 { 0.0 } else { m as f32 / 131_072.0 };
            assert_close(&format!("dw {what}"), &got, &expected, |i| exact(i) + lost);

            // Both at once: the same bits.
            let mut both = (upload(&gpu, &random(6, n * k)), upload_act(&gpu, &old));
            let (dw, dx) = (ViewMut::of(&mut both.0), (ViewMut::of(&mut both.1), Accumulate::Add));
            gpu.linear_f32_grads(dims, View::of(&gdy), (View::of(&gx), View::of(&gw)), dw, dx);
            let mut dx = upload_act(&gpu, &old);
            gpu.linear_f32_grad_input(dims, View::of(&gdy), View::of(&gw), ViewMut::of(&mut dx), Accumulate::Add);
            assert_eq!((download(&gpu, &both.0), download(&gpu, &both.1)), (got, download(&gpu, &dx)), "{what}");
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn swiglu_works_on_the_rows_that_count_and_on_no_other() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        for (bound, count, f) in ACTIVATIONS {
            let (what, live) = (format!("{} {bound} {count:?} {f}", A::NAME), count.unwrap_or(bound));
            // What does not count is NaN: reading it would show.
            let input = |seed, width: usize| {
                let mut data = rounded::<A>(&random(seed, bound * width));
                data[live * width..].fill(f32::NAN);
                data.iter().map(|x| 4.0 * x).collect::<Vec<f32>>()
            };
            let (h, da) = (input(1, 2 * f), input(2, f));
            let (gh, gda) = (upload_act(&gpu, &h), upload_act(&gpu, &da));
            let on_gpu = count.map(|count| upload(&gpu, &[count as i32]));
            let rows = Rows { bound, count: on_gpu.as_ref().map(View::of) };

            let mut expected = vec![f32::NAN; live * f];
            Cpu.swiglu(Rows::exactly(live), f, cpu(&h), cpu_mut(&mut expected));
            let mut a = poisoned::<A, A>(&gpu, bound * f);
            gpu.swiglu(rows, f, View::of(&gh), ViewMut::of(&mut a));
            let got = written(&gpu, &a);
            assert_close(&format!("a {what}"), &got[..live * f], &expected, off::<A>(64, &expected));
            assert!(got[live * f..].iter().all(|x| x.is_nan()), "a {what}: written beyond the rows that count");

            let mut expected = vec![f32::NAN; live * 2 * f];
            Cpu.swiglu_grad(Rows::exactly(live), f, cpu(&da), cpu(&h), cpu_mut(&mut expected));
            let mut dh = poisoned::<A, A>(&gpu, bound * 2 * f);
            gpu.swiglu_grad(rows, f, View::of(&gda), View::of(&gh), ViewMut::of(&mut dh));
            let got = written(&gpu, &dh);
            assert_close(&format!("dh {what}"), &got[..live * 2 * f], &expected, off::<A>(256, &expected));
            assert!(got[live * 2 * f..].iter().all(|x| x.is_nan()), "dh {what}: written beyond the rows that count");
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn activations_and_their_gradients_match_the_cpu() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        // Ranges that begin off 16 bytes, alike and not.
        let ranges = [(0, 0, 0), (0, 0, 1), (0, 0, 4096), (1, 1, 1000), (3, 0, 777), (5, 5, 3), (0, 0, 300_001)];
        for ((x_from, y_from, n), kind) in ranges.into_iter().flat_map(|range| ActivationKind::ALL.map(|k| (range, k)))
        {
            let what = format!("{} {kind:?} {x_from} {y_from} {n}", A::NAME);
            let x: Vec<f32> = rounded::<A>(&random(1, x_from + n)).iter().map(|x| 8.0 * x).collect();
            let (dy, part) = (rounded::<A>(&random(2, n)), x[x_from..].to_vec());
            let (gx, gdy) = (upload_act(&gpu, &x), upload_act(&gpu, &dy));
            let gx = View::range(&gx, x_from..x_from + n);

            let mut expected = vec![f32::NAN; n];
            Cpu.activation(kind, cpu(&part), cpu_mut(&mut expected));
            let mut y = poisoned::<A, A>(&gpu, y_from + n);
            gpu.activation(kind, gx, ViewMut::range(&mut y, y_from..y_from + n));
            let got = written(&gpu, &y);
            assert_close(&format!("y {what}"), &got[y_from..], &expected, off::<A>(64, &expected));
            assert!(got[..y_from].iter().all(|x| x.is_nan()), "y {what}: written before the start");

            Cpu.activation_grad(kind, cpu(&part), cpu(&dy), cpu_mut(&mut expected));
            let mut dx = poisoned::<A, A>(&gpu, y_from + n);
            gpu.activation_grad(kind, gx, View::of(&gdy), ViewMut::range(&mut dx, y_from..y_from + n));
            let got = written(&gpu, &dx);
            assert_close(&format!("dx {what}"), &got[y_from..], &expected, off::<A>(64, &expected));
            assert!(got[..y_from].iter().all(|x| x.is_nan()), "dx {what}: written before the start");
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn the_embedding_gathers_rows_and_adds_their_gradients_exactly() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        for (vocab, h, tokens) in EMBEDDINGS {
            let (table, dout, old) = (rounded::<A>(&random(1, vocab * h)), whole(2, tokens * h), whole(3, vocab * h));
            let spread: Vec<i32> = random(4, tokens).iter().map(|x| ((x + 1.0) / 2.0 * vocab as f32) as i32).collect();
            let skewed = spread.iter().map(|id| if id % 2 == 0 { 0 } else { *id }).collect();
            let (gtable, gdout) = (upload_act(&gpu, &table), upload_act(&gpu, &dout));
            for ids in [spread, skewed, vec![vocab as i32 - 1; tokens]] {
                let what = format!("{} {vocab} {h} {tokens}, first ids {:?}", A::NAME, &ids[..tokens.min(8)]);
                let gids = upload(&gpu, &ids);
                let mut expected = vec![f32::NAN; tokens * h];
                Cpu.embedding(h, View::of(&ids), cpu(&table), cpu_mut(&mut expected));
                let mut out = poisoned::<A, A>(&gpu, tokens * h);
                gpu.embedding(h, View::of(&gids), View::of(&gtable), ViewMut::of(&mut out));
                assert_close(&format!("rows {what}"), &written(&gpu, &out), &expected, |_| 0.0);

                let mut expected = old.clone();
                let mut dtable = upload(&gpu, &old);
                Cpu.embedding_grad(h, View::of(&ids), cpu(&dout), cpu_mut(&mut expected));
                gpu.embedding_grad(h, View::of(&gids), View::of(&gdout), ViewMut::of(&mut dtable));
                assert_close(&format!("gradient {what}"), &download(&gpu, &dtable), &expected, |_| 0.0);
            }
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn an_id_outside_of_the_table_gives_nan_and_no_gradient() {
    let Some(gpu) = gpu::<bf16>() else { return };
    let (ids, h) = (upload(&gpu, &[1, -3, 4, i32::MAX, i32::MIN]), 8);
    let (table, dout) = (upload_act(&gpu, &[1.0; 32]), upload_act(&gpu, &[1.0; 40]));
    let mut out = poisoned::<bf16, bf16>(&gpu, 5 * h);
    gpu.embedding(h, View::of(&ids), View::of(&table), ViewMut::of(&mut out));
    let rows = written(&gpu, &out);
    assert!(rows[..h].iter().all(|x| *x == 1.0) && rows[h..].iter().all(|x| x.is_nan()), "{rows:?}");
    let mut dtable = upload(&gpu, &[0.0_f32; 32]);
    gpu.embedding_grad(h, View::of(&ids), View::of(&dout), ViewMut::of(&mut dtable));
    let expected: Vec<f32> = (0..32).map(|i| if i / h == 1 { 1.0 } else { 0.0 }).collect();
    assert_eq!(download(&gpu, &dtable), expected);
}

#[test]
fn sums_of_elements_and_of_columns_match_the_cpu() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        // Ranges that begin off 16 bytes, alike and not.
        for (x_from, y_from, n) in [(0, 0, 1), (0, 0, 4096), (1, 1, 1000), (3, 0, 777), (5, 5, 3), (0, 0, 300_001)] {
            let [x, y] = [(1, x_from + n), (2, y_from + n + 9)].map(|(seed, len)| rounded::<A>(&random(seed, len)));
            let (gx, mut gy) = (upload_act(&gpu, &x), upload_act(&gpu, &y));
            gpu.add(View::range(&gx, x_from..x_from + n), ViewMut::range(&mut gy, y_from..y_from + n));
            let mut expected = y.clone();
            for (y, x) in expected[y_from..y_from + n].iter_mut().zip(&x[x_from..]) {
                *y = A::from_f32(*y + x).to_f32();
            }
            let got: Vec<f32> = download(&gpu, &gy).iter().map(|x| x.to_f32()).collect();
            assert_close(&format!("{} sum of {n}", A::NAME), &got, &expected, |_| 0.0);

            let (fx, mut fy) = (upload(&gpu, &x), upload(&gpu, &y));
            gpu.add_f32(View::range(&fx, x_from..x_from + n), ViewMut::range(&mut fy, y_from..y_from + n));
            let mut expected = y.clone();
            expected[y_from..y_from + n].iter_mut().zip(&x[x_from..]).for_each(|(y, x)| *y += x);
            assert_close(&format!("f32 sum of {n}"), &download(&gpu, &fy), &expected, |_| 0.0);
        }
        for (columns, rows) in BIASES {
            let (dy, mut expected) = (rounded::<A>(&random(1, rows * columns)), random(2, columns));
            let (gdy, mut db) = (upload_act(&gpu, &dy), upload(&gpu, &expected));
            Cpu.bias_grad(rows, columns, cpu(&dy), cpu_mut(&mut expected));
            gpu.bias_grad(rows, columns, View::of(&gdy), ViewMut::of(&mut db));
            let what = format!("{} db {rows} {columns}", A::NAME);
            assert_close(&what, &download(&gpu, &db), &expected, off::<f32>(rows, &expected));
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn the_shared_experts_gate_matches_the_cpu() {
    fn check<A: CudaAct>() {
        let Some(gpu) = gpu::<A>() else { return };
        for (tokens, h) in [(0, 8), (1, 1), (5, 7), (300, 64), (77, 1032)] {
            let what = format!("{} {tokens} {h}", A::NAME);
            let gate: Vec<f32> = random(1, tokens).iter().map(|x| 6.0 * x).collect();
            let [shared, dout, old] = [2, 3, 4].map(|seed| rounded::<A>(&random(seed, tokens * h)));
            let (ggate, gshared, gdout) = (upload(&gpu, &gate), upload_act(&gpu, &shared), upload_act(&gpu, &dout));

            let (mut expected, mut out) = (old.clone(), upload_act(&gpu, &old));
            Cpu.sigmoid_gate(h, cpu(&gate), cpu(&shared), cpu_mut(&mut expected));
            gpu.sigmoid_gate(h, View::of(&ggate), View::of(&gshared), ViewMut::of(&mut out));
            let got: Vec<f32> = download(&gpu, &out).iter().map(|x| x.to_f32()).collect();
            assert_close(&format!("out {what}"), &got, &expected, off::<A>(8, &expected));

            let (mut expected, mut slopes) = (vec![f32::NAN; tokens * h], vec![f32::NAN; tokens]);
            Cpu.sigmoid_gate_grad(
                h,
                cpu(&dout),
                cpu(&gate),
                cpu(&shared),
                cpu_mut(&mut expected),
                cpu_mut(&mut slopes),
            );
            let (mut dshared, mut dgate) = (poisoned::<A, A>(&gpu, tokens * h), poisoned::<A, f32>(&gpu, tokens));
            let (dshared_view, dgate_view) = (ViewMut::of(&mut dshared), ViewMut::of(&mut dgate));
            gpu.sigmoid_gate_grad(h, View::of(&gdout), View::of(&ggate), View::of(&gshared), dshared_view, dgate_view);
            assert_close(&format!("dshared {what}"), &written(&gpu, &dshared), &expected, off::<A>(8, &expected));
            assert_close(&format!("dgate {what}"), &written(&gpu, &dgate), &slopes, off::<f32>(h, &slopes));
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn gradients_have_the_same_bits_in_every_run() {
    fn bits(gpu: &Cuda<bf16>) -> Vec<Vec<u32>> {
        let (tokens, h, n) = (3000, 512, 96);
        let [x, dy] = [(1, h), (2, n)].map(|(seed, width)| upload_act(gpu, &random(seed, tokens * width)));
        let logits = upload(gpu, &random(3, tokens * n));
        let ids: Vec<i32> = (0..tokens as i32).map(|t| t * t % 7).collect();
        let ids = upload(gpu, &ids);
        let [mut dw, mut router, mut table] = [n, n, 7].map(|rows| upload(gpu, &vec![0.0_f32; rows * h]));
        let mut db = upload(gpu, &vec![0.0_f32; h]);
        let dims = GemmDims { m: tokens, n, k: h };
        gpu.linear_grad_weight(dims, View::of(&dy), View::of(&x), ViewMut::of(&mut dw));
        gpu.linear_f32_grad_weight(dims, View::of(&logits), View::of(&x), ViewMut::of(&mut router));
        gpu.embedding_grad(h, View::of(&ids), View::of(&x), ViewMut::of(&mut table));
        gpu.bias_grad(tokens, h, View::of(&x), ViewMut::of(&mut db));
        [dw, router, table, db].iter().map(|x| download(gpu, x).iter().map(|x| x.to_bits()).collect()).collect()
    }
    let Some(gpu) = gpu::<bf16>() else { return };
    // Another queue, whose memory has another history.
    assert!(bits(&gpu) == bits(&gpu.fork()), "other bits in the second run");
}
