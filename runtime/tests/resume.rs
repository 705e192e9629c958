//! Stopped and started again: the same training to the bit under the same layout, within rounding under another; and what a run
//! directory refuses.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use std::fs;
use std::process::Command;

use moe_runtime::checkpoint::Store;
use moe_runtime::collectives::local;
use moe_runtime::config::{Config, ScheduleKind};
use moe_runtime::data::Corpus;
use moe_runtime::telemetry::StepMetrics;
use support::gates::GATES;
use support::process::{DONE, INTERNAL, Place, Program, RETRY, Run, Signal, USAGE, assert_same_files};
use support::training::{Ranks, assert_same_curve, small, take_steps, text, trainer};

const BAD_DATA: i32 = 65;

/// Steps after which a step's checkpoint is written.
const EVERY: u64 = 20;

fn configuration() -> Config {
    let mut config = small();
    config.train.micro_batch = Some(2);
    config.schedule.kind = ScheduleKind::Cosine;
    config.schedule.steps = Some(60);
    config
}

/// The steps after `from` up to `to`, resumed where `from` is not 0, with a checkpoint at the end.
fn leg(config: &Config, corpus: &Corpus, ranks: Ranks, store: &Store, (from, to): (u64, u64)) -> Vec<StepMetrics> {
    let checkpoint = (from > 0).then(|| store.latest().unwrap().unwrap());
    let mut of_ranks = local::run(ranks.world, |world| {
        let mut trainer = trainer(config, corpus, world, ranks.ep);
        if let Some(checkpoint) = &checkpoint {
            assert_eq!(trainer.restore(checkpoint).unwrap().step, from);
        }
        let metrics = take_steps(&mut trainer, from + 1..=to);
        let cursor = serde_json::to_value(trainer.data().cursor(to)).unwrap();
        trainer.save(store, to, cursor).unwrap();
        metrics
    });
    of_ranks.swap_remove(0)
}

#[test]
fn forty_steps_and_twice_twenty_end_in_the_same_bits_with_every_gate() {
    let (corpus, ranks) = (text(), Ranks { world: 4, ep: 2 });
    for gate in GATES {
        let mut config = configuration();
        gate.choose(&mut config);
        let (straight, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (straight, stopped) = (Store::new(straight.path(), 0), Store::new(stopped.path(), 0));
        leg(&config, &corpus, ranks, &straight, (0, 40));
        leg(&config, &corpus, ranks, &stopped, (0, 20));
        leg(&config, &corpus, ranks, &stopped, (20, 40));
        assert_same_files(&stopped.step_dir(40), &straight.step_dir(40));
    }
}

#[test]
fn another_layout_goes_on_within_rounding() {
    let (corpus, config) = (text(), {
        let mut config = configuration();
        // With several passes a balance loss depends on how a step is cut; see `ep_invariance`.
        config.router.balance_coefficient = 0.0;
        config
    });
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), 0);
    leg(&config, &corpus, Ranks { world: 4, ep: 2 }, &store, (0, 20));
    let go_on = |world, ep| {
        let copy = tempfile::tempdir().unwrap();
        let own = Store::new(copy.path(), 0);
        copy_files(&store.step_dir(20), &own.step_dir(20));
        leg(&config, &corpus, Ranks { world, ep }, &own, (20, 40))
    };
    let expected = go_on(4, 2);
    for (world, ep) in [(1, 1), (2, 2), (4, 1), (4, 4), (3, 3)] {
        assert_same_curve(&format!("{world} ranks, EP {ep}"), &go_on(world, ep), &expected, 1e-5, 1e-3);
    }
}

fn copy_files(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// moe-worker alone on `run` up to `steps`, with more `--set`s.
fn worker(run: &Run, steps: u64, sets: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-worker"));
    command.args(run.args(steps)).args(sets.iter().flat_map(|set| ["--set", set]));
    command
}

/// More steps than a test waits for.
const FOR_EVER: u64 = 1_000_000;

#[test]
fn killed_after_a_checkpoint_a_run_ends_in_the_bits_of_an_undisturbed_one() {
    let place = Place::new();
    let (killed, undisturbed) = (place.run("killed"), place.run("undisturbed"));
    let checkpoints = ["train.checkpoint_every=20"];
    let mut first = Program::start(worker(&killed, FOR_EVER, &checkpoints));
    first.wait_until("the first checkpoint and a step after it", || {
        killed.checkpoints().last().filter(|&&step| killed.metrics().len() as u64 > step).map(|_| ())
    });
    first.signal(Signal::KILL);
    assert_eq!(first.wait().code, None);
    let done = *killed.checkpoints().last().unwrap();
    let last = done + EVERY;
    Program::start(worker(&killed, last, &checkpoints)).wait().expect(DONE).says(&format!("after step {done}"));
    Program::start(worker(&undisturbed, last, &checkpoints)).wait().expect(DONE);
    assert_same_files(&killed.checkpoint(last), &undisturbed.checkpoint(last));
    killed.has_each_step_once(last);
    assert_eq!(killed.losses(), undisturbed.losses());
}

#[test]
fn killed_before_its_first_checkpoint_a_run_begins_again_with_its_own_settings() {
    let place = Place::new();
    let (killed, undisturbed) = (place.run("killed"), place.run("undisturbed"));
    let mut first = Program::start(worker(&killed, FOR_EVER, &[]));
    first.wait_until("a step", || (!killed.metrics().is_empty()).then_some(()));
    first.signal(Signal::KILL);
    first.wait();
    let mut again = Command::new(env!("CARGO_BIN_EXE_moe-worker"));
    again.args(["--steps", "3", "--run-dir"]).arg(&killed.dir);
    Program::start(again).wait().expect(DONE).says("no checkpoint");
    Program::start(worker(&undisturbed, 3, &[])).wait().expect(DONE);
    killed.has_each_step_once(3);
    assert_eq!(killed.losses(), undisturbed.losses());
}

#[test]
fn a_graceful_stop_finishes_the_step_and_the_next_start_goes_on() {
    for signal in [Signal::USR1, Signal::INT] {
        let place = Place::new();
        let (stopped, undisturbed) = (place.run("stopped"), place.run("undisturbed"));
        let mut first = Program::start(worker(&stopped, FOR_EVER, &[]));
        first.wait_until("three steps", || (stopped.metrics().len() >= 3).then_some(()));
        assert_eq!(stopped.checkpoints(), [0; 0]);
        first.signal(signal);
        first.wait().expect(RETRY).says("stopped after step");
        let done = stopped.metrics().len() as u64;
        assert_eq!(stopped.checkpoints(), [done], "{signal:?}");
        stopped.has_each_step_once(done);
        Program::start(worker(&stopped, done + 5, &[])).wait().expect(DONE);
        Program::start(worker(&undisturbed, done + 5, &[])).wait().expect(DONE);
        stopped.has_each_step_once(done + 5);
        assert_same_files(&stopped.checkpoint(done + 5), &undisturbed.checkpoint(done + 5));
    }
}

/// SIGTERM does not wait for the step, nor does a second request to stop.
#[test]
fn an_immediate_stop_leaves_what_was_there_and_can_be_retried() {
    let place = Place::new();
    let run = place.run("ended");
    let mut first = Program::start(worker(&run, FOR_EVER, &["train.checkpoint_every=20"]));
    first.wait_until("a checkpoint", || run.checkpoints().last().copied());
    first.signal(Signal::TERM);
    first.wait().expect(RETRY).says("given up");
    let done = *run.checkpoints().last().unwrap();
    assert_eq!(done % EVERY, 0, "a step that was given up has no checkpoint");
    Program::start(worker(&run, done + 3, &["train.checkpoint_every=20"])).wait().expect(DONE);
    run.has_each_step_once(done + 3);
}

#[test]
fn a_run_that_is_done_has_nothing_left_to_do() {
    let place = Place::new();
    let run = place.run("done");
    Program::start(worker(&run, 3, &[])).wait().expect(DONE);
    let losses = run.losses();
    Program::start(worker(&run, 3, &[])).wait().expect(DONE);
    assert_eq!((run.losses(), run.checkpoints()), (losses, vec![3]));
}

#[test]
fn a_run_is_not_continued_with_other_settings_nor_where_that_was_ruled_out() {
    let place = Place::new();
    let run = place.run("first");
    Program::start(worker(&run, 3, &[])).wait().expect(DONE);
    let refused = |sets: &[&str]| Program::start(worker(&run, 5, sets)).wait().expect(USAGE);
    refused(&["optimizer.lr=0.5"]).says("optimizer.lr (0.003 then, 0.5 now)").says("config.toml");
    refused(&["model.experts=8", "train.seed=9"]).says("model.experts (4 then, 8 now), train.seed (1 then, 9 now)");
    let mut never = worker(&run, 5, &[]);
    never.args(["--resume", "never"]);
    Program::start(never).wait().expect(USAGE).says("holds a run already");
    run.has_each_step_once(3);
    // What says where and how long may change.
    Program::start(worker(&run, 5, &["parallel.chunks=2", "train.log_every=1"])).wait().expect(DONE);
    run.has_each_step_once(5);
}

#[test]
fn a_start_that_is_refused_leaves_the_settings_of_the_run_alone() {
    let place = Place::new();
    let run = place.run("kept");
    Program::start(worker(&run, 3, &[])).wait().expect(DONE);
    let settings = fs::read(run.dir.join("config.toml")).unwrap();
    let other = Run { text: place.path().join("other.txt"), ..run.clone() };
    fs::write(&other.text, "some other text ".repeat(1000)).unwrap();
    Program::start(worker(&other, 8, &[])).wait().expect(BAD_DATA).says("the text has sha256");
    let damaged = run.checkpoint(3).join("optimizer.expert-00003.safetensors");
    let mut bytes = fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&damaged, bytes).unwrap();
    Program::start(worker(&run, 8, &["run.threads=2"]))
        .wait()
        .expect(BAD_DATA)
        .says("optimizer.expert-00003.safetensors");
    assert_eq!(fs::read(run.dir.join("config.toml")).unwrap(), settings);
}

#[test]
fn what_is_gone_from_a_run_directory_is_not_made_up() {
    let place = Place::new();
    let run = place.run("gone");
    Program::start(worker(&run, 3, &[])).wait().expect(DONE);
    let settings = run.dir.join("config.toml");
    let kept = fs::read(&settings).unwrap();
    fs::write(&settings, "").unwrap();
    Program::start(worker(&run, 5, &[])).wait().expect(BAD_DATA).says("config.toml: is empty");
    fs::remove_file(&settings).unwrap();
    Program::start(worker(&run, 5, &[])).wait().expect(BAD_DATA).says("config.toml: is missing");
    assert!(!settings.exists());
    fs::write(&settings, kept).unwrap();
    fs::rename(run.dir.join("checkpoints"), place.path().join("elsewhere")).unwrap();
    let mut last_good = worker(&run, 5, &[]);
    last_good.args(["--resume", "last-good"]);
    Program::start(last_good).wait().expect(BAD_DATA).says("checkpoints: holds no checkpoint to go on from");
    run.has_each_step_once(3);
}

#[test]
fn a_run_goes_on_with_its_own_copy_of_the_tokenizer_wherever_it_is_moved() {
    let place = Place::new();
    let words: Vec<_> = (0..500).map(|id| format!("\"w{id}\": {id}")).collect();
    let model = format!("{{\"type\": \"WordLevel\", \"vocab\": {{{}}}, \"unk_token\": \"w0\"}}", words.join(", "));
    let pieces = "\"pre_tokenizer\": {\"type\": \"Whitespace\"}";
    let tokenizer = place.path().join("words.json");
    fs::write(&tokenizer, format!("{{\"version\": \"1.0\", {pieces}, \"model\": {model}}}")).unwrap();
    let start = |name: &str, steps, sets: &[&str]| {
        let mut command = worker(&Run { dir: name.into(), ..place.run(name) }, steps, sets);
        command.current_dir(place.path());
        Program::start(command).wait().expect(DONE)
    };
    start("one", 2, &["data.tokenizer=words.json", "model.vocab_size=512"]);
    fs::remove_file(&tokenizer).unwrap();
    start("one", 3, &[]);
    fs::rename(place.path().join("one"), place.path().join("two")).unwrap();
    start("two", 4, &[]);
    place.run("two").has_each_step_once(4);
}

#[test]
fn a_run_directory_serves_one_job_at_a_time() {
    let place = Place::new();
    let run = place.run("busy");
    let mut first = Program::start(worker(&run, FOR_EVER, &[]));
    first.wait_until("a step", || (!run.metrics().is_empty()).then_some(()));
    Program::start(worker(&run, FOR_EVER, &[])).wait().expect(RETRY).says("in use by another job");
    first.signal(Signal::USR1);
    first.wait().expect(RETRY);
    run.has_each_step_once(run.metrics().len() as u64);
}

/// Either number can be the first to go: a norm that overflows makes everything after it 0, and the loss stays finite.
#[test]
fn a_loss_or_gradient_that_is_no_number_stops_before_the_update_and_names_the_last_good_checkpoint() {
    let place = Place::new();
    for (rate, what) in [("1e18", "loss"), ("1e30", "gradient norm")] {
        let lr = format!("optimizer.lr={rate}");
        let message = format!("step 2: the {what} is NaN; the parameters are those of step 1; ");
        let with = place.run(&format!("{rate}-with"));
        Program::start(worker(&with, 10, &[&lr, "train.checkpoint_every=1"]))
            .wait()
            .expect(INTERNAL)
            .says(&format!("{message}the last checkpoint is {}", with.checkpoint(1).display()));
        assert_eq!(with.checkpoints(), [1]);
        with.has_each_step_once(1);
        let without = place.run(&format!("{rate}-without"));
        let ended = Program::start(worker(&without, 10, &[&lr])).wait().expect(INTERNAL);
        ended.says(&format!("{message}there is no checkpoint yet"));
        assert_eq!(without.checkpoints(), [0; 0]);
    }
}
