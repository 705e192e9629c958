//! Reductions between GPUs: who folds which part, in what memory.
//!
//! Owns the cut of a buffer into segments, which bounds the memory for what arrives, and of a segment into a part for each rank.

use std::ops::Range;

use moe_kernels::cuda::{Cuda, CudaAct, Event, Fold, Staging};
use moe_kernels::{Element, View, ViewMut};
use nccl_rs::{DeviceSlice, DeviceSliceMut};

use super::plane::Call;
use super::{Link, Result, source, target};
use crate::collectives::algorithms::SHORT_BYTES;
use crate::collectives::exchange::Collective;
use crate::collectives::{ReduceOp, Reducible};
use crate::topology::share;

/// Bytes of all ranks' contributions that arrive at a time: enough that a link is busy, little beside a model.
const SEGMENT_BYTES: usize = 64 << 20;
/// Parts begin at multiples of this, as NCCL's widest copies want.
const ALIGNED_BYTES: usize = 16;

fn fold_of(op: ReduceOp) -> Fold {
    match op {
        ReduceOp::Sum => Fold::Sum,
        ReduceOp::Max => Fold::Max,
        ReduceOp::Min => Fold::Min,
    }
}

/// Ranges of at most `most` elements that make up `len`.
fn segments(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let most = most.max(1);
    (0..len).step_by(most).map(move |start| start..len.min(start + most))
}

/// The part of `len` elements of type T that rank `rank` of `ranks` folds. Empty where there is too little for all.
fn part<T: Element>(len: usize, ranks: usize, rank: usize) -> Range<usize> {
    let unit = ALIGNED_BYTES / T::BYTES;
    let units = share(len.div_ceil(unit), ranks, rank);
    len.min(units.start * unit)..len.min(units.end * unit)
}

/// `bytes` of staging memory from byte `at` on, to be written by a collective.
fn staged(staging: &Staging<'_>, at: usize, bytes: usize) -> DeviceSliceMut<u8> {
    // SAFETY: the staging memory is the plane's own and held until its fold was issued, and the next one that holds it issues to the same
    // stream; parts of one collective do not overlap.
    unsafe { DeviceSliceMut::new(staging.address() + at as u64, bytes) }
}

impl<A: CudaAct> Link<A> {
    pub(super) fn all_reduce<T: Reducible>(
        &self,
        queue: &Cuda<A>,
        mut buffer: ViewMut<'_, Cuda<A>, T>,
        op: ReduceOp,
    ) -> Result<Event> {
        let n = buffer.len();
        self.call(Collective::AllReduce, n * T::BYTES).run(queue, |call| {
            for segment in segments(n, SEGMENT_BYTES / T::BYTES) {
                let segment = buffer.reborrow().slice(segment);
                if segment.len() * T::BYTES <= SHORT_BYTES {
                    self.reduce_short(call, segment, fold_of(op))?;
                } else {
                    self.reduce_long(call, segment, fold_of(op))?;
                }
            }
            Ok(())
        })
    }

    /// Everybody gets everything and folds all of it: one exchange.
    fn reduce_short<T: Element>(&self, call: &Call<'_, A>, buffer: ViewMut<'_, Cuda<A>, T>, fold: Fold) -> Result<()> {
        let (size, bytes) = (self.size(), buffer.len() * T::BYTES);
        let staging = self.plane.staging(size * bytes)?;
        let (send, mut recv) = (source(buffer.as_view()), staged(&staging, 0, size * bytes));
        call.group(|group, stream| group.all_gather(send, &mut recv, stream))?;
        self.plane.queue().fold_staged(fold, &staging, size, buffer);
        self.count_sent(Collective::AllReduce, bytes * (size - 1));
        Ok(())
    }

    /// Everybody folds a part and gives it to all: two exchanges, and every byte travels twice however many ranks there are.
    fn reduce_long<T: Element>(
        &self,
        call: &Call<'_, A>,
        mut buffer: ViewMut<'_, Cuda<A>, T>,
        fold: Fold,
    ) -> Result<()> {
        let (size, me, len) = (self.size(), self.rank(), buffer.len());
        let part_of = |rank| part::<T>(len, size, rank);
        let mine = part_of(me);
        let bytes = mine.len() * T::BYTES;
        let staging = self.plane.staging(size * bytes)?;
        let send_counts = (0..size).map(|rank| part_of(rank).len() * T::BYTES).collect::<Vec<_>>();
        let (send, mut recv) = (source(buffer.as_view()), staged(&staging, 0, size * bytes));
        call.group(|group, stream| group.all_to_all_v((send, &send_counts), (&mut recv, &vec![bytes; size]), stream))?;
        self.plane.queue().fold_staged(fold, &staging, size, buffer.reborrow().slice(mine.clone()));
        drop(staging);
        let folded = source(buffer.as_view().slice(mine.clone()));
        let mut gathered = (0..size)
            .filter(|rank| *rank != me)
            .map(|rank| (rank, target(buffer.reborrow().slice(part_of(rank)))))
            .collect::<Vec<_>>();
        call.group(|group, stream| {
            for (rank, part) in &mut gathered {
                if !folded.is_empty() {
                    group.send(folded, *rank, stream)?;
                }
                if !part.is_empty() {
                    group.recv(part, *rank, stream)?;
                }
            }
            Ok(())
        })?;
        self.count_sent(Collective::AllReduce, (len - mine.len()) * T::BYTES + bytes * (size - 1));
        Ok(())
    }

    pub(super) fn reduce_scatter<T: Reducible>(
        &self,
        queue: &Cuda<A>,
        send: View<'_, Cuda<A>, T>,
        mut recv: ViewMut<'_, Cuda<A>, T>,
        op: ReduceOp,
    ) -> Result<Event> {
        let (size, n) = (self.size(), recv.len());
        self.count_sent(Collective::ReduceScatter, n * T::BYTES * (size - 1));
        self.call(Collective::ReduceScatter, send.len() * T::BYTES).run(queue, |call| {
            for segment in segments(n, SEGMENT_BYTES / T::BYTES / size) {
                let bytes = segment.len() * T::BYTES;
                let staging = self.plane.staging(size * bytes)?;
                let block = |rank: usize| -> DeviceSlice<u8> {
                    source(send.slice(rank * n + segment.start..rank * n + segment.end))
                };
                call.group(|group, stream| {
                    for rank in 0..size {
                        group.send(block(rank), rank, stream)?;
                        group.recv(&mut staged(&staging, rank * bytes, bytes), rank, stream)?;
                    }
                    Ok(())
                })?;
                self.plane.queue().fold_staged(fold_of(op), &staging, size, recv.reborrow().slice(segment));
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_cover_a_buffer_once() {
        for len in [0, 1, 3, 4, 5, 17, 1000, 4099] {
            for ranks in 1..6 {
                let mut next = 0;
                for rank in 0..ranks {
                    let part = part::<f32>(len, ranks, rank);
                    assert_eq!(part.start, next, "{len} over {ranks}");
                    assert!(part.is_empty() || (part.start * 4).is_multiple_of(ALIGNED_BYTES));
                    next = part.end;
                }
                assert_eq!(next, len);
            }
        }
    }

    #[test]
    fn segments_cover_a_buffer_once() {
        assert_eq!(segments(10, 4).collect::<Vec<_>>(), [0..4, 4..8, 8..10]);
        assert_eq!(segments(0, 4).count(), 0);
    }
}
