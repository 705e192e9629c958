//! `moe-launch bench`: how fast, as a fraction of what the machine can do.
//!
//! A rate stands beside a ceiling that was measured in the same run; `routers` compares gates with each other.

mod collectives;
mod gemm;
mod layer;
mod measure;
mod megatron;
mod ops;
mod ranks;
mod routers;
mod shapes;
mod stub;
mod train;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use moe_runtime::exit::Failure;

const EXAMPLES: &str = "\
Examples:
  moe-launch bench train --preset moe-15m --device cpu --json
  moe-launch bench train --preset moe-3b --device cuda
  moe-launch bench layer --case olmoe-1b-7b
  moe-launch bench gemm --json
  moe-launch bench ops
  moe-launch bench routers --only switch,sigmoid-bias
  moe-launch bench routers --cost
  mpirun -n 4 moe-launch bench layer --device cuda
  mpirun -n 4 moe-launch bench layer --megatron --device cuda
  mpirun -n 2 moe-launch bench collectives --collective all_to_all_v
  mpirun -n 2 moe-launch bench train --preset moe-15m --ep 2 --threads 1";

/// Measure speed, as a fraction of what the machine can do.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Whole training steps on random tokens: forward, backward, optimizer. Under mpirun: all ranks together.
    Train(train::TrainArgs),
    /// Whole MoE layers of well-known models: router, dispatch, experts, combine. Under mpirun: experts shared out over all ranks.
    Layer(layer::LayerArgs),
    /// Grouped products of the experts, beside dense ones of the same size.
    Gemm(gemm::GemmArgs),
    /// What ranks exchange and add up: bandwidth as NCCL's own tests count it. Under mpirun.
    Collectives(collectives::CollectivesArgs),
    /// Gates side by side: loss, balance and speed of a small model, or the share of a layer's time that routing takes.
    Routers(routers::RoutersArgs),
    /// Operations that only move data, as a fraction of a copy's rate.
    Ops(ops::OpsArgs),
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode, Failure> {
    match &args.what {
        What::Train(args) => train::run(args),
        What::Layer(args) => layer::run(args),
        What::Gemm(args) => gemm::run(args),
        What::Collectives(args) => collectives::run(args),
        What::Routers(args) => routers::run(args),
        What::Ops(args) => ops::run(args),
    }
}
