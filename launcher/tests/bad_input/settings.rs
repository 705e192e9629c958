//! Flags, keys and combinations that cannot be: exit code 64 before anything is read or made.

use std::fs;

use super::process::{IO, Place, USAGE};
use super::{in_one_line, launch, wait, worker, worker_with};

#[test]
fn settings_that_cannot_be_are_refused_with_key_value_and_mend() {
    let place = Place::new();
    fs::write(place.path().join("unknown.toml"), "[optimiser]\nlr = 1.0\n").unwrap();
    fs::write(place.path().join("type.toml"), "[train]\nseed = \"ten\"\n").unwrap();
    fs::write(place.path().join("broken.toml"), "[train]\nsteps = = 3\n").unwrap();
    let number = "must be a whole number of at least 0";
    let positive = "must be a positive number";
    #[rustfmt::skip]
    let table: [(&[&str], i32, &str); 28] = [
        // Unknown keys, with the nearest that is known.
        (&["--set", "train.step=3"], USAGE, "--set: train.step = 3: there is no such key; did you mean train.steps?"),
        (&["--config", "unknown.toml"], USAGE, "unknown.toml: optimiser.lr = 1.0: there is no such key; did you mean optimizer.lr?"),
        // Types.
        (&["--config", "type.toml"], USAGE, "type.toml: train.seed = \"ten\": must be a whole number"),
        (&["--config", "broken.toml"], USAGE, "broken.toml:2:9: not TOML"),
        (&["--config", "absent.toml"], IO, "absent.toml: cannot be read: No such file"),
        (&["--set", "optimizer.lr=fast"], USAGE, "--set: optimizer.lr = \"fast\": must be a number"),
        (&["--set", "model.qkv_bias=1"], USAGE, "--set: model.qkv_bias = 1: must be true or false"),
        (&["--set", "schedule.kind=line"], USAGE, "schedule.kind = \"line\": must be one of \"cosine\", \"wsd\", \"constant\""),
        (&["--set", "train.steps"], USAGE, "--set train.steps: no = between key and value; write --set section.key=value"),
        // Combinations.
        (&["--set", "model.top_k=9"], USAGE, "--set: model.top_k = 9: a token can choose 1 to 4 of model.experts = 4 experts"),
        (&["--ep", "3"], USAGE, "--ep: parallel.ep = 3: must divide both the 1 ranks and model.experts = 4; nearest that do: [1]"),
        (&["--set", "model.heads=5"], USAGE, "model.heads = 5: model.hidden_size = 32 cannot be cut into so many heads; nearest that work: [4, 8]"),
        (&["--set", "model.kv_heads=3"], USAGE, "model.kv_heads = 3: must divide model.heads = 4; nearest that work: [2, 4]"),
        (&["--set", "router.kind=switch"], USAGE, "model.top_k = 2: router.kind: switch sends a token to one expert; set model.top_k = 1"),
        // Numbers that are negative, zero or none.
        (&["--set", "train.seed=-1"], USAGE, number),
        (&["--set", "model.experts=-4"], USAGE, number),
        (&["--set", "train.global_batch=0"], USAGE, "train.global_batch = 0: must be at least 1"),
        (&["--set", "train.sequence_length=0"], USAGE, "train.sequence_length = 0: must be at least 1"),
        (&["--set", "model.layers=0"], USAGE, "model.layers = 0: must be at least 1"),
        (&["--set", "optimizer.lr=nan"], USAGE, "--set: optimizer.lr = NaN: must be a positive number"),
        (&["--set", "optimizer.lr=-0.1"], USAGE, positive),
        (&["--set", "optimizer.eps=inf"], USAGE, positive),
        (&["--set", "model.norm_eps=nan"], USAGE, positive),
        (&["--set", "router.capacity_factor=0.0"], USAGE, "router.capacity_factor = 0: must be a positive number"),
        (&["--set", "data.validation_fraction=nan"], USAGE, "data.validation_fraction = NaN: must be at least 0 and below 1"),
        (&["--set", "run.collective_timeout_s=0"], USAGE, "run.collective_timeout_s = 0: must be a number of seconds above 0"),
        // Presets.
        (&["--preset", "tinny"], USAGE, "--preset: preset = \"tinny\": there is no such preset; did you mean tiny?"),
        (&["--set", "preset=huge"], USAGE, "preset = \"huge\": there is no such preset; there are tiny, shakespeare, moe-15m, moe-3b"),
    ];
    let run = place.run("refused");
    for (args, code, message) in table {
        in_one_line(wait(worker(&run, 2, args)).expect(code).says(message));
    }
    in_one_line(
        wait(worker_with(&run, "--steps", "0")).expect(USAGE).says("--steps: train.steps = 0: must be at least 1"),
    );
    // A device that is not there, and numbers that it has not.
    wait(worker(&run, 2, &["--set", "train.precision=bf16"])).expect(USAGE).says("accepted: auto, f32");
    if !cfg!(feature = "cuda") {
        in_one_line(wait(worker(&run, 2, &["--device", "cuda"])).expect(USAGE).says("build with `make cuda`"));
    }
    assert!(!run.dir.exists(), "nothing was begun");
    let file = place.path().join("text.txt");
    let message = "text.txt: is a file; a run needs a directory";
    in_one_line(wait(worker_with(&run, "--run-dir", file.to_str().unwrap())).expect(IO).says(message));
}

#[test]
fn a_grid_that_ranks_or_experts_do_not_fill_is_refused_before_ranks_are_started() {
    let place = Place::new();
    let run = place.run("refused");
    // Ranks, EP, the nearest that would do; 4 experts.
    for (ranks, ep, nearest) in [("6", "3", "[2]"), ("6", "4", "[2]"), ("4", "3", "[2, 4]")] {
        let mut args: Vec<String> = ["run", "-n", ranks, "--"].map(str::to_owned).into();
        args.extend(run.args(2));
        args.extend(["--ep", ep].map(str::to_owned));
        let message = format!(
            "--ep: parallel.ep = {ep}: must divide both the {ranks} ranks and model.experts = 4; nearest that do: {nearest}"
        );
        in_one_line(wait(launch(args)).expect(USAGE).says(&message));
    }
    assert!(!run.dir.exists(), "nothing was begun");
}
