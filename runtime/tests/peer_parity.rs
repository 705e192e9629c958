//! The runtime against Hugging Face transformers: logits, gradients and a trajectory of AdamW steps of tiny models, on several
//! numbers of ranks and every legal expert-parallel size.
//!
//! Walks every folder of `MOE_FIXTURES` (default: `shared/fixtures` beside the workspace); what a folder holds is said in its
//! README. A folder without a model is a gate of its own (`noisy-topk`).

// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used)]

#[cfg(feature = "cuda")]
mod gpus;
mod sites;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moe_kernels::{
    Accumulate, Backend, Choice, Cpu, DenseOps, GateDims, GateSpec, GemmDims, RoutingOps, Score, TokenLosses, View,
    ViewMut,
};
use moe_runtime::checkpoint::HfFolder;
use moe_runtime::checkpoint::names::tensor_name;
use moe_runtime::collectives::{Communicator, Groups};
use moe_runtime::config::{Config, DecayGroups, OptimizerConfig, ScheduleConfig, ScheduleKind, TrainConfig};
use moe_runtime::data::Batch;
use moe_runtime::model::layout::{PartId, PartKind};
use moe_runtime::model::{Family, LogitsOf, ModelSetup, PassTokens, Recompute, Transformer};
use moe_runtime::routing::BatchShare;
use moe_runtime::stages::StageClock;
use moe_runtime::topology::{Grid, Rank, share};
use moe_runtime::training::{Requests, Trainer, TrainingData};
use safetensors::{Dtype, SafeTensors};
use sites::{OneDevice, Site};

const WORLDS: [usize; 3] = [1, 2, 4];

/// The folders to walk; empty: there are none here, which is a failure where they were promised.
fn folders() -> Vec<PathBuf> {
    let named = std::env::var_os("MOE_FIXTURES").map(PathBuf::from);
    let root = named.clone().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures"));
    let mut folders: Vec<PathBuf> = std::fs::read_dir(&root)
        .map(|entries| entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
        .unwrap_or_default();
    folders.sort();
    if folders.is_empty() {
        let promised = named.is_some() || std::env::var("CI").is_ok_and(|ci| ci == "true");
        assert!(!promised, "{} holds no fixtures", root.display());
        eprintln!("notice: {} holds no fixtures: parity with peers was not tested", root.display());
    }
    folders
}

/// The numbers a peer computed.
struct Reference {
    bytes: Vec<u8>,
}

impl Reference {
    fn open(folder: &Path) -> Self {
        Self { bytes: std::fs::read(folder.join("reference.safetensors")).unwrap() }
    }

    fn f32(&self, name: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        Some(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    /// `input_ids`: (steps, sequences, tokens of a sequence, ids).
    fn ids(&self) -> (usize, usize, usize, Vec<i32>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor("input_ids").unwrap();
        let ids = tensor.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
        let &[steps, sequences, length] = tensor.shape() else { panic!("input_ids has three dimensions") };
        (steps, sequences, length, ids)
    }

    fn names(&self) -> Vec<String> {
        SafeTensors::deserialize(&self.bytes).unwrap().names().iter().map(|name| name.to_string()).collect()
    }
}

/// The batches of a fixture: step i is batch i, one pass.
struct FixtureData {
    ids: Vec<i32>,
    sequences: usize,
    length: usize,
    rank: usize,
    world: usize,
}

impl TrainingData for FixtureData {
    fn passes(&self) -> usize {
        1
    }

    fn train_pass(&self, steps_done: u64, _: usize, batch: &mut Batch) {
        let mine = share(self.sequences, self.world, self.rank);
        let first = steps_done as usize * self.sequences;
        let rows = (first + mine.start) * self.length..(first + mine.end) * self.length;
        batch.sequences = mine.len();
        batch.sequence_length = self.length;
        batch.first_sample = (first + mine.start) as u64;
        batch.inputs = self.ids[rows].to_vec();
        batch.targets = batch.inputs.chunks(self.length).flat_map(|row| row[1..].iter().copied().chain([-1])).collect();
    }

    fn eval_passes(&self) -> usize {
        0
    }

    fn eval_pass(&self, _: usize, _: &mut Batch) {}
}

struct Fixture {
    name: String,
    folder: PathBuf,
    reference: Reference,
}

impl Fixture {
    fn data(&self, rank: usize, world: usize) -> FixtureData {
        let (_, sequences, length, ids) = self.reference.ids();
        FixtureData { ids, sequences, length, rank, world }
    }

    /// The model on this rank of a grid, with its groups and data, on a queue of its own.
    fn model<B: Backend, C: Communicator<B>>(
        &self,
        device: &B,
        world: C,
        ep: usize,
    ) -> (Transformer<B>, Groups<C>, FixtureData) {
        let hf = HfFolder::open(&self.folder).unwrap();
        let (model, router) = (hf.model_config().clone(), hf.router_config().clone());
        let (rank, size) = (world.rank(), world.size());
        let grid = Grid::new(size, ep, model.experts).unwrap();
        let data = self.data(rank, size);
        let setup = ModelSetup {
            model,
            router,
            grid,
            rank: Rank(rank),
            seed: 0,
            chunks: 1,
            receive_headroom: 1.4,
            direct: true,
            max_sequences: data.sequences,
            sequence_length: data.length,
            recompute: Recompute::None,
            gate: None,
        };
        let mut transformer = Transformer::new(device.fork(), setup).unwrap();
        let queue = transformer.device().clone();
        hf.load_into(&queue, transformer.parameters_mut()).unwrap();
        let groups = Groups::of_grid(world, &grid).unwrap();
        (transformer, groups, data)
    }

    /// Every number of ranks with every legal expert-parallel size.
    fn layouts(&self) -> Vec<(usize, usize)> {
        let experts = HfFolder::open(&self.folder).unwrap().model_config().experts;
        let legal = |world: usize| (1..=world).filter(move |&ep| Grid::new(world, ep, experts).is_ok());
        WORLDS.into_iter().flat_map(|world| legal(world).map(move |ep| (world, ep))).collect()
    }
}

fn models() -> Vec<Fixture> {
    folders()
        .into_iter()
        .filter(|folder| folder.join("config.json").exists())
        .map(|folder| Fixture {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            reference: Reference::open(&folder),
            folder,
        })
        .collect()
}

#[test]
fn logits_are_the_peers() {
    logits(&OneDevice(Cpu), 1e-4);
}

/// Logits within `tolerance`.
fn logits(site: &impl Site, tolerance: f32) {
    for fixture in models() {
        let expected = fixture.reference.f32("logits_step0").unwrap();
        for (world, ep) in fixture.layouts() {
            let found = site.run(world, |device, comm| {
                let (mut model, groups, data) = fixture.model(device, comm, ep);
                let mut batch = Batch::default();
                data.train_pass(0, 0, &mut batch);
                model.read_logits(&groups, PassTokens::of_inputs(&batch.inputs, data.length), LogitsOf::All).unwrap()
            });
            let Some(found) = found.map(|found| found.concat()) else { continue };
            assert_eq!(found.len(), expected.len());
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!("{} W={world} EP={ep}: largest difference of a logit {worst:.2e}", fixture.name);
            assert!(worst <= tolerance, "{} W={world} EP={ep}: a logit differs by {worst}", fixture.name);
        }
    }
}

/// The name of a part's gradient in transformers' memory, and where in a stacked tensor it stands.
fn gradient_name(family: Family, id: PartId) -> (String, usize) {
    let experts = |name: &str| format!("grad.model.layers.{}.mlp.experts.{name}", id.layer.unwrap());
    match id.kind {
        PartKind::ExpertGate => (experts("gate_up_proj"), 2 * id.expert.unwrap()),
        PartKind::ExpertUp => (experts("gate_up_proj"), 2 * id.expert.unwrap() + 1),
        PartKind::ExpertDown => (experts("down_proj"), id.expert.unwrap()),
        _ => {
            let family = if family == Family::Mixtral { Family::Qwen3Moe } else { family };
            (format!("grad.{}", tensor_name(family, id)), 0)
        }
    }
}

#[test]
fn gradients_are_the_peers() {
    gradients(&OneDevice(Cpu), 1e-4);
}

/// Gradients within `tolerance`, relative.
fn gradients(site: &impl Site, tolerance: f64) {
    for fixture in models() {
        for (world, ep) in fixture.layouts() {
            let parts = site.run(world, |device, comm| {
                let (mut model, groups, data) = fixture.model(device, comm, ep);
                let mut batch = Batch::default();
                data.train_pass(0, 0, &mut batch);
                let tokens =
                    PassTokens { targets: &batch.targets, ..PassTokens::of_inputs(&batch.inputs, data.length) };
                let all = data.sequences * data.length;
                let share = BatchShare { global_tokens: all, tokens_so_far: all, pass_tokens: all };
                let scale = 1.0 / (data.sequences * (data.length - 1)) as f32;
                model.begin_step();
                model.train_pass(&groups, &mut StageClock::default(), tokens, share, scale).unwrap();
                let family = model.setup().model.family;
                let (parameters, queue) = (model.parameters(), model.device());
                let read = |id: PartId, part| (gradient_name(family, id), parameters.read_grad(queue, part).unwrap());
                parameters.layout().parts().map(|(part, _)| read(part.id, part)).collect::<Vec<_>>()
            });
            let Some(parts) = parts else { continue };
            // Sums over ranks: replicated gradients over all, an expert's over the ranks that hold it.
            let mut sums: BTreeMap<(String, usize), Vec<f64>> = BTreeMap::new();
            for (key, gradient) in parts.into_iter().flatten() {
                let sum = sums.entry(key).or_insert_with(|| vec![0.0; gradient.len()]);
                sum.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += f64::from(value));
            }
            let mut found: BTreeMap<String, Vec<f64>> = BTreeMap::new();
            for ((name, _), gradient) in sums {
                found.entry(name).or_default().extend(gradient);
            }
            let expected = fixture.reference.names().into_iter().filter(|name| name.starts_with("grad."));
            assert_eq!(expected.clone().collect::<std::collections::BTreeSet<_>>(), found.keys().cloned().collect());
            let mut worst = 0.0f64;
            for name in expected {
                let error = relative_error(&found[&name], &fixture.reference.f32(&name).unwrap());
                assert!(error <= tolerance, "{} W={world} EP={ep}: {name} differs by {error:.2e}", fixture.name);
                worst = worst.max(error);
            }
            println!("{} W={world} EP={ep}: largest relative difference of a gradient {worst:.2e}", fixture.name);
        }
    }
}

/// ‖found − expected‖ / ‖expected‖.
fn relative_error(found: &[f64], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(a, &b)| a - f64::from(b)));
    difference / norm(&mut expected.iter().map(|&b| f64::from(b))).max(1e-30)
}

#[test]
fn twenty_steps_of_adamw_follow_the_peers() {
    trajectories(&OneDevice(Cpu), 1.0);
}

/// Losses and gradient norms, with tolerances `wider` times the CPU's.
fn trajectories(site: &impl Site, wider: f64) {
    for fixture in models() {
        let text = std::fs::read_to_string(fixture.folder.join("reference.json")).unwrap();
        let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
        let series = |key: &str| -> Option<Vec<f64>> {
            Some(reference.get(key)?.as_array()?.iter().map(|x| x.as_f64().unwrap()).collect())
        };
        let optimizer = &reference["optimizer"];
        let setting = |key: &str| optimizer[key].as_f64().unwrap();
        assert_eq!(optimizer["decay"], "every parameter");
        let coefficient = reference["router_aux_loss_coef"].as_f64().unwrap();
        for (world, ep) in fixture.layouts() {
            let trajectory = site.run(world, |device, comm| {
                let (model, groups, data) = fixture.model(device, comm, ep);
                let config = Config {
                    model: model.setup().model.clone(),
                    router: model.setup().router.clone(),
                    train: TrainConfig {
                        global_batch: data.sequences,
                        micro_batch: Some(data.sequences),
                        sequence_length: data.length,
                        ..TrainConfig::default()
                    },
                    schedule: ScheduleConfig {
                        kind: ScheduleKind::Constant,
                        warmup_steps: 0,
                        ..ScheduleConfig::default()
                    },
                    optimizer: OptimizerConfig {
                        lr: setting("lr"),
                        beta1: optimizer["betas"][0].as_f64().unwrap(),
                        beta2: optimizer["betas"][1].as_f64().unwrap(),
                        eps: setting("eps"),
                        weight_decay: setting("weight_decay"),
                        expert_weight_decay: None,
                        decay: DecayGroups::All,
                        clip_grad_norm: setting("clip_grad_norm"),
                    },
                    ..Config::default()
                };
                let steps = data.ids.len() / (data.sequences * data.length);
                let mut trainer = Trainer::new(model, groups, &config, data).unwrap();
                (1..=steps as u64).map(|step| trainer.step(step, Requests::default()).unwrap().0).collect::<Vec<_>>()
            });
            let Some(trajectory) = trajectory else { continue };
            let steps = &trajectory[0];
            let at = |step: usize| format!("{} W={world} EP={ep} step {}", fixture.name, step + 1);
            for (step, expected) in series("loss").unwrap().into_iter().enumerate() {
                // The peer's loss is the objective: cross-entropy and weighted balance loss together.
                let found = steps[step].loss + coefficient * steps[step].balance_loss;
                assert!((found - expected).abs() <= 2e-4 * wider, "{}: loss {found}, expected {expected}", at(step));
            }
            for (step, expected) in series("aux_loss").unwrap_or_default().into_iter().enumerate() {
                let found = steps[step].balance_loss;
                assert!(
                    (found - expected).abs() <= 1e-4 * wider,
                    "{}: balance loss {found}, expected {expected}",
                    at(step)
                );
            }
            for (step, expected) in series("grad_norm_before_clip").unwrap().into_iter().enumerate() {
                let found = steps[step].grad_norm;
                let error = (found - expected).abs() / expected;
                assert!(error <= 1e-3 * wider, "{}: gradient norm {found}, expected {expected}", at(step));
            }
            for other in &trajectory[1..] {
                let losses = |steps: &[moe_runtime::telemetry::StepMetrics]| {
                    steps.iter().map(|m| (m.loss.to_bits(), m.grad_norm.to_bits())).collect::<Vec<_>>()
                };
                assert_eq!(losses(other), losses(steps), "ranks of {} W={world} EP={ep} disagree", fixture.name);
            }
            println!("{} W={world} EP={ep}: {} steps follow the peer", fixture.name, steps.len());
        }
    }
}

/// The same on GPUs in f32, where there are any: within 1e-3.
#[cfg(feature = "cuda")]
mod on_gpus {
    use moe_kernels::cuda::{Cuda, OpenError};

    use super::sites::{Gpus, OneDevice};

    /// The first GPU, for all ranks.
    fn gpu() -> Option<OneDevice<Cuda<f32>>> {
        match Cuda::open(0) {
            Ok(device) => Some(OneDevice(device)),
            Err(error @ (OpenError::NoDriver | OpenError::NoDevice)) => {
                eprintln!("notice: parity on a GPU was not tested: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn logits_on_a_gpu_are_the_peers() {
        gpu().inspect(|site| super::logits(site, 1e-3));
    }

    #[test]
    fn logits_over_nccl_are_the_peers() {
        super::logits(&Gpus, 1e-3);
    }

    #[test]
    fn gradients_on_a_gpu_are_the_peers() {
        gpu().inspect(|site| super::gradients(site, 1e-3));
    }

    #[test]
    fn gradients_over_nccl_are_the_peers() {
        super::gradients(&Gpus, 1e-3);
    }

    #[test]
    fn twenty_steps_of_adamw_on_a_gpu_follow_the_peers() {
        // 2e-4 of a loss of a few nats, five times over.
        gpu().inspect(|site| super::trajectories(site, 5.0));
    }

    #[test]
    fn twenty_steps_of_adamw_over_nccl_follow_the_peers() {
        super::trajectories(&Gpus, 5.0);
    }
}

/// A fixture of noisy top-k gating alone, as numbers.
struct NoisyGate {
    dims: GateDims,
    gemm: GemmDims,
    /// `[T, H]`.
    x: Vec<f32>,
    /// `[E, H]` each, as the runtime stores them.
    w_gate: Vec<f32>,
    w_noise: Vec<f32>,
    /// `[T, E]`.
    noise: Vec<f32>,
}

/// What the operations make of it, under the names of the fixture.
type Named = BTreeMap<&'static str, Vec<f32>>;

fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| matrix.iter().skip(c).step_by(columns).copied()).collect()
}

impl NoisyGate {
    fn open(reference: &Reference) -> Self {
        let tensor = |name: &str| reference.f32(name).unwrap_or_else(|| panic!("{name} is missing"));
        let (experts, tokens) = (tensor("load").len(), tensor("gates").len() / tensor("load").len());
        let (x, w_gate) = (tensor("x"), tensor("w_gate"));
        let hidden = x.len() / tokens;
        assert_eq!(w_gate.len(), hidden * experts);
        let chosen: Vec<usize> =
            tensor("gates").chunks(experts).map(|row| row.iter().filter(|&&gate| gate != 0.0).count()).collect();
        assert!(chosen.iter().all(|&k| k == chosen[0]), "tokens with different numbers of experts: {chosen:?}");
        Self {
            dims: GateDims { tokens, experts, top_k: chosen[0] },
            gemm: GemmDims { m: tokens, n: experts, k: hidden },
            w_gate: transposed(&w_gate, experts),
            w_noise: transposed(&tensor("w_noise"), experts),
            noise: tensor("noise"),
            x,
        }
    }

    /// Forward and backward of both losses with their coefficient of 0.01.
    fn compute(&self) -> Named {
        const COEFFICIENT: f32 = 0.01;
        let Self { dims, gemm, .. } = *self;
        let (te, tk, e) = (dims.tokens * dims.experts, dims.tokens * dims.top_k, dims.experts);
        let zeros = |len: usize| vec![0.0f32; len];
        let (x, w_gate, w_noise, noise) =
            (View::of(&self.x), View::of(&self.w_gate), View::of(&self.w_noise), View::of(&self.noise));
        let (mut clean, mut raw, mut noisy, mut load) = (zeros(te), zeros(te), zeros(te), zeros(e));
        Cpu.linear_f32(gemm, x, w_gate, ViewMut::of(&mut clean));
        Cpu.linear_f32(gemm, x, w_noise, ViewMut::of(&mut raw));
        let (clean, raw) = (View::of(&clean), View::of(&raw));
        Cpu.noisy_logits(dims, clean, raw, noise, ViewMut::of(&mut noisy), ViewMut::of(&mut load));
        let noisy = View::of(&noisy);
        let spec = GateSpec { dims, score: Score::Softmax, renormalize: true, scale: 1.0, choice: Choice::default() };
        let (mut scores, mut ids, mut weights, mut importance) = (zeros(te), vec![0; tk], zeros(tk), zeros(e));
        let (scores_out, ids_out) = (ViewMut::of(&mut scores), ViewMut::of(&mut ids));
        Cpu.gate(spec, noisy, None, scores_out, ids_out, ViewMut::of(&mut weights));
        Cpu.importance(dims, View::of(&ids), View::of(&weights), ViewMut::of(&mut importance));
        let mut gates = zeros(te);
        for (choice, (&id, &weight)) in ids.iter().zip(&weights).enumerate() {
            gates[choice / dims.top_k * e + id as usize] = weight;
        }

        let (mut loss, mut dimportance, mut dload) = (vec![0.0f64], zeros(e), zeros(e));
        Cpu.cv_squared(1.0, COEFFICIENT, View::of(&importance), ViewMut::of(&mut loss), ViewMut::of(&mut dimportance));
        Cpu.cv_squared(1.0, COEFFICIENT, View::of(&load), ViewMut::of(&mut loss), ViewMut::of(&mut dload));
        let (mut dweights, mut dnoisy, mut dclean, mut draw) = (zeros(tk), zeros(te), zeros(te), zeros(te));
        let (scores, ids) = (View::of(&scores), View::of(&ids));
        Cpu.importance_grad(dims, ids, View::of(&dimportance), ViewMut::of(&mut dweights));
        Cpu.gate_grad(
            spec,
            noisy,
            scores,
            ids,
            View::of(&dweights),
            None,
            TokenLosses::default(),
            ViewMut::of(&mut dnoisy),
        );
        let (incoming, dload) = (View::of(&dnoisy), View::of(&dload));
        let (dclean_out, draw_out) = (ViewMut::of(&mut dclean), ViewMut::of(&mut draw));
        Cpu.noisy_logits_grad(dims, clean, raw, noise, noisy, incoming, dload, dclean_out, draw_out);
        let (dclean, draw) = (View::of(&dclean), View::of(&draw));
        let (mut dx, mut dw_gate, mut dw_noise) =
            (zeros(self.x.len()), zeros(self.w_gate.len()), zeros(self.w_noise.len()));
        Cpu.linear_f32_grad_input(gemm, dclean, w_gate, ViewMut::of(&mut dx), Accumulate::Overwrite);
        Cpu.linear_f32_grad_input(gemm, draw, w_noise, ViewMut::of(&mut dx), Accumulate::Add);
        Cpu.linear_f32_grad_weight(gemm, dclean, x, ViewMut::of(&mut dw_gate));
        Cpu.linear_f32_grad_weight(gemm, draw, x, ViewMut::of(&mut dw_noise));
        BTreeMap::from([
            ("gates", gates),
            ("load", load),
            ("importance", importance),
            ("loss", vec![COEFFICIENT * loss[0] as f32]),
            ("grad.w_gate", transposed(&dw_gate, gemm.k)),
            ("grad.w_noise", transposed(&dw_noise, gemm.k)),
            ("grad.x", dx),
        ])
    }
}

#[test]
fn noisy_top_k_gates_losses_and_gradients_are_the_peers() {
    for folder in folders().into_iter().filter(|folder| !folder.join("config.json").exists()) {
        let (name, reference) = (folder.file_name().unwrap().to_string_lossy(), Reference::open(&folder));
        if reference.f32("w_gate").is_none() {
            continue;
        }
        let mut worst = 0.0f64;
        for (what, found) in NoisyGate::open(&reference).compute() {
            let expected = reference.f32(what).unwrap_or_else(|| panic!("{name}: {what} is missing"));
            let found: Vec<f64> = found.into_iter().map(f64::from).collect();
            let error = relative_error(&found, &expected);
            assert!(error <= 1e-4, "{name}: {what} differs by {error:.2e}");
            worst = worst.max(error);
        }
        println!("{name}: largest relative difference {worst:.2e}");
    }
}
