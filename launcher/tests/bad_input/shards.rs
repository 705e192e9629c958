//! `moe-launch data prepare` and `tokenizer train`: what cannot be read, and what is left of work that is cut short.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use super::process::{DONE, Ended, IO, Place, Program, Signal, USAGE};
use super::{BAD_DATA, after, files_below, in_one_line, launch, names, wait, worker, worker_with};

/// Root may read and write everything but for this.
const WITHOUT_PRIVILEGES: &str = "[ $(id -u) = 0 ] && set -- setpriv --bounding-set=-all --inh-caps=-all \"$@\";";

fn prepare(data: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = launch(["data", "prepare", "--data"]);
    command.arg(data).arg("--out").arg(out).args(more);
    command
}

fn nothing_half_written(out: &Path) {
    for name in names(out) {
        assert!(name == "prepare.json", "{name} was left");
    }
}

#[test]
fn text_that_cannot_be_read_makes_no_shard() {
    let place = Place::new();
    let long = "a line of text that goes on\n".repeat(2000);
    let gzip = stored_gzip(&long);
    let files: [(&str, Vec<u8>); 7] = [
        ("empty.txt", Vec::new()),
        ("latin1.txt", b"one\ntwo \xe9\n".into()),
        ("nofield.jsonl", b"{\"text\": \"a\"}\n{\"body\": \"b\"}\n".into()),
        ("broken.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\": \n".into()),
        ("number.jsonl", b"{\"text\": 5}\n".into()),
        ("cut.txt.gz", gzip[..gzip.len() / 2].into()),
        ("damaged.jsonl.zst", b"\x28\xb5\x2f\xfd broken".into()),
    ];
    for (name, bytes) in &files {
        fs::write(place.path().join(name), bytes).unwrap();
    }
    fs::create_dir(place.path().join("bare")).unwrap();
    let table = [
        ("absent.txt", IO, "absent.txt: cannot be read: No such file"),
        ("*.absent", IO, "*.absent: no file matches this pattern"),
        ("bare", BAD_DATA, "bare: holds no text; files in a directory are read when they end in"),
        ("empty.txt", BAD_DATA, "empty.txt: is empty"),
        ("latin1.txt", BAD_DATA, "latin1.txt: byte 8 (line 2) is 0xe9, which is not UTF-8; data must be UTF-8 text"),
        ("nofield.jsonl", BAD_DATA, "nofield.jsonl:2: has neither the field \"text\" (data.text_field)"),
        ("broken.jsonl", BAD_DATA, "broken.jsonl:3:"),
        ("number.jsonl", BAD_DATA, "number.jsonl:1:10: not a JSON object as expected: invalid type"),
        ("cut.txt.gz", BAD_DATA, "cut.txt.gz: line "),
        ("damaged.jsonl.zst", BAD_DATA, "damaged.jsonl.zst: line 1: the zstd data is damaged or cut off"),
    ];
    let out = place.path().join("shards");
    for (name, code, message) in table {
        in_one_line(wait(prepare(&place.path().join(name), &out, &[])).expect(code).says(message));
        nothing_half_written(&out);
        let _ = fs::remove_dir_all(&out);
    }
    let out = place.path().join("tokenizer.json");
    let train = |data: &str, vocabulary: &str| {
        let mut command = launch(["tokenizer", "train", "--vocab-size", vocabulary, "--data"]);
        command.arg(place.path().join(data)).arg("--out").arg(&out);
        wait(command)
    };
    in_one_line(train("broken.jsonl", "300").expect(BAD_DATA).says("broken.jsonl:3:"));
    in_one_line(train("text.txt", "100").expect(USAGE).says("a vocabulary of 100 is too small"));
    assert_eq!(names(place.path()).iter().filter(|name| name.starts_with("tokenizer")).count(), 0);
}

/// `text` as one gzip member of one stored block.
fn stored_gzip(text: &str) -> Vec<u8> {
    let mut bytes = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
    let length = u16::try_from(text.len()).unwrap();
    bytes.extend(length.to_le_bytes());
    bytes.extend((!length).to_le_bytes());
    bytes.extend(text.bytes());
    bytes
}

#[test]
fn files_and_folders_that_may_not_be_used_are_named_with_the_systems_reason() {
    let place = Place::new();
    let (text, closed) = (place.path().join("text.txt"), place.path().join("closed"));
    fs::create_dir(&closed).unwrap();
    let close = |path: &Path, mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(path, mode).unwrap();
    };
    close(&closed, 0o555);
    let unreadable = place.path().join("secret.txt");
    fs::write(&unreadable, "secret\n").unwrap();
    close(&unreadable, 0o000);
    let denied = |command: &Command, message: &str| -> Ended {
        in_one_line(wait(after(WITHOUT_PRIVILEGES, command)).expect(IO).says(message).says("Permission denied"))
    };
    let run = place.run("run");
    denied(
        &worker(&run, 2, &["--set", &format!("data.validation_paths={}", unreadable.display())]),
        "secret.txt: cannot be read: ",
    );
    assert!(!run.dir.exists());
    denied(&prepare(&unreadable, &place.path().join("shards"), &[]), "secret.txt: cannot be read: ");
    denied(&prepare(&text, &closed.join("shards"), &[]), "closed/shards: cannot be written: ");
    denied(&worker_with(&run, "--run-dir", closed.join("run").to_str().unwrap()), "closed/run: cannot be made: ");
    let mut train = launch(["tokenizer", "train", "--vocab-size", "300", "--data"]);
    train.arg(&text).arg("--out").arg(closed.join("tokenizer.json"));
    denied(&train, "closed/tokenizer.json: cannot be written: ");
    assert!(names(&closed).is_empty());
    // A file in the way is no matter of rights.
    let below = worker_with(&run, "--run-dir", text.join("run").to_str().unwrap());
    in_one_line(wait(below).expect(IO).says("text.txt/run").says("Not a directory"));
    close(&closed, 0o755);
}

#[test]
fn preparing_that_was_killed_goes_on_to_the_same_bytes() {
    let place = Place::new();
    let text = place.path().join("large.txt");
    let mut file = fs::File::create(&text).unwrap();
    for chapter in 0..600 {
        writeln!(file, "{}", format!("chapter {chapter} of a text that is long enough\n").repeat(1000)).unwrap();
    }
    drop(file);
    let (killed, undisturbed) = (place.path().join("killed"), place.path().join("undisturbed"));
    let settings = ["--shard-mb", "1", "--threads", "2"];
    let mut first = Program::start(prepare(&text, &killed, &settings));
    let whole = |name: &String| name.ends_with(".tokens");
    first.wait_until("two shards", || (names(&killed).iter().filter(|name| whole(name)).count() >= 2).then_some(()));
    first.signal(Signal::KILL);
    assert_eq!(first.wait().code, None);
    let before = names(&killed).iter().filter(|name| whole(name)).count();
    let inspect = launch(
        ["data", "inspect", "--verify"]
            .map(Into::into)
            .into_iter()
            .chain(names(&killed).iter().filter(|name| whole(name)).map(|name| killed.join(name))),
    );
    wait(inspect).expect(DONE);
    // Half of the work is no data to train on.
    in_one_line(wait(worker_with(&place.run("run"), "--data", killed.to_str().unwrap())).expect(BAD_DATA))
        .says("run the same `moe-launch data prepare` again to finish them");
    wait(prepare(&text, &killed, &settings)).expect(DONE).says(&format!("({before} kept from before)"));
    wait(prepare(&text, &undisturbed, &settings)).expect(DONE);
    let relative = |dir: &Path| -> Vec<_> {
        let files = files_below(dir).into_iter();
        files.map(|(path, bytes)| (path.strip_prefix(dir).unwrap().to_owned(), bytes)).collect()
    };
    assert!(relative(&killed) == relative(&undisturbed), "{:?} {:?}", names(&killed), names(&undisturbed));
}

#[test]
fn a_shard_that_was_changed_is_refused_where_its_tokens_are_read() {
    let place = Place::new();
    let (text, shards) = (place.path().join("text.txt"), place.path().join("shards"));
    let tokenizer = place.path().join("tok.json");
    let mut train = launch(["tokenizer", "train", "--vocab-size", "300", "--data"]);
    train.arg(&text).arg("--out").arg(&tokenizer);
    wait(train).expect(DONE);
    wait(prepare(&text, &shards, &["--tokenizer", tokenizer.to_str().unwrap()])).expect(DONE);
    let shard = shards.join("part-00000.tokens");
    // Two bytes a token, from byte 256 on.
    let mut bytes = fs::read(&shard).unwrap();
    bytes[262..264].copy_from_slice(&60_000_u16.to_le_bytes());
    fs::write(&shard, &bytes).unwrap();
    let run = place.run("run");
    let mut command = worker_with(&run, "--data", shards.to_str().unwrap());
    command.args(["--set", &format!("data.tokenizer={}", tokenizer.display())]);
    let message =
        "part-00000.tokens: token 3 is 60000, but the vocabulary has the tokens 0 to 299: set model.vocab_size to";
    in_one_line(wait(command).expect(BAD_DATA).says(message));
    let inspect = |file: &Path| wait(launch(["data", "inspect", "--verify", file.to_str().unwrap()]));
    in_one_line(inspect(&shard).expect(BAD_DATA).says("part-00000.tokens: "));
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    in_one_line(inspect(&shard).expect(BAD_DATA).says("part-00000.tokens: "));
    assert!(!run.dir.exists(), "nothing was begun");
}
