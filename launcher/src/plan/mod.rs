//! `moe-launch plan`: what a run will need, before anything is started.
//!
//! Owns the question: which configuration, on how many ranks of how many nodes, within which limits, at which rates. The arithmetic
//! is the runtime's.

mod compare;
mod rates;
mod show;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use moe_runtime::config::ConfigBuilder;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::plan::{Alternative, DoesNotFit, Job, MemoryPlan, Numbers, Plan, Rates, nearest_that_fit};
use moe_runtime::system::available_memory;
use moe_runtime::worker::grid_of;
use serde::Serialize;

const EXAMPLES: &str = "\
Examples:
  moe-launch plan -n 4                                        the built-in preset on four ranks of this machine
  moe-launch plan --preset moe-15m -n 8 --set parallel.shard_optimizer=true
  moe-launch plan --config run.toml --nodes 4 --gpus 8 --gpu-memory 80
  moe-launch plan --preset moe-3b -n 16 --memory 64 --json
  moe-launch plan --compare runs/a                            a run's own count beside its plan

Memory is that of rank 0, which has the largest share. Rates are measured on this machine in about a second, unless given; for GPUs
they must be given. Exit code 64: the job does not fit; the nearest that do are named.";

/// Say what a run will need: groups, memory, traffic, time.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct PlanArgs {
    /// TOML file laid over the preset.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Built-in configuration to start from.
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Sets one key, as `train.micro_batch=4`; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Number of ranks.
    #[arg(short = 'n', long = "ranks", value_name = "N", conflicts_with = "gpus")]
    ranks: Option<usize>,
    /// Nodes that the ranks are spread over.
    #[arg(long, value_name = "N", default_value_t = 1)]
    nodes: usize,
    /// GPUs of a node, one rank each: bf16 with f32 masters instead of the CPU's f32.
    #[arg(long, value_name = "N")]
    gpus: Option<usize>,
    /// Memory of a node in GiB. Default: what this machine has free.
    #[arg(long, value_name = "GIB")]
    memory: Option<f64>,
    /// Memory of a GPU in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 80.0)]
    gpu_memory: f64,
    #[command(flatten)]
    rates: rates::RateArgs,
    /// Run directory whose ranks have counted what they used: shows both.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "preset", "set", "ranks", "gpus"])]
    compare: Option<PathBuf>,
    /// One JSON object instead of tables.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    limit_bytes: u64,
    fits: bool,
    rates: Option<Rates>,
    alternatives: &'a [Alternative],
}

pub(crate) fn run(args: &PlanArgs, out: &mut impl Write) -> Result<ExitCode, Failure> {
    if let Some(dir) = &args.compare {
        return compare::run(dir, args.json, out);
    }
    let job = job(args)?;
    let limit_bytes = limit(args, &job)?;
    let rates = args.rates.resolve(&job)?;
    let plan = Plan::new(&job, rates.as_ref());
    let fits = plan.memory.peak_bytes <= limit_bytes;
    let alternatives = if fits { Vec::new() } else { nearest_that_fit(&job, limit_bytes) };
    if args.json {
        let report = Report { plan: &plan, limit_bytes, fits, rates, alternatives: &alternatives };
        let text = serde_json::to_string(&report).map_err(|error| Failure::new(Code::Internal, error))?;
        writeln!(out, "{text}").map_err(unwritable)?;
    } else {
        show::plan(&plan, &job, limit_bytes, out).map_err(unwritable)?;
    }
    if fits {
        return Ok(ExitCode::SUCCESS);
    }
    Err(DoesNotFit { peak_bytes: plan.memory.peak_bytes, limit_bytes, alternatives }.into())
}

fn unwritable(error: std::io::Error) -> Failure {
    Failure::new(Code::Io, format!("cannot write the plan: {error}"))
}

fn job(args: &PlanArgs) -> Result<Job, Failure> {
    let usage = |text: &str| Failure::new(Code::Usage, text.to_owned());
    if args.nodes == 0 {
        return Err(usage("--nodes 0: a job has at least 1 node"));
    }
    let world = match (args.ranks, args.gpus) {
        (Some(ranks), _) => ranks,
        (None, Some(gpus)) => args.nodes * gpus,
        (None, None) => return Err(usage("say how many ranks: -n N, or --nodes N --gpus M")),
    };
    if world == 0 {
        return Err(usage("a job has at least 1 rank"));
    }
    let builder = ConfigBuilder::new().given(args.preset.as_deref(), args.config.as_deref(), &args.set);
    let resolved = builder.build()?;
    resolved.validate(world)?;
    let grid = grid_of(&resolved.config, world)?;
    let numbers = if args.gpus.is_some() { Numbers::GPU } else { Numbers::CPU };
    Ok(Job { config: resolved.config, grid, ranks_per_node: world.div_ceil(args.nodes), numbers })
}

/// Bytes that a rank may use.
fn limit(args: &PlanArgs, job: &Job) -> Result<u64, Failure> {
    let gib = |gib: f64, flag: &str| {
        if gib.is_finite() && gib > 0.0 {
            return Ok((gib * (1_u64 << 30) as f64) as u64);
        }
        Err(Failure::new(Code::Usage, format!("{flag} {gib}: must be a number of GiB above 0")))
    };
    if args.gpus.is_some() {
        return gib(args.gpu_memory, "--gpu-memory");
    }
    let node = match args.memory {
        Some(memory) => gib(memory, "--memory")?,
        None => available_memory().ok_or_else(|| {
            Failure::new(Code::Io, "/proc/meminfo does not say how much memory is available; give --memory GIB")
        })?,
    };
    let ranks = job.ranks_per_node.max(1) as u64;
    Ok((node / ranks).saturating_sub(MemoryPlan::PROGRAM_BYTES))
}
