//! Runs the tables of `testdata/rendezvous.txt`, where the format is described.

use std::time::Duration;

use super::event::{
    Action, BarrierFailure, Command, Epoch, ErrorReport, Event, Progress, Registration, SessionId, Verdict, Worker,
};
use super::job::JobSpec;
use super::state::State;

/// The epoch of every job of the tables, not 1 so that a default would show.
const EPOCH: u64 = 4;

/// The words of one event line: positional ones, and `key=value` ones.
struct Line<'a> {
    words: Vec<&'a str>,
}

impl<'a> Line<'a> {
    fn key(&self, key: &str) -> Option<&'a str> {
        self.words.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    fn number<T: std::str::FromStr<Err: std::fmt::Debug>>(&self, key: &str, default: T) -> T {
        self.key(key).map_or(default, |text| text.parse().unwrap())
    }

    fn list(&self, key: &str) -> Vec<u32> {
        let text = self.key(key).unwrap_or_default();
        text.split(',').filter(|part| !part.is_empty()).map(|part| part.parse().unwrap()).collect()
    }

    fn positional(&self, index: usize) -> &'a str {
        self.words.iter().filter(|word| !word.contains('=')).nth(index).unwrap()
    }

    fn rank(&self) -> u32 {
        self.positional(1).parse().unwrap()
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.number("epoch", EPOCH))
    }

    fn event(&self, world_size: u32) -> Event {
        let epoch = self.epoch();
        let asked = self.key("epoch").map(|_| epoch);
        match self.words[0] {
            "register" => {
                let mut registration = registration(self.rank(), self.number("world", world_size));
                registration.epoch = asked;
                registration.worker.pid = self.number("pid", registration.worker.pid);
                registration.worker.instance = self.number("instance", registration.worker.instance);
                registration.worker.version = self.key("version").unwrap_or("1.0").to_owned();
                registration.config_fingerprint = self.key("config").unwrap_or("cafe").to_owned();
                Event::Register(registration)
            }
            "attach" => Event::Attached {
                rank: self.rank(),
                epoch,
                instance: self.number("instance", u64::from(self.rank())),
                session: SessionId(self.number("session", 0)),
            },
            "progress" => {
                let progress = Progress { step: self.number("step", 0), ..Progress::default() };
                Event::Progress { rank: self.rank(), epoch, progress }
            }
            "report" => {
                let report = ErrorReport {
                    step: self.number("step", 0),
                    collective: self.key("collective").unwrap_or_default().to_owned(),
                    message: self.key("message").unwrap_or_default().to_owned(),
                    missing: self.list("missing"),
                };
                Event::ErrorReport { rank: self.rank(), epoch, report }
            }
            "lost" => Event::SessionLost { rank: self.rank(), session: SessionId(self.number("session", 0)) },
            "barrier" => Event::BarrierArrived {
                rank: self.rank(),
                epoch,
                name: self.positional(2).to_owned(),
                generation: self.number("generation", 1),
                timeout: Duration::from_millis(self.number("timeout", 1000)),
                payload: self.key("payload").unwrap_or_default().as_bytes().to_vec(),
            },
            "drain" => Event::DrainRequested { epoch: asked, reason: self.positional(1).to_owned() },
            "checkpoint" => Event::CheckpointRequested { epoch: asked, reason: self.positional(1).to_owned() },
            "leave" => Event::Leave { rank: self.rank(), epoch, exit_code: self.number("code", 0) },
            "tick" => Event::Tick,
            other => panic!("no event {other:?}"),
        }
    }
}

fn registration(rank: u32, world_size: u32) -> Registration {
    let worker =
        Worker { host: format!("host{rank}"), pid: 100 + rank, instance: rank.into(), version: "1.0".to_owned() };
    Registration { rank, world_size, epoch: None, worker, config_fingerprint: "cafe".to_owned() }
}

fn blame(verdict: &Verdict) -> String {
    let culprit = verdict.culprit.map_or_else(String::new, |rank| format!(" culprit {rank}"));
    format!("abort{culprit}: {}", verdict.reason)
}

fn render(action: &Action) -> String {
    match action {
        Action::Registered { rank, missing } => format!("registered {rank} missing {missing:?}"),
        Action::Refused(refusal) => format!("refused: {refusal}"),
        Action::Send { rank, command } => match command {
            Command::Welcome => format!("send {rank} welcome"),
            Command::Abort(verdict) => format!("send {rank} {}", blame(verdict)),
            Command::Drain { reason } => format!("send {rank} drain: {reason}"),
            Command::Checkpoint { order, reason } => format!("send {rank} checkpoint {order}: {reason}"),
        },
        Action::BarrierPassed { name, generation, rank, payloads } => {
            let brought = payloads.iter().map(|payload| String::from_utf8_lossy(payload)).collect::<Vec<_>>();
            let with =
                if brought.iter().all(|text| text.is_empty()) { String::new() } else { format!(" with {brought:?}") };
            format!("barrier {name}#{generation} opens for {rank}{with}")
        }
        Action::BarrierFailed { name, generation, rank, why } => {
            let why = match why {
                BarrierFailure::Deadline { missing } => format!("missing {missing:?}"),
                BarrierFailure::Aborted(verdict) => format!("aborted, {}", verdict.reason),
            };
            format!("barrier {name}#{generation} fails for {rank}: {why}")
        }
        Action::CheckpointOrdered { order } => format!("checkpoint order {order}"),
        Action::PhaseChanged { from, to, reason } => format!("phase {from} -> {to}: {reason}"),
    }
}

/// What an event line of the table leads to, as text.
fn play(state: &mut State, at: u64, line: &Line<'_>) -> Vec<String> {
    let world_size = state.spec().world_size;
    let now = Duration::from_millis(at);
    match line.words[0] {
        "formed" => {
            for rank in 0..world_size {
                state.step(Event::Register(registration(rank, world_size)), now);
                let attached = Event::Attached {
                    rank,
                    epoch: Epoch(EPOCH),
                    instance: rank.into(),
                    session: SessionId(rank.into()),
                };
                state.step(attached, now);
            }
            Vec::new()
        }
        "pass" => {
            let mut lines = Vec::new();
            let until = line.positional(1).parse().unwrap();
            for at in (at..=until).step_by(50) {
                let now = Duration::from_millis(at);
                for rank in line.list("alive") {
                    assert_eq!(state.step(Event::Heartbeat { rank, epoch: Epoch(EPOCH) }, now), []);
                }
                let actions = state.step(Event::Tick, now);
                lines.extend(actions.iter().map(|action| format!("@{at} {}", render(action))));
            }
            lines
        }
        "heartbeat" => {
            let ranks = line.words[1..].iter().filter(|word| !word.contains('='));
            let beats = ranks.map(|rank| Event::Heartbeat { rank: rank.parse().unwrap(), epoch: line.epoch() });
            beats.flat_map(|beat| state.step(beat, now)).map(|action| render(&action)).collect()
        }
        "state" => {
            let status = state.status(now);
            let ranks: Vec<_> = status.ranks.iter().map(|rank| rank.state.name()).collect();
            vec![format!("{} step={} [{}]", status.phase, status.step, ranks.join(" "))]
        }
        _ => state.step(line.event(world_size), now).iter().map(render).collect(),
    }
}

#[test]
fn the_tables_hold() {
    let mut cases = 0;
    let mut failures = Vec::new();
    for case in include_str!("testdata/rendezvous.txt").split("\ncase ").skip(1) {
        cases += 1;
        let mut lines = case.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).peekable();
        let title = lines.next().unwrap();
        let job = Line { words: lines.next().unwrap().split_whitespace().collect() };
        let spec = JobSpec {
            epoch: Epoch(EPOCH),
            world_size: job.number("ranks", 1),
            ep_size: job.number("ep", 1),
            lease: Duration::from_millis(job.number("lease", 0)),
            heartbeat: Duration::from_millis(50),
            forming_deadline: Duration::from_millis(job.number("forming", 0)),
            config_fingerprint: None,
        };
        spec.validate().unwrap();
        let mut state = State::new(spec, Duration::ZERO);
        while let Some(line) = lines.next() {
            let (at, words) = line.split_once(' ').unwrap();
            let words = Line { words: words.split_whitespace().collect() };
            let mut expected = Vec::new();
            while let Some(action) = lines.next_if(|line| line.starts_with("  ")) {
                expected.push(action.trim().to_owned());
            }
            let found = play(&mut state, at.parse().unwrap(), &words);
            if found != expected {
                failures.push(format!("{title}\n{line}\n  expected {expected:#?}\n  found {found:#?}"));
            }
        }
    }
    assert!(cases >= 18, "only {cases} cases were read");
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}
