//! Whole runs of moe-worker under mpirun: they end as one process would, resume after a lost rank, and stop as one.
#![cfg(feature = "mpi")]
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use std::process::Command;
use std::time::Duration;

use support::mpirun::{available, mpirun, signal_rank};
use support::process::{DONE, Ended, INTERNAL, Place, Program, RETRY, Run, Signal, USAGE};

const WORKER: &str = env!("CARGO_BIN_EXE_moe-worker");

/// More steps than a test waits for.
const FOR_EVER: u64 = 1_000_000;

/// `mpirun -n ranks moe-worker` on `run` up to `steps`, with more `--set`s.
fn launch(ranks: usize, run: &Run, steps: u64, sets: &[&str]) -> Program {
    let mut command = mpirun(ranks, run.dir.parent().unwrap());
    command.arg(WORKER).args(run.args(steps)).args(sets.iter().flat_map(|set| ["--set", set]));
    Program::start(command)
}

/// One process without mpirun.
fn alone(run: &Run, steps: u64) -> Program {
    let mut command = Command::new(WORKER);
    command.args(run.args(steps));
    Program::start(command)
}

fn assert_same_losses(found: &Run, expected: &Run) {
    let (found, expected) = (found.losses(), expected.losses());
    assert_eq!(found.len(), expected.len());
    for (step, (a, b)) in found.iter().zip(&expected).enumerate() {
        assert!((a - b).abs() <= 1e-3 * b.abs(), "step {}: loss {a}, expected {b}", step + 1);
    }
}

#[test]
fn four_and_sixteen_ranks_train_as_one_does() {
    if !available() {
        return;
    }
    let place = Place::new();
    let one = place.run("one");
    alone(&one, 20).wait().expect(DONE).says("1 = 1 expert-parallel x 1 data-parallel");
    for (ranks, grid) in [(4, "4 = 4 expert-parallel x 1"), (16, "16 = 4 expert-parallel x 4")] {
        let run = place.run(&ranks.to_string());
        let job = launch(ranks, &run, 20, &[]);
        let ended = job.wait().expect(DONE).says(&format!("{grid} data-parallel"));
        assert_eq!(ended.output.matches("run directory").count(), 1, "one rank speaks:\n{}", ended.output);
        run.has_each_step_once(20);
        assert_eq!(run.checkpoints(), [20]);
        assert_same_losses(&run, &one);
    }
}

#[test]
fn a_killed_rank_ends_the_job_soon_and_the_next_start_resumes() {
    if !available() {
        return;
    }
    let place = Place::new();
    let (run, undisturbed) = (place.run("killed"), place.run("undisturbed"));
    let mut job = launch(4, &run, FOR_EVER, &["train.checkpoint_every=10"]);
    job.wait_until("a checkpoint and a step after it", || {
        run.checkpoints().last().filter(|&&step| run.metrics().len() as u64 > step).map(|_| ())
    });
    signal_rank(&job, 2, Signal::KILL);
    let ended = job.wait_within(Duration::from_secs(20));
    assert_ne!(ended.code, Some(DONE), "{}", ended.output);
    let done = *run.checkpoints().last().unwrap();
    // The same ranks, and then one alone.
    let resumed = launch(4, &run, done + 5, &[]).wait().expect(DONE);
    resumed.says(&format!("resuming       after step {done}"));
    alone(&run, done + 8).wait().expect(DONE);
    run.has_each_step_once(done + 8);
    alone(&undisturbed, done + 8).wait().expect(DONE);
    assert_same_losses(&run, &undisturbed);
}

#[test]
fn a_graceful_stop_reaches_every_rank_and_is_mpiruns_exit_code() {
    if !available() {
        return;
    }
    let place = Place::new();
    let run = place.run("stopped");
    let mut job = launch(4, &run, FOR_EVER, &[]);
    job.wait_until("three steps", || (run.metrics().len() >= 3).then_some(()));
    job.signal(Signal::USR1);
    let ended = job.wait().expect(RETRY).says("stopped after step");
    assert!(!ended.output.contains("error:") && !ended.output.contains("given up"), "{}", ended.output);
    let done = run.metrics().len() as u64;
    assert_eq!(run.checkpoints(), [done]);
    launch(2, &run, done + 3, &[]).wait().expect(DONE);
    run.has_each_step_once(done + 3);
}

#[test]
fn ranks_that_wait_in_vain_say_for_whom_and_leave() {
    if !available() {
        return;
    }
    let place = Place::new();
    let run = place.run("stuck");
    let job = launch(4, &run, 5, &[]);
    job.wait().expect(DONE);
    // Without checkpoints: while one is written, ranks wait longer for each other's storage.
    let mut job = launch(4, &run, FOR_EVER, &["run.collective_timeout_s=2"]);
    job.wait_until("steps after the checkpoint", || (run.metrics().len() > 6).then_some(()));
    signal_rank(&job, 2, Signal::STOP);
    let ended = job.wait_within(Duration::from_secs(30)).expect(RETRY).says("waited 2 s for rank");
    let ended = ended.says(&format!("the last checkpoint is {}", run.checkpoint(5).display()));
    // Ranks that are held up by others name those; the coordinator, who hears all of them, names the culprit.
    ended.says("waited in vain for rank 2");
    launch(4, &run, 7, &[]).wait().expect(DONE);
    run.has_each_step_once(7);
}

#[test]
fn what_rank_0_refuses_all_ranks_leave_with_and_one_says_why() {
    if !available() {
        return;
    }
    let place = Place::new();
    let run = place.run("refused");
    let job = launch(4, &run, 5, &["parallel.ep=3"]);
    let ended = job.wait().expect(USAGE).says("parallel.ep = 3: must divide both the 4 ranks and model.experts = 4");
    assert_eq!(ended.output.matches("error:").count(), 1, "{}", ended.output);
}

#[test]
fn of_what_all_ranks_meet_one_speaks() {
    if !available() {
        return;
    }
    let place = Place::new();
    let once = |ended: Ended| assert_eq!(ended.output.matches("error:").count(), 1, "{}", ended.output);
    once(launch(4, &place.run("nan"), 5, &["optimizer.lr=1e30"]).wait().expect(INTERNAL).says("step 2: the"));
    let run = place.run("damaged");
    launch(4, &run, 5, &[]).wait().expect(DONE);
    let file = run.checkpoint(5).join("optimizer.expert-00002.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    once(launch(4, &run, 8, &[]).wait().expect(65).says("optimizer.expert-00002.safetensors: damaged"));
}
