//! The CPU's communicator: device views in, slices to the algorithms.
//!
//! Owns shape checks and the making of groups. One type serves threads, processes and the lone rank, so that a program is
//! compiled once for all three; which transport carries its messages is decided where it is made.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use moe_kernels::cpu::{slice, slice_mut};
use moe_kernels::{Cpu, Element, View, ViewMut};

use super::algorithms;
use super::exchange::{Call, Collective, Group, Worker, lock};
use super::transport::Tag;
use super::{CollectiveError, Communicator, Context, ReduceOp, Reducible};
use crate::topology::Rank;

type Result<T> = std::result::Result<T, CollectiveError>;

/// A group of CPU ranks: threads ([`super::local`]), processes (`mpi`), or one rank alone ([`super::local::solo`]).
///
/// Several threads may hold it; their collectives take turns, in an order that must be the same on all ranks.
pub struct HostCommunicator {
    group: Group,
}

impl fmt::Debug for HostCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Group { name, members, rank, .. } = &self.group;
        f.debug_struct("HostCommunicator").field("name", name).field("members", members).field("rank", rank).finish()
    }
}

/// The number of the group of all ranks; splits number theirs from 1.
const WORLD_GROUP: u32 = 0;

impl HostCommunicator {
    /// The group of all `size` ranks of a transport.
    pub(super) fn world(worker: Arc<Worker>, rank: usize, size: usize) -> Self {
        Self { group: Group::new(worker, WORLD_GROUP, "world", (0..size).map(Rank).collect(), rank) }
    }

    fn begin(&self, collective: Collective) -> Result<Call<'_>> {
        self.group.begin(collective)
    }
}

impl Communicator<Cpu> for HostCommunicator {
    fn rank(&self) -> usize {
        self.group.rank
    }

    fn members(&self) -> &[Rank] {
        &self.group.members
    }

    fn name(&self) -> &str {
        &self.group.name
    }

    fn context(&self) -> &Context {
        &self.group.worker.context
    }

    fn all_to_all<T: Element>(&self, _: &Cpu, send: View<'_, Cpu, T>, recv: ViewMut<'_, Cpu, T>) -> Result<()> {
        let (send, recv) = (T::as_bytes(slice(send)), T::as_bytes_mut(slice_mut(recv)));
        let size = self.group.members.len();
        assert!(
            send.len() == recv.len() && send.len().is_multiple_of(size * T::BYTES),
            "all_to_all over {size} ranks: send {}, receive {} elements",
            send.len() / T::BYTES,
            recv.len() / T::BYTES
        );
        let block = send.len() / size;
        let at = |peer| peer * block..(peer + 1) * block;
        algorithms::personalised(&mut self.begin(Collective::AllToAll)?, send, at, recv, at)
    }

    fn all_to_all_v<T: Element>(
        &self,
        _: &Cpu,
        width: usize,
        send: View<'_, Cpu, T>,
        send_counts: View<'_, Cpu, i32>,
        recv: ViewMut<'_, Cpu, T>,
        recv_counts: View<'_, Cpu, i32>,
    ) -> Result<()> {
        let (send, recv) = (T::as_bytes(slice(send)), T::as_bytes_mut(slice_mut(recv)));
        let (send_counts, recv_counts) = (slice(send_counts), slice(recv_counts));
        let size = self.group.members.len();
        assert!(
            width > 0 && send_counts.len() == size && recv_counts.len() == size,
            "all_to_all_v over {size} ranks: width {width}, {} send and {} receive counts",
            send_counts.len(),
            recv_counts.len()
        );
        let row_bytes = width * T::BYTES;
        let mut call = self.begin(Collective::AllToAllV)?;
        for (what, counts, bytes) in [("send", send_counts, send.len()), ("receive", recv_counts, recv.len())] {
            let rows = bytes / row_bytes;
            let fits = counts.iter().all(|count| *count >= 0) && rows_before(counts, size) <= rows;
            if !fits {
                return Err(call.bad_counts(what, counts, rows));
            }
        }
        let bytes_of =
            |counts: &[i32], peer| rows_before(counts, peer) * row_bytes..rows_before(counts, peer + 1) * row_bytes;
        let outgoing = |peer| bytes_of(send_counts, peer);
        algorithms::personalised(&mut call, send, outgoing, recv, |peer| bytes_of(recv_counts, peer))
    }

    fn all_reduce<T: Reducible>(&self, _: &Cpu, buffer: ViewMut<'_, Cpu, T>, op: ReduceOp) -> Result<()> {
        algorithms::all_reduce(&mut self.begin(Collective::AllReduce)?, op, slice_mut(buffer))
    }

    fn reduce_scatter<T: Reducible>(
        &self,
        _: &Cpu,
        send: View<'_, Cpu, T>,
        recv: ViewMut<'_, Cpu, T>,
        op: ReduceOp,
    ) -> Result<()> {
        let size = self.group.members.len();
        assert_eq!(send.len(), recv.len() * size, "reduce_scatter over {size} ranks: elements of send, and due");
        algorithms::reduce_scatter(&mut self.begin(Collective::ReduceScatter)?, op, slice(send), slice_mut(recv))
    }

    fn all_gather<T: Element>(&self, _: &Cpu, send: View<'_, Cpu, T>, recv: ViewMut<'_, Cpu, T>) -> Result<()> {
        let size = self.group.members.len();
        assert_eq!(recv.len(), send.len() * size, "all_gather over {size} ranks: elements of recv, and due");
        let (mine, all) = (T::as_bytes(slice(send)), T::as_bytes_mut(slice_mut(recv)));
        algorithms::all_gather(&mut self.begin(Collective::AllGather)?, mine, all)
    }

    fn broadcast<T: Element>(&self, _: &Cpu, buffer: ViewMut<'_, Cpu, T>, root: usize) -> Result<()> {
        assert!(root < self.group.members.len(), "root {root} of {} ranks", self.group.members.len());
        algorithms::broadcast(&mut self.begin(Collective::Broadcast)?, T::as_bytes_mut(slice_mut(buffer)), root)
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        algorithms::all_gather_bytes(&mut self.begin(Collective::AllGatherBytes)?, mine)
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        assert!(root < self.group.members.len(), "root {root} of {} ranks", self.group.members.len());
        algorithms::broadcast_bytes(&mut self.begin(Collective::BroadcastBytes)?, bytes, root)
    }

    fn barrier(&self) -> Result<()> {
        algorithms::barrier(&mut self.begin(Collective::Barrier)?)
    }

    fn sent_bytes(&self) -> Vec<(&'static str, u64)> {
        self.group.sent_bytes()
    }

    fn staging_bytes(&self) -> u64 {
        lock(&self.group.worker.engine).pool.bytes()
    }

    fn split(&self, name: &str, color: usize, key: usize) -> Result<Self> {
        let worker = &self.group.worker;
        let me = Ticket { color: color as u64, key: key as u64, next: worker.next_group.load(Ordering::Relaxed) };
        let mut call = self.begin(Collective::Split)?;
        let mut tickets = vec![0; Ticket::BYTES * self.group.members.len()];
        algorithms::all_gather(&mut call, &me.encode(), &mut tickets)?;
        let tickets = tickets.chunks_exact(Ticket::BYTES).map(Ticket::decode).collect::<Vec<_>>();

        // The highest number any member could use is free with all of them; groups of one split have no member in common, so
        // they may share it.
        let id = tickets.iter().map(|ticket| ticket.next).max().unwrap_or(0);
        if id >= Tag::GROUPS {
            let limit = Tag::GROUPS - 1;
            return Err(call.fail(CollectiveError::TooManyGroups { group: name.into(), limit }));
        }
        worker.next_group.store(id + 1, Ordering::Relaxed);

        let mut chosen = (0..tickets.len()).filter(|rank| tickets[*rank].color == me.color).collect::<Vec<_>>();
        chosen.sort_by_key(|rank| (tickets[*rank].key, *rank));
        let rank = chosen.iter().take_while(|rank| **rank != self.group.rank).count();
        let members = chosen.into_iter().map(|rank| self.group.members[rank]).collect();
        Ok(Self { group: Group::new(Arc::clone(worker), id, name, members, rank) })
    }
}

/// Rows that go before those of `peer`. Counts are known to be no less than zero.
fn rows_before(counts: &[i32], peer: usize) -> usize {
    counts[..peer].iter().map(|count| *count as usize).sum()
}

/// What a rank says in a split: its color, its key, and the lowest group number it has not used.
struct Ticket {
    color: u64,
    key: u64,
    next: u32,
}

impl Ticket {
    const BYTES: usize = 24;

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.color.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.key.to_ne_bytes());
        bytes[16..].copy_from_slice(&u64::from(self.next).to_ne_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Self {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..(index + 1) * 8]);
            u64::from_ne_bytes(word)
        };
        Self { color: word(0), key: word(1), next: word(2) as u32 }
    }
}
