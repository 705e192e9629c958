//! A user's way from text to a trained model: a tokenizer of one's own, shards, training; and a model's own tokenizer.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

#[path = "../../runtime/tests/support/process.rs"]
mod process;

use std::fs;
use std::path::Path;
use std::process::Command;

use process::{DONE, Ended, Place, Program, Run};

const LAUNCH: &str = env!("CARGO_BIN_EXE_moe-launch");

fn launch(place: &Place, args: &[&str]) -> Ended {
    let mut command = Command::new(LAUNCH);
    command.args(args).current_dir(place.path());
    Program::start(command).wait().expect(DONE)
}

/// moe-worker on `run` with `data` in place of its text.
fn worker(place: &Place, run: &Run, data: &str, more: &[&str]) -> Ended {
    worker_to(place, run, data, 3, more)
}

fn worker_to(place: &Place, run: &Run, data: &str, steps: u64, more: &[&str]) -> Ended {
    let worker = Path::new(LAUNCH).with_file_name("moe-worker");
    assert!(worker.exists(), "{} is missing: `cargo test --workspace` builds it", worker.display());
    let mut args = run.args(steps);
    let text = args.iter().position(|arg| arg == "--data").unwrap() + 1;
    args[text] = data.into();
    let mut command = Command::new(worker);
    command.args(args).args(more).current_dir(place.path());
    Program::start(command).wait().expect(DONE)
}

#[test]
fn a_trained_tokenizer_prepares_shards_that_train_like_their_text() {
    let place = Place::new();
    let texts = place.path().join("texts");
    fs::create_dir(&texts).unwrap();
    fs::rename(place.path().join("text.txt"), texts.join("a.txt")).unwrap();
    let record = |number: usize| format!("{{\"text\": \"record {number} of a text that goes on\"}}\n");
    fs::write(texts.join("b.jsonl"), (0..300).map(record).collect::<String>()).unwrap();
    launch(&place, &["tokenizer", "train", "--data", "texts", "--vocab-size", "300", "--out", "tok.json"])
        .says("tok.json: 300 tokens");
    let prepared = ["data", "prepare", "--data", "texts/*", "--tokenizer", "tok.json", "--out", "shards"];
    launch(&place, &prepared).says("301 documents");
    launch(&place, &["data", "inspect", "--verify", "shards/part-00000.tokens"]).says("vocabulary of 300, verified");
    let settings = ["--set", "data.tokenizer=tok.json", "--set", "data.validation_paths=texts/b.jsonl"];
    let (from_text, from_shards) = (place.run("from-text"), place.run("from-shards"));
    worker(&place, &from_text, "texts", &settings);
    worker(&place, &from_shards, "shards", &settings);
    assert_eq!(from_shards.losses(), from_text.losses());
    let config = fs::read_to_string(from_text.dir.join("config.toml")).unwrap();
    assert!(config.contains("vocab_size = 300"), "the vocabulary follows from the tokenizer\n{config}");
    launch(&place, &["generate", "--checkpoint", "from-text", "--prompt", "record", "--tokens", "4"]).says("record");
}

#[test]
fn a_run_keeps_the_tokenizer_it_was_trained_with() {
    let place = Place::new();
    launch(&place, &["tokenizer", "train", "--data", "text.txt", "--vocab-size", "270", "--out", "own.json"]);
    let (run, undisturbed) = (place.run("run"), place.run("undisturbed"));
    let settings = ["--set", "data.tokenizer=own.json"];
    worker(&place, &run, "text.txt", &settings);
    worker_to(&place, &undisturbed, "text.txt", 5, &settings);
    // Its file goes, and the run moves.
    let file = fs::read(place.path().join("own.json")).unwrap();
    fs::remove_file(place.path().join("own.json")).unwrap();
    fs::rename(&run.dir, place.path().join("moved")).unwrap();
    let moved = place.run("moved");
    worker_to(&place, &moved, "text.txt", 5, &[]).says("resuming       after step 3");
    assert_eq!(moved.losses(), undisturbed.losses());
    launch(&place, &["status", "--run-dir", "moved"]).says("the job has ended, after step 5 of 5");
    launch(&place, &["generate", "--checkpoint", "moved", "--prompt", "the", "--tokens", "4"]).says("the");

    launch(&place, &["checkpoint", "export", "moved", "--to", "folder"]);
    let exported = |name: &str| fs::read(place.path().join("folder").join(name)).unwrap();
    let json = |name: &str| serde_json::from_slice::<serde_json::Value>(&exported(name)).unwrap();
    assert_eq!(exported("tokenizer.json"), file);
    assert_eq!(json("tokenizer_config.json")["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!(json("tokenizer_config.json")["eos_token"], "<|endoftext|>");
    assert_eq!(json("config.json")["eos_token_id"], 0);
}

#[test]
fn a_models_own_tokenizer_is_used_unless_another_is_named() {
    let place = Place::new();
    let first = place.run("first");
    worker(&place, &first, "text.txt", &[]);
    // Its tokens are the bytes, so that losses can be compared.
    launch(&place, &["checkpoint", "export", "first", "--to", "folder"]);
    let tokenizer_of = |run: &Run| {
        let text = fs::read_to_string(run.dir.join("config.toml")).unwrap();
        text.lines().find(|line| line.starts_with("tokenizer = ")).unwrap().to_owned()
    };
    let (own, bytes) = (place.run("own"), place.run("bytes"));
    worker(&place, &own, "text.txt", &["--model", "folder"]);
    worker(&place, &bytes, "text.txt", &["--model", "folder", "--set", "data.tokenizer=bytes"]);
    let file = place.path().join("folder/tokenizer.json");
    assert_eq!(tokenizer_of(&own), format!("tokenizer = \"{}\"", file.display()));
    assert_eq!(tokenizer_of(&bytes), "tokenizer = \"bytes\"");
    assert_eq!(own.losses(), bytes.losses());
    // A run that is continued keeps its own, whatever the folder has.
    worker(&place, &bytes, "text.txt", &["--model", "folder"]).says("nothing to do");
    assert_eq!(tokenizer_of(&bytes), "tokenizer = \"bytes\"");
    fs::remove_file(file).unwrap();
    let without = place.run("without");
    worker(&place, &without, "text.txt", &["--model", "folder"]);
    assert_eq!(tokenizer_of(&without), "tokenizer = \"bytes\"");
}
