//! What a user says and what comes of it: precedence, and a table of what is refused with its message.

use proptest::prelude::*;

use super::*;
use crate::exit::{Classified, ExitCode};

/// A configuration file in a folder of its own.
fn written(text: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

#[test]
fn nothing_said_is_the_default_preset() {
    let resolved = ConfigBuilder::new().build().unwrap();
    assert_eq!(resolved.config, Config::preset(DEFAULT_PRESET).unwrap());
    assert_eq!(resolved.config.schedule.steps, Some(200));
    assert_eq!(resolved.config.model.vocab_size, 256);
}

#[test]
fn flags_override_sets_which_override_the_file_which_overrides_the_preset() {
    let (_folder, path) = written("preset = \"moe-15m\"\n[train]\nsteps = 11\nseed = 11\nlog_every = 11\n");
    let builder = ConfigBuilder::new()
        .file(&path)
        .set("train.steps=12")
        .set("train.seed = 12")
        .set("train.seed=13")
        .flag("--steps", "train.steps", 14u64);
    let resolved = builder.clone().build().unwrap();
    let train = &resolved.config.train;
    assert_eq!((train.global_batch, train.log_every, train.seed, train.steps), (8, 11, 13, 14));
    assert_eq!(resolved.config.schedule.steps, Some(14), "the schedule follows the steps that won");
    assert_eq!(resolved.origin_of("train.steps"), &Origin::Flag("--steps"));
    assert_eq!(resolved.origin_of("train.seed"), &Origin::Set);
    assert_eq!(resolved.origin_of("train.log_every"), &Origin::File(path));
    assert_eq!(resolved.origin_of("model.experts"), &Origin::Preset("moe-15m".into()));
    let other = builder.preset("tiny").build().unwrap();
    assert_eq!(other.config.train.global_batch, 16, "--preset wins over the file's");
    assert_eq!(other.config.train.log_every, 11, "and the rest of the file stands");
}

#[test]
fn values_are_toml_or_bare_words() {
    let set = |text: &str| ConfigBuilder::new().set(text).build().unwrap().config;
    assert_eq!(set("router.kind=switch").router, set("router.kind=\"switch\"").router);
    assert_eq!(set("data.paths=../a b/c.txt").data.paths, [PathBuf::from("../a b/c.txt")]);
    assert_eq!(set("data.paths=[\"a\", \"b\"]").data.paths.len(), 2);
    assert_eq!(set("parallel.ep=4").parallel.ep, Some(4));
    assert_eq!(set("parallel.ep=auto").parallel.ep, None);
    assert_eq!(set("optimizer.lr=1").optimizer.lr, 1.0);
    assert_eq!(set("preset=moe-15m").train.global_batch, 8);
    assert_eq!(set("model.dense_layers=[0]").model.dense_layers, [0]);
}

#[test]
fn what_cannot_be_is_refused_with_place_key_value_reason_and_remedy() {
    // File text (none where empty), assignments, the whole message with FILE for the path.
    let table: [(&str, &[&str], &str); 17] = [
        ("", &["train.step=3"], "--set: train.step = 3: there is no such key; did you mean train.steps?"),
        ("[optimiser]\nlr = 1.0", &[], "FILE: optimiser.lr = 1.0: there is no such key; did you mean optimizer.lr?"),
        ("steps = 3", &[], "FILE: steps = 3: there is no such key; did you mean schedule.steps or train.steps?"),
        ("[train]\nsteps = \"ten\"", &[], "FILE: train.steps = \"ten\": must be a whole number of at least 0"),
        ("", &["train.steps=-1"], "--set: train.steps = -1: must be a whole number of at least 0"),
        ("", &["train.steps=1e3"], "--set: train.steps = 1000.0: must be a whole number of at least 0"),
        ("", &["optimizer.lr=fast"], "--set: optimizer.lr = \"fast\": must be a number"),
        ("", &["model.qkv_bias=1"], "--set: model.qkv_bias = 1: must be true or false"),
        ("", &["parallel.ep=0"], "--set: parallel.ep = 0: must be \"auto\" or a whole number of at least 1"),
        (
            "",
            &["schedule.kind=line"],
            "--set: schedule.kind = \"line\": must be one of \"cosine\", \"wsd\", \"constant\"",
        ),
        ("", &["data.paths=3"], "--set: data.paths = 3: must be a path in quotes or a list of them"),
        ("train = 3", &[], "FILE: train = 3: is a section; its keys are set as train.key or under [train]"),
        ("preset = \"tinny\"", &[], "FILE: preset = \"tinny\": there is no such preset; did you mean tiny?"),
        (
            "",
            &["preset=huge"],
            "--set: preset = \"huge\": there is no such preset; there are tiny, shakespeare, moe-15m, moe-3b",
        ),
        (
            "",
            &["train.steps"],
            "--set train.steps: no = between key and value; write --set section.key=value, for example --set train.steps=100",
        ),
        (
            "",
            &["data.paths=[a"],
            "--set data.paths=[a: the value begins like TOML but is not TOML; write --set section.key=value, for example \
             --set train.steps=100",
        ),
        (
            "",
            &["train.steps=3 \n seed=4"],
            "--set: train.steps = \"3 \\n seed=4\": must be a whole number of at least 0",
        ),
    ];
    for (text, sets, message) in table {
        let (_folder, path) = written(text);
        let mut builder = sets.iter().fold(ConfigBuilder::new(), |builder, set| builder.set(*set));
        if !text.is_empty() {
            builder = builder.file(&path);
        }
        let error = builder.build().unwrap_err();
        assert_eq!(error.to_string().replace(&path.display().to_string(), "FILE"), message);
        assert_eq!(error.exit_code(), ExitCode::Usage, "{message}");
    }
}

#[test]
fn files_that_cannot_be_read_say_where() {
    let (folder, path) = written("[train]\nsteps = = 3\n");
    let error = ConfigBuilder::new().file(&path).build().unwrap_err();
    assert!(error.to_string().contains("run.toml:2:9: not TOML"), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Usage);

    let (_folder, path) = written(b"# \xff\n");
    let error = ConfigBuilder::new().file(&path).build().unwrap_err();
    assert!(error.to_string().contains("run.toml: byte 2 is not UTF-8"), "{error}");

    let error = ConfigBuilder::new().file(folder.path().join("absent.toml")).build().unwrap_err();
    assert!(error.to_string().contains("absent.toml: cannot be read: No such file"), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Io);
}

#[test]
fn a_value_refused_later_still_says_who_set_it() {
    let resolved = ConfigBuilder::new().flag("--ep", "parallel.ep", 3usize).set("model.experts=6").build().unwrap();
    let error = resolved.validate(4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "--ep: parallel.ep = 3: must divide both the 4 ranks and model.experts = 6; nearest that do: [2]"
    );
    let sources = "[data.sources.a]\npaths = \"a\"\nweight = 1\n[data.sources.b]\npaths = \"b\"\n";
    let (_folder, path) = written(sources);
    let error = ConfigBuilder::new().file(&path).build().and_then(|resolved| resolved.validate(1)).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{}: data.sources.b.weight", path.display())), "{error}");
    let error = ConfigBuilder::new().flag("--seed", "train.seed", u64::MAX).build().unwrap_err();
    assert_eq!(error.to_string(), format!("--seed: train.seed = {}: must be at most {}", u64::MAX, i64::MAX));
}

#[test]
fn a_resumed_run_starts_from_its_own_configuration_and_keeps_its_schedule() {
    let run = ConfigBuilder::new().preset("shakespeare").set("optimizer.lr=0.5").build().unwrap().config;
    let (_folder, path) = written(run.to_toml().unwrap());
    assert_eq!(Config::read(&path).unwrap(), run);
    let (_folder, path) = written("[train]\nstep = 3");
    assert!(Config::read(&path).unwrap_err().to_string().ends_with("did you mean train.steps?"));
    let again = ConfigBuilder::new().resume_from(run.clone(), "runs/a/config.toml");
    assert_eq!(again.clone().build().unwrap().config, run);
    let longer = again.clone().flag("--steps", "train.steps", 9000u64).build().unwrap().config;
    assert_eq!((longer.train.steps, longer.schedule.steps), (9000, run.schedule.steps));
    assert!(longer.differences_that_matter(&run).unwrap().is_empty());
    let named = again.preset("shakespeare").flag("--steps", "train.steps", 9000u64).build().unwrap().config;
    let keys: Vec<_> = named.differences_that_matter(&run).unwrap().into_iter().map(|d| d.key).collect();
    assert_eq!(keys, ["optimizer.lr"], "the schedule's length stays the run's");
}

#[test]
fn a_model_folder_replaces_the_presets_model_and_nothing_else() {
    let model = ModelConfig { vocab_size: 999, experts: 4, ..ModelConfig::default() };
    let router = RouterConfig { renormalize: true, ..RouterConfig::default() };
    let builder = ConfigBuilder::new().preset("moe-15m").model(model.clone(), router.clone(), "hf");
    let resolved = builder.clone().build().unwrap();
    assert_eq!((&resolved.config.model, &resolved.config.router), (&model, &router));
    assert_eq!(resolved.config.train, Config::preset("moe-15m").unwrap().train);
    assert_eq!(resolved.origin_of("model.experts"), &Origin::Model("hf".into()));
    let overridden = builder.set("router.balance_coefficient=0").build().unwrap();
    assert_eq!(overridden.config.router.balance_coefficient, 0.0);
}

proptest! {
    #[test]
    fn any_configuration_survives_toml_exactly(
        lr in any::<f64>().prop_filter("NaN equals nothing", |x| !x.is_nan()),
        norm_eps in any::<f32>().prop_filter("NaN equals nothing", |x| !x.is_nan()),
        factor in proptest::option::of(1e-3f32..1e3),
        ep in proptest::option::of(1usize..1 << 40),
        seed in 0..=i64::MAX as u64,
        path in "\\PC*",
    ) {
        let mut config = Config::preset("tiny").unwrap();
        config.optimizer.lr = lr;
        config.model.norm_eps = norm_eps;
        config.router.capacity_factor = factor;
        config.parallel.ep = ep;
        config.train.seed = seed;
        config.data.paths = vec![path.into()];
        let text = config.to_toml().unwrap();
        let (_folder, file) = written(&text);
        prop_assert_eq!(&ConfigBuilder::new().file(file).build().unwrap().config, &config, "{}", text);
    }
}

#[test]
fn named_sources_and_paths_replace_one_another_and_one_key_of_a_source_can_be_set_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    let text =
        "[data.sources.web]\npaths = \"web/\"\nweight = 3\n[data.sources.code]\npaths = [\"a\", \"b\"]\nweight = 1\n";
    std::fs::write(&file, text).unwrap();
    let builder = || ConfigBuilder::new().file(&file);
    let config = builder().set("data.sources.web.weight=2").build().unwrap().config;
    config.validate(1).unwrap();
    assert_eq!(config.data.sources["web"].weight, Some(2.0));
    assert_eq!(config.data.sources["web"].paths, [PathBuf::from("web/")]);
    assert_eq!(toml::from_str::<Config>(&config.to_toml().unwrap()).unwrap(), config);

    let config = builder().flag("--data", "data.paths", vec![PathBuf::from("c")]).build().unwrap().config;
    config.validate(1).unwrap();
    assert!(config.data.sources.is_empty());
    let below = builder().set("data.paths=c").set("data.sources.d.paths=d").build().unwrap().config;
    assert_eq!(below.data.sources.keys().collect::<Vec<_>>(), ["d"]);
    assert!(below.data.paths.is_empty());

    std::fs::write(&file, format!("[data]\npaths = \"x\"\n{text}")).unwrap();
    assert_eq!(builder().build().unwrap().config.validate(1).unwrap_err().key, "data.paths");
    let error = builder().set("data.sources.web.wieght=2").build().unwrap_err().to_string();
    assert!(error.contains("data.sources.web"), "{error}");
}
