//! moe-launch as users start it: real mpirun, real ranks, real signals.

// The lint spares test functions, not what they share.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// No wait of these tests is longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// moe-launch with moe-worker beside it, which cargo builds here if only this package was asked for.
fn launch(args: &[&str]) -> Command {
    let launch = PathBuf::from(env!("CARGO_BIN_EXE_moe-launch"));
    if !launch.with_file_name("moe-worker").exists() {
        let build =
            Command::new(env!("CARGO")).args(["build", "--package", "moe-runtime", "--bin", "moe-worker"]).status();
        assert!(build.unwrap().success(), "moe-worker could not be built");
    }
    let mut command = Command::new(launch);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn output(args: &[&str]) -> Output {
    launch(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Waits until `ready`, or fails with what the child said.
fn wait_until(child: &mut Child, what: &str, mut ready: impl FnMut() -> bool) {
    let began = Instant::now();
    while !ready() {
        if let Some(status) = child.try_wait().unwrap() {
            panic!("moe-launch ended with {status} before {what}");
        }
        if began.elapsed() > PATIENCE {
            // The ranks end with it; what is reported is the test's failure.
            let _ = child.kill();
            panic!("waited for {what} in vain");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn steps_done(run_dir: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
    let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
    text.lines().filter_map(step).collect()
}

/// A run small enough to take a hundred steps a second.
const SMALL: [&str; 6] =
    ["--set", "train.sequence_length=16", "--set", "train.global_batch=2", "--set", "train.eval_every=0"];

/// A job of two ranks without an end, in the midst of it, which may be started again twice.
fn run_that_would_restart(dir: &Path) -> Child {
    let mut args = vec!["run", "-n", "2", "--restarts", "2", "--", "--run-dir", dir.to_str().unwrap()];
    args.extend(["--steps", "1000000"]);
    args.extend(SMALL);
    let mut child = launch(&args).spawn().unwrap();
    wait_until(&mut child, "three steps", || steps_done(dir).len() > 3);
    child
}

/// The last step that was done; it is saved.
fn assert_ended_in_a_checkpoint(dir: &Path) -> u64 {
    let last = *steps_done(dir).last().unwrap();
    assert!(dir.join(format!("checkpoints/step-{last:08}/manifest.json")).exists());
    last
}

#[test]
fn an_interrupt_becomes_a_checkpoint_and_no_restart() {
    let folder = tempfile::tempdir().unwrap();
    let child = run_that_would_restart(folder.path());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{said}");
    assert!(said.contains("stopping after this step") && !said.contains("starting it again"), "{said}");
    assert_ended_in_a_checkpoint(folder.path());
}

#[test]
fn an_order_to_stop_becomes_a_checkpoint_and_no_restart() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let child = run_that_would_restart(folder.path());
    let ordered = output(&["stop", "--run-dir", dir]);
    assert!(ordered.status.success(), "{}", text(&ordered.stderr));
    assert!(text(&ordered.stdout).contains("ordered at step"), "{}", text(&ordered.stdout));
    let ended = child.wait_with_output().unwrap();
    let said = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(75), "{said}");
    assert!(!said.contains("starting it again") && !said.contains("error:"), "{said}");
    let last = assert_ended_in_a_checkpoint(folder.path());

    // What is left of it is told; there is nothing more to stop.
    let told = format!("the job has ended, after step {last} of 1000000");
    for command in ["status", "save", "stop"] {
        let ended = output(&[command, "--run-dir", dir]);
        assert_eq!((ended.status.code(), text(&ended.stdout)), (Some(75), String::new()), "{command}");
        assert!(text(&ended.stderr).contains(&told), "{command}: {}", text(&ended.stderr));
    }
    let status: serde_json::Value =
        serde_json::from_slice(&output(&["status", "--run-dir", dir, "--json"]).stdout).unwrap();
    assert_eq!((&status["phase"], &status["step"]), (&"ended".into(), &last.into()));
}

#[test]
fn a_reader_that_goes_away_ends_a_command_without_a_word() {
    use std::os::unix::process::ExitStatusExt;
    let config = ["--preset", "tiny", "-n", "2", "--memory", "8", "--gemm", "80", "--memory-rate", "10"];
    let plan = [&["plan"], &config[..], &["--exchange", "3"]].concat();
    for args in [&plan[..], &["completions", "bash"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = launch(args).stdout(writer).output().unwrap();
        assert_eq!((ended.status.signal(), text(&ended.stderr)), (Some(13), String::new()), "{args:?}");
    }
}

#[test]
fn an_interrupt_before_the_ranks_have_begun_is_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let mut args = vec!["run", "-n", "2", "--", "--run-dir", dir.to_str().unwrap(), "--steps", "1000000"];
    args.extend(SMALL);
    for wait_ms in [0, 150, 300] {
        let mut child = launch(&args).spawn().unwrap();
        // A process that listens has more threads than its first; before that a signal simply ends it.
        let tasks = format!("/proc/{}/task", child.id());
        wait_until(&mut child, "its threads", || std::fs::read_dir(&tasks).is_ok_and(|tasks| tasks.count() > 1));
        std::thread::sleep(Duration::from_millis(wait_ms));
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(75), "after {wait_ms} ms: {}", text(&ended.stderr));
    }
}

#[test]
fn a_killed_rank_is_answered_by_a_new_epoch_that_goes_on_from_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let mut args = vec!["run", "-n", "2", "--restarts", "1", "--", "--run-dir", dir, "--steps", "400"];
    args.extend(SMALL);
    args.extend(["--set", "train.checkpoint_every=50"]);
    let mut child = launch(&args).spawn().unwrap();
    wait_until(&mut child, "a checkpoint", || folder.path().join("checkpoints/step-00000050/manifest.json").exists());
    let status = output(&["status", "--run-dir", dir, "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["epoch"], 1, "{status}");
    let rank_1 = status["ranks"][1]["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(i32::try_from(rank_1).unwrap()).unwrap(), Signal::KILL).unwrap();
    let output = child.wait_with_output().unwrap();
    let (said, shown) = (text(&output.stderr), text(&output.stdout));
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("starting it again, 1 of 1 restarts left"), "{said}");
    assert!(shown.contains("resuming       after step"), "{shown}");
    assert_eq!(steps_done(folder.path()), (1..=400).collect::<Vec<_>>());
}

#[test]
fn a_killed_rank_without_restarts_left_is_a_temporary_failure() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let mut args = vec!["run", "-n", "2", "--", "--run-dir", dir, "--steps", "1000000"];
    args.extend(SMALL);
    let mut child = launch(&args).spawn().unwrap();
    wait_until(&mut child, "three steps", || steps_done(folder.path()).len() > 3);
    // A checkpoint that was ordered is written while the run goes on.
    let saved = output(&["save", "--run-dir", dir]);
    assert!(saved.status.success() && text(&saved.stdout).contains("ordered at step"), "{}", text(&saved.stderr));
    let checkpoint = || {
        std::fs::read_dir(folder.path().join("checkpoints"))
            .is_ok_and(|mut all| all.any(|entry| entry.is_ok_and(|entry| entry.path().join("manifest.json").exists())))
    };
    wait_until(&mut child, "the checkpoint", checkpoint);
    let status: serde_json::Value =
        serde_json::from_slice(&output(&["status", "--run-dir", dir, "--json"]).stdout).unwrap();
    let rank_1 = status["ranks"][1]["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(i32::try_from(rank_1).unwrap()).unwrap(), Signal::KILL).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(75), "{}", text(&ended.stderr));
}

#[test]
fn wrong_use_ends_before_any_rank_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let dir = dir.to_str().unwrap();
    #[rustfmt::skip]
    let table: [(&[&str], &str); 6] = [
        (&["-n", "0"], "at least 1 rank"),
        (&["-n", "2", "--", "--run-dir", dir, "--ep", "3"], "parallel.ep = 3"),
        (&["-n", "2", "--", "--run-dir", dir, "--set", "model.expert=4"], "did you mean model.experts?"),
        (&["-n", "2", "--", "--no-such-flag"], "--no-such-flag"),
        (&["-n", "2", "--restarts", "1"], "--run-dir"),
        (&["-n", "4", "--hosts", "a:1,b:2"], "room for 3 ranks"),
    ];
    for (args, message) in table {
        let output = output(&[&["run"], args].concat());
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(64) && said.contains(message), "{args:?}: {}: {said}", output.status);
    }
    assert!(!Path::new(dir).exists(), "nothing was made");
}

#[test]
fn a_machine_that_nobody_knows_is_named_and_not_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    let output = output(
        &[
            &["run", "-n", "2", "--hosts", "no-such-host.invalid:2", "--restarts", "3"][..],
            &["--", "--run-dir", dir.to_str().unwrap(), "--steps", "2"],
        ]
        .concat(),
    );
    let said = text(&output.stderr);
    assert!(said.contains("error: --hosts no-such-host.invalid: mpirun ended with"), "{said}");
    assert!(output.status.code() == Some(64) && !said.contains("starting it again"), "{said}");
}

#[test]
fn the_doctor_lets_two_ranks_meet() {
    let output = output(&["doctor", "--json"]);
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let level = |name: &str| findings.iter().find(|finding| finding["name"] == name).unwrap()["level"].clone();
    for name in ["cpu", "cores", "memory", "mpi", "slots", "gpu", "network", "open files", "clock", "disk"] {
        assert_ne!(level(name), "problem", "{findings:?}");
    }
    assert_eq!(level("two ranks"), "ok", "{findings:?}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn completions_and_pages_know_every_command() {
    let output = output(&["completions", "bash"]);
    let script = text(&output.stdout);
    assert!(output.status.success() && script.contains("doctor") && script.contains("--restarts"));
    let worker = self::output(&["completions", "zsh", "--of", "moe-worker"]);
    assert!(text(&worker.stdout).contains("--run-dir"));
    let folder = tempfile::tempdir().unwrap();
    let made = self::output(&["man", "--out", folder.path().to_str().unwrap()]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    for page in ["moe-launch.1", "moe-launch-plan.1", "moe-launch-run.1", "moe-worker.1"] {
        assert!(folder.path().join(page).exists(), "{page}");
    }
}
