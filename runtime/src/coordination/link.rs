//! The session's thread: keeps the lease, carries news up and orders down, finds the coordinator again when the line breaks.
//!
//! Owns the connection and its retries. It decides one thing: when a coordinator that does not answer is lost.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc};
use std::time::Duration;

use moe_proto::v1;
use moe_proto::v1::coordinator_message::Body as Down;
use moe_proto::v1::worker_message::Body as Up;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::Status;

use super::client::{self, Stub};
use super::dial::{self, Connected, Dial, Line};
use super::error::CoordinationError;
use super::event::{Epoch, ErrorReport, Progress};
use super::session::{Abort, AbortKind, Identity, Membership, OnAbort, Order};
use super::token::JoinToken;
use super::wire;

/// How long a leaving worker waits for the coordinator to end the stream.
pub(super) const LEAVE_WAIT: Duration = Duration::from_secs(2);
/// Keepalive of the connection, and the longest that one attempt to connect may take.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Who this thread speaks for.
pub(super) struct Worker {
    pub(super) addr: String,
    pub(super) token: JoinToken,
    pub(super) identity: Identity,
    pub(super) instance: u64,
    pub(super) connect_timeout: Duration,
}

/// What the training thread asks of this one.
pub(super) enum Ask {
    /// Pass a report on.
    Report(ErrorReport),
    /// Meet the others.
    Barrier {
        name: String,
        generation: u64,
        timeout: Duration,
        payload: Vec<u8>,
        answer: std_mpsc::Sender<Result<Vec<Vec<u8>>, CoordinationError>>,
    },
    /// Say good-bye and end.
    Leave { exit_code: i32 },
}

/// What both threads see.
pub(super) struct Shared {
    progress: Mutex<Option<Progress>>,
    orders: Mutex<Vec<Order>>,
    abort: watch::Sender<Option<Abort>>,
    on_abort: OnAbort,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("abort", &*self.abort.borrow()).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(on_abort: OnAbort) -> Self {
        Self { progress: Mutex::default(), orders: Mutex::default(), abort: watch::Sender::new(None), on_abort }
    }

    pub(super) fn set_progress(&self, progress: Progress) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    }

    pub(super) fn take_orders(&self) -> Vec<Order> {
        std::mem::take(&mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn aborted(&self) -> Option<Abort> {
        self.abort.borrow().clone()
    }

    fn take_progress(&self) -> Option<Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn add_order(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
    }

    /// The epoch is over: tells the training thread, once.
    fn give_up(&self, abort: Abort) {
        if self.abort.borrow().is_none() {
            self.abort.send_replace(Some(abort.clone()));
            (self.on_abort)(abort);
        }
    }
}

/// How one connection ended.
enum End {
    /// The training thread dropped the session, or the good-bye went unheard.
    Dropped,
    /// The coordinator took note that this worker leaves.
    Left,
    /// The line broke.
    Broken,
    /// The coordinator wants no more of this worker.
    Refused(CoordinationError),
}

struct Link {
    worker: Worker,
    shared: Arc<Shared>,
    asks: UnboundedReceiver<Ask>,
    /// Asked for while there was no line.
    backlog: VecDeque<Ask>,
    stub: Stub,
    epoch: Option<Epoch>,
    lease: Duration,
    heartbeat: Duration,
    grid: Option<v1::Grid>,
    /// Sent again on every new line: a repeat does no harm, a lost one might.
    reports: Vec<ErrorReport>,
    last_order: u64,
    draining: bool,
    joined: Option<std_mpsc::Sender<Result<Membership, CoordinationError>>>,
}

/// Runs a session from joining to its end. Returns whether the coordinator took note of the end.
pub(super) async fn run(
    worker: Worker,
    shared: Arc<Shared>,
    asks: UnboundedReceiver<Ask>,
    joined: std_mpsc::Sender<Result<Membership, CoordinationError>>,
) -> bool {
    let stub = match client::stub(&worker.addr, &worker.token, KEEPALIVE) {
        Ok(stub) => stub,
        Err(error) => {
            let _ = joined.send(Err(error));
            return false;
        }
    };
    let mut link = Link {
        worker,
        shared,
        asks,
        backlog: VecDeque::new(),
        stub,
        epoch: None,
        lease: KEEPALIVE,
        heartbeat: KEEPALIVE,
        grid: None,
        reports: Vec::new(),
        last_order: 0,
        draining: false,
        joined: Some(joined),
    };
    link.run().await
}

impl Link {
    async fn run(&mut self) -> bool {
        let mut patience = self.worker.connect_timeout;
        loop {
            let line = match self.reach(patience).await {
                Some(Ok(line)) => line,
                Some(Err(error)) => return self.fail(error).await,
                None => return false,
            };
            match self.talk(line).await {
                End::Dropped => return false,
                End::Left => return true,
                End::Refused(error) => return self.fail(error).await,
                // After an abort there is nothing to come back for.
                End::Broken if self.shared.aborted().is_some() => return self.wait_for_the_end().await,
                End::Broken => {
                    tracing::warn!(rank = self.worker.identity.rank, "lost the coordinator; trying to reach it again");
                    patience = self.lease;
                }
            }
        }
    }

    /// Connects, with asks put aside meanwhile. `None` when the session was dropped.
    async fn reach(&mut self, patience: Duration) -> Option<Result<Line, CoordinationError>> {
        let connecting = dial::connect(self.dial(), patience);
        tokio::pin!(connecting);
        loop {
            tokio::select! {
                outcome = &mut connecting => return Some(outcome.map(|connected| self.adopt(connected))),
                ask = self.asks.recv() => self.backlog.push_back(ask?),
            }
        }
    }

    fn dial(&self) -> Dial {
        let Identity { rank, world_size, host, pid, version, config_fingerprint } = self.worker.identity.clone();
        let (epoch, instance) = (self.epoch.map_or(0, |epoch| epoch.0), self.worker.instance);
        let request = v1::RegisterRequest { epoch, rank, world_size, host, pid, instance, version, config_fingerprint };
        Dial { addr: self.worker.addr.clone(), stub: self.stub.clone(), request }
    }

    fn adopt(&mut self, connected: Connected) -> Line {
        let Connected { lease, membership, line } = connected;
        self.epoch = Some(Epoch(lease.epoch));
        self.lease = Duration::from_millis(lease.lease_duration_ms.into());
        self.heartbeat = Duration::from_millis(lease.heartbeat_interval_ms.max(1).into());
        self.grid = lease.grid;
        if let Some(v1::register_response::Membership::Welcome(welcome)) = membership {
            self.welcome(welcome);
        }
        line
    }

    /// Serves one connection until it ends. A quarter of the heartbeat interval is the pace at which news are looked for.
    async fn talk(&mut self, mut line: Line) -> End {
        let mut pace = tokio::time::interval((self.heartbeat / 4).max(Duration::from_millis(1)));
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut spoke = Instant::now();
        for report in self.reports.clone() {
            self.say(&line, Up::Error(wire::report(report)));
        }
        while let Some(ask) = self.backlog.pop_front() {
            if let Some(exit_code) = self.answer(&line, ask) {
                return self.leave(line, exit_code).await;
            }
        }
        loop {
            tokio::select! {
                _ = pace.tick() => {
                    if let Some(progress) = self.shared.take_progress() {
                        self.say(&line, Up::Progress(wire::progress(progress)));
                        spoke = Instant::now();
                    } else if spoke.elapsed() >= self.heartbeat * 3 / 4 {
                        self.say(&line, Up::Heartbeat(v1::Heartbeat {}));
                        spoke = Instant::now();
                    }
                }
                ask = self.asks.recv() => match ask {
                    None => return End::Dropped,
                    Some(ask) => if let Some(exit_code) = self.answer(&line, ask) {
                        return self.leave(line, exit_code).await;
                    },
                },
                message = line.down.message() => match message {
                    Ok(Some(message)) => self.hear(message),
                    Ok(None) => return End::Broken,
                    Err(status) => return self.ended_by(&status),
                },
            }
        }
    }

    /// Does what the training thread asked; returns the exit code if it asked to leave.
    fn answer(&mut self, line: &Line, ask: Ask) -> Option<i32> {
        match ask {
            Ask::Report(report) => {
                self.say(line, Up::Error(wire::report(report.clone())));
                self.reports.push(report);
            }
            Ask::Barrier { name, generation, timeout, payload, answer } => {
                let request = v1::BarrierRequest {
                    epoch: self.epoch.map_or(0, |epoch| epoch.0),
                    rank: self.worker.identity.rank,
                    name,
                    generation,
                    timeout_ms: wire::millis(timeout),
                    payload,
                };
                let meeting =
                    dial::meet(self.stub.clone(), self.worker.addr.clone(), request, self.shared.abort.subscribe());
                tokio::spawn(async move {
                    // The caller may have given up meanwhile.
                    let _ = answer.send(meeting.await);
                });
            }
            Ask::Leave { exit_code } => return Some(exit_code),
        }
        None
    }

    fn hear(&mut self, message: v1::CoordinatorMessage) {
        let epoch = Epoch(message.epoch);
        if self.epoch != Some(epoch) {
            tracing::warn!(%epoch, "ignored a message of another epoch");
            return;
        }
        match message.body {
            Some(Down::Welcome(welcome)) => self.welcome(welcome),
            Some(Down::Abort(v1::Abort { culprit, reason })) => {
                self.over(Abort { epoch, culprit, reason, kind: AbortKind::Ordered });
            }
            Some(Down::Drain(v1::Drain { reason })) if !self.draining => {
                self.draining = true;
                self.shared.add_order(Order::Drain { reason });
            }
            Some(Down::Checkpoint(v1::Checkpoint { order, reason })) if order > self.last_order => {
                self.last_order = order;
                self.shared.add_order(Order::Checkpoint { order, reason });
            }
            // A repeat, or an order that a newer coordinator knows.
            Some(Down::Drain(_) | Down::Checkpoint(_)) | None => {}
        }
    }

    fn welcome(&mut self, welcome: v1::Welcome) {
        let (Some(joined), Some(epoch)) = (self.joined.take(), self.epoch) else { return };
        let grid = wire::grid_from(self.grid.take().unwrap_or_default());
        let _ = joined.send(Ok(Membership { epoch, grid, peers: wire::peers(welcome) }));
    }

    /// The epoch is over: joining fails, or the training thread is called.
    fn over(&mut self, abort: Abort) {
        match self.joined.take() {
            Some(joined) => {
                let _ = joined.send(Err(CoordinationError::Aborted(abort)));
            }
            None => self.shared.give_up(abort),
        }
    }

    fn say(&self, line: &Line, body: Up) {
        // When the stream is full the connection hangs; its keepalive will find out, and only news are lost.
        let _ = line.up.try_send(self.message(body));
    }

    fn message(&self, body: Up) -> v1::WorkerMessage {
        let epoch = self.epoch.map_or(0, |epoch| epoch.0);
        v1::WorkerMessage { epoch, rank: self.worker.identity.rank, body: Some(body) }
    }

    fn ended_by(&self, status: &Status) -> End {
        let epoch = self.epoch.unwrap_or(Epoch(0));
        wire::verdict_of(&self.worker.addr, epoch, status).map_or(End::Broken, End::Refused)
    }

    /// Good-bye: the latest news, the exit code, then the coordinator ends the stream.
    async fn leave(&self, line: Line, exit_code: i32) -> End {
        let Line { up, mut down } = line;
        let talk = async {
            let last = self.shared.take_progress().map(|progress| Up::Progress(wire::progress(progress)));
            for body in last.into_iter().chain([Up::Leave(v1::Leave { exit_code })]) {
                up.send(self.message(body)).await.ok()?;
            }
            drop(up);
            while let Some(_late) = down.message().await.ok()? {}
            Some(())
        };
        match tokio::time::timeout(LEAVE_WAIT, talk).await {
            Ok(Some(())) => End::Left,
            _ => End::Dropped,
        }
    }

    /// The coordinator is lost or wants no more of this worker.
    async fn fail(&mut self, error: CoordinationError) -> bool {
        if let Some(joined) = self.joined.take() {
            let _ = joined.send(Err(error));
            return false;
        }
        let abort = match error {
            CoordinationError::Aborted(abort) => abort,
            other => Abort {
                epoch: self.epoch.unwrap_or(Epoch(0)),
                culprit: None,
                reason: other.to_string(),
                kind: AbortKind::CoordinatorLost,
            },
        };
        self.shared.give_up(abort);
        self.wait_for_the_end().await
    }

    /// No line any more: every barrier fails, until the training thread leaves.
    async fn wait_for_the_end(&mut self) -> bool {
        loop {
            let ask = match self.backlog.pop_front() {
                Some(ask) => Some(ask),
                None => self.asks.recv().await,
            };
            match ask {
                None | Some(Ask::Leave { .. }) => return false,
                Some(Ask::Report(_)) => {}
                Some(Ask::Barrier { answer, .. }) => {
                    if let Some(abort) = self.shared.aborted() {
                        let _ = answer.send(Err(CoordinationError::Aborted(abort)));
                    }
                }
            }
        }
    }
}
