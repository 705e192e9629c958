//! `moe-launch checkpoint export`: out to Hugging Face.

use std::path::PathBuf;

use clap::Args;
use moe_runtime::exit::Failure;
use serde_json::Value;

use super::{FamilyName, Output};
use crate::place::Place;

const EXAMPLES: &str = "\
Examples:
  moe-launch checkpoint export runs/a --to exported/
  moe-launch checkpoint export runs/a/checkpoints/step-00002000 --to exported/ --dtype bf16 --max-shard-size 2GB

The folder opens with transformers' AutoModelForCausalLM.from_pretrained and with moe-worker --model. Every tensor is counted and
hashed when it is read and again from the written files; where they differ the folder is removed and the command fails.";

/// Write a model as a folder that Hugging Face transformers opens.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct ExportArgs {
    /// Run directory (its newest checkpoint), one checkpoint, or a Hugging Face folder to write anew.
    #[arg(value_name = "MODEL")]
    from: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Family to write it as. Default: the model's own.
    #[arg(long, value_enum)]
    family: Option<FamilyName>,
}

pub(super) fn run(args: &ExportArgs) -> Result<(), Failure> {
    let place = Place::find(&args.from)?;
    let companions = place.companions()?;
    let mut notes = Vec::new();
    if !companions.has_tokenizer() {
        notes.push(("note", Value::from("no tokenizer is known for this model; none was written")));
    }
    if place.configs().1.capacity_factor.is_some() {
        let text = "trained with a capacity, which transformers does not have: there no choice is dropped";
        notes.push(("capacity", Value::from(text)));
    }
    let mut tensors = place.tensors()?;
    let moved = args.output.write("exporting", tensors.as_mut(), args.family.map(Into::into), companions)?;
    args.output.report(&moved, &notes)
}
