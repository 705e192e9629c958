//! Native checkpoints among ranks: saved under one layout and loaded under another, refused when damaged, absent when a rank
//! failed.

// The lint spares test functions, not what they share.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe_kernels::{Cpu, Device, ViewMut};
use moe_runtime::checkpoint::{
    Checkpoint, CheckpointError, Moments, MomentsMut, Progress, Restored, Store, Target, TrainingState, probe_shared,
};
use moe_runtime::collectives::{Communicator, HostCommunicator, local};
use moe_runtime::exit::Classified;
use moe_runtime::model::layout::Layout;
use moe_runtime::model::{Family, ModelConfig, Parameters, parameters};
use moe_runtime::routing::{RouterConfig, RouterKind};
use moe_runtime::topology::{Grid, Rank};
use serde_json::json;

type FlatBuffer = <Cpu as Device>::Buffer<f32>;

/// One dense block and one MoE block, with everything that is not in every model.
fn model() -> ModelConfig {
    ModelConfig {
        family: Family::Qwen2Moe,
        vocab_size: 6,
        hidden_size: 8,
        heads: 2,
        kv_heads: 1,
        moe_every: 2,
        ffn_size: 12,
        experts: 4,
        expert_ffn_size: 4,
        shared_expert_ffn_size: 4,
        shared_expert_gate: true,
        qkv_bias: true,
        ..ModelConfig::default()
    }
}

fn router() -> RouterConfig {
    RouterConfig { kind: RouterKind::NoisyTopk, ..RouterConfig::default() }
}

fn progress(step: u64) -> Progress {
    Progress { step, optimizer_step: step + 1, cursor: json!({"sample": step * 32, "pass": u64::MAX}) }
}

fn biases(seed: u64) -> Vec<(usize, Vec<f32>)> {
    vec![(1, (0..4).map(|e| (seed + e) as f32 * 0.1).collect())]
}

fn rank_of(world: &HostCommunicator) -> usize {
    Communicator::<Cpu>::rank(world)
}

/// What one rank holds.
struct Held {
    parameters: Parameters<Cpu>,
    m: FlatBuffer,
    v: FlatBuffer,
}

impl Held {
    fn zeros(grid: &Grid, rank: usize) -> Self {
        let layout = Layout::new(&model(), &router(), grid.local_experts(Rank(rank)));
        let buffer = || Cpu.alloc(layout.len(), "moment").unwrap();
        Self { m: buffer(), v: buffer(), parameters: Parameters::new(&Cpu, layout).unwrap() }
    }

    /// The state of `seed`, in which all values of all three kinds differ.
    fn of_seed(grid: &Grid, rank: usize, seed: u64) -> Self {
        let mut held = Self::zeros(grid, rank);
        for (buffer, seed) in [(&mut held.m, seed + 100), (&mut held.v, seed + 200)] {
            held.parameters.initialize(&Cpu, seed);
            for (part, _) in held.parameters.layout().parts() {
                let values = held.parameters.read(&Cpu, part).unwrap();
                Cpu.upload(&values, ViewMut::range(buffer, part.range.clone()));
            }
        }
        held.parameters.initialize(&Cpu, seed);
        held
    }

    fn bits(&self) -> BTreeMap<String, [Vec<u32>; 3]> {
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
        let parts = self.parameters.layout().parts().map(|(part, _)| {
            let values = self.parameters.read(&Cpu, part).unwrap();
            let (m, v) = (parameters::read(&Cpu, &self.m, part), parameters::read(&Cpu, &self.v, part));
            (part.id.to_string(), [values, m.unwrap(), v.unwrap()].map(bits))
        });
        parts.collect()
    }
}

/// Saves the state of `seed` at `step` from one rank.
fn save_on(
    world: &HostCommunicator,
    store: &Store,
    grid: &Grid,
    step: u64,
    seed: u64,
) -> Result<PathBuf, CheckpointError> {
    let rank = rank_of(world);
    let held = Held::of_seed(grid, rank, seed);
    let (model, router) = (model(), router());
    let state = TrainingState {
        model: &model,
        router: &router,
        parameters: &held.parameters,
        moments: Moments { m: &held.m, v: &held.v },
        router_biases: &biases(seed),
        progress: &progress(step),
    };
    store.save(&Cpu, world, grid, &state)
}

fn save(dir: &Path, (world, ep): (usize, usize), step: u64, seed: u64) -> PathBuf {
    save_keeping(dir, (world, ep), step, seed, 0)
}

fn save_keeping(dir: &Path, (world, ep): (usize, usize), step: u64, seed: u64, keep: usize) -> PathBuf {
    let (grid, store) = (Grid::new(world, ep, 4).unwrap(), Store::new(dir, keep));
    let mut saved = local::run(world, |world| save_on(&world, &store, &grid, step, seed).unwrap());
    saved.swap_remove(0)
}

/// Loads on every rank: what came beside the tensors, and what each rank then holds.
fn load(
    dir: &Path,
    (world, ep): (usize, usize),
    model: &ModelConfig,
) -> Vec<Result<(Restored, Held), CheckpointError>> {
    let grid = Grid::new(world, ep, 4).unwrap();
    local::run(world, |world| {
        let mut held = Held::zeros(&grid, rank_of(&world));
        let moments = Some(MomentsMut { m: &mut held.m, v: &mut held.v });
        let target = Target { model, router: &router(), parameters: &mut held.parameters, moments };
        let restored = Checkpoint::open(dir)?.load(&Cpu, &world, target)?;
        Ok((restored, held))
    })
}

fn load_error(dir: &Path) -> CheckpointError {
    match load(dir, (1, 1), &model()).swap_remove(0) {
        Err(error) => error,
        Ok(_) => panic!("a damaged checkpoint was loaded"),
    }
}

/// Every file below a directory, with its bytes.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_checkpoint_loads_bit_for_bit_under_any_layout() {
    let dir = tempfile::tempdir().unwrap();
    let saved = save(dir.path(), (4, 2), 40, 7);
    assert_eq!(saved, dir.path().join("step-00000040"));
    Checkpoint::open(&saved).unwrap().verify().unwrap();
    for (world, ep) in [(4, 2), (1, 1), (2, 1), (4, 4), (2, 2)] {
        let grid = Grid::new(world, ep, 4).unwrap();
        for (rank, loaded) in load(&saved, (world, ep), &model()).into_iter().enumerate() {
            let (restored, held) = loaded.unwrap();
            assert_eq!(restored, Restored { progress: progress(40), router_biases: biases(7) });
            assert_eq!(held.bits(), Held::of_seed(&grid, rank, 7).bits(), "rank {rank} of {world}, EP {ep}");
        }
    }
}

#[test]
fn the_same_state_gives_the_same_bytes_whatever_the_layout() {
    let layouts = [(4, 2), (4, 2), (1, 1), (4, 4)].map(|layout| {
        let dir = tempfile::tempdir().unwrap();
        files(&save(dir.path(), layout, 3, 1))
    });
    assert!(layouts[0].len() > 4);
    assert!(layouts.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn tensors_bear_the_names_of_the_hub_and_replicated_ones_are_there_once() {
    let dir = tempfile::tempdir().unwrap();
    let files = files(&save(dir.path(), (4, 2), 3, 1));
    let tensors = |file: &str| {
        let tensors = safetensors::SafeTensors::deserialize(&files[file]).unwrap();
        let mut names: Vec<String> = tensors.names().into_iter().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(
        tensors("model.expert-00002.safetensors"),
        ["down_proj", "gate_proj", "up_proj"].map(|name| format!("model.layers.1.mlp.experts.2.{name}.weight"))
    );
    let replicated = tensors("model.safetensors");
    assert!(replicated.contains(&"model.layers.1.mlp.gate.e_score_correction_bias".to_owned()));
    assert!(replicated.contains(&"model.layers.1.mlp.noise_gate.weight".to_owned()));
    assert!(tensors("optimizer.safetensors").contains(&"optimizer.v.model.layers.0.self_attn.q_proj.bias".to_owned()));
    let experts = (0..4).flat_map(|e| tensors(&format!("model.expert-{e:05}.safetensors")));
    let all: Vec<_> = experts.chain(replicated).collect();
    let layout = Layout::new(&model(), &router(), 0..4);
    assert_eq!(all.len(), layout.parts().count() + 1);
}

#[test]
fn parameters_alone_can_be_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let saved = save(dir.path(), (2, 2), 3, 1);
    let grid = Grid::new(1, 1, 4).unwrap();
    let mut held = Held::zeros(&grid, 0);
    let world = local::solo(Default::default());
    let target = Target { model: &model(), router: &router(), parameters: &mut held.parameters, moments: None };
    Checkpoint::open(&saved).unwrap().load(&Cpu, &world, target).unwrap();
    let expected = Held::of_seed(&grid, 0, 1).bits();
    assert!(held.bits().iter().all(|(name, [values, ..])| *values == expected[name][0]));
    assert!(held.bits().values().all(|[_, m, _]| m.iter().all(|bits| *bits == 0)));
}

#[test]
fn each_kind_of_damage_has_its_own_error_and_names_the_file() {
    type Damage = fn(&Path);
    fn rewrite(path: PathBuf, change: impl Fn(&mut Vec<u8>)) {
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
    }
    fn kind(error: &CheckpointError) -> &'static str {
        match error {
            CheckpointError::Length { .. } => "length",
            CheckpointError::Hash { .. } => "hash",
            CheckpointError::FileName { .. } => "file",
            CheckpointError::NoCheckpoint { .. } => "none",
            CheckpointError::Json { .. } => "json",
            CheckpointError::FutureFormat { .. } => "future",
            _ => "other",
        }
    }
    #[rustfmt::skip]
    let table: [(&str, &str, u8, Damage); 7] = [
        ("length", "optimizer.safetensors", 65, |dir| rewrite(dir.join("optimizer.safetensors"), |bytes| bytes.truncate(bytes.len() - 1))),
        ("hash", "model.expert-00001.safetensors", 65, |dir| rewrite(dir.join("model.expert-00001.safetensors"), |bytes| *bytes.last_mut().unwrap() ^= 4)),
        ("file", "model.safetensors", 65, |dir| fs::remove_file(dir.join("model.safetensors")).unwrap()),
        ("none", "step-00000005", 64, |dir| fs::remove_file(dir.join("manifest.json")).unwrap()),
        ("json", "manifest.json", 65, |dir| fs::write(dir.join("manifest.json"), "{\"sha256\": ").unwrap()),
        ("hash", "manifest.json", 65, |dir| rewrite(dir.join("manifest.json"), |bytes| {
            let text = String::from_utf8(bytes.clone()).unwrap();
            *bytes = text.replace("\"step\": 5", "\"step\": 6").into_bytes();
        })),
        ("future", "manifest.json", 65, |dir| fs::write(dir.join("manifest.json"), r#"{"format": 2, "chunks": {}}"#).unwrap()),
    ];
    for (expected, named, exit_code, damage) in table {
        let dir = tempfile::tempdir().unwrap();
        let saved = save(dir.path(), (1, 1), 5, 1);
        damage(&saved);
        let error = load_error(&saved);
        assert_eq!((kind(&error), error.exit_code().number()), (expected, exit_code), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
}

#[test]
fn every_rank_refuses_what_one_rank_finds_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let saved = save(dir.path(), (2, 2), 5, 1);
    let path = saved.join("optimizer.expert-00003.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    bytes[200] ^= 1;
    fs::write(&path, bytes).unwrap();
    let mut found = 0;
    for loaded in load(&saved, (4, 4), &model()) {
        let error = loaded.err().unwrap();
        assert_eq!(error.exit_code().number(), 65);
        assert!(error.to_string().contains("optimizer.expert-00003.safetensors"), "{error}");
        found += usize::from(matches!(error, CheckpointError::Hash { .. }));
    }
    assert_eq!(found, 1, "each file is hashed by one rank");
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_the_keys_that_differ() {
    let dir = tempfile::tempdir().unwrap();
    let saved = save(dir.path(), (1, 1), 5, 1);
    let other = ModelConfig { expert_ffn_size: 8, rope_theta: 5e5, init_std: 0.5, ..model() };
    match load(&saved, (1, 1), &other).swap_remove(0) {
        Err(error @ CheckpointError::OtherModel { .. }) => {
            let text = error.to_string();
            assert!(
                text.contains("model.expert_ffn_size: 4 in the checkpoint, 8 in this run; model.rope_theta"),
                "{text}"
            );
        }
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn a_rank_that_fails_leaves_no_checkpoint_and_nothing_else() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let grid = Grid::new(4, 4, 4).unwrap();
    let results = local::run(4, |world| {
        // Rank 2 has another directory of that name, as on storage that is not shared.
        let mine = if rank_of(&world) == 2 { &elsewhere } else { &dir };
        save_on(&world, &Store::new(mine.path(), 0), &grid, 5, 1)
    });
    for (rank, result) in results.into_iter().enumerate() {
        let error = result.unwrap_err();
        assert_eq!(error.exit_code().number(), 74, "{error}");
        match error {
            CheckpointError::Io { .. } => assert_eq!(rank, 2),
            CheckpointError::Peer { rank: culprit, .. } => assert_eq!(culprit, Rank(2)),
            other => panic!("{other}"),
        }
    }
    assert!(names(dir.path()).is_empty() && names(elsewhere.path()).is_empty());
}

#[test]
fn a_place_that_cannot_be_taken_leaves_nothing_unfinished() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("checkpoints"), "a file").unwrap();
    let grid = Grid::new(2, 2, 4).unwrap();
    let store = Store::new(dir.path().join("checkpoints"), 0);
    let results = local::run(2, |world| save_on(&world, &store, &grid, 5, 1));
    assert!(results.into_iter().all(|result| result.is_err_and(|error| error.exit_code().number() == 74)));
    assert_eq!(names(dir.path()), ["checkpoints"]);
}

#[test]
fn the_newest_are_kept_and_what_others_left_unfinished_goes() {
    let dir = tempfile::tempdir().unwrap();
    for step in [10, 20] {
        save_keeping(dir.path(), (1, 1), step, step, 2);
    }
    fs::create_dir(dir.path().join("step-00000030.tmp-dead")).unwrap();
    fs::write(dir.path().join("step-00000030.tmp-dead/model.safetensors"), "half").unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    save_keeping(dir.path(), (1, 1), 30, 30, 2);
    assert_eq!(names(dir.path()), ["notes.txt", "step-00000020", "step-00000030"]);
    // One step back, as after resuming from an older one: what was just written stays, whatever is newer.
    save_keeping(dir.path(), (1, 1), 15, 15, 1);
    assert_eq!(names(dir.path()), ["notes.txt", "step-00000015", "step-00000030"]);
}

#[test]
fn the_latest_is_the_newest_and_what_others_left_unfinished_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path().join("checkpoints"), 0);
    assert!(store.latest().unwrap().is_none(), "no directory yet");
    assert!(store.last_good().unwrap().checkpoint.is_none());
    for step in [10, 20] {
        save(store.dir(), (1, 1), step, step);
    }
    fs::create_dir(store.dir().join("step-00000040.tmp-1")).unwrap();
    let latest = local::run(2, |world| {
        let latest = store.latest_of_world::<Cpu, _>(&world).unwrap();
        latest.unwrap().manifest().progress.step
    });
    assert_eq!(latest, [20, 20]);
    fs::write(store.step_dir(20).join("manifest.json"), r#"{"format": 9}"#).unwrap();
    assert!(matches!(store.latest(), Err(CheckpointError::FutureFormat { .. })), "an older one would lose steps");
    assert!(matches!(store.last_good(), Err(CheckpointError::FutureFormat { .. })), "it is not damaged");
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path().join("checkpoints"), 0);
    for step in [10, 20, 30] {
        save(store.dir(), (1, 1), step, step);
    }
    // One whose length and manifest are right, and one that is not there.
    let changed = store.step_dir(20).join("model.safetensors");
    let mut bytes = fs::read(&changed).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&changed, bytes).unwrap();
    fs::remove_file(store.step_dir(30).join("manifest.json")).unwrap();
    match store.latest() {
        Err(error @ CheckpointError::NewestDamaged { .. }) => {
            assert_eq!(error.exit_code().number(), 65);
            let text = error.to_string();
            assert!(text.contains("step-00000030") && text.contains("step-00000020: "), "{text}");
        }
        other => panic!("{other:?}"),
    }
    let found = store.last_good().unwrap();
    assert_eq!(found.checkpoint.unwrap().dir(), store.step_dir(10));
    assert_eq!(found.damaged, [store.step_dir(30), store.step_dir(20)]);
    let before = files(&store.step_dir(20));
    store.set_aside(&found.damaged).unwrap();
    assert_eq!(store.latest().unwrap().unwrap().dir(), store.step_dir(10));
    let names = names(store.dir());
    assert!(
        names[1].starts_with("step-00000020.damaged-") && names[2].starts_with("step-00000030.damaged-"),
        "{names:?}"
    );
    assert_eq!(files(&store.dir().join(&names[1])), before, "nothing is removed");
    fs::remove_file(store.step_dir(10).join("optimizer.safetensors")).unwrap();
    let error = store.last_good().unwrap_err();
    assert!(error.to_string().contains("none of its 1 checkpoints is whole; the newest: "), "{error}");
    assert_eq!(error.exit_code().number(), 65);
}

#[test]
fn a_step_can_be_saved_again() {
    let dir = tempfile::tempdir().unwrap();
    let first = files(&save(dir.path(), (1, 1), 10, 1));
    assert_eq!(files(&save(dir.path(), (2, 2), 10, 1)), first);
    let other = files(&save(dir.path(), (1, 1), 10, 2));
    assert_ne!(other, first);
    assert_eq!(names(dir.path()), ["step-00000010"]);
}

#[test]
fn storage_that_is_not_shared_names_the_ranks_without_it() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let probe = |blind: &[usize]| {
        local::run(4, |world| {
            let is_blind = blind.contains(&rank_of(&world));
            let dir = if is_blind { elsewhere.path() } else { dir.path() };
            probe_shared::<Cpu, _>(&world, &dir.join("run"))
        })
    };
    assert!(probe(&[]).into_iter().all(|result| result.is_ok()));
    for result in probe(&[1, 3]) {
        match result {
            Err(CheckpointError::NotShared { ranks, .. }) => assert_eq!(ranks, [Rank(1), Rank(3)]),
            other => panic!("{other:?}"),
        }
    }
    assert!(names(&dir.path().join("run")).is_empty(), "the probe is gone");
}
