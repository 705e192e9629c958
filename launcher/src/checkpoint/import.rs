//! `moe-launch checkpoint import`: in from Hugging Face.
//!
//! Owns the run directory that a folder becomes: a checkpoint of step 0 and the configuration to train it with.

use std::path::PathBuf;

use clap::Args;
use moe_runtime::checkpoint::convert::{Companions, write_checkpoint};
use moe_runtime::checkpoint::{HfFolder, Store};
use moe_runtime::config::{ConfigBuilder, Origin};
use moe_runtime::data::{FileTokenizer, check_vocabulary, tokenizer};
use moe_runtime::exit::{ExitCode, Failure};
use moe_runtime::worker::RunDir;
use serde_json::Value;

use super::{report, tensor_bar};
use crate::place::HUB;

const EXAMPLES: &str = "\
Examples:
  moe-launch checkpoint import OLMoE/ --run-dir runs/b
  moe-launch checkpoint import OLMoE/ --run-dir runs/b --data texts/ --steps 1000 --set optimizer.lr=1e-5
  moe-worker --run-dir runs/b                             trains on from it

What is said here about training can still be changed when training starts. Every tensor is counted and hashed when it is read
and again from the written checkpoint; where they differ the checkpoint is removed and the command fails.";

/// Make a run directory of a Hugging Face folder, to train on from it.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct ImportArgs {
    /// Hugging Face folder: config.json and safetensors.
    #[arg(value_name = "DIR")]
    from: PathBuf,
    /// Run directory to make.
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
    /// TOML file laid over the preset.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Built-in configuration that everything but the model is taken from.
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Sets one key, as `optimizer.lr=1e-5`; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Text file or directory to train on; may be given several times.
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Steps to train.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ImportArgs) -> Result<(), Failure> {
    let folder = HfFolder::open(&args.from)?;
    let run_dir = RunDir::at(&args.run_dir);
    if run_dir.config().exists() {
        let message = format!("{}: holds a run already; give another --run-dir", args.run_dir.display());
        return Err(Failure::new(ExitCode::Usage, message));
    }
    let companions = Companions::of_folder(&args.from)?;
    let hub = std::path::absolute(args.run_dir.join(HUB))
        .map_err(|error| Failure::new(ExitCode::Io, format!("{}: {error}", args.run_dir.display())))?;
    let (model, router) = (folder.model_config().clone(), folder.router_config().clone());
    let own = args.from.join(FileTokenizer::FILE);
    let resolved = settings(args).model(model, router, &args.from).tokenizer_of_model(own).build()?;
    // As moe-worker --model does: one that does not fit is refused before anything is written, and not passed over for another.
    let opened = tokenizer(&resolved.config.data.tokenizer)?;
    resolved.validate(1)?;
    check_vocabulary(opened.as_ref(), resolved.config.model.vocab_size)?;
    let origin = resolved.origin_of("data.tokenizer");
    let (is_own, is_left) = (matches!(origin, Origin::Model(_)), matches!(origin, Origin::Preset(_)));
    let mut config = resolved.config;
    for path in &mut config.data.paths {
        *path = std::path::absolute(&*path)
            .map_err(|error| Failure::new(ExitCode::Io, format!("{}: {error}", path.display())))?;
    }
    let _held = run_dir.claim()?;
    let bar = tensor_bar("importing");
    let moved = write_checkpoint(&mut &folder, &Store::new(run_dir.checkpoints(), 0), &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let (checkpoint, moved) = moved?;
    companions.keep(&hub)?;
    if is_own {
        // The copy that stays with the run.
        config.data.tokenizer = hub.join(FileTokenizer::FILE).to_string_lossy().into_owned();
    }
    run_dir.save_config(&config)?;
    let next = format!("moe-worker --run-dir {}", args.run_dir.display());
    let mut notes = vec![
        ("checkpoint", Value::from(checkpoint.to_string_lossy())),
        ("tokenizer", Value::from(config.data.tokenizer.as_str())),
        ("train with", Value::from(next)),
    ];
    if is_left {
        let note = format!(
            "the folder has no {}; name the model's tokenizer with --set data.tokenizer=PATH",
            FileTokenizer::FILE
        );
        notes.push(("note", Value::from(note)));
    }
    report(&args.run_dir, &moved, &notes, args.json)
}

fn settings(args: &ImportArgs) -> ConfigBuilder {
    let mut builder = ConfigBuilder::new().given(args.preset.as_deref(), args.config.as_deref(), &args.set);
    if !args.data.is_empty() {
        builder = builder.flag("--data", "data.paths", args.data.clone());
    }
    if let Some(steps) = args.steps {
        builder = builder.flag("--steps", "train.steps", steps);
    }
    builder
}
