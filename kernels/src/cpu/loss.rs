//! Cross-entropy, and sums in f64.
//!
//! Owns one row's loss and gradient, and the order of long sums: a number of blocks that depends on the length alone, each
//! summed in fixed lanes, the blocks in order. So a sum is the same for every number of threads too.

use multiversion::multiversion;

use super::parallel::{for_parts, parts, rows_mut, with_scratch};
use super::simd::{exp, max, sum, sum_f64};
use super::{slice, slice_mut};
use crate::{Cpu, Element, LossOps, View, ViewMut};

impl LossOps for Cpu {
    fn cross_entropy(
        &self,
        vocab: usize,
        scale: f32,
        targets: View<'_, Self, i32>,
        logits: ViewMut<'_, Self, f32>,
        losses: ViewMut<'_, Self, f32>,
    ) {
        cross_entropy(vocab, scale, slice(targets), slice_mut(logits), slice_mut(losses));
    }

    fn cross_entropy_loss(
        &self,
        vocab: usize,
        targets: View<'_, Self, i32>,
        logits: View<'_, Self, f32>,
        losses: ViewMut<'_, Self, f32>,
    ) {
        cross_entropy_loss(vocab, slice(targets), slice(logits), slice_mut(losses));
    }

    fn sum<T: Element + Into<f64>>(&self, x: View<'_, Self, T>, total: ViewMut<'_, Self, f64>) {
        slice_mut(total)[0] += blocked_sum(slice(x), |block| sum_f64(block, Into::into));
    }
}

/// The column a target names, or None where there is no target. Panics if the vocabulary has no such column.
fn column(target: i32, vocab: usize) -> Option<usize> {
    match usize::try_from(target) {
        Ok(column) if column < vocab => Some(column),
        Err(_) if target == -1 => None,
        _ => panic!("target {target} is not in a vocabulary of {vocab}"),
    }
}

fn check(vocab: usize, rows: usize, logits: usize, losses: usize) {
    assert!(logits >= rows * vocab, "logits have {logits} elements for {rows} rows x {vocab}");
    assert!(losses >= rows, "losses have {losses} elements for {rows} rows");
}

fn cross_entropy(vocab: usize, scale: f32, targets: &[i32], logits: &mut [f32], losses: &mut [f32]) {
    let rows = targets.len();
    check(vocab, rows, logits.len(), losses.len());
    let outputs = (rows_mut(&mut logits[..rows * vocab], vocab), rows_mut(&mut losses[..rows], 1));
    for_parts(rows, parts(rows * vocab), outputs, |range, (logits, losses)| {
        for (row, (target, loss)) in targets[range].iter().zip(losses.data).enumerate() {
            let logits = &mut logits.data[row * vocab..(row + 1) * vocab];
            *loss = match column(*target, vocab) {
                Some(target) => row_loss_and_grad(logits, target, scale),
                None => {
                    logits.fill(0.0);
                    0.0
                }
            };
        }
    });
}

fn cross_entropy_loss(vocab: usize, targets: &[i32], logits: &[f32], losses: &mut [f32]) {
    let rows = targets.len();
    check(vocab, rows, logits.len(), losses.len());
    for_parts(rows, parts(rows * vocab), rows_mut(&mut losses[..rows], 1), |range, losses| {
        with_scratch(vocab, |scratch| {
            for ((row, target), loss) in range.clone().zip(&targets[range]).zip(losses.data) {
                *loss = column(*target, vocab).map_or(0.0, |target| {
                    scratch.copy_from_slice(&logits[row * vocab..(row + 1) * vocab]);
                    exponentials(scratch, target).loss
                });
            }
        });
    });
}

struct Exponentials {
    sum: f32,
    loss: f32,
}

/// Replaces a row by its exponentials less the largest logit.
#[inline(always)]
fn exponentials_of(row: &mut [f32], target: usize) -> Exponentials {
    let largest = max(row);
    let chosen = row[target] - largest;
    for x in row.iter_mut() {
        *x = exp(*x - largest);
    }
    let sum = sum(row);
    Exponentials { sum, loss: sum.ln() - chosen }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn exponentials(row: &mut [f32], target: usize) -> Exponentials {
    exponentials_of(row, target)
}

/// The loss of one row, which becomes `(softmax − onehot) · scale`.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn row_loss_and_grad(row: &mut [f32], target: usize, scale: f32) -> f32 {
    let Exponentials { sum, loss } = exponentials_of(row, target);
    let factor = scale / sum;
    for x in row.iter_mut() {
        *x *= factor;
    }
    row[target] -= scale;
    loss
}

/// Blocks of a long sum.
const SUM_BLOCKS: usize = 64;
/// Elements from which a sum is cut into blocks.
const LONG_SUM: usize = 64 * 1024;

/// Σ over blocks, in order, of `block_sum`.
pub(super) fn blocked_sum<T: Sync>(x: &[T], block_sum: impl Fn(&[T]) -> f64 + Sync) -> f64 {
    if x.len() < LONG_SUM {
        return block_sum(x);
    }
    let mut sums = [0.0; SUM_BLOCKS];
    let bound = |block: usize| x.len() / SUM_BLOCKS * block + x.len() % SUM_BLOCKS * block / SUM_BLOCKS;
    for_parts(SUM_BLOCKS, SUM_BLOCKS, rows_mut(&mut sums, 1), |range, sums| {
        for (block, sum) in range.zip(sums.data) {
            *sum = block_sum(&x[bound(block)..bound(block + 1)]);
        }
    });
    sums.iter().sum()
}
