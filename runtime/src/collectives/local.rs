//! Ranks as threads of one process: how tests, laptops and a single rank run.
//!
//! Owns the mailboxes between the threads, and what becomes of the others when one panics or leaves. It never computes.
//!
//! A message is handed over, not copied: the receiver reads the sender's memory and lets go of it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use super::exchange::{Worker, lock};
use super::post::{Letter, Posts};
use super::transport::{Parcel, Pool, Tag, Ticket, Transport, TransportError};
use super::{Context, DEFAULT_DEADLINE, HostCommunicator};
use crate::topology::Rank;

/// A world of one rank, whose collectives are copies.
pub fn solo(context: Context) -> HostCommunicator {
    let mut world = world([context]);
    // One context makes one rank.
    world.swap_remove(0)
}

/// Runs `body` on `size` threads, each with its rank of one world, and returns what they return in rank order.
///
/// A rank that panics aborts the others' waits, and then its panic is the caller's. A rank that returns early is a lost peer
/// to those that wait for it.
pub fn run<R: Send>(size: usize, body: impl Fn(HostCommunicator) -> R + Sync) -> Vec<R> {
    run_with(size, DEFAULT_DEADLINE, body)
}

/// [`run`] with another deadline. Each rank has a context of its own, as processes would.
pub fn run_with<R: Send>(size: usize, deadline: Duration, body: impl Fn(HostCommunicator) -> R + Sync) -> Vec<R> {
    let contexts = (0..size).map(|_| Context::new(deadline));
    let hub = Hub::new(contexts.collect());
    let results = std::thread::scope(|scope| {
        let (hub, body) = (&hub, &body);
        let threads = (0..size).map(|rank| {
            let thread = scope.spawn(move || {
                let communicator = Hub::join(hub, rank);
                let result = catch_unwind(AssertUnwindSafe(|| body(communicator)));
                if result.is_err() {
                    hub.panicked(rank);
                }
                result
            });
            (rank, thread)
        });
        let threads = threads.collect::<Vec<_>>();
        threads.into_iter().map(|(rank, thread)| (rank, thread.join().and_then(|result| result))).collect::<Vec<_>>()
    });
    let mut values = Vec::with_capacity(size);
    let mut panics = Vec::new();
    for (rank, result) in results {
        match result {
            Ok(value) => values.push(value),
            Err(panic) => panics.push((rank, panic)),
        }
    }
    // The first panic is the cause; the others are mostly tests that did not like being aborted.
    let first = hub.first_panic.get().copied();
    if let Some(index) = panics.iter().position(|(rank, _)| Some(*rank) == first) {
        resume_unwind(panics.swap_remove(index).1);
    }
    values
}

/// One world with a rank for each context, for callers that manage their own threads.
pub fn world(contexts: impl IntoIterator<Item = Context>) -> Vec<HostCommunicator> {
    let hub = Hub::new(contexts.into_iter().collect());
    (0..hub.contexts.len()).map(|rank| Hub::join(&hub, rank)).collect()
}

/// What the ranks of one world share.
struct Hub {
    contexts: Vec<Context>,
    /// What was sent to each rank and not received yet, in order.
    boxes: Vec<Mutex<Vec<Letter>>>,
    /// Whether each rank has left; set after its last letter.
    gone: Vec<AtomicBool>,
    first_panic: OnceLock<usize>,
}

impl Hub {
    fn new(contexts: Vec<Context>) -> Arc<Self> {
        let boxes = contexts.iter().map(|_| Mutex::default()).collect();
        let gone = contexts.iter().map(|_| AtomicBool::new(false)).collect();
        Arc::new(Self { contexts, boxes, gone, first_panic: OnceLock::new() })
    }

    fn join(hub: &Arc<Self>, rank: usize) -> HostCommunicator {
        let mailbox = Mailbox { hub: Arc::clone(hub), rank, posts: Posts::default() };
        let worker = Worker::new(Box::new(mailbox), hub.contexts[rank].clone());
        HostCommunicator::world(Arc::new(worker), rank, hub.contexts.len())
    }

    fn panicked(&self, rank: usize) {
        if self.first_panic.set(rank).is_ok() {
            for context in &self.contexts {
                context.abort_handle().abort(Some(Rank(rank)), "its thread panicked");
            }
        }
    }
}

/// One rank's end of the hub.
struct Mailbox {
    hub: Arc<Hub>,
    rank: usize,
    posts: Posts,
}

impl Transport for Mailbox {
    fn send(&mut self, to: usize, tag: Tag, parcel: Arc<Parcel>) -> Result<Ticket, TransportError> {
        lock(&self.hub.boxes[to]).push(Letter { from: self.rank, tag: tag.value(), parcel: Arc::clone(&parcel) });
        Ok(self.posts.sent(parcel))
    }

    fn receive(&mut self, from: usize, tag: Tag, _: usize, _: &mut Pool) -> Result<Ticket, TransportError> {
        Ok(self.posts.awaited(from, tag))
    }

    fn poll(&mut self, ticket: Ticket) -> Result<Option<Arc<Parcel>>, TransportError> {
        let gone = |from: usize| self.hub.gone[from].load(Ordering::Acquire);
        self.posts.poll(ticket, &self.hub.boxes[self.rank], |from| gone(from).then(|| "its thread has ended".into()))
    }

    fn abandon(&mut self, ticket: Ticket) {
        self.posts.abandon(ticket);
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // In this order: whoever sees that this rank is gone also sees why.
        if std::thread::panicking() {
            self.hub.panicked(self.rank);
        }
        self.hub.gone[self.rank].store(true, Ordering::Release);
    }
}
