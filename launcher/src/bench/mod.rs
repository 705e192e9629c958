//! `moe-launch bench`: how fast, as a fraction of what the machine can do.
//!
//! Every figure stands beside a ceiling that was measured in the same run.

mod train;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use moe_runtime::exit::Failure;

const EXAMPLES: &str = "\
Examples:
  moe-launch bench train --preset moe-15m --device cpu --json
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
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode, Failure> {
    match &args.what {
        What::Train(args) => train::run(args),
    }
}
