//! `moe-launch bench train`: whole training steps on random tokens, and where their time goes.
//!
//! FLOPs are the model's own (6 a parameter and token that takes part in a matrix product, and causal attention's half square);
//! nothing is counted twice that is computed twice. The ceiling is a 2048³ matrix product in f32, measured in the same run.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use moe_kernels::{Cpu, DenseOps, Device, GemmDims, View, ViewMut};
use moe_runtime::collectives::{Communicator, Groups, HostCommunicator, ReduceOp};
use moe_runtime::config::{Config, ConfigBuilder};
use moe_runtime::data::Batch;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::stages::Stage;
use moe_runtime::topology::{Grid, Rank, share};
use moe_runtime::training::{Requests, TrainingData};
use moe_runtime::worker::{DeviceChoice, World, build, grid_of, set_threads};
use rand::SeedableRng;
use rand::rand_core::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Whole training steps on random tokens.
#[derive(Args)]
pub(crate) struct TrainArgs {
    /// Built-in configuration: its model, batch and sequence length.
    #[arg(long, default_value = "moe-15m")]
    preset: String,
    /// Sets one key, as `train.micro_batch=4`; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Expert-parallel size. Default: the largest that divides both ranks and experts.
    #[arg(long, value_name = "N")]
    ep: Option<usize>,
    /// Threads of a rank. Default: this rank's share of the cores.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Timed steps, after three that are not.
    #[arg(long, value_name = "N", default_value_t = 10)]
    steps: u64,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

const WARMUP: u64 = 3;

/// What was measured.
#[derive(Serialize)]
struct Report {
    preset: String,
    device: String,
    ranks: usize,
    ep: usize,
    threads_per_rank: usize,
    tokens_per_s: f64,
    step_ms: f64,
    model_gflops: f64,
    /// 2048³ product, all ranks at once, summed.
    gemm_gflops: f64,
    fraction_of_gemm: f64,
    stages: Vec<StageReport>,
}

/// One stage on rank 0.
#[derive(Serialize)]
struct StageReport {
    stage: &'static str,
    ms: f64,
    share: f64,
    /// None: the stage has no matrix products to speak of.
    fraction_of_gemm: Option<f64>,
}

pub(crate) fn run(args: &TrainArgs) -> Result<ExitCode, Failure> {
    let (DeviceChoice::Auto | DeviceChoice::Cpu) = args.device;
    let world = World::join(Duration::from_secs(120))?;
    let result = measure(args, &world);
    match result {
        Ok(report) => {
            if world.place().0 == 0 {
                show(&report, args.json)?;
            }
            world.leave(Code::Done)
        }
        Err(failure) => {
            eprintln!("error: {failure}");
            world.abandon(failure.exit_code())
        }
    }
}

fn configure(args: &TrainArgs, ranks: usize) -> Result<Config, Failure> {
    let mut builder = ConfigBuilder::new().preset(&args.preset);
    for assignment in &args.set {
        builder = builder.set(assignment);
    }
    if let Some(ep) = args.ep {
        builder = builder.flag("--ep", "parallel.ep", ep);
    }
    if let Some(threads) = args.threads {
        builder = builder.flag("--threads", "run.threads", threads);
    }
    let resolved = builder.build()?;
    resolved.validate(ranks)?;
    Ok(resolved.config)
}

fn measure(args: &TrainArgs, world: &World) -> Result<Report, Failure> {
    let (rank, ranks) = world.place();
    let config = configure(args, ranks)?;
    set_threads(&config, world)?;
    let grid = grid_of(&config, ranks)?;
    let communicator = Communicator::<Cpu>::split(&world.communicator, "world", 0, rank)?;
    let groups = Groups::of_grid::<Cpu>(communicator, &grid)?;
    let data = RandomTokens::new(&config, rank, ranks);
    let mut trainer = build(&config, &grid, Rank(rank), groups, data)?;
    let (mut times, mut stages) = (Vec::new(), Vec::new());
    for step in 1..=WARMUP + args.steps {
        let started = Instant::now();
        trainer.step(step, Requests::default()).map_err(|error| Failure::new(Code::Internal, error))?;
        if step > WARMUP {
            times.push(started.elapsed().as_secs_f64());
            stages.push(trainer.stage_times().to_vec());
        }
    }
    let step_s = median(&mut times);
    let gemm = gemm_rate(&world.communicator)?;
    Ok(report(args, &config, &grid, step_s, gemm, &stages))
}

fn report(
    args: &TrainArgs,
    config: &Config,
    grid: &Grid,
    step_s: f64,
    gemm: f64,
    stages: &[Vec<(Stage, f64)>],
) -> Report {
    let tokens = (config.train.global_batch * config.train.sequence_length) as f64;
    let flops = Flops::of(config);
    let total = flops.attention + flops.experts + flops.route + flops.head + flops.dense;
    let stage = |(index, stage): (usize, Stage)| {
        let mut ms: Vec<f64> = stages.iter().map(|step| step[index].1).collect();
        let ms = median(&mut ms);
        let per_token = flops.of_stage(stage);
        let rate = per_token * tokens / (ms * 1e6);
        StageReport {
            stage: stage.name(),
            ms,
            share: ms / (step_s * 1e3),
            fraction_of_gemm: (per_token > 0.0).then_some(rate / gemm),
        }
    };
    let model_gflops = total * tokens / step_s / 1e9;
    Report {
        preset: args.preset.clone(),
        device: Cpu.describe(),
        ranks: grid.world(),
        ep: grid.ep(),
        threads_per_rank: rayon::current_num_threads(),
        tokens_per_s: tokens / step_s,
        step_ms: step_s * 1e3,
        model_gflops,
        gemm_gflops: gemm,
        fraction_of_gemm: model_gflops / gemm,
        stages: Stage::ALL.into_iter().enumerate().map(stage).collect(),
    }
}

/// FLOPs of a token, forward and backward.
struct Flops {
    attention: f64,
    route: f64,
    experts: f64,
    dense: f64,
    head: f64,
}

impl Flops {
    fn of(config: &Config) -> Self {
        let c = &config.model;
        let (h, layers) = (c.hidden_size as f64, c.layers as f64);
        let moe = c.moe_layers().count() as f64;
        let projections = h * c.qkv_width() as f64 + h * c.attention_width() as f64;
        // Scores and their use, 2 · 2 · S/2 · width each way; the backward pass does twice as much.
        let scores = 6.0 * config.train.sequence_length as f64 * c.attention_width() as f64;
        let feed_forward = |f: usize| 18.0 * h * f as f64;
        Self {
            attention: layers * (6.0 * projections + scores),
            route: moe * 6.0 * h * c.experts as f64,
            experts: moe * c.top_k as f64 * feed_forward(c.expert_ffn_size),
            dense: moe * feed_forward(c.shared_expert_ffn_size) + (layers - moe) * feed_forward(c.ffn_size),
            head: 6.0 * h * c.vocab_size as f64,
        }
    }

    fn of_stage(&self, stage: Stage) -> f64 {
        match stage {
            Stage::Attention => self.attention,
            Stage::Route => self.route,
            Stage::Experts => self.experts,
            Stage::Aggregate => self.dense,
            Stage::Head => self.head,
            _ => 0.0,
        }
    }
}

fn show(report: &Report, json: bool) -> Result<(), Failure> {
    if json {
        let text = serde_json::to_string(report).map_err(|error| Failure::new(Code::Internal, error))?;
        println!("{text}");
        return Ok(());
    }
    println!("{} on {}: {} ranks, EP {}", report.preset, report.device, report.ranks, report.ep);
    println!(
        "{:.0} tokens/s, {:.1} ms a step; {:.1} GF/s, {:.0} % of the {:.1} GF/s of a 2048^3 product",
        report.tokens_per_s,
        report.step_ms,
        report.model_gflops,
        report.fraction_of_gemm * 100.0,
        report.gemm_gflops
    );
    println!("{:<12}{:>9}{:>9}{:>13}", "stage", "ms", "share", "of GEMM rate");
    for StageReport { stage, ms, share, fraction_of_gemm } in &report.stages {
        let fraction = fraction_of_gemm.map_or("-".to_owned(), |fraction| format!("{:.0} %", fraction * 100.0));
        println!("{stage:<12}{ms:>9.2}{:>8.1}%{fraction:>13}", share * 100.0);
    }
    Ok(())
}

/// GF/s of a 2048³ product in f32, on all ranks at once, summed over them.
fn gemm_rate(world: &HostCommunicator) -> Result<f64, Failure> {
    const N: usize = 2048;
    let device = Cpu;
    let failed = |error: moe_kernels::DeviceError| Failure::new(Code::Internal, error);
    let mut x = device.alloc::<f32>(N * N, "x").map_err(failed)?;
    let mut w = device.alloc::<f32>(N * N, "w").map_err(failed)?;
    let mut y = device.alloc::<f32>(N * N, "y").map_err(failed)?;
    device.fill(ViewMut::of(&mut x), 0.5);
    device.fill(ViewMut::of(&mut w), 0.25);
    Communicator::<Cpu>::barrier(world)?;
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            let started = Instant::now();
            device.linear(GemmDims { m: N, n: N, k: N }, View::of(&x), View::of(&w), None, ViewMut::of(&mut y));
            started.elapsed().as_secs_f64()
        })
        .collect();
    let mut rate = vec![2.0 * (N as f64).powi(3) / median(&mut times) / 1e9];
    Communicator::<Cpu>::all_reduce(world, &device, ViewMut::of(&mut rate), ReduceOp::Sum)?;
    Ok(rate[0])
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The same random tokens in every step.
struct RandomTokens {
    ids: Vec<i32>,
    length: usize,
    micro: usize,
    passes: usize,
}

impl RandomTokens {
    fn new(config: &Config, rank: usize, ranks: usize) -> Self {
        let train = &config.train;
        let (micro, s) = (train.micro_batch_for(ranks), train.sequence_length);
        let mut rng = ChaCha8Rng::seed_from_u64(rank as u64);
        let vocab = config.model.vocab_size as u32;
        let mine = share(train.global_batch, ranks, rank).len();
        let ids = (0..mine * s).map(|_| (rng.next_u32() % vocab) as i32).collect();
        Self { ids, length: s, micro, passes: share(train.global_batch, ranks, 0).len().div_ceil(micro) }
    }
}

impl TrainingData for RandomTokens {
    fn passes(&self) -> usize {
        self.passes
    }

    fn train_pass(&self, _: u64, pass: usize, batch: &mut Batch) {
        let each = self.micro * self.length;
        let range = (pass * each).min(self.ids.len())..((pass + 1) * each).min(self.ids.len());
        batch.sequences = range.len() / self.length;
        batch.sequence_length = self.length;
        batch.inputs.clear();
        batch.inputs.extend_from_slice(&self.ids[range]);
        batch.targets.clear();
        batch.targets.extend(batch.inputs.iter().copied());
    }

    fn eval_passes(&self) -> usize {
        0
    }

    fn eval_pass(&self, _: usize, _: &mut Batch) {}
}
