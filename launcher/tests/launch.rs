//! moe-launch with real jobs: starting and stopping them, looking at them, and what comes of their results.
#![cfg(feature = "mpi")]
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

#[path = "../../runtime/tests/support/mpirun.rs"]
mod mpirun;
#[path = "../../runtime/tests/support/process.rs"]
mod process;

use std::path::Path;
use std::process::Command;

use mpirun::{apart, available};
use process::{DONE, IO, Place, Program, RETRY, Run, Signal, USAGE};
use serde_json::Value;

const LAUNCH: &str = env!("CARGO_BIN_EXE_moe-launch");

/// More steps than a test waits for.
const FOR_EVER: u64 = 1_000_000;

fn moe_launch(args: &[&str]) -> Command {
    let mut command = Command::new(LAUNCH);
    command.args(args);
    command
}

/// `moe-launch run -n 2` of a small run up to `steps`, with more `--set`s.
fn job(run: &Run, steps: u64, sets: &[&str]) -> Program {
    let worker = Path::new(LAUNCH).with_file_name("moe-worker");
    assert!(worker.exists(), "{} is missing: `cargo test --workspace` builds it", worker.display());
    let mut command = moe_launch(&["run", "-n", "2", "--"]);
    command.args(run.args(steps)).args(sets.iter().flat_map(|set| ["--set", set]));
    apart(&mut command, run.dir.parent().unwrap());
    Program::start(command)
}

/// What `moe-launch status` says of `run`.
fn status(run: &Run, more: &[&str]) -> String {
    let dir = run.dir.to_str().unwrap();
    Program::start(moe_launch(&[&["status", "--run-dir", dir], more].concat())).wait().expect(DONE).output
}

#[test]
fn a_job_is_watched_stopped_with_ctrl_c_and_continued() {
    if !available() {
        return;
    }
    let place = Place::new();
    let run = place.run("watched");
    let mut first = job(&run, FOR_EVER, &[]);
    first.wait_until("three steps", || (run.metrics().len() >= 3).then_some(()));
    // Progress comes with the next heartbeat.
    let table = first.wait_until("two ranks that train", || {
        let table = status(&run, &[]);
        (table.matches("live, training").count() == 2).then_some(table)
    });
    assert!(table.starts_with("running") && table.contains("EP 2 × DP 1"), "{table}");
    let object: Value = serde_json::from_str(&status(&run, &["--json"])).unwrap();
    assert_eq!(object["phase"], "running");
    assert!(object["step"].as_u64().unwrap() > 0, "{object}");
    let ranks = object["ranks"].as_array().unwrap();
    for (index, rank) in ranks.iter().enumerate() {
        let process = std::fs::read_to_string(format!("/proc/{}/comm", rank["pid"])).unwrap();
        assert_eq!((rank["rank"].as_u64(), process.trim()), (Some(index as u64), "moe-worker"), "{object}");
    }
    assert_eq!(ranks.len(), 2);

    first.signal(Signal::INT);
    let ended = first.wait().expect(RETRY).says("stopping after this step").says("stopped after step");
    assert!(!ended.output.contains("error:"), "{}", ended.output);
    let done = run.metrics().len() as u64;
    assert_eq!(run.checkpoints(), [done]);
    job(&run, done + 3, &[]).wait().expect(DONE).says(&format!("resuming       after step {done}"));
    run.has_each_step_once(done + 3);
}

#[test]
fn a_second_request_gives_up_the_step() {
    if !available() {
        return;
    }
    let place = Place::new();
    let run = place.run("given-up");
    // Steps long enough that the first request cannot be fulfilled before the second comes.
    let mut job = job(&run, FOR_EVER, &["train.global_batch=400"]);
    job.wait_until("a step", || (!run.metrics().is_empty()).then_some(()));
    job.signal(Signal::TERM);
    job.wait_for("a second signal gives the step up");
    job.signal(Signal::INT);
    job.wait().expect(RETRY).says("giving up the step").says("was given up");
    assert_eq!(run.checkpoints(), [0; 0]);
}

#[test]
fn a_refusal_of_the_workers_is_the_exit_code() {
    if !available() {
        return;
    }
    let place = Place::new();
    let run = place.run("refused");
    let mut command = moe_launch(&["run", "-n", "2", "--", "--set", "model.experts=0.5"]);
    apart(&mut command, place.path());
    Program::start(command).wait().expect(USAGE).says("model.experts");
    assert!(!run.dir.exists());
    Program::start(moe_launch(&["run", "-n", "0"])).wait().expect(USAGE).says("at least 1 rank");
}

#[test]
fn without_mpirun_the_mend_is_told() {
    let mut command = moe_launch(&["run", "-n", "2"]);
    command.env("PATH", "/nowhere");
    Program::start(command).wait().expect(IO).says("cannot start mpirun").says("apt-get install");
}

#[test]
fn a_trained_model_writes() {
    let place = Place::new();
    let run = place.run("trained");
    let mut command = Command::new(Path::new(LAUNCH).with_file_name("moe-worker"));
    command.args(run.args(40));
    Program::start(command).wait().expect(DONE);
    let write = |checkpoint: &Path, more: &[&str]| {
        let mut command = moe_launch(&["generate", "--prompt", "line ", "--tokens", "24", "--checkpoint"]);
        command.arg(checkpoint).args(more);
        Program::start(command).wait().expect(DONE).output
    };
    let text = write(&run.dir, &[]);
    assert!(text.starts_with("line ") && text.ends_with('\n'), "{text:?}");
    assert!(text.trim_end().chars().count() > "line ".len(), "{text:?}");
    assert_eq!(write(&run.checkpoint(40), &[]), text, "the newest checkpoint of a run, and that checkpoint");
    assert_ne!(write(&run.dir, &["--seed", "2", "--temperature", "2"]), text);
    let likeliest = write(&run.dir, &["--temperature", "0"]);
    assert_eq!(write(&run.dir, &["--temperature", "0", "--seed", "2"]), likeliest);

    let empty = place.run("empty");
    std::fs::create_dir_all(&empty.dir).unwrap();
    let nothing = moe_launch(&["generate", "--checkpoint", empty.dir.to_str().unwrap()]);
    Program::start(nothing).wait().expect(USAGE);
}

#[test]
fn the_training_benchmark_prints_its_figures() {
    let small = ["--set", "model.layers=1", "--set", "train.global_batch=2", "--set", "train.sequence_length=32"];
    let args = ["bench", "train", "--preset", "tiny", "--device", "cpu", "--steps", "2", "--threads", "1", "--json"];
    let ended = Program::start(moe_launch(&[&args[..], &small].concat())).wait().expect(DONE);
    let object: Value = serde_json::from_str(&ended.output).unwrap();
    for key in ["tokens_per_s", "step_ms", "gemm_gflops", "fraction_of_gemm"] {
        assert!(object[key].as_f64().unwrap() > 0.0, "{key} in {object}");
    }
    assert!(!object["stages"].as_array().unwrap().is_empty());
}

#[test]
fn the_collectives_benchmark_counts_every_collective_at_every_size() {
    let args = ["bench", "collectives", "--device", "cpu", "--mib", "0.01", "--mib", "0.1", "--json"];
    let ended = Program::start(moe_launch(&args)).wait().expect(DONE);
    let object: Value = serde_json::from_str(&ended.output).unwrap();
    assert_eq!(object["ranks"], 1);
    let cases = object["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5 * 2);
    assert!(cases.iter().all(|case| case["us"].as_f64().unwrap() > 0.0 && case["algorithm_gbs"].as_f64().is_some()));
    let refused = Program::start(moe_launch(&["bench", "collectives", "--mib", "0"])).wait().expect(USAGE);
    assert!(refused.output.contains("--mib 0: accepted: 0.001 to 16384"), "{}", refused.output);
}

#[test]
fn the_routers_benchmark_trains_the_gates_that_are_named() {
    let place = Place::new();
    let run = place.run("text");
    let text = run.text.to_str().unwrap();
    let small = ["--set", "model.layers=1", "--set", "train.global_batch=2", "--set", "train.sequence_length=32"];
    let bench = |more: &[&str]| {
        let args = ["bench", "routers", "--device", "cpu", "--threads", "1", "--json", "--text", text];
        Program::start(moe_launch(&[&args[..], &small, more].concat())).wait().expect(DONE)
    };
    let object: Value =
        serde_json::from_str(&bench(&["--only", "switch,sinkhorn", "--steps", "4", "--seeds", "2"]).output).unwrap();
    let gates = object["gates"].as_array().unwrap();
    assert_eq!(gates.iter().map(|gate| gate["name"].as_str().unwrap()).collect::<Vec<_>>(), ["switch", "sinkhorn"]);
    for gate in gates {
        for key in ["val_loss", "busiest_over_mean", "entropy", "tokens_per_s", "route_share"] {
            assert!(gate[key]["mean"].as_f64().unwrap() > 0.0, "{key} in {gate}");
        }
        assert!(gate["val_loss"]["spread"].as_f64().unwrap() > 0.0, "two seeds are two models: {gate}");
    }
    let costs: Value =
        serde_json::from_str(&bench(&["--only", "gshard", "--preset", "tiny", "--steps", "4", "--cost"]).output)
            .unwrap();
    let share = costs["gates"][0]["share"].as_f64().unwrap();
    assert!(share > 0.0 && share < 1.0, "{costs}");

    let refused = Program::start(moe_launch(&["bench", "routers", "--only", "softmax"])).wait().expect(USAGE);
    refused.says("--only softmax: accepted: topk-softmax, softmax-topk, ");
    let refused = Program::start(moe_launch(&["bench", "routers", "--set", "model.experts=1"])).wait().expect(USAGE);
    refused.says("topk-softmax: ");
}
