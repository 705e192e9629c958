//! Bad input to the real programs: each row an input, its exit code, and a message that names file, key, value and mend; and what
//! is on the disk afterwards: nothing half-written, nothing lost.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod checkpoints;
mod disk;
#[path = "../../../runtime/tests/support/mpirun.rs"]
mod mpirun;
#[path = "../../../runtime/tests/support/process.rs"]
mod process;
mod ranks;
mod settings;
mod shards;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use process::{Ended, Program, Run};

const BAD_DATA: i32 = 65;
const REFUSED: i32 = 77;

/// More steps than a test waits for.
const FOR_EVER: u64 = 1_000_000;

/// moe-launch with `args`.
fn launch<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-launch"));
    command.args(args);
    command
}

/// moe-worker beside it, which cargo builds here if only this package was asked for.
fn worker_program() -> PathBuf {
    let worker = Path::new(env!("CARGO_BIN_EXE_moe-launch")).with_file_name("moe-worker");
    if !worker.exists() {
        let build =
            Command::new(env!("CARGO")).args(["build", "--package", "moe-runtime", "--bin", "moe-worker"]).status();
        assert!(build.unwrap().success(), "moe-worker could not be built");
    }
    worker
}

/// moe-worker alone on `run` up to `steps`, with `more` arguments.
fn worker(run: &Run, steps: u64, more: &[&str]) -> Command {
    let mut command = Command::new(worker_program());
    command.args(run.args(steps)).args(more).current_dir(run.dir.parent().unwrap());
    command
}

/// The same with `value` in place of what `run` gives `flag`.
fn worker_with(run: &Run, flag: &str, value: &str) -> Command {
    let mut args = run.args(2);
    let place = args.iter().position(|arg| arg == flag).unwrap() + 1;
    args[place] = value.into();
    let mut command = Command::new(worker_program());
    command.args(args);
    command
}

fn wait(command: Command) -> Ended {
    Program::start(command).wait()
}

/// `command` with what a shell does before it becomes it.
fn after(script: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{script} exec \"$@\""), "sh"]).arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        shell.current_dir(dir);
    }
    shell
}

/// Every file below `dir` with its bytes, but for those that say only who was here.
fn files_below(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let Ok(entries) = fs::read_dir(dir) else { return files };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if !path.ends_with("lock") && !path.parent().unwrap().ends_with("logs") {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// Names in `dir`, sorted; none where it is not.
fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn copy_below(from: &Path, to: &Path) {
    for (path, bytes) in files_below(from) {
        let copy = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::write(copy, bytes).unwrap();
    }
}

/// Asserts that a refusal is told in one line.
fn in_one_line(ended: Ended) -> Ended {
    let errors = ended.output.lines().filter(|line| line.contains("error: ")).count();
    assert_eq!(errors, 1, "{}", ended.output);
    ended
}
