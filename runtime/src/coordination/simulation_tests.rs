//! Simulated workers on a simulated network with a simulated clock: messages are lost, late and doubled, connections break,
//! processes crash and hang, strangers of another epoch speak.
//!
//! A fault script comes from proptest, so that a failure shrinks to the few faults that matter; delays come from a seeded generator.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::event::{
    Action, Command, Epoch, ErrorReport, Event, Phase, Refusal, Registration, SessionId, Verdict, Worker,
};
use super::job::JobSpec;
use super::state::State;

const EPOCH: Epoch = Epoch(2);
const LEASE_MS: u64 = 300;
const HEARTBEAT_MS: u64 = 60;
const FORMING_MS: u64 = 2000;
const TICK_MS: u64 = 10;
const SLOWEST_MS: u64 = 20;
/// When a worker without faults leaves.
const WORK_MS: u64 = 3000;
/// Faults happen before this; afterwards the network is perfect and everything must settle.
const FAULTS_END_MS: u64 = 4000;
const END_MS: u64 = 8000;

#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The process is gone, without a word.
    Crash,
    /// The process says nothing for this long.
    Hang(u64),
    /// The connection breaks; the worker comes back after this long.
    Disconnect(u64),
    /// The next message up is lost; as on a stream, the connection breaks with it.
    Lose,
    /// The next message up arrives twice, the second time late.
    Double,
    /// A collective times out at this rank and it blames that one.
    Report(u32),
    /// It leaves with this code.
    Leave(i32),
    /// An operator drains the job.
    Drain,
    /// A worker of another epoch speaks as this rank.
    Stranger,
    /// It never starts.
    Absent,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Life {
    Running,
    Crashed(u64),
    Left,
}

struct SimWorker {
    life: Life,
    starts: u64,
    silent_until: u64,
    registered: bool,
    session: Option<SessionId>,
    reconnect_at: u64,
    next_beat: u64,
    lose: bool,
    double: bool,
    drain: bool,
    told: Option<Verdict>,
}

struct Sim {
    state: State,
    now: u64,
    workers: Vec<SimWorker>,
    /// (arrival, number) → event; a hand-over of what the coordinator sends is immediate if the session is the worker's.
    up: BTreeMap<(u64, u64), Event>,
    sent: u64,
    sessions: u64,
    /// The stream the coordinator last opened for a rank.
    open: BTreeMap<u32, SessionId>,
    rng: ChaCha8Rng,
    aborts: Vec<Verdict>,
    phase_changes: Vec<(Phase, u64)>,
}

impl Sim {
    fn new(world_size: u32, seed: u64) -> Self {
        let ms = Duration::from_millis;
        let spec = JobSpec {
            epoch: EPOCH,
            world_size,
            lease: ms(LEASE_MS),
            heartbeat: ms(HEARTBEAT_MS),
            forming_deadline: ms(FORMING_MS),
            ..JobSpec::default()
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let workers = (0..world_size).map(|_| SimWorker {
            life: Life::Running,
            starts: rng.random_range(0..500),
            silent_until: 0,
            registered: false,
            session: None,
            reconnect_at: 0,
            next_beat: 0,
            lose: false,
            double: false,
            drain: false,
            told: None,
        });
        Self {
            state: State::new(spec, Duration::ZERO),
            now: 0,
            workers: workers.collect(),
            up: BTreeMap::new(),
            sent: 0,
            sessions: 0,
            open: BTreeMap::new(),
            rng,
            aborts: Vec::new(),
            phase_changes: Vec::new(),
        }
    }

    fn send(&mut self, rank: u32, event: Event) {
        let delay = self.rng.random_range(1..=SLOWEST_MS);
        let late = self.rng.random_range(SLOWEST_MS..=10 * SLOWEST_MS);
        self.sent += 2;
        let worker = &mut self.workers[rank as usize];
        if std::mem::take(&mut worker.double) {
            self.up.insert((self.now + late, self.sent), event.clone());
        }
        if std::mem::take(&mut worker.lose) {
            self.disconnect(rank, 0);
            return;
        }
        self.up.insert((self.now + delay, self.sent + 1), event);
    }

    fn disconnect(&mut self, rank: u32, back_after: u64) {
        let worker = &mut self.workers[rank as usize];
        worker.reconnect_at = self.now + back_after;
        if let Some(session) = worker.session.take() {
            self.sent += 2;
            let delay = self.rng.random_range(1..=2 * LEASE_MS);
            self.up.insert((self.now + delay, self.sent), Event::SessionLost { rank, session });
        }
    }

    fn inject(&mut self, rank: u32, fault: Fault) {
        let running = self.workers[rank as usize].life == Life::Running;
        let worker = &mut self.workers[rank as usize];
        match fault {
            Fault::Crash if running => {
                worker.life = Life::Crashed(self.now);
                self.disconnect(rank, 0);
            }
            Fault::Absent if !worker.registered && running => worker.life = Life::Crashed(self.now),
            Fault::Hang(time) => worker.silent_until = self.now + time,
            Fault::Disconnect(time) if running => self.disconnect(rank, time),
            Fault::Lose => worker.lose = true,
            Fault::Double => worker.double = true,
            Fault::Report(missing) if running && worker.session.is_some() => {
                let report = ErrorReport { missing: vec![missing], ..ErrorReport::default() };
                self.send(rank, Event::ErrorReport { rank, epoch: EPOCH, report });
            }
            Fault::Leave(exit_code) if running && worker.session.is_some() => self.leave(rank, exit_code),
            Fault::Drain => {
                self.deliver(Event::DrainRequested { epoch: None, reason: "simulated".to_owned() });
            }
            Fault::Stranger => self.speak_as_stranger(rank),
            _ => {}
        }
    }

    fn leave(&mut self, rank: u32, exit_code: i32) {
        // A leave that is lost is a crash as far as the coordinator can tell; this worker makes sure of its last word.
        self.workers[rank as usize].lose = false;
        self.send(rank, Event::Leave { rank, epoch: EPOCH, exit_code });
        self.workers[rank as usize].life = Life::Left;
    }

    /// Nothing that a process of another epoch says may change anything.
    fn speak_as_stranger(&mut self, rank: u32) {
        let now = Duration::from_millis(self.now);
        for epoch in [Epoch(EPOCH.0 - 1), Epoch(EPOCH.0 + 1)] {
            let before = self.state.status(now);
            let events = [
                Event::Register(Registration { epoch: Some(epoch), ..self.registration(rank) }),
                Event::Attached { rank, epoch, instance: rank.into(), session: SessionId(u64::MAX) },
                Event::Heartbeat { rank, epoch },
                Event::ErrorReport { rank, epoch, report: ErrorReport::default() },
                Event::Leave { rank, epoch, exit_code: 70 },
                Event::DrainRequested { epoch: Some(epoch), reason: String::new() },
            ];
            for event in events {
                let actions = self.state.step(event, now);
                assert!(matches!(&actions[..], [Action::Refused(Refusal::StaleEpoch { .. })]), "{actions:?}");
            }
            assert_eq!(self.state.status(now), before);
        }
    }

    fn registration(&self, rank: u32) -> Registration {
        let worker = Worker { host: "node".to_owned(), pid: rank, instance: rank.into(), version: "1".to_owned() };
        let world_size = self.state.spec().world_size;
        Registration { rank, world_size, epoch: None, worker, config_fingerprint: String::new() }
    }

    fn deliver(&mut self, event: Event) {
        let opened = match event {
            Event::Attached { rank, session, .. } => Some((rank, session)),
            _ => None,
        };
        let actions = self.state.step(event, Duration::from_millis(self.now));
        if let Some((rank, session)) = opened
            && !matches!(actions[..], [Action::Refused(_)])
        {
            self.open.insert(rank, session);
        }
        for action in actions {
            match action {
                Action::Send { rank, command } => self.receive(rank, command),
                Action::Registered { rank, .. } => self.workers[rank as usize].registered = true,
                Action::PhaseChanged { to, .. } => self.phase_changes.push((to, self.now)),
                // A worker that comes too late is told so in the answer to its call.
                Action::Refused(Refusal::Aborted(verdict)) => {
                    for worker in self.workers.iter_mut().filter(|worker| !worker.registered) {
                        worker.told.get_or_insert_with(|| verdict.clone());
                    }
                }
                _ => {}
            }
        }
    }

    fn receive(&mut self, rank: u32, command: Command) {
        if let Command::Abort(verdict) = &command
            && !self.aborts.contains(verdict)
        {
            self.aborts.push(verdict.clone());
        }
        let worker = &mut self.workers[rank as usize];
        let through = worker.session.is_some() && self.open.get(&rank) == worker.session.as_ref();
        if !through || worker.life != Life::Running {
            return;
        }
        match command {
            Command::Abort(verdict) => worker.told = Some(verdict),
            Command::Drain { .. } => worker.drain = true,
            Command::Welcome | Command::Checkpoint { .. } => {}
        }
    }

    /// One worker's turn.
    fn act(&mut self, rank: u32) {
        let (now, faulty) = (self.now, self.now < FAULTS_END_MS);
        let worker = &mut self.workers[rank as usize];
        let hangs = faulty && now < worker.silent_until;
        if worker.life != Life::Running || now < worker.starts || now < worker.reconnect_at || hangs {
            return;
        }
        let due = now >= worker.next_beat;
        if due {
            worker.next_beat = now + HEARTBEAT_MS;
        }
        if !worker.registered {
            if due {
                let registration = self.registration(rank);
                self.send(rank, Event::Register(registration));
            }
        } else if worker.session.is_none() {
            self.sessions += 1;
            let session = SessionId(self.sessions);
            worker.session = Some(session);
            self.send(rank, Event::Attached { rank, epoch: EPOCH, instance: rank.into(), session });
        } else if worker.drain && worker.told.is_none() {
            self.leave(rank, 75);
        } else if now >= WORK_MS && self.state.phase() == Phase::Running && worker.told.is_none() {
            self.leave(rank, 0);
        } else if due {
            self.send(rank, Event::Heartbeat { rank, epoch: EPOCH });
        }
    }

    fn run(&mut self, faults: &[(u64, u32, Fault)]) {
        let mut faults: Vec<_> = faults.to_vec();
        faults.sort_by_key(|(at, ..)| *at);
        let mut faults = faults.into_iter().peekable();
        while self.now < END_MS {
            self.now += 1;
            while let Some((_, rank, fault)) = faults.next_if(|(at, ..)| *at <= self.now) {
                self.inject(rank % self.state.spec().world_size, fault);
            }
            for rank in 0..self.state.spec().world_size {
                self.act(rank);
            }
            while let Some(entry) = self.up.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let event = entry.remove();
                self.deliver(event);
            }
            if self.now.is_multiple_of(TICK_MS) {
                self.deliver(Event::Tick);
                self.check();
            }
        }
    }

    fn entered(&self, phase: Phase) -> impl Iterator<Item = u64> {
        self.phase_changes.iter().filter(move |(to, _)| *to == phase).map(|(_, at)| *at)
    }

    /// What must hold at every moment.
    fn check(&self) {
        assert!(self.aborts.len() <= 1, "two verdicts in one epoch: {:?}", self.aborts);
        assert!(self.entered(Phase::Aborted).count() <= 1);
        if self.now >= FORMING_MS {
            assert_ne!(self.state.phase(), Phase::Forming, "forming did not end");
        }
        let over = matches!(self.state.phase(), Phase::Aborted | Phase::Done);
        for (rank, worker) in self.workers.iter().enumerate() {
            if let Life::Crashed(at) = worker.life
                && worker.registered
            {
                // Its last words may still have been on the way.
                let known_by = at + 10 * SLOWEST_MS + LEASE_MS + TICK_MS;
                assert!(over || self.now <= known_by, "nobody noticed that rank {rank} crashed at {at}");
            }
        }
    }

    /// What must hold once the faults are over and everything has settled.
    fn check_end(&self) {
        let status = self.state.status(Duration::from_millis(self.now));
        assert!(matches!(self.state.phase(), Phase::Aborted | Phase::Done), "the job never ended: {status:?}");
        if self.state.phase() == Phase::Aborted {
            for (rank, worker) in self.workers.iter().enumerate() {
                let verdict = worker.told.as_ref();
                assert!(worker.life != Life::Running || verdict.is_some(), "live rank {rank} was not told: {status:?}");
                assert!(verdict.is_none_or(|verdict| verdict.reason == status.reason));
            }
        }
        assert_eq!(
            self.phase_changes.iter().map(|(to, _)| format!("{to}")).collect::<BTreeSet<_>>().len(),
            self.phase_changes.len()
        );
    }
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        1 => Just(Fault::Crash),
        1 => Just(Fault::Absent),
        2 => (0..2 * LEASE_MS).prop_map(Fault::Hang),
        3 => (0..2 * LEASE_MS).prop_map(Fault::Disconnect),
        3 => Just(Fault::Lose),
        3 => Just(Fault::Double),
        1 => (0u32..6).prop_map(Fault::Report),
        1 => prop_oneof![Just(0), Just(70), Just(75)].prop_map(Fault::Leave),
        1 => Just(Fault::Drain),
        2 => Just(Fault::Stranger),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_there_is_one_verdict_and_everybody_hears_it(
        world_size in 1u32..6,
        seed in any::<u64>(),
        faults in prop::collection::vec((0..FAULTS_END_MS, 0u32..6, fault()), 0..12),
    ) {
        let mut sim = Sim::new(world_size, seed);
        sim.run(&faults);
        sim.check_end();
    }

    #[test]
    fn broken_connections_and_doubled_messages_alone_never_end_a_job(
        world_size in 1u32..6,
        seed in any::<u64>(),
        faults in prop::collection::vec(
            (0..FAULTS_END_MS, 0u32..6, prop_oneof![Just(Fault::Double), Just(Fault::Stranger), Just(Fault::Disconnect(LEASE_MS / 3))]),
            0..6,
        ),
    ) {
        // Two breaks in a row may well use the lease up: keep them apart.
        let mut last = BTreeMap::new();
        let mut apart = faults;
        apart.sort_by_key(|(at, ..)| *at);
        apart.retain(|(at, rank, _)| at - last.insert(rank % world_size, *at).unwrap_or(0) > LEASE_MS);
        let mut sim = Sim::new(world_size, seed);
        sim.run(&apart);
        prop_assert_eq!(sim.state.phase(), Phase::Done);
    }
}

#[test]
fn an_undisturbed_job_runs_from_forming_to_done() {
    let mut sim = Sim::new(5, 7);
    sim.run(&[]);
    let phases: Vec<Phase> = sim.phase_changes.iter().map(|(to, _)| *to).collect();
    assert_eq!(phases, [Phase::Running, Phase::Done]);
}

#[test]
fn a_crash_is_found_within_the_lease_and_named() {
    let mut sim = Sim::new(3, 11);
    sim.run(&[(1500, 1, Fault::Crash)]);
    assert_eq!(sim.aborts.len(), 1);
    assert_eq!(sim.aborts[0].culprit, Some(1));
    let at = sim.entered(Phase::Aborted).next().unwrap();
    assert!((1500 + LEASE_MS - HEARTBEAT_MS..=1500 + LEASE_MS + SLOWEST_MS + TICK_MS).contains(&at), "found at {at}");
}
