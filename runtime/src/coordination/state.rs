//! The rendezvous state machine: who is in the job, who is lost, who is told what.
//!
//! Pure: `step(event, now)` changes the state and returns what is to be done. There is no socket, no clock and no randomness in
//! here; `now` is the time since the coordinator started and never runs backwards. Decisions carry their reason.
//!
//! ```text
//!   Forming ──all ranks registered──▶ Running ──drain asked──▶ Draining
//!      │                                 │  └──every rank left 0──┐ │ every rank left 0 or 75
//!      └── deadline, drain ──▶ Aborted ◀─┴─ lost lease, error ─┐  ▼ ▼
//!                                 ▲────── report, bad exit ────┘  Done
//! ```

use std::time::Duration;

use super::barriers::{Barriers, Entry};
use super::event::{
    Action, Command, Epoch, ErrorReport, Event, Phase, Progress, Refusal, Registration, SessionId, Verdict, Worker,
};
use super::job::JobSpec;
use super::status::{JobStatus, RankState, RankStatus};

/// The exit code of a worker that saved and stopped because it was asked to.
const EXIT_DRAINED: i32 = 75;

/// The state of one job in one epoch.
#[derive(Debug, Clone)]
pub struct State {
    spec: JobSpec,
    phase: Phase,
    reason: String,
    verdict: Option<Verdict>,
    opened: Duration,
    last_tick: Duration,
    members: Vec<Option<Member>>,
    version: Option<String>,
    barriers: Barriers,
    checkpoint: Option<(u64, String)>,
    stop_asked: bool,
}

#[derive(Debug, Clone)]
struct Member {
    worker: Worker,
    standing: Standing,
    last_seen: Duration,
    progress: Option<Progress>,
}

impl Member {
    fn status(&self, rank: u32, now: Duration) -> RankStatus {
        let (state, exit_code) = match self.standing {
            Standing::Live(_) => (RankState::Live, None),
            Standing::Detached => (RankState::Detached, None),
            Standing::Lost => (RankState::Lost, None),
            Standing::Left(code) => (RankState::Left, Some(code)),
        };
        let age = now.saturating_sub(self.last_seen).as_millis();
        RankStatus {
            rank,
            state,
            host: self.worker.host.clone(),
            pid: self.worker.pid,
            version: self.worker.version.clone(),
            progress: self.progress,
            heartbeat_age_ms: Some(u64::try_from(age).unwrap_or(u64::MAX)),
            exit_code,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Live(SessionId),
    Detached,
    Lost,
    Left(i32),
}

impl State {
    /// A job that waits for its ranks from `now` on. `spec` must be valid.
    pub fn new(spec: JobSpec, now: Duration) -> Self {
        Self {
            members: vec![None; spec.world_size as usize],
            reason: format!("waiting for {} ranks", spec.world_size),
            spec,
            phase: Phase::Forming,
            verdict: None,
            opened: now,
            last_tick: now,
            version: None,
            barriers: Barriers::default(),
            checkpoint: None,
            stop_asked: false,
        }
    }

    /// Takes one event at time `now` and returns what is to be done, in order. A [`Action::Refused`] means nothing changed.
    pub fn step(&mut self, event: Event, now: Duration) -> Vec<Action> {
        self.decide(event, now).unwrap_or_else(|refusal| vec![Action::Refused(refusal)])
    }

    fn decide(&mut self, event: Event, now: Duration) -> Result<Vec<Action>, Refusal> {
        match event {
            Event::Register(registration) => self.register(registration, now),
            Event::Attached { rank, epoch, instance, session } => self.attach(rank, epoch, instance, session, now),
            Event::Heartbeat { rank, epoch } => self.heard(rank, epoch, now).map(|_| Vec::new()),
            Event::Progress { rank, epoch, progress } => {
                let member = self.heard(rank, epoch, now)?;
                // A late copy must not set a rank back.
                if member.progress.is_none_or(|known| known.step <= progress.step) {
                    member.progress = Some(progress);
                }
                Ok(Vec::new())
            }
            Event::ErrorReport { rank, epoch, report } => {
                self.heard(rank, epoch, now)?;
                let verdict = self.judge(rank, &report);
                Ok(self.abort(verdict))
            }
            Event::SessionLost { rank, session } => {
                if let Some(Some(member)) = self.members.get_mut(rank as usize)
                    && member.standing == Standing::Live(session)
                {
                    member.standing = Standing::Detached;
                }
                Ok(Vec::new())
            }
            Event::BarrierArrived { rank, epoch, name, generation, timeout, payload } => {
                self.heard(rank, epoch, now)?;
                self.enter_barrier(rank, name, Entry { generation, deadline: now.saturating_add(timeout), payload })
            }
            Event::DrainRequested { epoch, reason } => self.drain(epoch, reason),
            Event::CheckpointRequested { epoch, reason } => self.order_checkpoint(epoch, reason),
            Event::Leave { rank, epoch, exit_code } => self.leave(rank, epoch, exit_code, now),
            Event::Tick => Ok(self.tick(now)),
        }
    }

    // ---- joining ------------------------------------------------------------------------------------------------------------

    fn register(&mut self, registration: Registration, now: Duration) -> Result<Vec<Action>, Refusal> {
        let Registration { rank, world_size, epoch, worker, config_fingerprint: theirs } = registration;
        self.check_epoch(epoch)?;
        if world_size != self.spec.world_size {
            return Err(Refusal::WrongWorldSize { rank, theirs: world_size, ours: self.spec.world_size });
        }
        self.check_rank(rank)?;
        if let Some(ours) = self.spec.config_fingerprint.as_ref().filter(|ours| **ours != theirs) {
            return Err(Refusal::WrongFingerprint { rank, theirs, ours: ours.clone() });
        }
        if let Some(ours) = self.version.as_ref().filter(|ours| **ours != worker.version) {
            return Err(Refusal::WrongVersion { rank, theirs: worker.version, ours: ours.clone() });
        }
        if let Some(verdict) = &self.verdict {
            return Err(Refusal::Aborted(verdict.clone()));
        }
        let mut actions = Vec::new();
        match &mut self.members[rank as usize] {
            Some(member) if member.worker != worker => {
                let Worker { host, pid, .. } = member.worker.clone();
                return Err(Refusal::RankTaken { rank, host, pid });
            }
            Some(Member { standing: Standing::Left(exit_code), .. }) => {
                return Err(Refusal::HasLeft { rank, exit_code: *exit_code });
            }
            Some(member) => member.last_seen = now,
            place @ None => {
                self.version.get_or_insert_with(|| worker.version.clone());
                self.spec.config_fingerprint.get_or_insert(theirs);
                *place = Some(Member { worker, standing: Standing::Detached, last_seen: now, progress: None });
                if self.members.iter().all(Option::is_some) {
                    let reason = format!("all {} ranks have registered", self.spec.world_size);
                    actions.push(self.enter(Phase::Running, reason));
                    actions.extend(self.tell_all(&Command::Welcome));
                }
            }
        }
        actions.insert(0, Action::Registered { rank, missing: self.unregistered() });
        Ok(actions)
    }

    fn attach(
        &mut self,
        rank: u32,
        epoch: Epoch,
        instance: u64,
        session: SessionId,
        now: Duration,
    ) -> Result<Vec<Action>, Refusal> {
        let aborted = self.verdict.clone();
        let phase = self.phase;
        let reason = self.reason.clone();
        let checkpoint = self.checkpoint.clone();
        let member = self.member(rank, epoch)?;
        if member.worker.instance != instance {
            let Worker { host, pid, .. } = member.worker.clone();
            return Err(Refusal::RankTaken { rank, host, pid });
        }
        // A lost rank that comes back is told of the abort below, but it stays lost.
        if member.standing != Standing::Lost {
            member.standing = Standing::Live(session);
            member.last_seen = now;
        }
        // What it missed. Workers take repeats.
        let mut commands = Vec::new();
        if let Some(verdict) = aborted {
            commands.push(Command::Abort(verdict));
        } else if phase != Phase::Forming {
            commands.push(Command::Welcome);
            commands.extend(checkpoint.map(|(order, reason)| Command::Checkpoint { order, reason }));
            if phase == Phase::Draining {
                commands.push(Command::Drain { reason });
            }
        }
        Ok(commands.into_iter().map(|command| Action::Send { rank, command }).collect())
    }

    // ---- leaving and failing ------------------------------------------------------------------------------------------------

    fn leave(&mut self, rank: u32, epoch: Epoch, exit_code: i32, now: Duration) -> Result<Vec<Action>, Refusal> {
        match self.heard(rank, epoch, now) {
            // Said twice.
            Err(Refusal::HasLeft { exit_code: before, .. }) if before == exit_code => return Ok(Vec::new()),
            Err(refusal) => return Err(refusal),
            Ok(member) => member.standing = Standing::Left(exit_code),
        }
        let good = match self.phase {
            Phase::Running => exit_code == 0,
            Phase::Draining => exit_code == 0 || exit_code == EXIT_DRAINED,
            Phase::Aborted | Phase::Done => return Ok(Vec::new()),
            Phase::Forming => false,
        };
        if !good {
            let reason = format!("rank {rank} left with exit code {exit_code} while the job was {}", self.phase);
            return Ok(self.abort(Verdict { culprit: Some(rank), reason }));
        }
        if self.registered().all(|(_, member)| matches!(member.standing, Standing::Left(_))) {
            return Ok(vec![self.enter(Phase::Done, "every rank has left".to_owned())]);
        }
        Ok(Vec::new())
    }

    /// Whom a report blames: of the ranks waited for in vain the one not heard of for longest, else the reporter.
    fn judge(&self, reporter: u32, report: &ErrorReport) -> Verdict {
        let suspects = report.missing.iter().copied().filter(|rank| *rank != reporter && *rank < self.spec.world_size);
        let culprit = suspects.min_by_key(|rank| (self.last_seen(*rank), *rank));
        let collective = if report.collective.is_empty() { "" } else { &format!(" in {}", report.collective) };
        let what = match culprit {
            Some(culprit) => format!("waited in vain for rank {culprit}"),
            None => "failed".to_owned(),
        };
        let step = if report.step == 0 { "" } else { &format!(", step {}", report.step) };
        let reason = format!("rank {reporter} {what}{collective}{step}: {}", report.message);
        Verdict { culprit: Some(culprit.unwrap_or(reporter)), reason }
    }

    /// Gives the epoch up, once: later verdicts of the same epoch are consequences of the first.
    fn abort(&mut self, verdict: Verdict) -> Vec<Action> {
        if matches!(self.phase, Phase::Aborted | Phase::Done) {
            return Vec::new();
        }
        let mut actions = vec![self.enter(Phase::Aborted, verdict.reason.clone())];
        actions.extend(self.barriers.give_up(&verdict));
        actions.extend(self.tell_all(&Command::Abort(verdict.clone())));
        self.verdict = Some(verdict);
        actions
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        let gap = now.saturating_sub(self.last_tick);
        self.last_tick = now;
        if gap > self.spec.lease / 2 {
            // The coordinator itself did not run: what the ranks said meanwhile is still unread, so nobody is to blame for it.
            for member in self.members.iter_mut().flatten() {
                member.last_seen = member.last_seen.saturating_add(gap).min(now);
            }
        }
        let mut actions = self.expire_leases(now);
        if self.phase == Phase::Forming && now.saturating_sub(self.opened) >= self.spec.forming_deadline {
            let missing = self.unregistered();
            let reason = format!(
                "{} of {} ranks did not arrive within {:?}: {missing:?}",
                missing.len(),
                self.spec.world_size,
                self.spec.forming_deadline
            );
            actions.extend(self.abort(Verdict { culprit: missing.first().copied(), reason }));
        }
        actions.extend(self.barriers.expire(now, self.spec.world_size));
        actions
    }

    fn expire_leases(&mut self, now: Duration) -> Vec<Action> {
        let lease = self.spec.lease;
        let mut first: Option<(Duration, u32, bool)> = None;
        for (rank, member) in (0..).zip(&mut self.members) {
            let Some(member) = member else { continue };
            let attached = matches!(member.standing, Standing::Live(_));
            let waits = attached || member.standing == Standing::Detached;
            if !waits || now.saturating_sub(member.last_seen) < lease {
                continue;
            }
            member.standing = Standing::Lost;
            if first.is_none_or(|(seen, ..)| member.last_seen < seen) {
                first = Some((member.last_seen, rank, attached));
            }
        }
        let Some((seen, rank, attached)) = first else { return Vec::new() };
        let silence = now.saturating_sub(seen);
        let worker = self.members[rank as usize].as_ref().map(|member| &member.worker);
        let process = worker.map_or_else(String::new, |worker| format!(" (process {} on {})", worker.pid, worker.host));
        let how = if attached { "its connection is open" } else { "its connection broke and did not come back" };
        let reason =
            format!("nothing was heard of rank {rank}{process} for {silence:?}, its lease is {lease:?}; {how}");
        self.abort(Verdict { culprit: Some(rank), reason })
    }

    // ---- barriers -----------------------------------------------------------------------------------------------------------

    fn enter_barrier(&mut self, rank: u32, name: String, entry: Entry) -> Result<Vec<Action>, Refusal> {
        if let Some(verdict) = &self.verdict {
            return Err(Refusal::Aborted(verdict.clone()));
        }
        if !matches!(self.phase, Phase::Running | Phase::Draining) {
            return Err(Refusal::WrongPhase { what: "a barrier", phase: self.phase });
        }
        self.barriers.enter(rank, name, entry, self.members.len())
    }

    // ---- operators ----------------------------------------------------------------------------------------------------------

    fn drain(&mut self, epoch: Option<Epoch>, reason: String) -> Result<Vec<Action>, Refusal> {
        self.check_epoch(epoch)?;
        match self.phase {
            Phase::Forming => {
                self.stop_asked = true;
                let reason = format!("asked to stop before all ranks had registered: {reason}");
                Ok(self.abort(Verdict { culprit: None, reason }))
            }
            Phase::Running => {
                self.stop_asked = true;
                let mut actions = vec![self.enter(Phase::Draining, reason.clone())];
                actions.extend(self.tell_all(&Command::Drain { reason }));
                Ok(actions)
            }
            Phase::Draining => Ok(Vec::new()),
            phase => Err(Refusal::WrongPhase { what: "draining", phase }),
        }
    }

    fn order_checkpoint(&mut self, epoch: Option<Epoch>, reason: String) -> Result<Vec<Action>, Refusal> {
        self.check_epoch(epoch)?;
        if self.phase != Phase::Running {
            return Err(Refusal::WrongPhase { what: "ordering a checkpoint", phase: self.phase });
        }
        let order = self.checkpoint.as_ref().map_or(1, |(order, _)| order + 1);
        self.checkpoint = Some((order, reason.clone()));
        let mut actions = vec![Action::CheckpointOrdered { order }];
        actions.extend(self.tell_all(&Command::Checkpoint { order, reason }));
        Ok(actions)
    }

    // ---- what is known ------------------------------------------------------------------------------------------------------

    /// Where the job stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The job as hosted.
    pub fn spec(&self) -> &JobSpec {
        &self.spec
    }

    /// How long the job may still take to form.
    pub fn forming_remaining(&self, now: Duration) -> Duration {
        self.spec.forming_deadline.saturating_sub(now.saturating_sub(self.opened))
    }

    /// Whether nothing more will happen: the job is done, or aborted with every rank gone.
    pub fn is_over(&self) -> bool {
        let gone = |member: &Member| matches!(member.standing, Standing::Left(_) | Standing::Lost);
        self.phase == Phase::Done || (self.phase == Phase::Aborted && self.registered().all(|(_, member)| gone(member)))
    }

    /// Whether the job was asked to stop: however it ends, it has not failed by itself.
    pub fn is_asked_to_stop(&self) -> bool {
        self.stop_asked
    }

    /// The processes that hold ranks, ascending.
    pub fn workers(&self) -> impl Iterator<Item = (u32, &Worker)> {
        self.registered().map(|(rank, member)| (rank, &member.worker))
    }

    /// Everything, for people and tools.
    pub fn status(&self, now: Duration) -> JobStatus {
        let ranks: Vec<RankStatus> = (0..)
            .zip(&self.members)
            .map(|(rank, member)| {
                member.as_ref().map_or_else(|| RankStatus::awaited(rank), |member| member.status(rank, now))
            })
            .collect();
        let step = ranks.iter().map(|rank| rank.progress.map_or(0, |progress| progress.step)).min().unwrap_or(0);
        JobStatus {
            epoch: self.spec.epoch,
            phase: self.phase,
            reason: self.reason.clone(),
            culprit: self.verdict.as_ref().and_then(|verdict| verdict.culprit),
            step,
            ep_size: self.spec.ep_size,
            dp_size: self.spec.world_size / self.spec.ep_size,
            ranks,
        }
    }

    // ---- small parts --------------------------------------------------------------------------------------------------------

    fn enter(&mut self, to: Phase, reason: String) -> Action {
        self.reason.clone_from(&reason);
        Action::PhaseChanged { from: std::mem::replace(&mut self.phase, to), to, reason }
    }

    /// The member that a message of `epoch` comes from. Refuses stale epochs, unknown ranks and ranks that have left.
    fn member(&mut self, rank: u32, epoch: Epoch) -> Result<&mut Member, Refusal> {
        self.check_epoch(Some(epoch))?;
        self.check_rank(rank)?;
        match &mut self.members[rank as usize] {
            None => Err(Refusal::NotRegistered { rank }),
            Some(Member { standing: Standing::Left(exit_code), .. }) => {
                Err(Refusal::HasLeft { rank, exit_code: *exit_code })
            }
            Some(member) => Ok(member),
        }
    }

    /// As [`Self::member`], and notes that it lives.
    fn heard(&mut self, rank: u32, epoch: Epoch, now: Duration) -> Result<&mut Member, Refusal> {
        let member = self.member(rank, epoch)?;
        member.last_seen = now;
        Ok(member)
    }

    fn check_epoch(&self, theirs: Option<Epoch>) -> Result<(), Refusal> {
        match theirs {
            Some(theirs) if theirs != self.spec.epoch => Err(Refusal::StaleEpoch { theirs, ours: self.spec.epoch }),
            _ => Ok(()),
        }
    }

    fn check_rank(&self, rank: u32) -> Result<(), Refusal> {
        let world_size = self.spec.world_size;
        if rank < world_size { Ok(()) } else { Err(Refusal::RankOutOfRange { rank, world_size }) }
    }

    fn registered(&self) -> impl Iterator<Item = (u32, &Member)> {
        (0..).zip(&self.members).filter_map(|(rank, member)| Some((rank, member.as_ref()?)))
    }

    fn unregistered(&self) -> Vec<u32> {
        (0..).zip(&self.members).filter(|(_, member)| member.is_none()).map(|(rank, _)| rank).collect()
    }

    fn last_seen(&self, rank: u32) -> Option<Duration> {
        self.members[rank as usize].as_ref().map(|member| member.last_seen)
    }

    /// Lost ranks are told too: one that was only slow must not train on alone.
    fn tell_all(&self, command: &Command) -> Vec<Action> {
        let here = self.registered().filter(|(_, member)| !matches!(member.standing, Standing::Left(_)));
        here.map(|(rank, _)| Action::Send { rank, command: command.clone() }).collect()
    }
}
