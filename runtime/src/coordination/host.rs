//! The state machine in its surroundings: feeds it events with the time, and delivers what it decides.
//!
//! Owns the open session streams and the callers that wait at barriers. It takes no decision and awaits nothing: everything
//! happens under one short lock.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use moe_proto::v1;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::event::{Action, BarrierFailure, Epoch, Event, Phase, Refusal, SessionId};
use super::job::JobSpec;
use super::state::State;
use super::wire;

/// Commands that may wait in a stream. A worker that does not read more than this is cut off and told again when it returns.
const STREAM_DEPTH: usize = 32;

/// What a session stream carries down.
pub(super) type Down = Result<v1::CoordinatorMessage, Status>;

/// A barrier's name, its generation and a rank that waits at it.
type Waiting = (String, u64, u32);
/// Who hears how a barrier ended; several callers when a rank asked again over a new connection.
type Callers = Vec<oneshot::Sender<Met>>;
/// How a barrier ended for a rank: with what each rank brought.
pub(super) type Met = Result<Arc<[Vec<u8>]>, BarrierFailure>;

/// The coordinator's shared state.
pub(super) struct Shared {
    host: Mutex<Host>,
    over: Condvar,
}

/// See the module.
pub(super) struct Host {
    state: State,
    started: Instant,
    sessions: HashMap<u32, (SessionId, mpsc::Sender<Down>)>,
    sessions_opened: u64,
    waiters: HashMap<Waiting, Callers>,
}

impl Shared {
    pub(super) fn new(spec: JobSpec) -> Self {
        let host = Host {
            state: State::new(spec, Duration::ZERO),
            started: Instant::now(),
            sessions: HashMap::new(),
            sessions_opened: 0,
            waiters: HashMap::new(),
        };
        Self { host: Mutex::new(host), over: Condvar::new() }
    }

    /// The host, for one short look or change. A panic under the lock leaves values that are still consistent one by one.
    pub(super) fn lock(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an event and delivers what follows. Returns the answers to the sender, or the refusal.
    pub(super) fn apply(&self, event: Event) -> Result<Vec<Action>, Refusal> {
        let mut host = self.lock();
        let actions = host.step(event)?;
        let answers = host.deliver(actions);
        if host.state.is_over() {
            self.over.notify_all();
        }
        Ok(answers)
    }

    /// Waits until the job is over, at most `timeout`. Returns whether it is.
    pub(super) fn wait_over(&self, timeout: Duration) -> bool {
        let waiting = self.over.wait_timeout_while(self.lock(), timeout, |host| !host.state.is_over());
        let (host, _) = waiting.unwrap_or_else(PoisonError::into_inner);
        host.state.is_over()
    }
}

impl Host {
    pub(super) fn state(&self) -> &State {
        &self.state
    }

    /// Time since the coordinator started.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn peers(&self) -> Vec<v1::Peer> {
        self.state.workers().map(wire::peer).collect()
    }

    /// Opens a session for a registered worker and sends what it missed.
    pub(super) fn open_session(
        &mut self,
        rank: u32,
        epoch: Epoch,
        instance: u64,
    ) -> Result<(SessionId, mpsc::Receiver<Down>), Refusal> {
        self.sessions_opened += 1;
        let session = SessionId(self.sessions_opened);
        let missed = self.step(Event::Attached { rank, epoch, instance, session })?;
        let (sender, receiver) = mpsc::channel(STREAM_DEPTH);
        self.sessions.insert(rank, (session, sender));
        self.deliver(missed);
        Ok((session, receiver))
    }

    /// Ends a session's stream, with a status if there is one to tell. A session that was replaced is left alone.
    pub(super) fn close_session(&mut self, rank: u32, session: SessionId, status: Option<Status>) {
        if self.sessions.get(&rank).is_some_and(|(open, _)| *open == session)
            && let Some((_, sender)) = self.sessions.remove(&rank)
            && let Some(status) = status
        {
            // A full stream belongs to a worker that does not read; its stream ends without the reason.
            let _ = sender.try_send(Err(status));
        }
    }

    /// Ends all streams and fails all waiters: the coordinator stops.
    pub(super) fn close_all(&mut self) {
        self.sessions.clear();
        self.waiters.clear();
    }

    /// Enters a barrier; the receiver hears when it opens or fails.
    pub(super) fn enter_barrier(&mut self, request: v1::BarrierRequest) -> Result<oneshot::Receiver<Met>, Refusal> {
        let v1::BarrierRequest { epoch, rank, name, generation, timeout_ms, payload } = request;
        let actions = self.step(Event::BarrierArrived {
            rank,
            epoch: Epoch(epoch),
            name: name.clone(),
            generation,
            timeout: Duration::from_millis(timeout_ms.into()),
            payload,
        })?;
        let (sender, receiver) = oneshot::channel();
        self.waiters.entry((name, generation, rank)).or_default().push(sender);
        self.deliver(actions);
        Ok(receiver)
    }

    fn step(&mut self, event: Event) -> Result<Vec<Action>, Refusal> {
        let now = self.now();
        let mut actions = self.state.step(event, now);
        match actions.pop() {
            Some(Action::Refused(refusal)) => {
                tracing::debug!(%refusal, "refused");
                Err(refusal)
            }
            last => {
                actions.extend(last);
                Ok(actions)
            }
        }
    }

    fn deliver(&mut self, actions: Vec<Action>) -> Vec<Action> {
        let epoch = self.state.spec().epoch;
        let mut answers = Vec::new();
        for action in actions {
            match action {
                Action::Send { rank, command } => {
                    let Some((_, sender)) = self.sessions.get(&rank) else { continue };
                    let message = wire::command(epoch, command, || self.peers());
                    if sender.try_send(Ok(message)).is_err() {
                        self.sessions.remove(&rank);
                    }
                }
                Action::BarrierPassed { name, generation, rank, payloads } => {
                    self.release(&(name, generation, rank), &Ok(payloads));
                }
                Action::BarrierFailed { name, generation, rank, why } => {
                    self.release(&(name, generation, rank), &Err(why));
                }
                Action::PhaseChanged { from, to: to @ Phase::Aborted, reason } => {
                    tracing::info!(%epoch, %from, %to, reason, "the job was given up");
                }
                Action::PhaseChanged { from, to, reason } => {
                    tracing::debug!(%epoch, %from, %to, reason, "phase changed")
                }
                answer @ (Action::Registered { .. } | Action::CheckpointOrdered { .. } | Action::Refused(_)) => {
                    answers.push(answer);
                }
            }
        }
        answers
    }

    fn release(&mut self, key: &Waiting, answer: &Met) {
        for waiter in self.waiters.remove(key).unwrap_or_default() {
            // A caller that gave up meanwhile hears nothing.
            let _ = waiter.send(answer.clone());
        }
    }
}
