//! Cross-entropy, and sums in f64.
//!
//! Owns how much of a row of logits stays in shared memory, and the cut of long sums over blocks.

use super::shape::{Cut, PACK_BYTES, holds, int};
use super::{Cuda, CudaAct, Grid, launch, pointer, pointer_mut};
use crate::{Element, LossOps, View, ViewMut};

/// Threads of a block of the kernels of cuda/sums.cu.
const SUM_THREADS: u32 = 512;
/// Shared memory that a block has beside the row: the driver's share of it and the block's reductions.
const OTHER_SHARED_BYTES: usize = 1536;

impl<A: CudaAct> LossOps for Cuda<A> {
    fn cross_entropy(
        &self,
        vocab: usize,
        scale: f32,
        targets: View<'_, Self, i32>,
        logits: ViewMut<'_, Self, A>,
        losses: ViewMut<'_, Self, f32>,
    ) {
        let rows = targets.len();
        holds("logits", logits.len(), rows * vocab);
        holds("losses", losses.len(), rows);
        if rows == 0 || vocab == 0 {
            return;
        }
        let (targets, logits, losses) = (pointer(targets), pointer_mut(logits), pointer_mut(losses));
        let row_bytes = (vocab * A::BYTES).next_multiple_of(PACK_BYTES);
        // Three blocks a multiprocessor, or two, so that one reads while the others reduce and write; one larger block where the row
        // needs all there is.
        let of = |blocks| self.facts().shared_bytes / blocks - OTHER_SHARED_BYTES;
        let (most, kept_bytes) = match row_bytes {
            bytes if bytes <= of(3) => (384, bytes),
            bytes if bytes <= of(2) => (512, bytes),
            bytes => (1024, bytes.min(of(1))),
        };
        let kept = kept_bytes / PACK_BYTES;
        let grid = Grid::new(rows, threads::<A>(vocab, most)).shared(kept * PACK_BYTES);
        let kernel = A::pick("cross_entropy_f32", "cross_entropy_bf16");
        launch!(self, kernel, grid; int("vocabulary", vocab), scale, targets, logits, losses, int("packs", kept));
    }

    fn cross_entropy_loss(
        &self,
        vocab: usize,
        targets: View<'_, Self, i32>,
        logits: View<'_, Self, A>,
        losses: ViewMut<'_, Self, f32>,
    ) {
        let rows = targets.len();
        holds("logits", logits.len(), rows * vocab);
        holds("losses", losses.len(), rows);
        if rows == 0 || vocab == 0 {
            return;
        }
        let (kernel, grid) =
            (A::pick("cross_entropy_loss_f32", "cross_entropy_loss_bf16"), Grid::new(rows, threads::<A>(vocab, 512)));
        launch!(self, kernel, grid; int("vocabulary", vocab), pointer(targets), pointer(logits), pointer_mut(losses));
    }

    fn sum<T: Element + Into<f64>>(&self, x: View<'_, Self, T>, total: ViewMut<'_, Self, f64>) {
        let kernel = match T::NAME {
            "F32" => "sum_f32",
            "F64" => "sum_f64",
            "I32" => "sum_i32",
            "BF16" => "sum_bf16",
            other => panic!("there is no sum of {other}"),
        };
        self.total(kernel, x, total);
    }
}

impl<A: CudaAct> Cuda<A> {
    /// `total[0] +=` what `kernel` of cuda/sums.cu sums of each element.
    pub(super) fn total<T: Element>(&self, kernel: &'static str, x: View<'_, Self, T>, total: ViewMut<'_, Self, f64>) {
        holds("total", total.len(), 1);
        let (n, x) = (x.len(), pointer(x));
        if n == 0 {
            return;
        }
        let width = PACK_BYTES / T::BYTES;
        let cut = Cut::new(n, width, &[(x, T::BYTES)]);
        let grid = Grid::cover(cut.threads(width), SUM_THREADS, self.facts());
        let Some(scratch) = self.scratch(grid.blocks.0 as usize * size_of::<f64>()) else { return };
        let partial = scratch.at(0);
        launch!(self, kernel, grid; x, cut, partial);
        let blocks = int("blocks", grid.blocks.0 as usize);
        launch!(self, "sum_partials", Grid::new(1, SUM_THREADS); blocks, partial, pointer_mut(total));
    }
}

/// Threads for a row of logits: at most one for each four packs, in whole warps.
fn threads<A: CudaAct>(vocab: usize, most: usize) -> u32 {
    (vocab * A::BYTES / PACK_BYTES / 4).next_multiple_of(32).clamp(32, most) as u32
}
