//! Splitting work over the threads of the current rayon pool.
//!
//! Owns how many parts an operation is cut into, where the cuts are, and the scratch memory a thread keeps. The cuts depend on
//! sizes and the number of threads alone, so the same thread count always gives the same bits. It never computes and never
//! reduces: what parts have to add up, the operation adds in the order of the parts.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

/// Elements below which handing work to another thread costs more than it saves.
const WORTH_SPLITTING: usize = 16 * 1024;

/// Floats of a cache line.
const CACHE_LINE: usize = 16;

/// Parts for an operation that touches `elements` numbers: one a thread, or one where the work is too small to share.
pub(super) fn parts(elements: usize) -> usize {
    if elements < WORTH_SPLITTING { 1 } else { rayon::current_num_threads() }
}

/// Where an output is cut in two.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Rows before the cut.
    rows: usize,
    /// Parts before the cut.
    parts: usize,
}

/// An output that can be cut between two parts.
pub(super) trait Split: Send + Sized {
    /// What lies before the cut, and the rest.
    fn split(self, at: Cut) -> (Self, Self);
}

/// Contiguous rows of `width` elements; the last may end early.
pub(super) struct RowsMut<'a, T> {
    /// The elements of all rows.
    pub(super) data: &'a mut [T],
    width: usize,
}

/// `data` as rows of `width` elements.
pub(super) fn rows_mut<T>(data: &mut [T], width: usize) -> RowsMut<'_, T> {
    RowsMut { data, width }
}

impl<T: Send> Split for RowsMut<'_, T> {
    fn split(self, at: Cut) -> (Self, Self) {
        let (head, tail) = self.data.split_at_mut((at.rows * self.width).min(self.data.len()));
        (rows_mut(head, self.width), rows_mut(tail, self.width))
    }
}

/// One row of `width` elements for each part, however many rows the part works on: room for a part's own sums.
pub(super) struct PartsMut<'a, T> {
    /// The elements of all parts.
    pub(super) data: &'a mut [T],
    width: usize,
}

/// `data` as one row of `width` elements a part.
pub(super) fn parts_mut<T>(data: &mut [T], width: usize) -> PartsMut<'_, T> {
    PartsMut { data, width }
}

impl<T: Send> Split for PartsMut<'_, T> {
    fn split(self, at: Cut) -> (Self, Self) {
        let (head, tail) = self.data.split_at_mut(at.parts * self.width);
        (parts_mut(head, self.width), parts_mut(tail, self.width))
    }
}

impl Split for () {
    fn split(self, _: Cut) -> (Self, Self) {
        ((), ())
    }
}

impl<A: Split, B: Split> Split for (A, B) {
    fn split(self, at: Cut) -> (Self, Self) {
        let (a, b) = (self.0.split(at), self.1.split(at));
        ((a.0, b.0), (a.1, b.1))
    }
}

impl<A: Split, B: Split, C: Split, D: Split> Split for (A, B, C, D) {
    fn split(self, at: Cut) -> (Self, Self) {
        let (a, b, c, d) = (self.0.split(at), self.1.split(at), self.2.split(at), self.3.split(at));
        ((a.0, b.0, c.0, d.0), (a.1, b.1, c.1, d.1))
    }
}

/// Calls `work(rows, output)` for `parts` contiguous ranges that make up `0..rows`, each with its rows of the output. On a pool
/// of one thread the calls run here, in order.
pub(super) fn for_parts<S: Split>(rows: usize, parts: usize, output: S, work: impl Fn(Range<usize>, S) + Sync) {
    let cuts = Cuts { rows, parts: parts.clamp(1, rows.max(1)) };
    let inline = cuts.parts == 1 || rayon::current_num_threads() == 1;
    descend(cuts, 0..cuts.parts, inline, output, &work);
}

/// Where the parts meet.
#[derive(Clone, Copy)]
struct Cuts {
    rows: usize,
    parts: usize,
}

impl Cuts {
    fn before(self, part: usize) -> usize {
        self.rows * part / self.parts
    }
}

fn descend<S: Split>(
    cuts: Cuts,
    range: Range<usize>,
    inline: bool,
    output: S,
    work: &(impl Fn(Range<usize>, S) + Sync),
) {
    let (from, to) = (cuts.before(range.start), cuts.before(range.end));
    if range.len() <= 1 {
        return work(from..to, output);
    }
    let middle = range.start + range.len() / 2;
    let (left, right) = output.split(Cut { rows: cuts.before(middle) - from, parts: middle - range.start });
    let first = || descend(cuts, range.start..middle, inline, left, work);
    let second = || descend(cuts, middle..range.end, inline, right, work);
    if inline {
        first();
        second();
    } else {
        rayon::join(first, second);
    }
}

/// A matrix whose columns are shared out among threads, so that no contiguous cut exists: attention heads side by side in a
/// token's row, for one.
pub(super) struct SharedRows<'a> {
    data: *mut f32,
    len: usize,
    width: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer comes from an exclusive borrow that `owner` keeps alive, f32 may be sent and shared, and the only access is
// `segment`, whose caller answers for segments being disjoint.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    /// `data` as rows of `width` elements.
    pub(super) fn new(data: &'a mut [f32], width: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), width, owner: PhantomData }
    }

    /// Some columns of one row. Panics if they lie outside.
    ///
    /// # Safety
    /// While the result lives, no other segment that overlaps it may exist, on this thread or another.
    #[allow(clippy::mut_from_ref)] // exclusive access is what the caller vouches for
    pub(super) unsafe fn segment(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(columns.start <= columns.end && columns.end <= self.width, "columns {columns:?} of {}", self.width);
        assert!((row + 1) * self.width <= self.len, "row {row} of {} elements in rows of {}", self.len, self.width);
        // SAFETY: by the two assertions the range lies inside the borrowed slice, and the caller keeps segments apart.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.width + columns.start), columns.len()) }
    }
}

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Lends `work` a slice of `len` floats that this thread keeps from call to call, so that steady use allocates nothing. It begins
/// with a cache line, so that aligned vectors never straddle two. The content is whatever the last use left. A use inside another one, as when a waiting thread takes up other work, gets memory of
/// its own.
pub(super) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = SCRATCH.take();
    if memory.len() < len + CACHE_LINE {
        memory.resize(len + CACHE_LINE, 0.0);
    }
    let skipped = memory.as_ptr().align_offset(CACHE_LINE * size_of::<f32>()).min(CACHE_LINE);
    let result = work(&mut memory[skipped..skipped + len]);
    let nested = SCRATCH.replace(memory);
    if nested.len() > len + CACHE_LINE {
        SCRATCH.set(nested);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_row_once_and_in_order() {
        for (rows, parts) in [(0, 4), (1, 4), (7, 3), (64, 64), (1000, 7)] {
            let mut seen = vec![0; 2 * rows];
            for_parts(rows, parts, rows_mut(&mut seen, 2), |range, part| {
                assert_eq!(part.data.len(), 2 * range.len());
                for (row, pair) in range.zip(part.data.chunks_exact_mut(2)) {
                    pair[0] += row;
                    pair[1] += 1;
                }
            });
            let expected: Vec<usize> = (0..rows).flat_map(|row| [row, 1]).collect();
            assert_eq!(seen, expected, "{rows} rows in {parts} parts");
        }
    }

    #[test]
    fn segments_of_shared_rows_reach_their_own_columns_only() {
        let mut data = vec![0.0; 12];
        let rows = SharedRows::new(&mut data, 4);
        for_parts(2, 2, (), |halves, ()| {
            for half in halves {
                for row in 0..3 {
                    // SAFETY: each half writes its own two columns.
                    unsafe { rows.segment(row, 2 * half..2 * half + 2) }.fill((1 + half) as f32);
                }
            }
        });
        assert_eq!(data, [1.0, 1.0, 2.0, 2.0].repeat(3));
    }

    #[test]
    fn nested_scratch_does_not_overlap() {
        with_scratch(8, |outer| {
            outer.fill(1.0);
            with_scratch(16, |inner| inner.fill(2.0));
            assert_eq!(outer, [1.0; 8]);
        });
    }
}
