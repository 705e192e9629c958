//! The communicator over host memory: device views in, slices to the algorithms.
//!
//! Owns shape checks and the making of groups. One type serves threads, processes and the lone rank, so that a program is
//! compiled once for all three; which transport carries its messages is decided where it is made.
//!
//! It serves every device. Where the host sees the device's memory, as a CPU's, nothing is copied; elsewhere data goes through host
//! memory and the host waits for it, except that a lone rank's collectives are at most a copy on the device.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use moe_kernels::{Device, Element, View, ViewMut};

use super::algorithms;
use super::exchange::{Call, Collective, Group, Worker, lock};
use super::transport::Tag;
use super::{CollectiveError, Communicator, Context, ReduceOp, Reducible, fit};
use crate::topology::Rank;

type Result<T> = std::result::Result<T, CollectiveError>;

/// A group of ranks that exchange host memory: threads ([`super::local`]), processes (`mpi`), or one rank alone ([`super::local::solo`]).
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

    fn is_alone(&self) -> bool {
        self.group.members.len() == 1
    }

    fn all_to_all_v_slices<T: Element>(
        &self,
        width: usize,
        (send, send_rows): (&[T], &[Range<usize>]),
        (recv, recv_rows): (&mut [T], &[Range<usize>]),
    ) -> Result<()> {
        let (send, recv) = (T::as_bytes(send), T::as_bytes_mut(recv));
        let row_bytes = width * T::BYTES;
        let mut call = self.begin(Collective::AllToAllV)?;
        for (what, ranges, bytes) in [("send", send_rows, send.len()), ("receive", recv_rows, recv.len())] {
            let rows = bytes / row_bytes;
            if !fit(ranges, rows) {
                return Err(call.bad_rows(what, ranges, rows));
            }
        }
        let bytes_of = |rows: &Range<usize>| rows.start * row_bytes..rows.end * row_bytes;
        let outgoing = |peer: usize| bytes_of(&send_rows[peer]);
        algorithms::personalised(&mut call, send, outgoing, recv, |peer| bytes_of(&recv_rows[peer]))
    }
}

/// What needs no device.
impl HostCommunicator {
    /// See [`Communicator::rank`].
    pub fn rank(&self) -> usize {
        self.group.rank
    }

    /// See [`Communicator::size`].
    pub fn size(&self) -> usize {
        self.group.members.len()
    }

    /// See [`Communicator::members`].
    pub fn members(&self) -> &[Rank] {
        &self.group.members
    }

    /// See [`Communicator::name`].
    pub fn name(&self) -> &str {
        &self.group.name
    }

    /// See [`Communicator::context`].
    pub fn context(&self) -> &Context {
        &self.group.worker.context
    }

    /// See [`Communicator::all_gather_bytes`].
    ///
    /// # Errors
    /// As there.
    pub fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        algorithms::all_gather_bytes(&mut self.begin(Collective::AllGatherBytes)?, mine)
    }

    /// See [`Communicator::broadcast_bytes`].
    ///
    /// # Errors
    /// As there.
    pub fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        assert!(root < self.group.members.len(), "root {root} of {} ranks", self.group.members.len());
        algorithms::broadcast_bytes(&mut self.begin(Collective::BroadcastBytes)?, bytes, root)
    }

    /// See [`Communicator::barrier`].
    ///
    /// # Errors
    /// As there.
    pub fn barrier(&self) -> Result<()> {
        algorithms::barrier(&mut self.begin(Collective::Barrier)?)
    }

    /// See [`Communicator::sent_bytes`].
    pub fn sent_bytes(&self) -> Vec<(&'static str, u64)> {
        self.group.sent_bytes()
    }

    /// See [`Communicator::staging_bytes`].
    pub fn staging_bytes(&self) -> u64 {
        lock(&self.group.worker.engine).pool.bytes()
    }

    /// See [`Communicator::split`].
    ///
    /// # Errors
    /// As there.
    pub fn split(&self, name: &str, color: usize, key: usize) -> Result<Self> {
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

/// A copy of a view in host memory. Waits for the queue.
fn downloaded<D: Device, T: Element>(queue: &D, view: View<'_, D, T>) -> Result<Vec<T>> {
    let mut host = vec![T::default(); view.len()];
    queue.read_to_host(view, &mut host)?;
    Ok(host)
}

/// Calls `work` with the elements of a view: themselves where the host sees them, else a copy.
fn with_host<D: Device, T: Element, R>(
    queue: &D,
    view: View<'_, D, T>,
    work: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    match D::host_view(view) {
        Some(slice) => work(slice),
        None => work(&downloaded(queue, view)?),
    }
}

/// As [`with_host`]; what `work` leaves becomes the view's content.
fn with_host_mut<D: Device, T: Element>(
    queue: &D,
    mut view: ViewMut<'_, D, T>,
    work: impl FnOnce(&mut [T]) -> Result<()>,
) -> Result<()> {
    if let Some(slice) = D::host_view_mut(view.reborrow()) {
        return work(slice);
    }
    let mut host = downloaded(queue, view.as_view())?;
    work(&mut host)?;
    queue.upload(&host, view);
    Ok(())
}

impl<D: Device> Communicator<D> for HostCommunicator {
    fn rank(&self) -> usize {
        HostCommunicator::rank(self)
    }

    fn members(&self) -> &[Rank] {
        HostCommunicator::members(self)
    }

    fn name(&self) -> &str {
        HostCommunicator::name(self)
    }

    fn context(&self) -> &Context {
        HostCommunicator::context(self)
    }

    fn all_to_all<T: Element>(&self, queue: &D, send: View<'_, D, T>, recv: ViewMut<'_, D, T>) -> Result<D::Event> {
        let size = self.group.members.len();
        assert!(
            send.len() == recv.len() && send.len().is_multiple_of(size),
            "all_to_all over {size} ranks: send {}, receive {} elements",
            send.len(),
            recv.len()
        );
        let mut call = self.begin(Collective::AllToAll)?;
        if self.is_alone() {
            queue.copy(send, recv);
            return Ok(queue.record());
        }
        with_host(queue, send, |send| {
            let block = T::as_bytes(send).len() / size;
            let at = |peer| peer * block..(peer + 1) * block;
            with_host_mut(queue, recv, |recv| {
                algorithms::personalised(&mut call, T::as_bytes(send), at, T::as_bytes_mut(recv), at)
            })
        })?;
        Ok(queue.record())
    }

    fn all_to_all_v<T: Element>(
        &self,
        queue: &D,
        width: usize,
        (send, send_rows): (View<'_, D, T>, &[Range<usize>]),
        (recv, recv_rows): (ViewMut<'_, D, T>, &[Range<usize>]),
    ) -> Result<D::Event> {
        let size = self.group.members.len();
        assert!(
            width > 0 && send_rows.len() == size && recv_rows.len() == size,
            "all_to_all_v over {size} ranks: width {width}, {} send and {} receive ranges",
            send_rows.len(),
            recv_rows.len()
        );
        with_host(queue, send, |send| {
            with_host_mut(queue, recv, |recv| self.all_to_all_v_slices(width, (send, send_rows), (recv, recv_rows)))
        })?;
        Ok(queue.record())
    }

    fn all_reduce<T: Reducible>(&self, queue: &D, buffer: ViewMut<'_, D, T>, op: ReduceOp) -> Result<D::Event> {
        let mut call = self.begin(Collective::AllReduce)?;
        if !self.is_alone() {
            with_host_mut(queue, buffer, |buffer| algorithms::all_reduce(&mut call, op, buffer))?;
        }
        Ok(queue.record())
    }

    fn reduce_scatter<T: Reducible>(
        &self,
        queue: &D,
        send: View<'_, D, T>,
        recv: ViewMut<'_, D, T>,
        op: ReduceOp,
    ) -> Result<D::Event> {
        let size = self.group.members.len();
        assert_eq!(send.len(), recv.len() * size, "reduce_scatter over {size} ranks: elements of send, and due");
        let mut call = self.begin(Collective::ReduceScatter)?;
        if self.is_alone() {
            queue.copy(send, recv);
            return Ok(queue.record());
        }
        with_host(queue, send, |send| {
            with_host_mut(queue, recv, |recv| algorithms::reduce_scatter(&mut call, op, send, recv))
        })?;
        Ok(queue.record())
    }

    fn all_gather<T: Element>(&self, queue: &D, send: View<'_, D, T>, recv: ViewMut<'_, D, T>) -> Result<D::Event> {
        let size = self.group.members.len();
        assert_eq!(recv.len(), send.len() * size, "all_gather over {size} ranks: elements of recv, and due");
        let mut call = self.begin(Collective::AllGather)?;
        if self.is_alone() {
            queue.copy(send, recv);
            return Ok(queue.record());
        }
        with_host(queue, send, |mine| {
            with_host_mut(queue, recv, |all| algorithms::all_gather(&mut call, T::as_bytes(mine), T::as_bytes_mut(all)))
        })?;
        Ok(queue.record())
    }

    fn broadcast<T: Element>(&self, queue: &D, buffer: ViewMut<'_, D, T>, root: usize) -> Result<D::Event> {
        assert!(root < self.group.members.len(), "root {root} of {} ranks", self.group.members.len());
        let mut call = self.begin(Collective::Broadcast)?;
        if !self.is_alone() {
            with_host_mut(queue, buffer, |buffer| algorithms::broadcast(&mut call, T::as_bytes_mut(buffer), root))?;
        }
        Ok(queue.record())
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        HostCommunicator::all_gather_bytes(self, mine)
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        HostCommunicator::broadcast_bytes(self, bytes, root)
    }

    fn barrier(&self) -> Result<()> {
        HostCommunicator::barrier(self)
    }

    fn sent_bytes(&self) -> Vec<(&'static str, u64)> {
        HostCommunicator::sent_bytes(self)
    }

    fn staging_bytes(&self) -> u64 {
        HostCommunicator::staging_bytes(self)
    }

    fn split(&self, name: &str, color: usize, key: usize) -> Result<Self> {
        HostCommunicator::split(self, name, color, key)
    }
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
