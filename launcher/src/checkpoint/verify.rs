//! `moe-launch checkpoint verify`: is it what was written?

use std::path::{Path, PathBuf};

use clap::Args;
use moe_runtime::checkpoint::{Checkpoint, CheckpointError, HfFolder};
use moe_runtime::exit::{ExitCode, Failure};
use moe_runtime::worker::RunDir;
use serde_json::{Value, json};

use super::tensor_bar;
use crate::out::say;
use crate::place::Place;

const EXAMPLES: &str = "\
Examples:
  moe-launch checkpoint verify runs/a                     every checkpoint of the run
  moe-launch checkpoint verify runs/a/checkpoints/step-00002000
  moe-launch checkpoint verify OLMoE/                     a Hugging Face folder has no hashes: names, shapes and values are checked";

/// Compare every file of a checkpoint with its hash.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct VerifyArgs {
    /// Run directory (all its checkpoints), one checkpoint, or a Hugging Face folder.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Print one JSON object a checkpoint.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let store = RunDir::at(&args.model).checkpoints();
    if store.is_dir() {
        let mut found = false;
        for dir in steps_in(&store)? {
            found = true;
            let checkpoint = Checkpoint::open(&dir).map_err(|fault| match fault {
                // In a run a directory of such a name was whole once.
                CheckpointError::NoCheckpoint { .. } => Failure::new(ExitCode::BadData, fault),
                fault => fault.into(),
            })?;
            verify_checkpoint(&checkpoint, args.json)?;
        }
        let none = || Failure::new(ExitCode::Usage, format!("{}: has no checkpoint yet", args.model.display()));
        return if found { Ok(()) } else { Err(none()) };
    }
    match Place::find(&args.model)? {
        Place::Run { checkpoint, .. } => verify_checkpoint(&checkpoint, args.json),
        Place::Folder(folder) => verify_folder(&folder, args.json),
    }
}

/// The directories that should be checkpoints, in the order of their steps; unfinished ones are not.
fn steps_in(store: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |error| Failure::new(ExitCode::Io, format!("cannot list {}: {error}", store.display()));
    let mut dirs = Vec::new();
    for entry in std::fs::read_dir(store).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.strip_prefix("step-").is_some_and(|step| step.bytes().all(|byte| byte.is_ascii_digit())) {
            dirs.push(path);
        }
    }
    dirs.sort();
    Ok(dirs)
}

fn verify_checkpoint(checkpoint: &Checkpoint, as_json: bool) -> Result<(), Failure> {
    checkpoint.verify()?;
    let files = &checkpoint.manifest().files;
    let tensors: usize = files.iter().map(|file| file.tensors.len()).sum();
    let bytes: u64 = files.iter().map(|file| file.bytes).sum();
    let said =
        json!({"path": checkpoint.dir(), "files": files.len(), "tensors": tensors, "bytes": bytes, "intact": true});
    show(&said, as_json, || {
        format!(
            "{}: intact: {} files, {tensors} tensors, {bytes} bytes, every hash is right",
            checkpoint.dir().display(),
            files.len()
        )
    })
}

/// Opening it has compared names, shapes and lengths; what is left are values that are no numbers.
fn verify_folder(folder: &HfFolder, as_json: bool) -> Result<(), Failure> {
    let bar = tensor_bar("reading");
    let bad = folder.not_finite(&mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if let [first, ..] = &bad[..] {
        let message = format!(
            "{}: {} tensors hold values that are no finite numbers, the first is {first}",
            folder.dir().display(),
            bad.len()
        );
        return Err(Failure::new(ExitCode::BadData, message));
    }
    let tensors = folder.tensors().count();
    let said = json!({"path": folder.dir(), "tensors": tensors, "hashes": Value::Null, "intact": true});
    show(&said, as_json, || {
        let what = "names, shapes, types and lengths are right and all values are finite; it has no hashes to compare";
        format!("{}: {tensors} tensors: {what}", folder.dir().display())
    })
}

fn show(object: &Value, as_json: bool, text: impl FnOnce() -> String) -> Result<(), Failure> {
    if as_json { say!("{object}") } else { say!("{}", text()) }
}
