//! Models out to Hugging Face folders and in from them, upcycled and merged: what comes out is what went in.

// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used)]

mod tiny_models;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe_kernels::Cpu;
use moe_runtime::checkpoint::convert::{
    CheckpointModel, Companions, ExpertsFrom, ExportOptions, Merged, ModelTensors, Precision, Slices, Transfer,
    UpcycleOptions, Upcycled, export, write_checkpoint,
};
use moe_runtime::checkpoint::{Checkpoint, CheckpointError, HfFolder, Store};
use moe_runtime::config::Config;
use moe_runtime::model::{Family, ModelConfig, RopeScaling};
use moe_runtime::routing::RouterConfig;
use tiny_models::{LENGTH, SEQUENCES, alone, config, dense, difference, families, inputs, logits, save, train};

fn out(model: &mut dyn ModelTensors, dir: &Path, options: &ExportOptions) -> Result<Transfer, CheckpointError> {
    export(model, dir, options, &mut |_, _| {})
}

/// Trains a model for some steps and writes it as a folder; also its logits.
fn trained_folder(config: &Config, dir: &Path) -> (Transfer, Vec<f32>) {
    let mut trainer = alone(config);
    train(&mut trainer, 4);
    let (_, checkpoint) = save(&trainer, &dir.with_extension("run"), 4);
    let moved = out(&mut CheckpointModel::verified(&checkpoint).unwrap(), dir, &ExportOptions::default()).unwrap();
    (moved, logits(&mut trainer))
}

/// The logits of a folder's model.
fn logits_of(folder: &HfFolder) -> Vec<f32> {
    let mut trainer = alone(&config(folder.model_config(), folder.router_config()));
    folder.load_into(&Cpu, trainer.model.parameters_mut()).unwrap();
    logits(&mut trainer)
}

/// The bytes of every tensor of a folder.
fn tensors(dir: &Path) -> BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let bytes = fs::read(&path).unwrap();
            for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let stored = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(tensors.insert(name, stored).is_none());
            }
        }
    }
    tensors
}

#[test]
fn five_trained_models_go_out_and_in_bit_for_bit() {
    for (name, model, router) in families() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let (moved, expected) = trained_folder(&config(&model, &router), &first);
        let folder = HfFolder::open(&first).unwrap();
        assert_eq!(folder.model_config(), &model, "{name}");
        assert_eq!(logits_of(&folder), expected, "{name}");
        assert_eq!(moved.tensors, tensors(&first).len());

        let store = Store::new(dir.path().join("in"), 0);
        let (path, imported) = write_checkpoint(&mut &folder, &store, &mut |_, _| {}).unwrap();
        assert_eq!(imported, moved, "{name}");
        let checkpoint = Checkpoint::open(&path).unwrap();
        let again =
            out(&mut CheckpointModel::verified(&checkpoint).unwrap(), &second, &ExportOptions::default()).unwrap();
        assert_eq!(again, moved, "{name}");
        assert!(tensors(&first) == tensors(&second), "{name}");
        let mut trainer = alone(&config(&model, &router));
        assert_eq!(trainer.restore(&checkpoint).unwrap().step, 0);
        assert_eq!(logits(&mut trainer), expected, "{name}: the checkpoint trains on from the same weights");
        let losses = train(&mut trainer, 8);
        assert!(losses[7].loss < losses[0].loss, "{name}: {} then {}", losses[0].loss, losses[7].loss);
    }
}

/// The fixture folders that hold a model; none where the fixtures are absent and may be.
fn fixtures() -> Vec<PathBuf> {
    let named = std::env::var_os("MOE_FIXTURES").map(PathBuf::from);
    let root = named.clone().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures"));
    let entries = root.read_dir().into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    let folders: Vec<_> = entries.filter(|path| path.join("config.json").is_file()).collect();
    let required = named.is_some() || std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!(required && folders.is_empty()), "{} holds no model", root.display());
    folders
}

#[test]
fn folders_of_transformers_go_in_and_out_bit_for_bit() {
    for fixture in fixtures() {
        let dir = tempfile::tempdir().unwrap();
        let folder = HfFolder::open(&fixture).unwrap();
        let store = Store::new(dir.path().join("in"), 0);
        let (path, _) = write_checkpoint(&mut &folder, &store, &mut |_, _| {}).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let to = dir.path().join("out");
        let companions = Companions::of_folder(&fixture).unwrap();
        let options = ExportOptions { companions, ..ExportOptions::default() };
        out(&mut CheckpointModel::verified(&checkpoint).unwrap(), &to, &options).unwrap();
        assert!(tensors(&fixture) == tensors(&to), "{}", fixture.display());
        let again = HfFolder::open(&to).unwrap();
        assert_eq!((again.model_config(), again.router_config()), (folder.model_config(), folder.router_config()));
        let generation = |dir: &Path| fs::read(dir.join("generation_config.json")).unwrap();
        assert_eq!(generation(&fixture), generation(&to));
    }
}

#[test]
fn a_folder_in_shards_holds_the_same_as_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, shards) = (dir.path().join("whole"), dir.path().join("shards"));
    let (name, model, router) = families().swap_remove(0);
    trained_folder(&config(&model, &router), &whole);
    let folder = HfFolder::open(&whole).unwrap();
    let options = ExportOptions { shard_bytes: 40_000, ..ExportOptions::default() };
    out(&mut &folder, &shards, &options).unwrap();
    assert!(tensors(&whole) == tensors(&shards), "{name}");
    let files = fs::read_dir(&shards).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let count = files.filter(|name| name.starts_with("model-") && name.ends_with(".safetensors")).count();
    assert!(count > 2 && shards.join(format!("model-00001-of-{count:05}.safetensors")).is_file());
    assert_eq!(logits_of(&HfFolder::open(&shards).unwrap()), logits_of(&folder));
}

#[test]
fn half_precision_is_the_nearest_and_comes_back_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, half, again) = (dir.path().join("whole"), dir.path().join("half"), dir.path().join("again"));
    let (_, model, router) = families().swap_remove(0);
    trained_folder(&config(&model, &router), &whole);
    let options = ExportOptions { precision: Precision::Bf16, ..ExportOptions::default() };
    out(&mut &HfFolder::open(&whole).unwrap(), &half, &options).unwrap();
    let folder = HfFolder::open(&half).unwrap();
    let (path, _) = write_checkpoint(&mut &folder, &Store::new(dir.path().join("in"), 0), &mut |_, _| {}).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    out(&mut CheckpointModel::verified(&checkpoint).unwrap(), &again, &options).unwrap();
    assert!(tensors(&half) == tensors(&again));
    let (exact, rounded) = (tensors(&whole), tensors(&half));
    let worst = exact.iter().flat_map(|(name, (_, _, bytes))| {
        let halves =
            rounded[name].2.as_chunks::<2>().0.iter().map(|h| f32::from_bits(u32::from(u16::from_le_bytes(*h)) << 16));
        bytes.as_chunks::<4>().0.iter().map(|w| f32::from_le_bytes(*w)).zip(halves).collect::<Vec<_>>()
    });
    for (exact, rounded) in worst {
        assert!((exact - rounded).abs() <= exact.abs() / 256.0, "{exact} became {rounded}");
    }
}

fn upcycled(dir: &Path, options: UpcycleOptions) -> (Vec<f32>, HfFolder) {
    let (from, to) = (dir.join("dense"), dir.join("moe"));
    let (_, expected) = trained_folder(&config(&dense(), &RouterConfig::default()), &from);
    let folder = HfFolder::open(&from).unwrap();
    let mut source = &folder;
    out(&mut Upcycled::new(&mut source, options).unwrap(), &to, &ExportOptions::default()).unwrap();
    (expected, HfFolder::open(&to).unwrap())
}

const COPIES: UpcycleOptions =
    UpcycleOptions { experts: 4, top_k: 2, from: ExpertsFrom::Copies, router_std: 0.02, seed: 3 };

/// The losses of a few steps that train on from a folder.
fn trained_on(folder: &HfFolder) -> Vec<f64> {
    let mut trainer = alone(&config(folder.model_config(), folder.router_config()));
    folder.load_into(&Cpu, trainer.model.parameters_mut()).unwrap();
    train(&mut trainer, 10).into_iter().map(|step| step.loss).collect()
}

#[test]
fn upcycled_by_copy_a_model_computes_what_the_dense_one_did_and_learns_on() {
    let dir = tempfile::tempdir().unwrap();
    let (expected, folder) = upcycled(dir.path(), COPIES);
    assert_eq!((folder.model_config().family, folder.model_config().experts), (Family::Mixtral, 4));
    let worst = difference(&logits_of(&folder), &expected);
    println!("upcycled by copy: largest difference of a logit {worst:.2e}");
    assert!(worst <= 1e-5, "{worst}");
    let losses = trained_on(&folder);
    let dense = trained_on(&HfFolder::open(&dir.path().join("dense")).unwrap());
    println!("loss at step 0: dense {:.7}, upcycled {:.7}", dense[0], losses[0]);
    assert!((losses[0] - dense[0]).abs() <= 1e-5, "{} and {}", losses[0], dense[0]);
    assert!(losses[9] < losses[0]);
}

#[test]
fn slices_that_are_all_chosen_alike_are_the_whole_and_fewer_learn_on() {
    for slices in [Slices::Contiguous, Slices::Random] {
        let from = ExpertsFrom::Slices(slices);
        let dir = tempfile::tempdir().unwrap();
        let (expected, folder) = upcycled(dir.path(), UpcycleOptions { top_k: 4, from, router_std: 0.0, ..COPIES });
        assert_eq!(folder.model_config().expert_ffn_size, 12);
        let worst = difference(&logits_of(&folder), &expected);
        println!("{slices:?}: largest difference of a logit {worst:.2e}");
        assert!(worst <= 1e-5, "{slices:?}: {worst}");

        let dir = tempfile::tempdir().unwrap();
        let (_, folder) = upcycled(dir.path(), UpcycleOptions { from, ..COPIES });
        let losses = trained_on(&folder);
        assert!(losses[9] < losses[0], "{slices:?}: {losses:?}");
    }
}

#[test]
fn upcycling_is_the_same_for_the_same_seed() {
    let options = UpcycleOptions { from: ExpertsFrom::Slices(Slices::Random), ..COPIES };
    let written = [options.clone(), options.clone(), UpcycleOptions { seed: 4, ..options }].map(|options| {
        let dir = tempfile::tempdir().unwrap();
        upcycled(dir.path(), options);
        tensors(&dir.path().join("moe"))
    });
    assert!(written[0] == written[1]);
    let router = "model.layers.0.block_sparse_moe.gate.weight";
    let expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
    assert!(written[0][router] != written[2][router] && written[0][expert] != written[2][expert]);
}

#[test]
fn what_cannot_be_upcycled_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    trained_folder(&config(&dense(), &RouterConfig::default()), &dir.path().join("dense"));
    let folder = HfFolder::open(&dir.path().join("dense")).unwrap();
    let refused = |options| Upcycled::new(&mut &folder, options).err().unwrap().to_string();
    let slices = ExpertsFrom::Slices(Slices::Contiguous);
    let uneven = refused(UpcycleOptions { experts: 5, from: slices, ..COPIES });
    assert!(uneven.starts_with("experts = 5: ") && uneven.contains("[4, 6]"), "{uneven}");
    assert!(refused(UpcycleOptions { top_k: 5, ..COPIES }).starts_with("top-k = 5: "));
    assert!(refused(UpcycleOptions { router_std: f32::NAN, ..COPIES }).starts_with("router-std = NaN: "));
    let (_, model, router) = families().swap_remove(0);
    trained_folder(&config(&model, &router), &dir.path().join("moe"));
    let moe = HfFolder::open(&dir.path().join("moe")).unwrap();
    let error = Upcycled::new(&mut &moe, COPIES).err().unwrap().to_string();
    assert_eq!(
        error,
        format!("is a {:?} with {} experts a layer; upcycling takes a dense Llama", model.family, model.experts)
    );
}

/// Two models of one architecture that differ, as folders.
fn pair(dir: &Path) -> [HfFolder; 2] {
    let (_, model, router) = families().swap_remove(0);
    [4, 9].map(|steps| {
        let mut trainer = alone(&config(&model, &router));
        train(&mut trainer, steps);
        let (_, checkpoint) = save(&trainer, &dir.join(format!("run-{steps}")), steps);
        let to = dir.join(format!("model-{steps}"));
        out(&mut CheckpointModel::verified(&checkpoint).unwrap(), &to, &ExportOptions::default()).unwrap();
        HfFolder::open(&to).unwrap()
    })
}

#[test]
fn merged_with_all_weight_on_one_a_model_is_that_one_and_else_the_average() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = pair(dir.path());
    let merge = |weights: &[f64], name: &str| {
        let (mut a, mut b) = (&first, &second);
        let mut merged = Merged::new(vec![&mut a, &mut b], weights).unwrap();
        out(&mut merged, &dir.path().join(name), &ExportOptions::default()).unwrap();
        tensors(&dir.path().join(name))
    };
    assert!(merge(&[1.0, 0.0], "first") == tensors(first.dir()));
    assert!(merge(&[0.0, 2.0], "second") == tensors(second.dir()));
    let (a, b, mean) = (tensors(first.dir()), tensors(second.dir()), merge(&[3.0, 3.0], "mean"));
    let values = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|w| f32::from_le_bytes(*w)).collect::<Vec<_>>();
    for (name, (_, _, bytes)) in &mean {
        let expected: Vec<f32> =
            values(&a[name].2).into_iter().zip(values(&b[name].2)).map(|(a, b)| (a + b) / 2.0).collect();
        assert!(difference(&values(bytes), &expected) <= 1e-7, "{name}");
    }
    assert!(a != b);
}

#[test]
fn models_of_two_architectures_and_weights_that_are_none_are_not_merged() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = pair(dir.path());
    let mut other = families().swap_remove(0);
    other.1.heads = 2;
    trained_folder(&config(&other.1, &other.2), &dir.path().join("other"));
    let other = HfFolder::open(&dir.path().join("other")).unwrap();
    let refused = |b: &HfFolder, weights: &[f64]| {
        let (mut a, mut b) = (&first, b);
        Merged::new(vec![&mut a, &mut b], weights).err().unwrap().to_string()
    };
    let message = "is of another architecture than the first: model.heads: 4 in the first, 2 in this one";
    assert_eq!(refused(&other, &[1.0, 1.0]), message);
    for weights in [&[1.0][..], &[0.0, 0.0], &[1.0, -1.0], &[f64::NAN, 1.0]] {
        assert!(refused(&second, weights).starts_with("weights = "), "{weights:?}");
    }
}

#[test]
fn a_damaged_source_leaves_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (_, model, router) = families().swap_remove(0);
    let trainer = alone(&config(&model, &router));
    let (path, checkpoint) = save(&trainer, &dir.path().join("run"), 1);
    let file = path.join("model.expert-00003.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    assert!(
        matches!(CheckpointModel::verified(&checkpoint).err(), Some(CheckpointError::Hash { path, .. }) if path == file)
    );

    // Damaged after it was opened: the failure comes in the middle of the writing.
    let to = dir.path().join("out");
    trained_folder(&config(&model, &router), &to);
    let folder = HfFolder::open(&to).unwrap();
    fs::File::options().write(true).open(to.join("model.safetensors")).unwrap().set_len(20_000).unwrap();
    let before = fs::read_dir(dir.path()).unwrap().count();
    assert!(matches!(
        out(&mut &folder, &dir.path().join("x"), &ExportOptions::default()),
        Err(CheckpointError::Io { .. })
    ));
    let store = Store::new(dir.path().join("run-2"), 0);
    assert!(write_checkpoint(&mut &folder, &store, &mut |_, _| {}).is_err());
    assert!(store.latest().unwrap().is_none() && fs::read_dir(store.dir()).unwrap().count() == 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before + 1, "only the empty store is new");
}

#[test]
fn places_that_are_taken_and_models_without_a_class_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, model, router) = families().swap_remove(0);
    let to = dir.path().join("out");
    trained_folder(&config(&model, &router), &to);
    let folder = HfFolder::open(&to).unwrap();
    assert!(matches!(out(&mut &folder, &to, &ExportOptions::default()), Err(CheckpointError::Exists { .. })));
    let as_olmoe = ExportOptions { family: Some(Family::Olmoe), ..ExportOptions::default() };
    let error = out(&mut &folder, &dir.path().join("olmoe"), &as_olmoe).unwrap_err().to_string();
    assert!(error.starts_with("as olmoe the model cannot be written: model.qk_norm = None: "), "{error}");
    assert!(error.ends_with("can be written as mixtral: give it as the family"), "{error}");
    let store = Store::new(dir.path().join("in"), 0);
    write_checkpoint(&mut &folder, &store, &mut |_, _| {}).unwrap();
    let again = write_checkpoint(&mut &folder, &store, &mut |_, _| {});
    assert!(matches!(again, Err(CheckpointError::Exists { .. })));
}

#[test]
fn a_head_that_is_called_tied_and_is_not_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("out");
    let tied = ModelConfig { tie_embeddings: true, ..dense() };
    trained_folder(&config(&tied, &RouterConfig::default()), &to);
    let file = to.join("model.safetensors");
    let original = tensors(&to);
    assert!(!original.contains_key("lm_head.weight"));
    for (change, same) in [(0, true), (1, false)] {
        let mut all = original.clone();
        let mut head = all["model.embed_tokens.weight"].clone();
        head.2[0] ^= change;
        all.insert("lm_head.weight".into(), head);
        let views = all.iter().map(|(name, (dtype, shape, data))| {
            (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
        let opened = HfFolder::open(&to);
        assert_eq!(opened.is_ok(), same);
        if let Err(error) = opened {
            assert!(error.to_string().contains("lm_head.weight in model.safetensors differs"), "{error}");
        }
    }
}

/// Writes what `make test-transformers` compares: folders with what this runtime computes on them.
#[test]
#[ignore = "its folders are for transformers: make test-transformers"]
fn folders_for_transformers() {
    let root = PathBuf::from(std::env::var_os("MOE_EXPORT_DIR").unwrap());
    let mut cases = families().into_iter().map(|(name, m, r)| (name.to_owned(), m, r)).collect::<Vec<_>>();
    let (mixtral, topk) = (cases[0].1.clone(), cases[0].2.clone());
    let scaled = |name: &str, rope_scaling| {
        (name.to_owned(), ModelConfig { rope_scaling: Some(rope_scaling), ..mixtral.clone() }, topk.clone())
    };
    cases.push(("tied".into(), ModelConfig { tie_embeddings: true, ..dense() }, topk.clone()));
    cases.push(scaled("rope-linear", RopeScaling::Linear { factor: 2.0 }));
    let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
    cases.push(scaled(
        "rope-llama3",
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor, high_freq_factor, original_positions: 16 },
    ));
    let yarn = |attention_factor, truncate| RopeScaling::Yarn {
        factor: 4.0,
        original_positions: 16,
        attention_factor,
        beta_fast: 2.0,
        beta_slow: 0.5,
        truncate,
    };
    cases.push(scaled("rope-yarn", yarn(None, true)));
    cases.push(scaled("rope-yarn-exact", yarn(Some(1.3), false)));
    for (name, model, router) in cases {
        let dir = root.join(&name);
        let mut trainer = alone(&config(&model, &router));
        train(&mut trainer, 20);
        let (_, checkpoint) = save(&trainer, &root.join(format!("{name}.run")), 20);
        let companions = Companions::of_bytes();
        let options = ExportOptions { companions, shard_bytes: 100_000, ..ExportOptions::default() };
        out(&mut CheckpointModel::verified(&checkpoint).unwrap(), &dir, &options).unwrap();
        let ids: Vec<u8> = inputs().into_iter().flat_map(i32::to_le_bytes).collect();
        let logits: Vec<u8> = logits(&mut trainer).into_iter().flat_map(f32::to_le_bytes).collect();
        let view = |dtype, shape, data| safetensors::tensor::TensorView::new(dtype, shape, data).unwrap();
        let views = [
            ("input_ids", view(safetensors::Dtype::I32, vec![SEQUENCES, LENGTH], &ids)),
            ("logits", view(safetensors::Dtype::F32, vec![SEQUENCES, LENGTH, model.vocab_size], &logits)),
        ];
        fs::write(dir.join("ours.bin"), safetensors::serialize(views, None).unwrap()).unwrap();
    }
}
