//! The collectives over point-to-point messages: who sends what to whom, and in which order sums are formed.
//!
//! Owns the algorithms, written on slices of host memory. It never waits by itself and never names a transport.
//!
//! All are direct exchanges: every rank posts all its receives, then all its sends, then waits. So each byte crosses the
//! network once, reductions see the contributions in rank order, and a rank that is missing is missed by name by every other.
//! Long buffers go in segments, which bounds the memory of messages under way.
//!
//! Letters: W ranks in the group, n elements of a block.

use std::ops::Range;

use super::exchange::Call;
use super::{CollectiveError, ReduceOp, Reducible};
use crate::topology::share;

type Result<T> = std::result::Result<T, CollectiveError>;

/// Bytes that one rank has under way at a time in collectives whose sizes all ranks know: long enough that the wait at a
/// segment's end does not count, short enough that staging a model's gradients takes no memory to speak of.
const SEGMENT_BYTES: usize = 4 << 20;
/// Up to this, one round of whole buffers is faster than two rounds of parts: latency is all that counts.
const SHORT_BYTES: usize = 16 << 10;
/// Elements summed at a time: all ranks' contributions to them fit the first-level cache.
const FOLD: usize = 1024;

/// The ranges of at most `most` elements that make up `0..len`.
fn segments(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let most = most.max(1);
    (0..len.div_ceil(most)).map(move |index| index * most..((index + 1) * most).min(len))
}

fn shifted(range: &Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}

/// Bytes `outgoing(i)` of `send` go to rank i; what comes from rank j lands at bytes `incoming(j)` of `recv`.
pub(super) fn personalised(
    call: &mut Call<'_>,
    send: &[u8],
    outgoing: impl Fn(usize) -> Range<usize>,
    recv: &mut [u8],
    incoming: impl Fn(usize) -> Range<usize>,
) -> Result<()> {
    for peer in call.peers() {
        call.receive(peer, incoming(peer).len())?;
    }
    for peer in call.peers() {
        call.send([peer], &send[outgoing(peer)])?;
    }
    let me = call.rank();
    recv[incoming(me)].copy_from_slice(&send[outgoing(me)]);
    call.wait()?;
    for peer in call.peers() {
        recv[incoming(peer)].copy_from_slice(call.arrived(peer));
    }
    Ok(())
}

/// Block i of `all [W, n]` becomes the `mine [n]` of rank i.
pub(super) fn all_gather(call: &mut Call<'_>, mine: &[u8], all: &mut [u8]) -> Result<()> {
    let block = mine.len();
    let own = call.rank() * block;
    all[own..own + block].copy_from_slice(mine);
    for segment in segments(block, SEGMENT_BYTES / call.size()) {
        call.next_round();
        for peer in call.peers() {
            call.receive(peer, segment.len())?;
        }
        call.send(call.peers(), &mine[segment.clone()])?;
        call.wait()?;
        for peer in call.peers() {
            all[shifted(&segment, peer * block)].copy_from_slice(call.arrived(peer));
        }
    }
    Ok(())
}

/// Each rank's bytes, of lengths that the others do not know yet.
pub(super) fn all_gather_bytes(call: &mut Call<'_>, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
    for peer in call.peers() {
        call.receive(peer, size_of::<u64>())?;
    }
    call.send(call.peers(), &(mine.len() as u64).to_ne_bytes())?;
    call.wait()?;
    let lengths = call.peers().map(|peer| (peer, length(call.arrived(peer)))).collect::<Vec<_>>();

    call.next_round();
    for (peer, len) in lengths {
        call.receive(peer, len)?;
    }
    call.send(call.peers(), mine)?;
    call.wait()?;
    let all =
        (0..call.size()).map(|peer| if peer == call.rank() { mine.to_vec() } else { call.arrived(peer).to_vec() });
    Ok(all.collect())
}

/// A length as sent by [`all_gather_bytes`] and [`broadcast_bytes`]; the exchange has checked that it is eight bytes.
fn length(bytes: &[u8]) -> usize {
    let mut word = [0; size_of::<u64>()];
    word.copy_from_slice(bytes);
    u64::from_ne_bytes(word) as usize
}

/// `buffer` becomes that of `root`.
pub(super) fn broadcast(call: &mut Call<'_>, buffer: &mut [u8], root: usize) -> Result<()> {
    for segment in segments(buffer.len(), SEGMENT_BYTES) {
        broadcast_segment(call, &mut buffer[segment], root)?;
        call.next_round();
    }
    Ok(())
}

/// A short buffer goes from the root to everyone. Of a long one the root gives each rank a share, and the ranks gather the
/// shares from each other, so that the root sends the buffer twice and not W times.
fn broadcast_segment(call: &mut Call<'_>, buffer: &mut [u8], root: usize) -> Result<()> {
    let (me, size) = (call.rank(), call.size());
    if size == 2 || buffer.len() <= SHORT_BYTES {
        if me == root {
            call.send(call.peers(), buffer)?;
            return call.wait();
        }
        call.receive(root, buffer.len())?;
        call.wait()?;
        buffer.copy_from_slice(call.arrived(root));
        return Ok(());
    }
    let len = buffer.len();
    let part = |index| share(len, size, index);
    if me == root {
        for peer in call.peers() {
            call.send([peer], &buffer[part(peer)])?;
        }
        // Not waiting in between: the others' gathering must not wait for one rank that is late to take its share.
        call.next_round();
        call.send(call.peers(), &buffer[part(me)])?;
        return call.wait();
    }
    call.receive(root, part(me).len())?;
    call.wait()?;
    buffer[part(me)].copy_from_slice(call.arrived(root));
    call.next_round();
    for peer in call.peers() {
        call.receive(peer, part(peer).len())?;
    }
    call.send(call.peers().filter(|peer| *peer != root), &buffer[part(me)])?;
    call.wait()?;
    for peer in call.peers() {
        buffer[part(peer)].copy_from_slice(call.arrived(peer));
    }
    Ok(())
}

/// `bytes` becomes that of `root`, length included.
pub(super) fn broadcast_bytes(call: &mut Call<'_>, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
    let mut word = (bytes.len() as u64).to_ne_bytes();
    broadcast_segment(call, &mut word, root)?;
    call.next_round();
    bytes.resize(length(&word), 0);
    broadcast(call, bytes, root)
}

/// Returns once every rank has begun it.
pub(super) fn barrier(call: &mut Call<'_>) -> Result<()> {
    for peer in call.peers() {
        call.receive(peer, 0)?;
    }
    call.send(call.peers(), &[])?;
    call.wait()
}

/// `recv [n]` becomes the reduction of block `rank` of all ranks' `send [W, n]`.
pub(super) fn reduce_scatter<T: Reducible>(
    call: &mut Call<'_>,
    op: ReduceOp,
    send: &[T],
    recv: &mut [T],
) -> Result<()> {
    let block = recv.len();
    for segment in segments(block, SEGMENT_BYTES / T::BYTES / call.size()) {
        call.next_round();
        for peer in call.peers() {
            call.receive(peer, segment.len() * T::BYTES)?;
        }
        for peer in call.peers() {
            call.send([peer], T::as_bytes(&send[shifted(&segment, peer * block)]))?;
        }
        let own = &send[shifted(&segment, call.rank() * block)];
        recv[segment.clone()].copy_from_slice(own);
        call.wait()?;
        fold_arrived(call, op, &mut recv[segment]);
    }
    Ok(())
}

/// `buffer` becomes the reduction of all ranks' buffers.
pub(super) fn all_reduce<T: Reducible>(call: &mut Call<'_>, op: ReduceOp, buffer: &mut [T]) -> Result<()> {
    if call.size() == 1 {
        // What one rank has is the reduction; passing over all gradients to find that out would cost as much as reading them.
        return Ok(());
    }
    for segment in segments(buffer.len(), SEGMENT_BYTES / T::BYTES) {
        let segment = &mut buffer[segment];
        call.next_round();
        if size_of_val(segment) <= SHORT_BYTES {
            all_reduce_whole(call, op, segment)?;
        } else {
            all_reduce_parts(call, op, segment)?;
        }
    }
    Ok(())
}

/// Every rank reduces everything: one round, W − 1 times the bytes. The order is the same on all, hence the bits.
fn all_reduce_whole<T: Reducible>(call: &mut Call<'_>, op: ReduceOp, buffer: &mut [T]) -> Result<()> {
    for peer in call.peers() {
        call.receive(peer, size_of_val(buffer))?;
    }
    call.send(call.peers(), T::as_bytes(buffer))?;
    call.wait()?;
    fold_arrived(call, op, buffer);
    Ok(())
}

/// Every rank reduces its share, then gathers the others': two rounds, 2·(W − 1)/W times the bytes, which no algorithm beats.
fn all_reduce_parts<T: Reducible>(call: &mut Call<'_>, op: ReduceOp, buffer: &mut [T]) -> Result<()> {
    let (me, size, len) = (call.rank(), call.size(), buffer.len());
    let part = |index| share(len, size, index);
    for peer in call.peers() {
        call.receive(peer, part(me).len() * T::BYTES)?;
    }
    for peer in call.peers() {
        call.send([peer], T::as_bytes(&buffer[part(peer)]))?;
    }
    call.wait()?;
    fold_arrived(call, op, &mut buffer[part(me)]);

    call.next_round();
    for peer in call.peers() {
        call.receive(peer, part(peer).len() * T::BYTES)?;
    }
    call.send(call.peers(), T::as_bytes(&buffer[part(me)]))?;
    call.wait()?;
    for peer in call.peers() {
        T::as_bytes_mut(&mut buffer[part(peer)]).copy_from_slice(call.arrived(peer));
    }
    Ok(())
}

/// `block` holds this rank's contribution and becomes the reduction with those that arrived, in ascending rank order.
fn fold_arrived<T: Reducible>(call: &Call<'_>, op: ReduceOp, block: &mut [T]) {
    let (me, size) = (call.rank(), call.size());
    let (mut own, mut theirs) = ([T::default(); FOLD], [T::default(); FOLD]);
    for range in segments(block.len(), FOLD) {
        let len = range.len();
        let bytes = range.start * T::BYTES..range.end * T::BYTES;
        let into = &mut block[range];
        own[..len].copy_from_slice(into);
        for rank in 0..size {
            let from = if rank == me {
                &own[..len]
            } else {
                // A message's bytes need not be aligned for T.
                T::as_bytes_mut(&mut theirs[..len]).copy_from_slice(&call.arrived(rank)[bytes.clone()]);
                &theirs[..len]
            };
            if rank == 0 { into.copy_from_slice(from) } else { T::fold(op, into, from) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_a_buffer_in_order() {
        for (len, most, expected) in
            [(0, 4, "[]"), (4, 4, "[0..4]"), (9, 4, "[0..4, 4..8, 8..9]"), (2, 0, "[0..1, 1..2]")]
        {
            assert_eq!(format!("{:?}", segments(len, most).collect::<Vec<_>>()), expected, "{len} by {most}");
        }
    }
}
