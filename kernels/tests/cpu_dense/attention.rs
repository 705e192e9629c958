//! Rotary embedding and causal attention, over whole sequences and over the documents of packed ones.

use super::support::{
    assert_close, assert_reproducible, inner, numeric_gradient, random, tolerance, view, view_mut, wide,
};
use moe_kernels::{AttentionDims, AttentionOps, Cpu, RotaryDirection};

/// Head widths off and on the tile, groups of 1, 2 and 4, sequences off the strip, the block and the tile.
fn sizes() -> Vec<AttentionDims> {
    let mut sizes = vec![];
    for (head_dim, heads, kv_heads) in [(16, 2, 2), (32, 4, 2), (64, 4, 1), (6, 2, 1), (40, 1, 1)] {
        for (batch, seq) in [(0, 5), (1, 1), (2, 7), (1, 32), (1, 65), (2, 130)] {
            sizes.push(AttentionDims { batch, seq, heads, kv_heads, head_dim });
        }
    }
    sizes
}

struct Reference {
    out: Vec<f64>,
    lse: Vec<f64>,
    /// dqkv for the given dout.
    dqkv: Vec<f64>,
}

/// Lengths of documents, repeated until sequences are full: the edges fall on, before and behind strips, tiles and blocks, and
/// some documents are as short as a strip's rows, some longer than a block.
const DOCUMENTS: [&[usize]; 5] = [&[1], &[3, 1, 9], &[32], &[40, 7, 33, 1], &[1000]];

/// The first position that each token sees where documents of these lengths are packed into every sequence.
fn starts_of(dims: AttentionDims, lengths: &[usize]) -> Vec<i32> {
    let documents = lengths.iter().cycle().scan(0, |end, length| {
        let start = *end;
        *end += length;
        Some((start, *length))
    });
    let row: Vec<i32> =
        documents.flat_map(|(start, length)| std::iter::repeat_n(start as i32, length)).take(dims.seq).collect();
    row.repeat(dims.batch)
}

/// Attention as it is written in a textbook, one query at a time, and its chain rule.
fn reference(dims: AttentionDims, starts: Option<&[i32]>, qkv: &[f64], dout: &[f64]) -> Reference {
    let AttentionDims { seq, heads, kv_heads, head_dim: d, .. } = dims;
    let (width, scale) = (dims.qkv_width(), 1.0 / (d as f64).sqrt());
    let mut result = Reference {
        out: vec![0.0; dims.tokens() * heads * d],
        lse: vec![0.0; dims.tokens() * heads],
        dqkv: vec![0.0; qkv.len()],
    };
    for (token, head) in (0..dims.tokens()).flat_map(|token| (0..heads).map(move |head| (token, head))) {
        let (b, s, kv) = (token / seq, token % seq, head / (heads / kv_heads));
        let first = starts.map_or(0, |starts| starts[token] as usize);
        let q = token * width + head * d;
        let k = |j: usize| (b * seq + j) * width + (heads + kv) * d;
        let v = |j: usize| (b * seq + j) * width + (heads + kv_heads + kv) * d;
        let o = (token * heads + head) * d;
        let scores: Vec<f64> =
            (first..=s).map(|j| scale * (0..d).map(|i| qkv[q + i] * qkv[k(j) + i]).sum::<f64>()).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = largest + scores.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
        result.lse[token * heads + head] = lse;
        let p: Vec<f64> = scores.iter().map(|x| (x - lse).exp()).collect();
        for (i, j) in (0..d).flat_map(|i| (first..=s).map(move |j| (i, j))) {
            result.out[o + i] += p[j - first] * qkv[v(j) + i];
            result.dqkv[v(j) + i] += p[j - first] * dout[o + i];
        }
        let dp: Vec<f64> = (first..=s).map(|j| (0..d).map(|i| dout[o + i] * qkv[v(j) + i]).sum()).collect();
        let mean: f64 = dp.iter().zip(&p).map(|(dp, p)| dp * p).sum();
        for (i, j) in (0..d).flat_map(|i| (first..=s).map(move |j| (i, j))) {
            let ds = p[j - first] * (dp[j - first] - mean) * scale;
            result.dqkv[q + i] += ds * qkv[k(j) + i];
            result.dqkv[k(j) + i] += ds * qkv[q + i];
        }
    }
    result
}

/// Scores of a few units, so that the softmax is neither flat nor one-hot.
fn inputs(dims: AttentionDims) -> (Vec<f32>, Vec<f32>) {
    let qkv = random(1, dims.tokens() * dims.qkv_width()).into_iter().map(|x| 2.0 * x).collect();
    (qkv, random(2, dims.tokens() * dims.heads * dims.head_dim))
}

fn run(dims: AttentionDims, qkv: &Vec<f32>, dout: &Vec<f32>) -> [Vec<f32>; 3] {
    run_documents(dims, None, qkv, dout)
}

fn run_documents(dims: AttentionDims, starts: Option<&Vec<i32>>, qkv: &Vec<f32>, dout: &Vec<f32>) -> [Vec<f32>; 3] {
    let starts = starts.map(view);
    let (mut out, mut lse) = (vec![f32::NAN; dout.len()], vec![f32::NAN; dims.tokens() * dims.heads]);
    let mut dqkv = vec![f32::NAN; qkv.len()];
    Cpu.attention(dims, starts, view(qkv), view_mut(&mut out), view_mut(&mut lse));
    Cpu.attention_grad(dims, starts, view(qkv), view(&out), view(&lse), view(dout), view_mut(&mut dqkv));
    [out, lse, dqkv]
}

/// Scores of up to a dozen carry an error of some ulp, which the exponential makes relative; then a sum over keys or queries.
fn allowed(dims: AttentionDims) -> f64 {
    4.0 * tolerance(dims.head_dim + dims.seq * dims.heads / dims.kv_heads)
}

#[test]
fn attention_and_its_gradient_match_the_reference() {
    for dims in sizes() {
        let (qkv, dout) = inputs(dims);
        let exact = reference(dims, None, &wide(&qkv), &wide(&dout));
        let [out, lse, dqkv] = run(dims, &qkv, &dout);
        assert_close(&format!("out {dims:?}"), &out, &exact.out, allowed(dims));
        assert_close(&format!("lse {dims:?}"), &lse, &exact.lse, allowed(dims));
        assert_close(&format!("dqkv {dims:?}"), &dqkv, &exact.dqkv, allowed(dims));
    }
}

#[test]
fn documents_of_a_sequence_do_not_see_each_other_and_neither_do_their_gradients() {
    for (dims, lengths) in sizes().into_iter().flat_map(|dims| DOCUMENTS.map(|lengths| (dims, lengths))) {
        let ((qkv, dout), starts) = (inputs(dims), starts_of(dims, lengths));
        let exact = reference(dims, Some(&starts), &wide(&qkv), &wide(&dout));
        let [out, lse, dqkv] = run_documents(dims, Some(&starts), &qkv, &dout);
        assert_close(&format!("out {dims:?} {lengths:?}"), &out, &exact.out, allowed(dims));
        assert_close(&format!("lse {dims:?} {lengths:?}"), &lse, &exact.lse, allowed(dims));
        assert_close(&format!("dqkv {dims:?} {lengths:?}"), &dqkv, &exact.dqkv, allowed(dims));
    }
}

#[test]
fn one_document_is_as_none_bit_for_bit() {
    for dims in sizes() {
        let ((qkv, dout), starts) = (inputs(dims), starts_of(dims, &[1000]));
        assert_eq!(run_documents(dims, Some(&starts), &qkv, &dout), run(dims, &qkv, &dout), "{dims:?}");
    }
}

#[test]
fn nothing_of_another_document_is_read_however_large_it_is() {
    let dims = AttentionDims { batch: 1, seq: 100, heads: 2, kv_heads: 1, head_dim: 16 };
    let ((qkv, dout), starts) = (inputs(dims), starts_of(dims, &[45, 55]));
    let [out, ..] = run_documents(dims, Some(&starts), &qkv, &dout);
    let mut changed = qkv.clone();
    changed[..45 * dims.qkv_width()].iter_mut().for_each(|x| *x *= 300.0);
    let [other, lse, dqkv] = run_documents(dims, Some(&starts), &changed, &dout);
    assert_eq!(out[45 * 32..], other[45 * 32..]);
    assert!(lse.iter().chain(&dqkv).all(|x| x.is_finite()));
}

#[test]
fn the_reference_gradient_is_that_of_the_reference() {
    let dims = AttentionDims { batch: 2, seq: 4, heads: 2, kv_heads: 1, head_dim: 3 };
    let (qkv, dout) = inputs(dims);
    for starts in [None, Some(&[0, 0, 2, 2, 0, 1, 1, 1][..])] {
        let exact = reference(dims, starts, &wide(&qkv), &wide(&dout)).dqkv;
        let numeric =
            numeric_gradient(&wide(&qkv), |qkv| inner(&reference(dims, starts, qkv, &wide(&dout)).out, &dout));
        for (a, b) in numeric.iter().zip(exact) {
            assert!((a - b).abs() < 1e-8, "{a} {b}");
        }
    }
}

#[test]
fn large_scores_neither_overflow_nor_leak_past_the_causal_edge() {
    let dims = AttentionDims { batch: 1, seq: 40, heads: 2, kv_heads: 2, head_dim: 16 };
    let (qkv, dout) = inputs(dims);
    let qkv: Vec<f32> = qkv.into_iter().map(|x| 20.0 * x).collect();
    let [out, lse, dqkv] = run(dims, &qkv, &dout);
    assert!(out.iter().chain(&lse).chain(&dqkv).all(|x| x.is_finite()));
    // Changing the last position changes nothing before it.
    let mut changed = qkv.clone();
    let last = 39 * dims.qkv_width();
    changed[last..].iter_mut().for_each(|x| *x = -*x);
    let [other, ..] = run(dims, &changed, &dout);
    assert_eq!(out[..39 * 32], other[..39 * 32]);
}

#[test]
fn rotary_turns_pairs_by_the_angle_of_their_position_and_back() {
    for dims in sizes() {
        let (half, width) = (dims.head_dim / 2, dims.qkv_width());
        let angles: Vec<f64> = random(3, dims.seq * half).iter().map(|x| 3.0 * f64::from(*x)).collect();
        let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();
        let (qkv, _) = inputs(dims);
        let mut turned = qkv.clone();
        Cpu.rotary(dims, RotaryDirection::Forward, view(&cos), view(&sin), view_mut(&mut turned));
        let exact: Vec<f64> = (0..qkv.len())
            .map(|at| {
                let (token, column) = (at / width, at % width);
                let (head, i) = (column / dims.head_dim, column % dims.head_dim);
                if head >= dims.heads + dims.kv_heads {
                    return f64::from(qkv[at]);
                }
                let (sine, cosine) = angles[token % dims.seq * half + i % half].sin_cos();
                if i < half {
                    f64::from(qkv[at]) * cosine - f64::from(qkv[at + half]) * sine
                } else {
                    f64::from(qkv[at]) * cosine + f64::from(qkv[at - half]) * sine
                }
            })
            .collect();
        assert_close(&format!("{dims:?}"), &turned, &exact, tolerance(2));
        Cpu.rotary(dims, RotaryDirection::Inverse, view(&cos), view(&sin), view_mut(&mut turned));
        assert_close(&format!("back {dims:?}"), &turned, &wide(&qkv), tolerance(2));
    }
}

#[test]
fn attention_is_reproducible_and_the_same_for_every_number_of_threads() {
    let dims = AttentionDims { batch: 3, seq: 65, heads: 4, kv_heads: 2, head_dim: 32 };
    let (qkv, dout) = inputs(dims);
    assert_reproducible("attention", 0.0, || run(dims, &qkv, &dout).concat());
}
