//! Sums over tokens that have the same bits whatever the number of threads.
//!
//! Owns the order of summation: tokens are halved down to blocks of a fixed length, blocks are summed in f64 from first to last,
//! and halves are added pairwise. Where the halves run decides nothing. It never allocates: partial sums live on the stack.

use std::ops::Range;

/// Experts summed in one pass; more of them are taken in several passes.
const COLUMNS: usize = 64;
/// Tokens of a block that one thread sums from first to last.
const BLOCK: usize = 256;

/// `out[c] = Σ_t`, where `add(t, columns, sums)` adds token t's terms of those columns to `sums` (of the same length).
pub(super) fn sum_columns(tokens: Range<usize>, out: &mut [f32], add: impl Fn(usize, Range<usize>, &mut [f64]) + Sync) {
    for (pass, out) in out.chunks_mut(COLUMNS).enumerate() {
        let columns = pass * COLUMNS..pass * COLUMNS + out.len();
        let add = |t: usize, sums: &mut [f64; COLUMNS]| add(t, columns.clone(), &mut sums[..columns.len()]);
        let sums = halves(tokens.clone(), &add);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = sum as f32;
        }
    }
}

/// `Σ_t term(t)`.
pub(super) fn sum(tokens: Range<usize>, term: impl Fn(usize) -> f64 + Sync) -> f64 {
    let [total] = halves(tokens, &|t, sums: &mut [f64; 1]| sums[0] += term(t));
    total
}

fn halves<const N: usize>(tokens: Range<usize>, add: &(impl Fn(usize, &mut [f64; N]) + Sync)) -> [f64; N] {
    if tokens.len() <= BLOCK {
        let mut sums = [0.0; N];
        tokens.for_each(|t| add(t, &mut sums));
        return sums;
    }
    let middle = tokens.start + tokens.len() / 2;
    let (mut left, right) = rayon::join(|| halves(tokens.start..middle, add), || halves(middle..tokens.end, add));
    for (left, right) in left.iter_mut().zip(right) {
        *left += right;
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_reach_every_token_and_column_once() {
        let mut out = vec![f32::NAN; 3 * COLUMNS + 5];
        sum_columns(10..1000, &mut out, |t, columns, sums| {
            for (c, sum) in columns.zip(sums) {
                *sum += (t * (c + 1)) as f64;
            }
        });
        let tokens: usize = (10..1000).sum();
        for (c, &got) in out.iter().enumerate() {
            assert_eq!(got, (tokens * (c + 1)) as f32, "column {c}");
        }
        assert_eq!(sum(10..1000, |t| t as f64), tokens as f64);
    }

    #[test]
    fn no_tokens_sum_to_zero() {
        let mut out = [f32::NAN; 4];
        sum_columns(0..0, &mut out, |_, _, _| unreachable!());
        assert_eq!(out, [0.0; 4]);
    }
}
