//! Data and tokenizers that cannot be used: each row an input, its exit code and its message; and data that can, through the
//! whole program.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use moe_runtime::data::{ByteTokenizer, EndOfDocument, Prepare, PrepareSpec};
use support::process::{DONE, Ended, IO, Place, Program, USAGE};

const BAD_DATA: i32 = 65;

/// A small run of `data`, with further `settings`.
fn worker(place: &Place, run: &str, data: &Path, settings: &[&str]) -> Ended {
    let mut args = place.run(run).args(2);
    let text = args.iter().position(|arg| arg == "--data").unwrap() + 1;
    args[text] = data.to_str().unwrap().into();
    args.extend(settings.iter().flat_map(|set| ["--set".to_owned(), (*set).to_owned()]));
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-worker"));
    command.args(args).current_dir(place.path());
    Program::start(command).wait()
}

/// A Megatron index of one sequence of `tokens` 16-bit tokens.
fn megatron_index(tokens: i32) -> Vec<u8> {
    let mut bytes = b"MMIDIDX\0\0".to_vec();
    bytes.extend(1u64.to_le_bytes());
    bytes.push(8);
    bytes.extend([1u64, 2].iter().flat_map(|count| count.to_le_bytes()));
    bytes.extend(tokens.to_le_bytes());
    bytes.extend([0i64, 0, 1].iter().flat_map(|number| number.to_le_bytes()));
    bytes
}

fn prepare(place: &Place, data: &Path, out: &str) {
    let spec = PrepareSpec {
        paths: vec![data.into()],
        out: place.path().join(out),
        text_field: "text".into(),
        end_of_document: EndOfDocument::Auto,
        part_bytes: Some(10_000),
    };
    Prepare::plan(spec, &ByteTokenizer).unwrap().run(&|_| {}).unwrap();
}

#[test]
fn data_that_cannot_be_used_is_refused_with_file_reason_and_class() {
    let place = Place::new();
    let text = fs::read(place.path().join("text.txt")).unwrap();
    let tokens: Vec<u8> = (0..2000u16).flat_map(|id| (id % 300).to_le_bytes()).collect();
    let files: [(&str, &[u8]); 10] = [
        ("empty.txt", b""),
        ("latin1.txt", b"one\ntwo \xe9\n"),
        ("short.txt", b"ten words"),
        ("nofield.jsonl", b"{\"text\": \"a\"}\n{\"body\": \"b\"}\n"),
        ("prompts.jsonl", b"{\"prompt\": \"a\", \"completion\": \"\"}\n"),
        ("broken.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\": \n"),
        ("damaged.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\0broken"),
        ("damaged.jsonl.zst", b"\x28\xb5\x2f\xfd broken"),
        ("notashard.tokens", &text),
        ("lies.bin", &tokens),
    ];
    for (name, bytes) in files {
        fs::write(place.path().join(name), bytes).unwrap();
    }
    fs::write(place.path().join("beyond.bin"), &tokens).unwrap();
    fs::write(place.path().join("lies.idx"), megatron_index(2001)).unwrap();
    fs::write(place.path().join("beyond.idx"), megatron_index(2000)).unwrap();
    let table = [
        ("absent.txt", IO, "absent.txt: cannot be read: No such file"),
        ("*.absent", IO, "*.absent: no file matches this pattern"),
        ("empty.txt", BAD_DATA, "empty.txt: is empty"),
        ("latin1.txt", BAD_DATA, "latin1.txt: byte 8 (line 2) is 0xe9, which is not UTF-8"),
        ("short.txt", BAD_DATA, "the training text is 8 tokens long, but a sequence of train.sequence_length = 32"),
        ("nofield.jsonl", BAD_DATA, "nofield.jsonl:2: has neither the field \"text\" (data.text_field)"),
        ("prompts.jsonl", BAD_DATA, "prompts.jsonl: every completion is empty"),
        ("broken.jsonl", BAD_DATA, "broken.jsonl:3:"),
        ("damaged.txt.gz", BAD_DATA, "damaged.txt.gz: line 1: the gzip data is damaged or cut off"),
        ("damaged.jsonl.zst", BAD_DATA, "damaged.jsonl.zst: line 1: the zstd data is damaged or cut off"),
        ("notashard.tokens", BAD_DATA, "notashard.tokens: is no token shard"),
        ("lies.idx", BAD_DATA, "lies.idx: describes 4002 bytes of tokens, but"),
        ("beyond", BAD_DATA, "beyond.bin: token 256 is 256, but the vocabulary has the tokens 0 to 255"),
    ];
    for (name, code, message) in table {
        let ended = worker(&place, "refused", &place.path().join(name), &[]).expect(code).says(message);
        let errors = ended.output.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!(errors, 1, "one line\n{}", ended.output);
    }
    assert!(!place.run("refused").dir.exists(), "nothing was begun");
}

#[test]
fn tokenizers_that_cannot_be_used_are_refused() {
    let place = Place::new();
    let text = place.path().join("text.txt");
    fs::write(place.path().join("broken.json"), "{}").unwrap();
    let words: Vec<_> = (0..500).map(|id| format!("\"w{id}\": {id}")).collect();
    let model = format!("{{\"type\": \"WordLevel\", \"vocab\": {{{}}}, \"unk_token\": \"w0\"}}", words.join(", "));
    fs::write(place.path().join("words.json"), format!("{{\"version\": \"1.0\", \"model\": {model}}}")).unwrap();
    let table: [(&[&str], i32, &str); 5] = [
        (&["data.tokenizer=words"], USAGE, "data.tokenizer = \"words\": \"words\" is no tokenizer"),
        (&["data.tokenizer=absent.json"], IO, "absent.json: cannot be read: No such file"),
        (&["data.tokenizer=broken.json"], BAD_DATA, "broken.json: is not a Hugging Face tokenizer.json"),
        (
            &["data.tokenizer=words.json", "model.vocab_size=499"],
            BAD_DATA,
            "words.json: makes 500 different tokens, but model.vocab_size = 499",
        ),
        (&["data.end_of_document=<eos>"], USAGE, "data.end_of_document = \"<eos>\": bytes has no such token"),
    ];
    for (settings, code, message) in table {
        worker(&place, "refused", &text, settings).expect(code).says(message);
    }
    prepare(&place, &text, "shards");
    worker(&place, "refused", &place.path().join("shards"), &["data.tokenizer=words.json"])
        .expect(BAD_DATA)
        .says("was made with another tokenizer");
}

#[test]
fn shards_train_like_the_text_they_were_made_of() {
    let place = Place::new();
    let text = place.path().join("text.txt");
    prepare(&place, &text, "shards");
    // Held-out text of its own, so that documents do not move the cut.
    let held_out = format!("data.validation_paths={}", text.display());
    worker(&place, "text", &text, &[&held_out]).expect(DONE);
    worker(&place, "shards-run", &place.path().join("shards"), &[&held_out]).expect(DONE);
    assert_eq!(place.run("shards-run").losses(), place.run("text").losses());
}

#[test]
fn a_mixture_of_records_with_prompts_and_text_trains() {
    let place = Place::new();
    let example = |number: usize| {
        let prompt = format!("what is {number} and {number}?");
        format!("{{\"prompt\": \"{prompt}\", \"completion\": \"{}\"}}\n", 2 * number)
    };
    fs::write(place.path().join("sums.jsonl"), (0..500).map(example).collect::<String>()).unwrap();
    let config = "[data.sources.sums]\npaths = \"sums.jsonl\"\nweight = 3\n\n[data.sources.prose]\npaths = [\"*.txt\"]\nweight = 1\n";
    fs::write(place.path().join("run.toml"), config).unwrap();
    let mut args = place.run("mixed").args(3);
    let data = args.iter().position(|arg| arg == "--data").unwrap();
    args.splice(data..data + 2, ["--config".to_owned(), "run.toml".to_owned()]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-worker"));
    command.args(args).current_dir(place.path());
    Program::start(command).wait().expect(DONE).says("sums: ").says("prose: ");
    assert_eq!(place.run("mixed").losses().len(), 3);
    // And goes on without being told its data again.
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-worker"));
    command.args(["--run-dir", "mixed", "--steps", "5"]).current_dir(place.path());
    Program::start(command).wait().expect(DONE).says("resuming       after step 3");
}
