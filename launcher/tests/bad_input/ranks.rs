//! Ranks that do not come, are not let in, or find their place taken.
#![cfg(feature = "mpi")]

use std::net::TcpListener;
use std::time::Duration;

use super::mpirun::{available, mpirun};
use super::process::{DONE, IO, Place, Program, RETRY, Signal, USAGE};
use super::{FOR_EVER, REFUSED, files_below, in_one_line, wait, worker, worker_program};

const TOKEN: &str = "00112233445566778899aabbccddeeff";
const OTHER: &str = "ffeeddccbbaa99887766554433221100";

#[test]
fn a_port_that_is_taken_is_named() {
    let place = Place::new();
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let addr = format!("127.0.0.1:{}", taken.local_addr().unwrap().port());
    let run = place.run("run");
    let refused = wait(worker(&run, 2, &["--host-coordinator", "--coordinator", &addr, "--join-token", TOKEN]));
    let message = format!("--coordinator {addr}: cannot listen on port {}: Address already in use", &addr[10..]);
    in_one_line(refused.expect(IO).says(&message).says("end what listens there, or give another port"));
    assert!(run.metrics().is_empty() && run.checkpoints().is_empty());
    drop(taken);
    wait(worker(&run, 2, &["--host-coordinator", "--coordinator", &addr, "--join-token", TOKEN])).expect(DONE);
}

#[test]
fn a_wrong_join_token_is_refused_and_disturbs_nobody() {
    let place = Place::new();
    // Free a moment ago: the job that hosts the coordinator takes it.
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let at = ["--coordinator", &addr, "--join-token"];
    let run = place.run("host");
    let mut host = Program::start(worker(&run, FOR_EVER, &[&at[..], &[TOKEN, "--host-coordinator"]].concat()));
    host.wait_until("a step", || (!run.metrics().is_empty()).then_some(()));
    let stranger = place.run("stranger");
    let refused = in_one_line(wait(worker(&stranger, 2, &[&at[..], &[OTHER]].concat())).expect(REFUSED));
    refused.says(&format!(
        "the coordinator at {addr} refused the join token; take it from this run (MOE_JOIN_TOKEN or coordinator.json)"
    ));
    assert!(stranger.metrics().is_empty());
    let none = wait(worker(&place.run("none"), 2, &[&at[..], &["short"]].concat())).expect(USAGE);
    in_one_line(none);
    assert!(!place.run("none").dir.exists());
    let steps = run.metrics().len();
    host.wait_until("further steps", || (run.metrics().len() > steps).then_some(()));
    host.signal(Signal::USR1);
    host.wait().expect(RETRY);
    run.has_each_step_once(run.metrics().len() as u64);
}

#[test]
fn a_rank_that_never_arrives_is_waited_for_no_longer_than_asked() {
    if !available() {
        return;
    }
    let place = Place::new();
    let run = place.run("lonely");
    let mut command = mpirun(1, place.path());
    command.arg(worker_program()).args(run.args(2)).args(["--start-timeout", "2"]);
    command.args([":", "-n", "1", "sleep", "100"]);
    let ended = Program::start(command).wait_within(Duration::from_secs(30)).expect(RETRY);
    ended.says("rank 0: not all 2 ranks have started within 2 s: one never arrived").says("--start-timeout");
    assert!(!run.dir.exists(), "nothing was begun");
}

#[test]
fn a_second_job_on_a_run_directory_changes_nothing_in_it() {
    let place = Place::new();
    let run = place.run("busy");
    let mut first = Program::start(worker(&run, FOR_EVER, &["--set", "train.log_every=1000"]));
    first.wait_until("a step", || (!run.metrics().is_empty()).then_some(()));
    let config = files_below(&run.dir).remove(&run.dir.join("config.toml")).unwrap();
    let second = wait(worker(&run, 3, &["--seed", "9"]));
    let message =
        format!("{}: in use by another job; wait for it, stop it, or give another --run-dir", run.dir.display());
    in_one_line(second.expect(RETRY).says(&message));
    assert_eq!(files_below(&run.dir).remove(&run.dir.join("config.toml")).unwrap(), config);
    first.signal(Signal::USR1);
    first.wait().expect(RETRY);
    run.has_each_step_once(run.metrics().len() as u64);
}
