//! Disks that are full and programs that are killed while they write: what is there is whole, and work goes on from it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::{DONE, IO, Place, Program, Signal, assert_same_files};
use super::{FOR_EVER, after, files_below, in_one_line, launch, names, wait, worker};

/// No file may become larger than so many blocks of 512 bytes; what a program does then is what it does on a full disk.
const SMALL_FILES: &str = "trap '' XFSZ; ulimit -f 8;";

/// A file system of a few kilobytes, where this user may mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, bytes: usize) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(at.to_owned()));
        }
        eprintln!(
            "notice: not tested here with a full file system, since none can be mounted; files of limited size stand in"
        );
        None
    }

    fn grow(&self) {
        let grown = Command::new("mount").args(["-o", "remount,size=256m"]).arg(&self.0).status();
        assert!(grown.unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_whole_and_the_run_goes_on_when_there_is_room() {
    let place = Place::new();
    let every = ["--set", "train.checkpoint_every=2"];
    let undisturbed = place.run("undisturbed");
    wait(worker(&undisturbed, 6, &every)).expect(DONE);
    let checkpoint_bytes: usize = files_below(&undisturbed.checkpoint(6)).values().map(Vec::len).sum();
    let Some(disk) = SmallDisk::mount(&place.path().join("disk"), checkpoint_bytes * 3 / 2 + (128 << 10)) else {
        return;
    };
    let run = place.run("disk/run");
    let message = format!(
        "the checkpoint of step 4 was not written: cannot write {}/step-00000004.tmp-",
        run.dir.join("checkpoints").display()
    );
    let full = in_one_line(wait(worker(&run, 6, &every)).expect(IO));
    full.says(&message)
        .says("No space left on device")
        .says(&format!("the last checkpoint is {}", run.checkpoint(2).display()));
    assert_eq!(names(&run.dir.join("checkpoints")), ["step-00000002"], "nothing is half-written");
    wait(launch(["checkpoint", "verify", run.dir.to_str().unwrap()])).expect(DONE);
    disk.grow();
    wait(worker(&run, 6, &every)).expect(DONE).says("resuming       after step 2");
    assert_same_files(&run.checkpoint(6), &undisturbed.checkpoint(6));
    run.has_each_step_once(6);
    assert_eq!(run.losses(), undisturbed.losses());
}

#[test]
fn files_that_cannot_be_written_whole_are_not_left() {
    let place = Place::new();
    let text = place.path().join("text.txt");
    let paths = |command: &mut Command, out: &Path| {
        command.arg("--data").arg(&text).arg("--out").arg(out);
    };
    let limited = |command: &Command, message: &str| {
        in_one_line(wait(after(SMALL_FILES, command)).expect(IO).says(message).says("File too large"));
    };
    let run = place.run("run");
    limited(&worker(&run, 2, &[]), "the checkpoint of step 2 was not written: cannot write ");
    assert!(names(&run.dir.join("checkpoints")).is_empty());
    run.has_each_step_once(2);

    let shards = place.path().join("shards");
    let mut prepare = launch(["data", "prepare"]);
    paths(&mut prepare, &shards);
    limited(&prepare, "shards/part-00000.tokens: cannot be written: ");
    assert_eq!(names(&shards), ["prepare.json"]);
    wait(prepare).expect(DONE);

    let mut train = launch(["tokenizer", "train", "--vocab-size", "3000"]);
    paths(&mut train, &place.path().join("tokenizer.json"));
    limited(&train, "tokenizer.json: cannot be written: ");
    assert!(!names(place.path()).iter().any(|name| name.starts_with("tokenizer")), "{:?}", names(place.path()));

    // With room it is the run it would have been.
    wait(worker(&run, 2, &[])).expect(DONE);
    run.has_each_step_once(2);
    let export = ["checkpoint", "export", run.dir.to_str().unwrap(), "--to", "exported"];
    let mut export = launch(export);
    export.current_dir(place.path());
    limited(&export, "cannot write ");
    assert!(!place.path().join("exported").join("config.json").exists());
}

/// A model whose checkpoint takes a while to write.
const LARGE: [&str; 8] = [
    "--set",
    "model.hidden_size=128",
    "--set",
    "model.expert_ffn_size=512",
    "--set",
    "train.checkpoint_every=2",
    "--set",
    "train.global_batch=2",
];

#[test]
fn killed_while_it_writes_a_checkpoint_a_run_goes_on_from_the_one_before() {
    let place = Place::new();
    let (run, undisturbed) = (place.run("killed"), place.run("undisturbed"));
    let checkpoints = run.dir.join("checkpoints");
    let unfinished = || names(&checkpoints).into_iter().any(|name| name.contains(".tmp-"));
    let mut killed_inside = false;
    for _attempt in 0..20 {
        let before = run.checkpoints().len();
        let mut job = Program::start(worker(&run, FOR_EVER, &LARGE));
        let none_yet = before == 0;
        job.wait_until("a checkpoint that is being written", || {
            (unfinished() && !(none_yet && run.checkpoints().is_empty())).then_some(())
        });
        job.signal(Signal::KILL);
        assert_eq!(job.wait().code, None);
        killed_inside = unfinished();
        if killed_inside {
            break;
        }
    }
    assert!(killed_inside, "no kill hit the writing of a checkpoint: {:?}", names(&checkpoints));
    let last = *run.checkpoints().last().unwrap();
    let more: Vec<&str> = LARGE.to_vec();
    wait(worker(&run, last + 4, &more)).expect(DONE).says(&format!("resuming       after step {last}"));
    wait(worker(&undisturbed, last + 4, &more)).expect(DONE);
    assert!(!unfinished(), "the next checkpoint removes what is unfinished");
    assert_same_files(&run.checkpoint(last + 4), &undisturbed.checkpoint(last + 4));
    run.has_each_step_once(last + 4);
    assert_eq!(run.losses(), undisturbed.losses());
}
