//! Programs as processes: started, signalled, waited for with a limit, and never left behind.
//!
//! Owns the processes it starts, the small run that whole-run tests start, and reading what a run directory holds.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) use rustix::process::Signal;
use rustix::process::{Pid, kill_process};
use serde_json::Value;

/// A run on a busy machine takes seconds; a hang takes for ever.
pub(crate) const LIMIT: Duration = Duration::from_secs(100);

/// What a program is given to leave after SIGTERM, before it is killed.
const FAREWELL: Duration = Duration::from_secs(5);

/// Exit codes that job managers act on.
pub(crate) const DONE: i32 = 0;
pub(crate) const USAGE: i32 = 64;
pub(crate) const INTERNAL: i32 = 70;
pub(crate) const IO: i32 = 74;
pub(crate) const RETRY: i32 = 75;

/// A program that runs. Dropped before its end, it is ended.
pub(crate) struct Program {
    child: Child,
    output: File,
}

/// A program that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// None: a signal ended it.
    pub(crate) code: Option<i32>,
    /// stdout and stderr as they came.
    pub(crate) output: String,
}

impl Program {
    pub(crate) fn start(mut command: Command) -> Self {
        let output = tempfile::tempfile().unwrap();
        let ours = || output.try_clone().unwrap();
        command.stdin(Stdio::null()).stdout(ours()).stderr(ours());
        Self { child: command.spawn().unwrap(), output }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it has written `text`.
    pub(crate) fn wait_for(&mut self, text: &str) {
        let mut reader = self.reader();
        self.wait_until(text, || read(&mut reader).contains(text).then_some(()));
    }

    /// What it has written so far.
    pub(crate) fn output(&self) -> String {
        read(&mut self.reader())
    }

    /// The output with a position of its own: the program's is where it goes on writing.
    fn reader(&self) -> File {
        File::open(format!("/proc/self/fd/{}", self.output.as_raw_fd())).unwrap()
    }

    /// Waits for its end, at most `limit`.
    pub(crate) fn wait_within(mut self, limit: Duration) -> Ended {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Ended { code: status.code(), output: self.output() };
            }
            assert!(began.elapsed() < limit, "it still runs after {limit:?}\n{}", self.output());
            pause();
        }
    }

    pub(crate) fn wait(self) -> Ended {
        self.wait_within(LIMIT)
    }

    /// Waits until `look` finds something, while the program runs.
    pub(crate) fn wait_until<T>(&mut self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended before {what}: {ended:?}\n{}", self.output());
            assert!(began.elapsed() < LIMIT, "no {what} after {LIMIT:?}\n{}", self.output());
            pause();
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // A test that failed in between: mpirun ends its ranks on SIGTERM, and cannot on SIGKILL.
        let ended = |child: &mut Child| child.try_wait().map_or(true, |status| status.is_some());
        if ended(&mut self.child) {
            return;
        }
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let began = Instant::now();
        while began.elapsed() < FAREWELL && !ended(&mut self.child) {
            pause();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Asserts the exit code, with the output where it is another.
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}", self.output);
        self
    }

    /// Asserts that the output holds `text`.
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.output.contains(text), "{text:?} is not in\n{}", self.output);
        self
    }
}

fn read(reader: &mut File) -> String {
    let mut bytes = Vec::new();
    reader.rewind().unwrap();
    reader.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn pause() {
    std::thread::sleep(Duration::from_millis(2));
}

/// A place for runs, with a text to train on.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let line = |i: usize| format!("line {} of a text that goes on and on, {}\n", i * i % 97, i * 31 % 89);
        fs::write(dir.path().join("text.txt"), (0..1000).map(line).collect::<String>()).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The run directory `name`, which may not exist yet.
    pub(crate) fn run(&self, name: &str) -> Run {
        Run { dir: self.dir.path().join(name), text: self.dir.path().join("text.txt") }
    }
}

/// One run directory.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) dir: PathBuf,
    pub(crate) text: PathBuf,
}

/// A model that trains in milliseconds a step, the same whatever the layout.
const SMALL: [&str; 12] = [
    "model.hidden_size=32",
    "model.expert_ffn_size=32",
    "model.experts=4",
    "router.balance_scope=global",
    "train.global_batch=8",
    "train.sequence_length=32",
    "train.eval_every=0",
    "train.eval_batches=1",
    "train.checkpoint_every=0",
    "train.log_every=10",
    "schedule.steps=60",
    "run.threads=1",
];

impl Run {
    /// Arguments of moe-worker for a small run up to `steps`, to which a test adds its own.
    pub(crate) fn args(&self, steps: u64) -> Vec<String> {
        let mut args: Vec<String> = SMALL.iter().flat_map(|set| ["--set".into(), (*set).into()]).collect();
        for (flag, value) in [("--data", &self.text), ("--run-dir", &self.dir)] {
            args.extend([flag.into(), value.to_str().unwrap().into()]);
        }
        args.extend(["--steps".into(), steps.to_string()]);
        args
    }

    /// `metrics.jsonl`, with a last line that is not whole left out.
    pub(crate) fn metrics(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.dir.join("metrics.jsonl")).unwrap_or_default();
        text.split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The loss of each step.
    pub(crate) fn losses(&self) -> Vec<f64> {
        self.metrics().iter().map(|step| step["loss"].as_f64().unwrap()).collect()
    }

    /// Asserts that the metrics have the steps 1 to `last`, each once.
    pub(crate) fn has_each_step_once(&self, last: u64) {
        let steps: Vec<u64> = self.metrics().iter().map(|step| step["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=last).collect::<Vec<_>>());
    }

    /// Steps of the complete checkpoints, ascending.
    pub(crate) fn checkpoints(&self) -> Vec<u64> {
        let Ok(entries) = fs::read_dir(self.dir.join("checkpoints")) else { return Vec::new() };
        let step = |entry: fs::DirEntry| {
            let complete = entry.path().join("manifest.json").exists();
            entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok().filter(|_| complete)
        };
        let mut steps: Vec<u64> = entries.flatten().filter_map(step).collect();
        steps.sort_unstable();
        steps
    }

    pub(crate) fn checkpoint(&self, step: u64) -> PathBuf {
        self.dir.join(format!("checkpoints/step-{step:08}"))
    }
}

/// Asserts that two checkpoints hold the same files with the same bytes.
pub(crate) fn assert_same_files(found: &Path, expected: &Path) {
    let files = |dir: &Path| -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
    };
    let (found, expected) = (files(found), files(expected));
    assert!(expected.len() > 2, "{:?}", expected.keys());
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, bytes) in &expected {
        assert!(found[name] == *bytes, "{name} differs");
    }
}
