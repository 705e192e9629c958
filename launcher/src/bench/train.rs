//! `moe-launch bench train`: whole training steps on random tokens, and where their time goes.
//!
//! FLOPs are the model's own (6 a parameter and token that takes part in a matrix product, and causal attention's half square);
//! nothing is counted twice that is computed twice. The ceiling is a dense matrix product in the same numbers, measured in the same run:
//! 2048³ on CPUs, 8192³ on GPUs.

use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use moe_kernels::{Cpu, DeviceError};
use moe_runtime::collectives::{Communicator, Groups, ReduceOp};
use moe_runtime::config::{Config, ConfigBuilder};
use moe_runtime::data::Batch;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::memory::Tally;
use moe_runtime::plan::Flops;
use moe_runtime::routing::check_own_gate;
use moe_runtime::stages::Stage;
use moe_runtime::topology::{Grid, Rank, share};
use moe_runtime::training::{Requests, StepError, TrainingData};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked, World, build, grid_of, set_threads};
use rand::SeedableRng;
use rand::rand_core::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::measure::{Conditions, median};
use super::ranks::{connect, reduced, together};
use crate::out::say;

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
    /// Over what all devices could do by their makers' data sheets, where those are known: model-FLOPs utilisation.
    mfu: Option<f64>,
    /// A dense product on all ranks at once, summed.
    gemm_gflops: f64,
    fraction_of_gemm: f64,
    /// Buffers of rank 0 by kind.
    buffers: Tally,
    /// A copy on rank 0.
    copy_gbs: f64,
    commit: String,
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
    together(|world| measure(args, world), |report| show(report, args.json))
}

fn configure(args: &TrainArgs, ranks: usize) -> Result<Config, Failure> {
    let mut builder = ConfigBuilder::new().given(Some(&args.preset), None, &args.set);
    if let Some(ep) = args.ep {
        builder = builder.flag("--ep", "parallel.ep", ep);
    }
    if let Some(threads) = args.threads {
        builder = builder.flag("--threads", "run.threads", threads);
    }
    let resolved = builder.build()?;
    resolved.validate(ranks)?;
    check_own_gate(&resolved.config.router, None)?;
    Ok(resolved.config)
}

fn measure(args: &TrainArgs, world: &World) -> Result<Report, Failure> {
    let (_, ranks) = world.place();
    let config = configure(args, ranks)?;
    set_threads(&config, world)?;
    let grid = grid_of(&config, ranks)?;
    let device = Device::choose(args.device, config.train.precision, world)?;
    device.check((&config.model, &config.router))?;
    device.visit(Measure { args, config: &config, world, grid, device: &device })
}

struct Measure<'a> {
    args: &'a TrainArgs,
    config: &'a Config,
    world: &'a World,
    grid: Grid,
    device: &'a Device,
}

impl OnDevice for Measure<'_> {
    type Output = Result<Report, Failure>;

    fn run<B: Ranked>(self, queue: B) -> Result<Report, Failure> {
        let Self { args, config, world, grid, device } = self;
        let (rank, ranks) = world.place();
        let communicator = connect(world, &queue)?;
        let groups = Groups::of_grid(communicator, &grid)?;
        let data = RandomTokens::new(config, rank, ranks);
        let told = |error: StepError| match error {
            StepError::Device(error @ DeviceError::OutOfMemory { .. }) => device.explain(error, config, &grid),
            error => Failure::new(Code::Internal, error),
        };
        let mut trainer = build(queue.clone(), config, (&grid, Rank(rank)), groups, data).map_err(told)?;
        let (mut times, mut stages) = (Vec::new(), Vec::new());
        for step in 1..=WARMUP + args.steps {
            let started = Instant::now();
            trainer.step(step, Requests::default()).map_err(told)?;
            if step > WARMUP {
                times.push(started.elapsed().as_secs_f64());
                stages.push(trainer.stage_times().to_vec());
            }
        }
        let buffers = trainer.tally();
        // The ceilings need memory of their own.
        drop(trainer);
        Communicator::<Cpu>::barrier(&world.communicator)?;
        let conditions = Conditions::measure(&queue, device.describe())?;
        let gemm = reduced(world, 1e3 * conditions.dense_tflops, ReduceOp::Sum)?;
        let measured = Measured { step_s: median(&mut times), gemm, stages, buffers, conditions };
        Ok(report(args, config, &grid, device, measured))
    }
}

/// What was timed.
struct Measured {
    step_s: f64,
    gemm: f64,
    stages: Vec<Vec<(Stage, f64)>>,
    buffers: Tally,
    conditions: Conditions,
}

fn report(args: &TrainArgs, config: &Config, grid: &Grid, device: &Device, measured: Measured) -> Report {
    let Measured { step_s, gemm, stages, buffers, conditions } = measured;
    let tokens = (config.train.global_batch * config.train.sequence_length) as f64;
    let flops = Flops::of(config);
    let total = flops.total();
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
        device: conditions.device,
        ranks: grid.world(),
        ep: grid.ep(),
        threads_per_rank: rayon::current_num_threads(),
        tokens_per_s: tokens / step_s,
        step_ms: step_s * 1e3,
        model_gflops,
        mfu: device.peak_flops().map(|peak| model_gflops * 1e9 / (peak * grid.world() as f64)),
        gemm_gflops: gemm,
        fraction_of_gemm: model_gflops / gemm,
        stages: Stage::ALL.into_iter().enumerate().map(stage).collect(),
        buffers,
        copy_gbs: conditions.copy_gbs,
        commit: conditions.commit,
    }
}

fn show(report: &Report, json: bool) -> Result<(), Failure> {
    if json {
        let text = serde_json::to_string(report).map_err(|error| Failure::new(Code::Internal, error))?;
        return say!("{text}");
    }
    say!("{} on {}: {} ranks, EP {}", report.preset, report.device, report.ranks, report.ep)?;
    say!(
        "{:.0} tokens/s, {:.1} ms a step; {:.1} GF/s, {:.0} % of the {:.1} GF/s of a dense product{}",
        report.tokens_per_s,
        report.step_ms,
        report.model_gflops,
        report.fraction_of_gemm * 100.0,
        report.gemm_gflops,
        report.mfu.map_or(String::new(), |mfu| format!("; MFU {:.1} %", 100.0 * mfu))
    )?;
    let gib = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
    let Tally { parameters, gradients, optimizer, activations, communication } = report.buffers;
    say!(
        "GiB: parameters {:.2}, gradients {:.2}, optimizer {:.2}, activations {:.2}, communication {:.2}",
        gib(parameters),
        gib(gradients),
        gib(optimizer),
        gib(activations),
        gib(communication)
    )?;
    say!("{:<12}{:>9}{:>9}{:>13}", "stage", "ms", "share", "of GEMM rate")?;
    for StageReport { stage, ms, share, fraction_of_gemm } in &report.stages {
        let fraction = fraction_of_gemm.map_or("-".to_owned(), |fraction| format!("{:.0} %", fraction * 100.0));
        say!("{stage:<12}{ms:>9.2}{:>8.1}%{fraction:>13}", share * 100.0)?;
    }
    Ok(())
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
