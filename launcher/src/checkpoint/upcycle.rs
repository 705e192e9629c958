//! `moe-launch checkpoint upcycle`: from dense to experts.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moe_runtime::checkpoint::convert::{ExpertsFrom, ModelTensors, Slices, UpcycleError, UpcycleOptions, Upcycled};
use moe_runtime::exit::{ExitCode, Failure};
use moe_runtime::model::layout::parameter_counts;
use serde_json::Value;

use super::Output;
use crate::place::Place;

const EXAMPLES: &str = "\
Examples:
  moe-launch checkpoint upcycle Llama/ --to moe/ --experts 8 --top-k 2
  moe-launch checkpoint upcycle Llama/ --to moe/ --experts 16 --top-k 4 --split random
  moe-worker --model moe/ --data texts/                   trains on from it

Without --split every expert is a copy of the whole feed-forward: the model starts with the dense model's loss and costs top-k
times its feed-forward. With --split each expert is one part of it: the model starts worse and costs top-k/experts of it.";

/// Turn a dense Llama into a Mixture-of-Experts model.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct UpcycleArgs {
    /// The dense model: a Hugging Face folder, a run directory or a checkpoint.
    #[arg(value_name = "DENSE")]
    from: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Experts of each block.
    #[arg(long, value_name = "N")]
    experts: usize,
    /// Experts a token is sent to.
    #[arg(long, value_name = "K")]
    top_k: usize,
    /// Cut the feed-forward into the experts instead of copying it: neighbouring neurons, or neurons drawn at random.
    #[arg(long, value_enum, value_name = "HOW")]
    split: Option<Split>,
    /// Standard deviation of the new router's weights; 0: all experts alike.
    #[arg(long, value_name = "STD", default_value_t = 0.02)]
    router_std: f32,
    /// Seed of the router and of a random split.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Which neurons an expert gets.
#[derive(Clone, Copy, ValueEnum)]
enum Split {
    /// Neighbours.
    Contiguous,
    /// Drawn at random, block by block.
    Random,
}

pub(super) fn run(args: &UpcycleArgs) -> Result<(), Failure> {
    let from = match args.split {
        None => ExpertsFrom::Copies,
        Some(Split::Contiguous) => ExpertsFrom::Slices(Slices::Contiguous),
        Some(Split::Random) => ExpertsFrom::Slices(Slices::Random),
    };
    let &UpcycleArgs { experts, top_k, router_std, seed, .. } = args;
    let place = Place::find(&args.from)?;
    let mut dense = place.tensors()?;
    let refused = |error: UpcycleError| {
        let what = match &error {
            UpcycleError::NotDense { .. } => format!("{}: ", args.from.display()),
            UpcycleError::Option(_) => "--".to_owned(),
        };
        Failure::new(ExitCode::Usage, format!("{what}{error}"))
    };
    let mut model =
        Upcycled::new(dense.as_mut(), UpcycleOptions { experts, top_k, from, router_std, seed }).map_err(refused)?;
    let (before, _) = parameter_counts(place.configs().0, place.configs().1);
    let moved = args.output.write("upcycling", &mut model, None, place.companions()?)?;
    let (all, active) = parameter_counts(model.model(), model.router());
    let grown = format!("{before} dense, {all} now, {active} of them active a token");
    args.output.report(&moved, &[("size", Value::from(grown))])
}
