//! How many bytes one rank sends to others in a collective.
//!
//! Owns the arithmetic of the CPU's direct exchanges, for plans. It moves nothing; the counters of
//! [`super::Communicator::sent_bytes`] say the same afterwards, and a test holds one to the other.

pub use super::algorithms::SEGMENT_BYTES;
use super::algorithms::SHORT_BYTES;
use crate::topology::share;

/// Each rank gets `block_bytes` from each other.
pub fn all_to_all(block_bytes: u64, ranks: usize) -> u64 {
    block_bytes * others(ranks)
}

/// Sums `len` elements of `element_bytes` over `ranks` ranks, as seen by `rank`: short buffers go whole to everyone, long ones in
/// two rounds of parts.
pub fn all_reduce(len: usize, element_bytes: usize, ranks: usize, rank: usize) -> u64 {
    let most = SEGMENT_BYTES / element_bytes;
    let segment = |len: usize| -> u64 {
        if len * element_bytes <= SHORT_BYTES {
            return (len * element_bytes) as u64 * others(ranks);
        }
        let mine = share(len, ranks, rank).len();
        ((len - mine) * element_bytes) as u64 + (mine * element_bytes) as u64 * others(ranks)
    };
    (len / most) as u64 * segment(most) + segment(len % most)
}

/// Each rank keeps the sum of one block of `block_len` elements.
pub fn reduce_scatter(block_len: usize, element_bytes: usize, ranks: usize) -> u64 {
    (block_len * element_bytes) as u64 * others(ranks)
}

/// Each rank's block of `block_len` elements goes to all.
pub fn all_gather(block_len: usize, element_bytes: usize, ranks: usize) -> u64 {
    reduce_scatter(block_len, element_bytes, ranks)
}

fn others(ranks: usize) -> u64 {
    ranks.saturating_sub(1) as u64
}

#[cfg(test)]
mod tests {
    use moe_kernels::{Cpu, View, ViewMut};

    use super::*;
    use crate::collectives::{Communicator, ReduceOp, local};

    /// Bytes that `collective` has sent on this group.
    fn counted(group: &impl Communicator<Cpu>, collective: &str) -> u64 {
        group.sent_bytes().iter().find(|(name, _)| *name == collective).map_or(0, |(_, bytes)| *bytes)
    }

    #[test]
    fn what_is_foreseen_is_what_is_sent() {
        // Empty, short, just above short, one segment and a bit, several segments and a short end.
        for len in [0, 1, 4096, 4097, (1 << 20) + 5000, (2 << 20) + 100] {
            for ranks in [1, 2, 3, 4] {
                local::run(ranks, |world| {
                    let mut whole = vec![1.0_f32; len];
                    world.all_reduce(&Cpu, ViewMut::of(&mut whole), ReduceOp::Sum).unwrap();
                    let rank = Communicator::<Cpu>::rank(&world);
                    assert_eq!(counted(&world, "all_reduce"), all_reduce(len, 4, ranks, rank), "{len} on {ranks}");
                    let (mut all, mut mine) = (vec![1.0_f32; len / 4 * ranks], vec![0.0_f32; len / 4]);
                    world.reduce_scatter(&Cpu, View::of(&all), ViewMut::of(&mut mine), ReduceOp::Sum).unwrap();
                    assert_eq!(counted(&world, "reduce_scatter"), reduce_scatter(len / 4, 4, ranks));
                    world.all_gather(&Cpu, View::of(&mine), ViewMut::of(&mut all)).unwrap();
                    assert_eq!(counted(&world, "all_gather"), all_gather(len / 4, 4, ranks));
                    let (send, mut recv) = (vec![1_i32; ranks * 3], vec![0_i32; ranks * 3]);
                    world.all_to_all(&Cpu, View::of(&send), ViewMut::of(&mut recv)).unwrap();
                    assert_eq!(counted(&world, "all_to_all"), all_to_all(12, ranks));
                });
            }
        }
    }
}
