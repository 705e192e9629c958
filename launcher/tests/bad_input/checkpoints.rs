//! Checkpoints and models that are not what they should be: told with file and mend, passed over only when asked, never lost.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::process::{DONE, Place, Run, USAGE, assert_same_files};
use super::{BAD_DATA, copy_below, files_below, in_one_line, launch, names, wait, worker};

/// Checkpoints after steps 2 and 4.
const EVERY_TWO: [&str; 2] = ["--set", "train.checkpoint_every=2"];

type Damage = fn(&Path);

fn rewrite(path: &Path, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Ways to damage a checkpoint, with the file that is named and what is said of it.
#[rustfmt::skip]
const TABLE: [(&str, &str, Damage); 7] = [
    ("optimizer.safetensors", "bytes long where", |dir| rewrite(&dir.join("optimizer.safetensors"), |bytes| bytes.truncate(bytes.len() / 2))),
    ("model.expert-00001.safetensors", "damaged: its sha256 is", |dir| rewrite(&dir.join("model.expert-00001.safetensors"), |bytes| *bytes.last_mut().unwrap() ^= 4)),
    ("model.safetensors", "there is no such file in the folder", |dir| fs::remove_file(dir.join("model.safetensors")).unwrap()),
    ("step-00000004", "it has no manifest.json", |dir| fs::remove_file(dir.join("manifest.json")).unwrap()),
    ("manifest.json", "damaged: its sha256 is", |dir| rewrite(&dir.join("manifest.json"), |bytes| *bytes = String::from_utf8(bytes.clone()).unwrap().replace("\"step\": 4", "\"step\": 5").into())),
    ("manifest.json", "not valid", |dir| rewrite(&dir.join("manifest.json"), |bytes| bytes.truncate(bytes.len() / 2))),
    ("manifest.json", "not valid", |dir| rewrite(&dir.join("manifest.json"), |bytes| { let at = bytes.windows(5).position(|w| w == b"model").unwrap(); bytes[at + 2] ^= 0x80; })),
];

/// A run of 4 steps, to be damaged.
fn trained(place: &Place, name: &str) -> Run {
    let run = place.run(name);
    wait(worker(&run, 4, &EVERY_TWO)).expect(DONE);
    run
}

#[test]
fn a_damaged_checkpoint_is_named_and_an_older_one_taken_only_when_asked() {
    let place = Place::new();
    let (whole, undisturbed) = (trained(&place, "whole"), place.run("undisturbed"));
    wait(worker(&undisturbed, 6, &EVERY_TWO)).expect(DONE);
    for (index, (file, fault, damage)) in TABLE.into_iter().enumerate() {
        let run = place.run(&format!("damaged-{index}"));
        copy_below(&whole.dir, &run.dir);
        let config = fs::read_to_string(run.dir.join("config.toml")).unwrap();
        damage(&run.checkpoint(4));
        let before = files_below(&run.dir);
        let refused = in_one_line(wait(worker(&run, 6, &EVERY_TWO)).expect(BAD_DATA));
        refused.says(file).says(fault).says("--resume last-good");
        assert!(files_below(&run.dir).keys().eq(before.keys()), "nothing is lost");
        assert!(before.iter().all(|(path, bytes)| path.ends_with("config.toml") || fs::read(path).unwrap() == *bytes));
        let look = launch(["checkpoint", "verify", run.dir.to_str().unwrap()]);
        in_one_line(wait(look).expect(BAD_DATA).says(file).says(fault));

        let asked = [&EVERY_TWO[..], &["--resume", "last-good"]].concat();
        wait(worker(&run, 6, &asked))
            .expect(DONE)
            .says("step-00000004 is damaged and was set aside")
            .says("resuming       after step 2");
        assert_eq!(run.checkpoints(), [4, 6]);
        assert_same_files(&run.checkpoint(6), &undisturbed.checkpoint(6));
        run.has_each_step_once(6);
        assert_eq!(run.losses(), undisturbed.losses());
        let aside = names(&run.dir.join("checkpoints"));
        let aside = aside.iter().find(|name| name.starts_with("step-00000004.damaged-")).unwrap();
        let kept = files_below(&run.dir.join("checkpoints").join(aside)).into_values().collect::<Vec<_>>();
        let there = before.into_iter().filter(|(path, _)| path.starts_with(run.checkpoint(4))).map(|(_, bytes)| bytes);
        assert!(kept.into_iter().eq(there), "what is damaged stays as it was");
        assert!(config.contains("checkpoint_every = 2"));
    }
}

#[test]
fn without_a_whole_checkpoint_a_run_is_not_begun_again() {
    let place = Place::new();
    let run = trained(&place, "run");
    for step in [2, 4] {
        rewrite(&run.checkpoint(step).join("model.safetensors"), |bytes| bytes.truncate(bytes.len() - 1));
    }
    let before = files_below(&run.dir);
    let asked = wait(worker(&run, 6, &["--resume", "last-good"])).expect(BAD_DATA);
    in_one_line(
        asked
            .says("checkpoints: none of its 2 checkpoints is whole; the newest: ")
            .says("step-00000004/model.safetensors"),
    );
    fs::remove_dir_all(run.checkpoint(2)).unwrap();
    let alone = wait(worker(&run, 6, &[])).expect(BAD_DATA);
    in_one_line(alone.says("there is no older one: bring the file back, or begin a new run"));
    assert!(files_below(&run.dir).into_iter().all(|(path, bytes)| before[&path] == bytes));
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_the_keys_that_differ() {
    let place = Place::new();
    let run = trained(&place, "run");
    let other = place.run("other");
    wait(worker(&other, 6, &["--set", "model.expert_ffn_size=48"])).expect(DONE);
    copy_below(&other.checkpoint(6), &run.checkpoint(6));
    let before = files_below(&run.checkpoint(4));
    let message = "step-00000006 is of another model: model.expert_ffn_size: 48 in the checkpoint, 32 in this run";
    in_one_line(wait(worker(&run, 8, &[])).expect(USAGE).says(message));
    assert_eq!(files_below(&run.checkpoint(4)), before);
    // A run directory of another model.
    let message = "config.toml: the run was started with other settings: model.expert_ffn_size (48 then, 32 now)";
    in_one_line(wait(worker(&other, 8, &["--set", "model.expert_ffn_size=32"])).expect(USAGE).says(message));
}

#[test]
fn a_folder_that_asks_for_what_there_is_not_is_refused_by_its_key() {
    let place = Place::new();
    let run = trained(&place, "run");
    let folder = place.path().join("folder");
    wait(launch(["checkpoint", "export", run.dir.to_str().unwrap(), "--to", folder.to_str().unwrap()])).expect(DONE);
    let path = folder.join("config.json");
    let whole = fs::read_to_string(&path).unwrap();
    let with = |changes: Value| {
        let mut config: Value = serde_json::from_str(&whole).unwrap();
        let changes = changes.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(changes);
        config.to_string()
    };
    let table = [
        (
            with(json!({"attention_dropout": 0.1})),
            "config.json: attention_dropout = 0.1: dropout is not supported; accepted: 0.0",
        ),
        (
            with(json!({"clip_qkv": 8.0})),
            "config.json: clip_qkv = 8.0: clipping queries, keys and values is not supported; accepted: null",
        ),
        (
            with(json!({"quantization_config": {"bits": 4}})),
            "config.json: quantization_config = {\"bits\":4}: quantized weights are not supported",
        ),
        (
            with(json!({"use_sliding_window": true, "sliding_window": 16})),
            "config.json: sliding_window = 16: attention within a window is not supported; accepted: null",
        ),
        (with(json!({"model_type": "retnet"})), "config.json: model_type = \"retnet\": "),
        (whole[..whole.len() / 2].to_owned(), "config.json: not valid: "),
    ];
    let (worked, imported) = (place.run("worked"), place.path().join("imported"));
    for (text, message) in table {
        fs::write(&path, text).unwrap();
        let from = folder.to_str().unwrap();
        in_one_line(wait(worker(&worked, 2, &["--model", from])).expect(BAD_DATA).says(message));
        let import = ["checkpoint", "import", from, "--run-dir", imported.to_str().unwrap()];
        in_one_line(wait(launch(import)).expect(BAD_DATA).says(message));
    }
    fs::write(&path, whole).unwrap();
    rewrite(&folder.join("model.safetensors"), |bytes| bytes.truncate(bytes.len() - 4));
    let cut = wait(worker(&worked, 2, &["--model", folder.to_str().unwrap()])).expect(BAD_DATA);
    in_one_line(cut.says("model.safetensors: ").says("bytes long where"));
    assert!(!worked.dir.exists() && !imported.exists(), "nothing was begun");
}

#[test]
fn a_tokenizer_that_does_not_fit_its_model_is_refused_and_one_that_is_missing_is_told() {
    let place = Place::new();
    let run = trained(&place, "run");
    let (folder, imported) = (place.path().join("folder"), place.path().join("imported"));
    wait(launch(["checkpoint", "export", run.dir.to_str().unwrap(), "--to", folder.to_str().unwrap()])).expect(DONE);
    let path = folder.join("tokenizer.json");
    let import = |more: &[&str]| {
        let args = ["checkpoint", "import", folder.to_str().unwrap(), "--run-dir", imported.to_str().unwrap()];
        wait(launch([&args[..], more].concat()))
    };
    let whole = fs::read_to_string(&path).unwrap();
    let mut larger: Value = serde_json::from_str(&whole).unwrap();
    larger["model"]["vocab"]["more"] = 256.into();
    for (text, message) in [(whole[..40].to_owned(), "tokenizer.json"), (larger.to_string(), "257")] {
        fs::write(&path, text).unwrap();
        in_one_line(import(&[]).expect(BAD_DATA).says(message));
        assert!(!imported.exists(), "nothing was begun");
    }
    import(&["--set", "data.tokenizer=bytes"]).expect(DONE).says("tokenizer: bytes");
    fs::remove_dir_all(&imported).unwrap();
    fs::remove_file(&path).unwrap();
    import(&[]).expect(DONE).says("tokenizer: bytes").says("note: the folder has no tokenizer.json");
}
