//! Plans against runs: what ranks under mpirun have really used is what `moe-launch plan` foresaw.

// The lint spares test functions, not what they share.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn launch(args: &[&str]) -> Output {
    let launch = PathBuf::from(env!("CARGO_BIN_EXE_moe-launch"));
    if !launch.with_file_name("moe-worker").exists() {
        let build =
            Command::new(env!("CARGO")).args(["build", "--package", "moe-runtime", "--bin", "moe-worker"]).status();
        assert!(build.unwrap().success(), "moe-worker could not be built");
    }
    Command::new(launch).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Off by at most this much: the peak of resident memory above what a rank had before it built its model.
const PEAK_TOLERANCE: f64 = 0.15;

#[test]
fn peak_memory_and_bytes_sent_are_those_of_the_plan() {
    // Large enough that the model and not the allocator decides.
    let presets: [(&str, &[&str]); 3] = [
        ("tiny", &["model.hidden_size=256", "model.expert_ffn_size=512", "train.global_batch=32"]),
        ("shakespeare", &["train.global_batch=8"]),
        ("moe-15m", &[]),
    ];
    let folder = tempfile::tempdir().unwrap();
    // A small text: memory that reading a large one leaves free is used again by the model, and hides a part of its peak.
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "The quick brown fox jumps over the lazy dog.\n".repeat(4000)).unwrap();
    for (preset, sets) in presets {
        for ep in ["1", "2"] {
            let dir = folder.path().join(format!("{preset}-{ep}"));
            let dir = dir.to_str().unwrap();
            let mut args =
                vec!["run", "-n", "2", "--", "--preset", preset, "--run-dir", dir, "--steps", "4", "--ep", ep];
            args.extend(sets.iter().flat_map(|set| ["--set", set]));
            args.extend(["--set", "train.eval_every=0", "--set", "data.validation_fraction=0"]);
            args.extend(["--data", text.to_str().unwrap()]);
            let run = launch(&args);
            assert!(run.status.success(), "{preset}: {}", String::from_utf8_lossy(&run.stderr));
            let compared = launch(&["plan", "--compare", dir, "--json"]);
            let lines: Vec<Value> = serde_json::from_slice(&compared.stdout).unwrap();
            for line in &lines {
                let what = line["what"].as_str().unwrap();
                let (planned, counted) =
                    (line["planned_bytes"].as_f64().unwrap(), line["counted_bytes"].as_f64().unwrap());
                let off = (planned / counted - 1.0).abs();
                let allowed = match what {
                    "parameters" | "gradients" | "optimizer" => 0.0,
                    "peak above the start" => PEAK_TOLERANCE,
                    // Counted bytes are divided by the steps, in whole bytes.
                    what if what.ends_with(", a step") => 1e-4,
                    _ => continue,
                };
                assert!(off <= allowed, "{preset}, EP {ep}: {what}: planned {planned}, counted {counted}");
            }
        }
    }
}

/// A plan as JSON, with its exit code.
fn plan(args: &[&str]) -> (Option<i32>, Value) {
    let output = launch(&[&["plan", "--json"], args].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}")))
}

/// `args` with what `change` says instead.
fn changed<'a>(args: &[&'a str], change: &'a str) -> Vec<&'a str> {
    let new: Vec<&str> = change.split(' ').collect();
    let replaced = |flag: &str| flag != "--set" && new.contains(&flag);
    let kept = args.chunks(2).filter(|pair| !replaced(pair[0])).flatten();
    kept.copied().chain(new.iter().copied()).collect()
}

#[test]
fn what_is_named_as_the_nearest_that_fits_fits() {
    // Measured rates would be the same for each.
    let rates = ["--gemm", "80", "--memory-rate", "10", "--exchange", "3"];
    let jobs = [
        "--preset moe-3b -n 4 --memory 80",
        "--preset moe-3b -n 8 --nodes 2 --memory 70 --set parallel.ep=2",
        "--preset moe-3b --nodes 1 --gpus 4 --gpu-memory 20",
        "--preset moe-3b --nodes 2 --gpus 8 --gpu-memory 9 --set train.global_batch=128",
        "--preset shakespeare -n 2 --memory 0.3 --set train.global_batch=64",
    ];
    for job in jobs {
        let args: Vec<&str> = job.split(' ').chain(rates).collect();
        let (code, refused) = plan(&args);
        assert_eq!((code, &refused["fits"]), (Some(64), &false.into()), "{job}");
        let alternatives = refused["alternatives"].as_array().unwrap();
        assert!(!alternatives.is_empty(), "{job}");
        for alternative in alternatives {
            let change = alternative["change"].as_str().unwrap();
            let (code, accepted) = plan(&changed(&args, change));
            assert_eq!(code, Some(0), "{job}: {change}");
            assert_eq!(accepted["memory"]["peak_bytes"], alternative["peak_bytes"], "{job}: {change}");
        }
    }
}

#[test]
fn a_job_that_cannot_fit_is_refused_with_what_would() {
    let job = "plan --preset moe-3b -n 4 --memory 72 --gemm 80 --memory-rate 10 --exchange 3";
    let refused = launch(&job.split(' ').collect::<Vec<_>>());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(64), "{said}");
    assert!(said.contains("a rank needs") && said.contains("nearest that fit: -n 8 --nodes 2"), "{said}");
    let (code, plan) =
        plan(&"--preset moe-3b --nodes 2 --gpus 8 --set train.global_batch=16".split(' ').collect::<Vec<_>>());
    assert_eq!(code, Some(0));
    assert_eq!((&plan["groups"]["world"], &plan["groups"]["nodes"]), (&16.into(), &2.into()));
    assert!(plan["traffic"]["between_nodes_bytes"].as_f64().unwrap() > 0.0 && plan["time"].is_null());
}
