//! `moe-launch checkpoint merge`: several models into one.
//!
//! Owns where the weights come from: the command line, or the models' losses on examples.

use std::path::PathBuf;

use clap::Args;
use moe_runtime::checkpoint::convert::{MergeError, Merged, ModelTensors, weights_from_losses};
use moe_runtime::exit::{ExitCode, Failure};
use serde_json::Value;

use super::{Output, count_of};
use crate::eval::loss_on_file;
use crate::place::Place;

const EXAMPLES: &str = "\
Examples:
  moe-launch checkpoint merge runs/a runs/b --to merged/ --weights 0.7,0.3
  moe-launch checkpoint merge base/ tuned-a/ tuned-b/ --to merged/ --examples task.txt --temperature 0.1

Weights are divided by their sum. With --examples each model is weighed by its loss on that text: softmax(-loss / temperature).";

/// Average several models of one architecture.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct MergeArgs {
    /// The models: run directories, checkpoints or Hugging Face folders.
    #[arg(value_name = "MODEL", num_args = 2.., required = true)]
    models: Vec<PathBuf>,
    #[command(flatten)]
    output: Output,
    /// A weight for each model.
    #[arg(
        long,
        value_name = "W,W",
        value_delimiter = ',',
        required_unless_present = "examples",
        conflicts_with = "examples"
    )]
    weights: Vec<f64>,
    /// Text whose losses decide the weights.
    #[arg(long, value_name = "FILE")]
    examples: Option<PathBuf>,
    /// The higher, the more even the weights that losses decide.
    #[arg(long, value_name = "T", default_value_t = 0.1, requires = "examples")]
    temperature: f64,
    /// Tokenizer of the examples: bytes, or a tokenizer.json. Default: the first model's own.
    #[arg(long, value_name = "NAME", requires = "examples")]
    tokenizer: Option<String>,
}

pub(super) fn run(args: &MergeArgs) -> Result<(), Failure> {
    if !(args.temperature.is_finite() && args.temperature > 0.0) {
        let message = format!("--temperature {}: must be a positive number", args.temperature);
        return Err(Failure::new(ExitCode::Usage, message));
    }
    let places = args.models.iter().map(|path| Place::find(path)).collect::<Result<Vec<_>, _>>()?;
    let mut notes = Vec::new();
    let weights = match &args.examples {
        None => {
            count_of("--weights", args.weights.len(), places.len())?;
            args.weights.clone()
        }
        Some(file) => {
            let tokenizer = places[0].tokenizer(args.tokenizer.as_deref())?;
            let loss = |place: &Place| Ok::<_, Failure>(loss_on_file(place, tokenizer.as_ref(), file)?.mean());
            let losses = places.iter().map(loss).collect::<Result<Vec<f64>, _>>()?;
            if let Some(at) = losses.iter().position(|loss| !loss.is_finite()) {
                let message =
                    format!("{}: its loss on {} is {}", args.models[at].display(), file.display(), losses[at]);
                return Err(Failure::new(ExitCode::BadData, message));
            }
            notes.push(("losses", Value::from(losses.clone())));
            weights_from_losses(&losses, args.temperature)
        }
    };
    notes.push(("weights", Value::from(weights.clone())));
    let mut tensors = places.iter().map(Place::tensors).collect::<Result<Vec<_>, _>>()?;
    let models: Vec<&mut dyn ModelTensors> =
        tensors.iter_mut().map(|model| &mut **model as &mut dyn ModelTensors).collect();
    let refused = |error: MergeError| {
        let what = match &error {
            MergeError::Differs { index, .. } => format!("{}: ", args.models[*index].display()),
            MergeError::Weights(_) => "--".to_owned(),
        };
        Failure::new(ExitCode::Usage, format!("{what}{error}"))
    };
    let mut merged = Merged::new(models, &weights).map_err(refused)?;
    let moved = args.output.write("merging", &mut merged, None, places[0].companions()?)?;
    args.output.report(&moved, &notes)
}
