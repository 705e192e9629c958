//! One collective under way on one group: posting messages, waiting for them with patience, giving up in order.
//!
//! Owns the state of a group on this rank and every wait in it. It never looks into a message; `algorithms` decides who sends
//! what to whom.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::context::Patience;
use super::transport::{Parcel, Pool, Tag, Ticket, Transport, TransportError};
use super::{CollectiveError, Context};
use crate::topology::Rank;

/// The collectives, as errors and tags name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Collective {
    AllToAll,
    AllToAllV,
    AllReduce,
    ReduceScatter,
    AllGather,
    AllGatherBytes,
    Broadcast,
    BroadcastBytes,
    Barrier,
    Split,
}

impl Collective {
    pub(super) const ALL: [Self; 10] = [
        Self::AllToAll,
        Self::AllToAllV,
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::AllGatherBytes,
        Self::Broadcast,
        Self::BroadcastBytes,
        Self::Barrier,
        Self::Split,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::AllToAll => "all_to_all",
            Self::AllToAllV => "all_to_all_v",
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::AllGatherBytes => "all_gather_bytes",
            Self::Broadcast => "broadcast",
            Self::BroadcastBytes => "broadcast_bytes",
            Self::Barrier => "barrier",
            Self::Split => "split",
        }
    }
}

/// A lock that a panic elsewhere does not take away: every state it guards is valid between calls.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all groups of a worker share.
pub(super) struct Worker {
    pub(super) engine: Mutex<Engine>,
    pub(super) context: Context,
    /// The lowest group number this worker has not used.
    pub(super) next_group: AtomicU32,
}

impl Worker {
    pub(super) fn new(transport: Box<dyn Transport>, context: Context) -> Self {
        let engine = Mutex::new(Engine { transport, pool: Pool::default() });
        Self { engine, context, next_group: AtomicU32::new(1) }
    }
}

/// The transport and the memory of its messages.
pub(super) struct Engine {
    pub(super) transport: Box<dyn Transport>,
    pub(super) pool: Pool,
}

/// A group on this rank.
pub(super) struct Group {
    pub(super) worker: Arc<Worker>,
    /// Number that no other group with two of these members has.
    pub(super) id: u32,
    pub(super) name: Arc<str>,
    pub(super) members: Vec<Rank>,
    pub(super) rank: usize,
    /// Bytes this rank has sent to others, by collective.
    sent: [AtomicU64; Collective::ALL.len()],
    state: Mutex<State>,
}

/// What a group keeps between collectives: its place in the order of rounds, its failure, and vectors to be used again.
struct State {
    round: u32,
    broken: Option<CollectiveError>,
    flights: Vec<Flight>,
    arrived: Vec<Option<Arc<Parcel>>>,
    sent: Vec<Arc<Parcel>>,
}

/// One message under way.
struct Flight {
    peer: usize,
    ticket: Ticket,
    /// Bytes expected of a receive; none for a send.
    expected: Option<usize>,
}

impl Group {
    pub(super) fn new(worker: Arc<Worker>, id: u32, name: &str, members: Vec<Rank>, rank: usize) -> Self {
        let arrived = members.iter().map(|_| None).collect();
        let state = State { round: 0, broken: None, flights: Vec::new(), arrived, sent: Vec::new() };
        Self { worker, id, name: name.into(), members, rank, sent: Default::default(), state: Mutex::new(state) }
    }

    /// Bytes this rank has sent to others so far: (collective, bytes), of those that sent any.
    pub(super) fn sent_bytes(&self) -> Vec<(&'static str, u64)> {
        let counted = Collective::ALL.into_iter().zip(&self.sent);
        counted
            .map(|(which, sent)| (which.name(), sent.load(Ordering::Relaxed)))
            .filter(|(_, sent)| *sent > 0)
            .collect()
    }

    /// Begins a collective; another one on the same group has to wait for its end.
    pub(super) fn begin(&self, collective: Collective) -> Result<Call<'_>, CollectiveError> {
        let state = lock(&self.state);
        if let Some(broken) = &state.broken {
            return Err(broken.clone());
        }
        let context = &self.worker.context;
        let mut call = Call {
            group: self,
            collective,
            began: Instant::now(),
            deadline: context.deadline(),
            step: context.step(),
            state,
        };
        call.state.round = call.state.round.wrapping_add(1);
        match context.aborted() {
            Some(aborted) => Err(call.fail(aborted)),
            None => Ok(call),
        }
    }
}

/// A collective under way. Dropping it ends it: messages still under way are abandoned.
pub(super) struct Call<'g> {
    group: &'g Group,
    collective: Collective,
    began: Instant,
    deadline: Duration,
    step: u64,
    state: MutexGuard<'g, State>,
}

impl Call<'_> {
    pub(super) fn rank(&self) -> usize {
        self.group.rank
    }

    pub(super) fn size(&self) -> usize {
        self.group.members.len()
    }

    /// The other ranks of the group, beginning with the next one, so that not all ranks start with the same.
    pub(super) fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank(), self.size());
        (1..size).map(move |distance| (rank + distance) % size)
    }

    /// Posts a receive of exactly `len` bytes from `peer`, one a peer and wait.
    pub(super) fn receive(&mut self, peer: usize, len: usize) -> Result<(), CollectiveError> {
        let (from, tag) = (self.group.members[peer].0, self.tag());
        let Engine { transport, pool } = &mut *lock(&self.group.worker.engine);
        match transport.receive(from, tag, len, pool) {
            Ok(ticket) => self.state.flights.push(Flight { peer, ticket, expected: Some(len) }),
            Err(error) => return Err(self.failed_with(peer, Some(len), error)),
        }
        Ok(())
    }

    /// Sends a copy of `bytes` to each of `peers`.
    pub(super) fn send(&mut self, peers: impl IntoIterator<Item = usize>, bytes: &[u8]) -> Result<(), CollectiveError> {
        let mut peers = peers.into_iter().peekable();
        if peers.peek().is_none() {
            return Ok(());
        }
        let tag = self.tag();
        let mut parcel = lock(&self.group.worker.engine).pool.take(bytes.len());
        Arc::make_mut(&mut parcel).bytes_mut().copy_from_slice(bytes);
        for peer in peers {
            let to = self.group.members[peer].0;
            let sent = lock(&self.group.worker.engine).transport.send(to, tag, Arc::clone(&parcel));
            match sent {
                Ok(ticket) => {
                    self.group.sent[self.collective as usize].fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    self.state.flights.push(Flight { peer, ticket, expected: None });
                }
                Err(error) => return Err(self.failed_with(peer, None, error)),
            }
        }
        self.state.sent.push(parcel);
        Ok(())
    }

    /// What came from `peer` in the last wait.
    pub(super) fn arrived(&self, peer: usize) -> &[u8] {
        self.state.arrived[peer].as_deref().map_or(&[], Parcel::bytes)
    }

    /// Messages posted from now on belong to the next round, so that they cannot be taken for those of this one.
    pub(super) fn next_round(&mut self) {
        self.state.round = self.state.round.wrapping_add(1);
    }

    /// Waits until everything posted has been carried. What arrived before is forgotten.
    pub(super) fn wait(&mut self) -> Result<(), CollectiveError> {
        self.clear_arrived();
        let mut patience = Patience::new();
        while !self.state.flights.is_empty() {
            if let Some(aborted) = self.group.worker.context.aborted() {
                return Err(self.fail(aborted));
            }
            if self.poll_all()? {
                patience.progressed();
                continue;
            }
            let waited = self.began.elapsed();
            if waited >= self.deadline {
                let timeout = self.timeout(waited);
                return Err(self.fail(timeout));
            }
            patience.pause();
        }
        self.return_sent();
        Ok(())
    }

    /// Looks at each message once; whether any has been carried.
    fn poll_all(&mut self) -> Result<bool, CollectiveError> {
        let group = self.group;
        let state = &mut *self.state;
        let mut engine = lock(&group.worker.engine);
        let before = state.flights.len();
        let mut index = 0;
        while index < state.flights.len() {
            let Flight { peer, ticket, expected } = state.flights[index];
            let wrong = match engine.transport.poll(ticket) {
                Ok(None) => {
                    index += 1;
                    continue;
                }
                Ok(Some(parcel)) => {
                    state.flights.swap_remove(index);
                    let Some(expected_bytes) = expected else { continue };
                    let sent = parcel.bytes().len();
                    state.arrived[peer] = Some(parcel);
                    if sent == expected_bytes {
                        continue;
                    }
                    self.disagreement(peer, expected_bytes, Some(sent))
                }
                Err(error) => {
                    state.flights.swap_remove(index);
                    self.explain(peer, expected, error)
                }
            };
            drop(engine);
            return Err(self.fail(wrong));
        }
        Ok(state.flights.len() < before)
    }

    /// Ends the collective and the group with `error`.
    pub(super) fn fail(&mut self, error: CollectiveError) -> CollectiveError {
        self.state.broken = Some(error.clone());
        error
    }

    /// The error for `ranges` that do not fit a buffer of `rows` rows.
    pub(super) fn bad_rows(&mut self, what: &'static str, ranges: &[Range<usize>], rows: usize) -> CollectiveError {
        let (collective, group, step) = self.place();
        self.fail(CollectiveError::Rows { collective, group, step, what, ranges: ranges.to_vec(), rows })
    }

    fn failed_with(&mut self, peer: usize, expected: Option<usize>, error: TransportError) -> CollectiveError {
        let error = self.explain(peer, expected, error);
        self.fail(error)
    }

    fn explain(&self, peer: usize, expected: Option<usize>, error: TransportError) -> CollectiveError {
        // A rank that pulls down the others says why before it leaves, and why is worth more than that.
        if let Some(aborted) = self.group.worker.context.aborted() {
            return aborted;
        }
        let (collective, group, step) = self.place();
        match error {
            TransportError::Lost(reason) => {
                CollectiveError::PeerLost { collective, group, step, rank: self.group.members[peer], reason }
            }
            TransportError::TooLong => self.disagreement(peer, expected.unwrap_or(0), None),
            TransportError::Failed(text) => {
                let rank = self.group.members[peer];
                CollectiveError::Mpi(format!(
                    "{collective} at step {step} in the {group} group, message with rank {rank}: {text}"
                ))
            }
        }
    }

    fn disagreement(&self, peer: usize, expected_bytes: usize, sent_bytes: Option<usize>) -> CollectiveError {
        let (collective, group, step) = self.place();
        let rank = self.group.members[peer];
        CollectiveError::Disagreement { collective, group, step, rank, expected_bytes, sent_bytes }
    }

    /// Names the ranks whose messages are missing; where all have come, those that do not take ours.
    fn timeout(&self, waited: Duration) -> CollectiveError {
        let (collective, group, step) = self.place();
        let ranks = |silent: bool| {
            let flights = self.state.flights.iter().filter(|flight| flight.expected.is_some() == silent);
            flights.map(|flight| self.group.members[flight.peer]).collect::<Vec<_>>()
        };
        let mut missing = ranks(true);
        if missing.is_empty() {
            missing = ranks(false);
        }
        missing.sort_unstable();
        missing.dedup();
        CollectiveError::Timeout { collective, group, step, waited, missing }
    }

    fn place(&self) -> (&'static str, String, u64) {
        (self.collective.name(), self.group.name.to_string(), self.step)
    }

    fn tag(&self) -> Tag {
        Tag::new(self.group.id, self.state.round, self.collective as u32)
    }

    fn clear_arrived(&mut self) {
        let pool = &mut lock(&self.group.worker.engine).pool;
        for parcel in self.state.arrived.iter_mut().filter_map(Option::take) {
            pool.put_back_arrived(parcel);
        }
    }

    fn return_sent(&mut self) {
        let pool = &mut lock(&self.group.worker.engine).pool;
        for parcel in self.state.sent.drain(..) {
            pool.put_back(parcel);
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let flights = std::mem::take(&mut self.state.flights);
        if !flights.is_empty() {
            let transport = &mut lock(&self.group.worker.engine).transport;
            for flight in &flights {
                transport.abandon(flight.ticket);
            }
            // Left early without an error: by a panic. The peers are waiting for what will not come.
            if self.state.broken.is_none() {
                let aborted = CollectiveError::Aborted { culprit: None, reason: "a collective panicked".into() };
                self.state.broken = Some(aborted);
            }
        }
        // An empty vector with its capacity goes back for the next collective.
        self.state.flights = flights;
        self.state.flights.clear();
        self.clear_arrived();
        if self.state.broken.is_some() { self.state.sent.clear() } else { self.return_sent() }
    }
}
