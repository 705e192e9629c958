//! A worker's session with the coordinator, for code that trains and does not wait.
//!
//! Owns the thread that keeps the lease while the caller computes. Nothing here blocks the training thread but [`Session::join`],
//! [`Session::barrier`], [`Session::gather`] and [`Session::leave`], each with a bound.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedSender, WeakUnboundedSender};

use super::error::CoordinationError;
use super::event::{Epoch, ErrorReport, Progress};
use super::job::Grid;
use super::link::{self, Ask, Shared};
use super::token::JoinToken;

/// What answers to the training thread may take beyond the deadline it gave.
const MARGIN: Duration = Duration::from_secs(1);
/// How long the thread may take to end once it was told.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// Called once, from the session's thread, when the epoch is over: break what waits for peers and return soon.
pub type OnAbort = Box<dyn Fn(Abort) + Send + Sync>;

/// What a worker says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its rank.
    pub rank: u32,
    /// Ranks of the job, as it was launched.
    pub world_size: u32,
    /// Name of its machine.
    pub host: String,
    /// Its process id.
    pub pid: u32,
    /// Version of the program.
    pub version: String,
    /// Hash of its resolved configuration.
    pub config_fingerprint: String,
}

impl Identity {
    /// The identity of this process, with the version of this library.
    pub fn of_this_process(rank: u32, world_size: u32, config_fingerprint: String) -> Self {
        // A name for messages; nothing is looked up by it.
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "unknown".to_owned() } else { host.trim().to_owned() };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { rank, world_size, host, pid: std::process::id(), version, config_fingerprint }
    }
}

/// What [`Session::join`] needs.
pub struct SessionConfig {
    /// `HOST:PORT` of the coordinator.
    pub addr: String,
    /// The join token.
    pub token: JoinToken,
    /// Who asks.
    pub identity: Identity,
    /// How long to try to reach the coordinator: it may start later than its workers.
    pub connect_timeout: Duration,
    /// See [`OnAbort`].
    pub on_abort: OnAbort,
}

impl fmt::Debug for SessionConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionConfig")
            .field("addr", &self.addr)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Why the epoch is over for this worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abort {
    /// The epoch.
    pub epoch: Epoch,
    /// The rank to blame, if one is.
    pub culprit: Option<u32>,
    /// What happened, for people.
    pub reason: String,
    /// Who says so.
    pub kind: AbortKind,
}

/// Who gave the epoch up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbortKind {
    /// The coordinator ordered it.
    Ordered,
    /// The coordinator itself could not be reached for a whole lease, or no longer knows this worker.
    CoordinatorLost,
}

impl fmt::Display for Abort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, self.culprit) {
            (AbortKind::Ordered, Some(rank)) => {
                write!(f, "epoch {} was aborted because of rank {rank}: {}", self.epoch, self.reason)
            }
            (AbortKind::Ordered, None) => write!(f, "epoch {} was aborted: {}", self.epoch, self.reason),
            (AbortKind::CoordinatorLost, _) => {
                write!(f, "the coordinator was lost in epoch {}: {}", self.epoch, self.reason)
            }
        }
    }
}

/// What the training loop is asked to do after its current step.
///
/// An order reaches ranks at different moments: ranks must agree on the step at which they follow it (with the step's all-reduce
/// of the token count, say), or some will wait for a collective the others never enter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Save, leave with exit code 75.
    Drain {
        /// Who asked and why.
        reason: String,
    },
    /// Save and go on.
    Checkpoint {
        /// Number of the order within the epoch.
        order: u64,
        /// Who asked and why.
        reason: String,
    },
}

/// A process of the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its rank.
    pub rank: u32,
    /// Its machine.
    pub host: String,
    /// Its process id.
    pub pid: u32,
}

/// What a worker knows of the job once all ranks are there.
#[derive(Debug, Clone)]
pub(super) struct Membership {
    pub(super) epoch: Epoch,
    pub(super) grid: Grid,
    pub(super) peers: Vec<Peer>,
}

/// A worker's place in a running job. Dropping it without [`Session::leave`] breaks the connection, and when the lease has run out
/// the coordinator aborts the epoch and names this rank: that is what a crash should do.
#[derive(Debug)]
pub struct Session {
    addr: String,
    rank: u32,
    membership: Membership,
    shared: Arc<Shared>,
    asks: Option<UnboundedSender<Ask>>,
    generations: Mutex<HashMap<String, u64>>,
    ended: Mutex<mpsc::Receiver<bool>>,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Takes the worker's rank and waits until all ranks have. The coordinator bounds the wait by its forming deadline; if it is lost
    /// meanwhile, the lease does.
    ///
    /// Errors: [`CoordinationError::Unreachable`] when nobody answers within `connect_timeout`; `Unauthenticated`; `Refused` when the
    /// worker does not fit the job; `Precondition` for another epoch; `Aborted` when the job did not form.
    pub fn join(config: SessionConfig) -> Result<Self, CoordinationError> {
        let SessionConfig { addr, token, identity, connect_timeout, on_abort } = config;
        let rank = identity.rank;
        let start = |error: std::io::Error| CoordinationError::Start {
            what: format!("the session of rank {rank} with {addr}"),
            reason: error.to_string(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(start)?;
        let shared = Arc::new(Shared::new(on_abort));
        let (asks, asked) = tokio::sync::mpsc::unbounded_channel();
        let (joined, joining) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let worker = link::Worker { addr: addr.clone(), token, identity, instance: rand::random(), connect_timeout };
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(format!("session-{rank}")).spawn(move || {
            let left = runtime.block_on(link::run(worker, for_thread, asked, joined));
            // Not waiting for a name look-up that may still hang.
            runtime.shutdown_background();
            let _ = end.send(left);
        });
        let thread = thread.map_err(start)?;
        // The thread answers or ends; both end this wait.
        let membership = joining.recv().unwrap_or_else(|_| {
            let what = "the session ended before it began".to_owned();
            Err(CoordinationError::Protocol { addr: addr.clone(), what })
        })?;
        Ok(Self {
            addr,
            rank,
            membership,
            shared,
            asks: Some(asks),
            generations: Mutex::default(),
            ended: Mutex::new(ended),
            thread: Some(thread),
        })
    }

    /// This worker's rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// The epoch of the lease.
    pub fn epoch(&self) -> Epoch {
        self.membership.epoch
    }

    /// The grid as the coordinator fixed it.
    pub fn grid(&self) -> &Grid {
        &self.membership.grid
    }

    /// All processes of the job, by ascending rank.
    pub fn peers(&self) -> &[Peer] {
        &self.membership.peers
    }

    /// Tells how far this worker is. The latest wins: what was not sent yet is replaced. Never blocks on the network.
    pub fn progress(&self, progress: Progress) {
        self.shared.set_progress(progress);
    }

    /// Orders that came since the last call, oldest first. Returns at once.
    pub fn commands(&self) -> Vec<Order> {
        self.shared.take_orders()
    }

    /// Why the epoch is over, if it is.
    pub fn aborted(&self) -> Option<Abort> {
        self.shared.aborted()
    }

    /// Reports that this worker cannot go on; the coordinator will abort the epoch. Returns at once; the report is sent again if the
    /// connection breaks, and is on its way before a following [`Session::leave`].
    pub fn report_error(&self, report: ErrorReport) {
        self.ask(Ask::Report(report));
    }

    /// Reports from other threads. It does not keep the session alive.
    pub fn reporter(&self) -> Reporter {
        Reporter(self.asks.as_ref().map(UnboundedSender::downgrade))
    }

    /// Waits until every rank has entered the barrier of this name, at most `timeout`. A name may be used again: the n-th call
    /// meets the n-th call of the others. After a timeout the same meeting may be tried again.
    ///
    /// Errors: [`CoordinationError::BarrierTimeout`] naming the missing ranks; `Aborted` when the epoch ends meanwhile.
    pub fn barrier(&self, name: &str, timeout: Duration) -> Result<(), CoordinationError> {
        self.gather(name, Vec::new(), timeout).map(drop)
    }

    /// As [`Session::barrier`], and brings `payload`: what each rank brought, by ascending rank. For the little that ranks must know of
    /// each other before they can talk themselves; not more than some hundred bytes.
    ///
    /// # Errors
    /// As there.
    pub fn gather(&self, name: &str, payload: Vec<u8>, timeout: Duration) -> Result<Vec<Vec<u8>>, CoordinationError> {
        let generation = {
            let generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
            generations.get(name).map_or(1, |passed| passed + 1)
        };
        let (answer, answered) = mpsc::channel();
        self.ask(Ask::Barrier { name: name.to_owned(), generation, timeout, payload, answer });
        let outcome = match answered.recv_timeout(timeout.saturating_add(MARGIN)) {
            Ok(outcome) => outcome,
            Err(_) => Err(match self.aborted() {
                Some(abort) => CoordinationError::Aborted(abort),
                None => {
                    CoordinationError::BarrierTimeout { name: name.to_owned(), waited: timeout, missing: Vec::new() }
                }
            }),
        };
        if outcome.is_ok() {
            let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
            generations.insert(name.to_owned(), generation);
        }
        outcome
    }

    /// Says that this worker ends with `exit_code`, and waits a short while until the coordinator has heard it. 0, and 75 while
    /// draining, are good ends; with any other the coordinator aborts the epoch for the other ranks and names this one.
    ///
    /// Errors: [`CoordinationError::LeaveUnconfirmed`]; the worker can only end all the same.
    pub fn leave(mut self, exit_code: i32) -> Result<(), CoordinationError> {
        self.ask(Ask::Leave { exit_code });
        let waited = link::LEAVE_WAIT + MARGIN;
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let left = ended.recv_timeout(waited).unwrap_or(false);
        if left {
            return Ok(());
        }
        Err(CoordinationError::LeaveUnconfirmed { addr: self.addr.clone(), rank: self.rank, waited })
    }

    fn ask(&self, ask: Ask) {
        if let Some(asks) = &self.asks {
            // Fails only when the thread has ended; what is asked for then goes unanswered, and the wait for it ends at once.
            let _ = asks.send(ask);
        }
    }
}

/// See [`Session::reporter`].
#[derive(Debug, Clone)]
pub struct Reporter(Option<WeakUnboundedSender<Ask>>);

impl Reporter {
    /// As [`Session::report_error`]; after the session's end it does nothing.
    pub fn report_error(&self, report: ErrorReport) {
        if let Some(asks) = self.0.as_ref().and_then(WeakUnboundedSender::upgrade) {
            // Fails only when the session's thread has ended.
            let _ = asks.send(Ask::Report(report));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Without a sender the thread ends.
        drop(self.asks.take());
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let over = !matches!(ended.recv_timeout(STOP_WAIT), Err(mpsc::RecvTimeoutError::Timeout));
        if let Some(thread) = self.thread.take().filter(|_| over) {
            // A panic was printed by its thread.
            let _ = thread.join();
        }
    }
}
