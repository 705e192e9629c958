//! What the collectives need of a way to carry bytes between ranks.
//!
//! Owns the contract between algorithms and transports, and the memory of messages under way. It never knows a collective.
//!
//! A message owns its memory until it has been carried. Lending the caller's buffers instead would save a copy, but then a
//! collective that gives up could not return: MPI may still write into those buffers when the late peer turns up. Owned memory
//! can be left behind.

use std::sync::Arc;

/// Bytes of a message. The storage keeps its size when the message gets shorter, so reuse neither allocates nor clears it.
#[derive(Clone, Debug, Default)]
pub(super) struct Parcel {
    storage: Vec<u8>,
    len: usize,
}

impl Parcel {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.storage[..self.len]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.storage[..self.len]
    }

    /// Makes the message shorter; longer is not possible here.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code, reason = "mailboxes hand over what was sent"))]
    pub(super) fn shorten(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Of bytes that came.
    pub(super) fn of(storage: Vec<u8>) -> Self {
        let len = storage.len();
        Self { storage, len }
    }

    fn set_len(&mut self, len: usize) {
        if self.storage.len() < len {
            // Not `resize`: it would copy what nobody reads.
            self.storage = vec![0; len];
        }
        self.len = len;
    }
}

/// Parcels that have been used before. One pool serves all groups of a worker.
#[derive(Default)]
pub(super) struct Pool {
    parcels: Vec<Arc<Parcel>>,
}

impl Pool {
    /// A parcel of `len` bytes of any content that nobody else holds: the smallest that fits, or else the largest, enlarged.
    pub(super) fn take(&mut self, len: usize) -> Arc<Parcel> {
        let mut best: Option<(usize, usize)> = None;
        for (index, parcel) in self.parcels.iter_mut().enumerate() {
            // A peer in the same process may still be reading it.
            let Some(parcel) = Arc::get_mut(parcel) else { continue };
            let size = parcel.storage.len();
            let better = match best {
                None => true,
                Some((_, best)) if best < len => size > best,
                Some((_, best)) => size >= len && size < best,
            };
            if better {
                best = Some((index, size));
            }
        }
        let mut parcel = best.map_or_else(Arc::default, |(index, _)| self.parcels.swap_remove(index));
        Arc::make_mut(&mut parcel).set_len(len);
        parcel
    }

    /// Bytes of the parcels that are kept.
    pub(super) fn bytes(&self) -> u64 {
        self.parcels.iter().map(|parcel| parcel.storage.len() as u64).sum()
    }

    /// Keeps a parcel that was taken from here; peers may still be reading it.
    pub(super) fn put_back(&mut self, parcel: Arc<Parcel>) {
        self.parcels.push(parcel);
    }

    /// Keeps a parcel that arrived, unless it is the sender's own, who will want it back.
    pub(super) fn put_back_arrived(&mut self, mut parcel: Arc<Parcel>) {
        if Arc::get_mut(&mut parcel).is_some() {
            self.parcels.push(parcel);
        }
    }
}

/// A send or receive under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(pub(super) usize);

/// Tells messages between two ranks apart. Fits 20 bits, which every MPI in use allows (the standard promises only 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag(u32);

impl Tag {
    /// Groups that a worker can tell apart.
    pub(super) const GROUPS: u32 = 1 << 10;
    /// Rounds of a group after which tags repeat. Order alone would do, since messages of a pair never overtake; the round
    /// turns ranks that are out of step into a timeout instead of wrong data.
    const ROUNDS: u32 = 1 << 6;
    const KINDS: u32 = 1 << 4;
    /// The largest value of a tag.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code, reason = "only MPI bounds tags"))]
    pub(super) const MAX: u32 = Self::GROUPS * Self::ROUNDS * Self::KINDS - 1;

    /// Of `round` in `group`, for a collective of `kind`. Panics if group or kind are out of range.
    pub(super) fn new(group: u32, round: u32, kind: u32) -> Self {
        assert!(group < Self::GROUPS && kind < Self::KINDS, "tag of group {group}, kind {kind}");
        Self((group * Self::ROUNDS + round % Self::ROUNDS) * Self::KINDS + kind)
    }

    pub(super) fn value(self) -> u32 {
        self.0
    }
}

/// Why a message was not carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TransportError {
    /// The peer is gone.
    Lost(String),
    /// A message longer than the receive that waits for it, by a transport that does not say how long.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code, reason = "mailboxes know the length"))]
    TooLong,
    /// The transport itself failed.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code, reason = "mailboxes cannot fail"))]
    Failed(String),
}

/// Non-blocking point-to-point messages between the ranks of the world.
///
/// Messages of one sender, receiver and tag arrive in the order they were sent. Dropping a transport must be sound while
/// messages are under way: their memory is leaked if it cannot be got back.
pub(super) trait Transport: Send {
    /// Starts to send `parcel` to world rank `to`.
    fn send(&mut self, to: usize, tag: Tag, parcel: Arc<Parcel>) -> Result<Ticket, TransportError>;

    /// Starts to receive up to `len` bytes from world rank `from`; memory comes from `pool` if any is needed.
    fn receive(&mut self, from: usize, tag: Tag, len: usize, pool: &mut Pool) -> Result<Ticket, TransportError>;

    /// Whether the message has been carried, and then its parcel. A ticket is void once this returned a parcel or an error.
    fn poll(&mut self, ticket: Ticket) -> Result<Option<Arc<Parcel>>, TransportError>;

    /// Gives up on a message. Its memory is not seen again unless the transport is sure to be done with it.
    fn abandon(&mut self, ticket: Ticket);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_parcel_is_reused_and_a_shared_one_is_not() {
        let mut pool = Pool::default();
        let (small, large) = (pool.take(10), pool.take(1000));
        let (small_at, large_at) = (small.bytes().as_ptr(), large.bytes().as_ptr());
        pool.put_back(small);
        pool.put_back(large);
        assert_eq!(pool.take(4).bytes().as_ptr(), small_at, "the smallest that fits");

        let taken = pool.take(600);
        assert_eq!((taken.bytes().as_ptr(), taken.bytes().len()), (large_at, 600));
        let reader = Arc::clone(&taken);
        pool.put_back(taken);
        assert_ne!(pool.take(600).bytes().as_ptr(), large_at, "a peer still reads it");
        drop(reader);
        assert_eq!(pool.take(600).bytes().as_ptr(), large_at);
    }

    #[test]
    fn tags_of_different_groups_rounds_and_kinds_differ() {
        let tags = [Tag::new(0, 0, 0), Tag::new(0, 0, 15), Tag::new(0, 1, 0), Tag::new(0, 63, 0), Tag::new(1, 0, 0)];
        for (index, tag) in tags.iter().enumerate() {
            assert!(!tags[..index].contains(tag), "{tag:?}");
        }
        assert_eq!(Tag::new(Tag::GROUPS - 1, Tag::ROUNDS - 1, Tag::KINDS - 1).value(), Tag::MAX);
    }
}
