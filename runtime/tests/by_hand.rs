//! Ranks that are started one by one, without MPI: they train as one does, and leave when one of them is lost.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use support::process::{DONE, IO, Place, Program, RETRY, Run, Signal, USAGE};

const WORKER: &str = env!("CARGO_BIN_EXE_moe-worker");
const TOKEN: &str = "00112233445566778899aabbccddeeff";

/// An address that was free a moment ago.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn rank(run: &Run, (rank, of): (usize, usize), coordinator: Option<&str>, steps: u64, more: &[&str]) -> Program {
    let mut command = Command::new(WORKER);
    command.args(run.args(steps)).args([
        "--device",
        "cpu",
        "--rank",
        &rank.to_string(),
        "--world-size",
        &of.to_string(),
    ]);
    if let Some(addr) = coordinator {
        command.args(["--coordinator", addr, "--join-token", TOKEN]);
    }
    if coordinator.is_some() && rank == 0 {
        command.arg("--host-coordinator");
    }
    command.args(more);
    Program::start(command)
}

fn ranks(run: &Run, of: usize, steps: u64, more: &[&str]) -> Vec<Program> {
    let addr = free_address();
    // The last first: a coordinator may come later than those that look for it.
    (0..of).rev().map(|number| rank(run, (number, of), Some(&addr), steps, more)).rev().collect()
}

#[test]
fn three_ranks_started_by_hand_train_as_one_does() {
    let place = Place::new();
    let (one, run) = (place.run("one"), place.run("three"));
    rank(&one, (0, 1), None, 10, &[]).wait().expect(DONE);
    let started = ranks(&run, 3, 10, &["--ep", "1"]);
    for (number, program) in started.into_iter().enumerate() {
        let ended = program.wait().expect(DONE);
        assert_eq!(ended.output.contains("3 = 1 expert-parallel x 3 data-parallel"), number == 0, "{}", ended.output);
    }
    run.has_each_step_once(10);
    for (a, b) in run.losses().iter().zip(one.losses()) {
        assert!((a - b).abs() <= 1e-3 * b.abs(), "loss {a}, expected {b}");
    }
}

#[test]
fn a_killed_rank_is_named_by_the_others_which_end_with_75() {
    let place = Place::new();
    let run = place.run("killed");
    let mut started = ranks(&run, 3, 1_000_000, &["--ep", "1"]);
    started[0].wait_until("a step", || (!run.metrics().is_empty()).then_some(()));
    started[2].signal(Signal::KILL);
    started.truncate(2);
    for program in started {
        program.wait_within(Duration::from_secs(20)).expect(RETRY).says("rank 2");
    }
}

#[test]
fn a_rank_that_fails_alone_tells_the_others_why() {
    let place = Place::new();
    let (run, addr) = (place.run("alone"), free_address());
    let nowhere = "/proc/nowhere/trace.json";
    let fails = rank(&run, (1, 2), Some(&addr), 1_000_000, &["--trace", nowhere]);
    let other = rank(&run, (0, 2), Some(&addr), 1_000_000, &[]);
    fails.wait().expect(IO).says(nowhere);
    other
        .wait_within(Duration::from_secs(20))
        .expect(RETRY)
        .says(&format!("because of rank 1: rank 1 failed: {nowhere}"));
}

#[test]
fn several_ranks_without_a_coordinator_are_told_how_to_start() {
    let place = Place::new();
    let ended = rank(&place.run("lost"), (1, 2), None, 10, &[]).wait().expect(USAGE);
    ended.says("rank 1 of 2 by --rank").says("give all of them --coordinator HOST:PORT");
}
