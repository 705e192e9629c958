//! How tensors are cut for kernels that work on 16 bytes at a time; kernels/cuda/pack.cuh has the other side.

use crate::Element;

/// Bytes of a full pack.
pub(super) const PACK_BYTES: usize = 16;

/// Panics where a tensor is too short.
#[track_caller]
pub(super) fn holds(name: &str, len: usize, needed: usize) {
    assert!(len >= needed, "{name} has {len} elements, {needed} are needed");
}

/// `number` as a kernel's int. Panics where it does not fit.
#[track_caller]
pub(super) fn int(name: &str, number: usize) -> i32 {
    i32::try_from(number).unwrap_or_else(|_| panic!("{name} is {number}; kernels count to {}", i32::MAX))
}

/// Whether rows whose elements T begin at `addresses` and at multiples of each of `strides` are whole packs: 1 or 0.
pub(super) fn packed<T: Element>(strides: &[usize], addresses: &[u64]) -> i32 {
    let strides = strides.iter().all(|stride| (stride * T::BYTES).is_multiple_of(PACK_BYTES));
    i32::from(strides && addresses.iter().all(|address| address.is_multiple_of(PACK_BYTES as u64)))
}

/// Packs, whole or of one element, in a matrix: what a kernel over rows shares out. Panics where its 32-bit division would not do.
#[track_caller]
pub(super) fn items<T: Element>(rows: usize, width: usize, packed: i32) -> usize {
    let items = rows * width / if packed == 1 { PACK_BYTES / T::BYTES } else { 1 };
    assert!(u32::try_from(items).is_ok(), "{rows} rows of {width} are more than kernels count");
    items
}

/// A flat tensor cut into whole packs of 16 bytes, counted in the operand with the largest elements, and what lies outside of them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    n: i64,
    head: i64,
    packs: i64,
}

impl Cut {
    /// Of `n` elements in packs of `width`, of operands with (address, bytes of an element). There are no packs where the operands
    /// do not reach a pack's boundary at the same element.
    pub(super) fn new(n: usize, width: usize, operands: &[(u64, usize)]) -> Self {
        let phase = |(address, bytes): (u64, usize)| (address / bytes as u64) % width as u64;
        let first = operands.first().map_or(0, |first| phase(*first));
        let together = operands.iter().all(|operand| phase(*operand) == first);
        let head = ((width as u64 - first) % width as u64) as usize;
        if !together || n < head {
            return Self { n: n as i64, head: 0, packs: 0 };
        }
        Self { n: n as i64, head: head as i64, packs: ((n - head) / width) as i64 }
    }

    /// How many threads have work: one a pack, and some for the rest.
    pub(super) fn threads(self, width: usize) -> usize {
        (self.packs.max(self.n - self.packs * width as i64)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_tensor_is_cut_at_the_first_boundary_that_all_operands_share() {
        let cut = |n, operands: &[(u64, usize)]| {
            let Cut { head, packs, .. } = Cut::new(n, 4, operands);
            (head, packs)
        };
        assert_eq!(cut(10, &[(256, 4), (256, 2)]), (0, 2));
        assert_eq!(cut(10, &[(256 + 4, 4), (256 + 2, 2)]), (3, 1));
        assert_eq!(cut(10, &[(256 + 4, 4), (256, 2)]), (0, 0));
        assert_eq!(cut(2, &[(256 + 4, 4)]), (0, 0));
        assert_eq!(cut(3, &[(256 + 4, 4)]), (3, 0));
    }
}
