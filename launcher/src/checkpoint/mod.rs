//! `moe-launch checkpoint`: models on disk, looked at, checked and converted.
//!
//! Owns the options that several of its commands share, and how they report. What a conversion does is
//! `moe_runtime::checkpoint::convert`'s.

mod export;
mod import;
mod inspect;
mod merge;
mod upcycle;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use moe_runtime::checkpoint::convert::{Companions, ExportOptions, ModelTensors, Precision, Transfer};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::model::Family;
use serde_json::{Value, json};

use crate::out::{print, say};

const EXAMPLES: &str = "\
Examples:
  moe-launch checkpoint inspect runs/a
  moe-launch checkpoint verify runs/a
  moe-launch checkpoint export runs/a --to exported/ --dtype bf16
  moe-launch checkpoint import OLMoE/ --run-dir runs/b --data texts/
  moe-launch checkpoint upcycle Llama/ --to moe/ --experts 8 --top-k 2
  moe-launch checkpoint merge runs/a runs/b --to merged/ --weights 0.7,0.3";

/// Look at, check and convert models on disk.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct CheckpointArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what a checkpoint or a Hugging Face folder holds.
    Inspect(inspect::InspectArgs),
    /// Compare every file of a checkpoint with its hash.
    Verify(verify::VerifyArgs),
    /// Write a model as a folder that Hugging Face transformers opens.
    Export(export::ExportArgs),
    /// Make a run directory of a Hugging Face folder, to train on from it.
    Import(import::ImportArgs),
    /// Turn a dense Llama into a Mixture-of-Experts model.
    Upcycle(upcycle::UpcycleArgs),
    /// Average several models of one architecture.
    Merge(merge::MergeArgs),
}

pub(crate) fn run(args: &CheckpointArgs) -> Result<ExitCode, Failure> {
    match &args.command {
        Command::Inspect(args) => inspect::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Export(args) => export::run(args),
        Command::Import(args) => import::run(args),
        Command::Upcycle(args) => upcycle::run(args),
        Command::Merge(args) => merge::run(args),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// Type of the tensors that are written.
#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    /// As trained: exact.
    F32,
    /// Rounded to nearest: half the size.
    Bf16,
}

/// A published family.
#[derive(Clone, Copy, ValueEnum)]
enum FamilyName {
    Llama,
    Mixtral,
    Olmoe,
    Qwen2Moe,
    Qwen3Moe,
}

impl From<FamilyName> for Family {
    fn from(name: FamilyName) -> Self {
        match name {
            FamilyName::Llama => Self::Llama,
            FamilyName::Mixtral => Self::Mixtral,
            FamilyName::Olmoe => Self::Olmoe,
            FamilyName::Qwen2Moe => Self::Qwen2Moe,
            FamilyName::Qwen3Moe => Self::Qwen3Moe,
        }
    }
}

/// The folder that a command writes.
#[derive(Args)]
struct Output {
    /// Folder to write: a new one, or an empty one.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Type of the tensors.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// Size from which tensors go to several files, as 500MB or 5GB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    max_shard_size: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Output {
    /// Writes `model` and reports it.
    fn write(
        &self,
        what: &str,
        model: &mut dyn ModelTensors,
        family: Option<Family>,
        companions: Companions,
    ) -> Result<Transfer, Failure> {
        let precision = match self.dtype {
            Dtype::F32 => Precision::F32,
            Dtype::Bf16 => Precision::Bf16,
        };
        let options = ExportOptions { precision, shard_bytes: self.max_shard_size, family, companions };
        let bar = tensor_bar(what);
        let moved = moe_runtime::checkpoint::convert::export(model, &self.to, &options, &mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        });
        bar.finish_and_clear();
        Ok(moved?)
    }

    /// Says what was written, with what else there is to know.
    fn report(&self, moved: &Transfer, notes: &[(&str, Value)]) -> Result<(), Failure> {
        report(&self.to, moved, notes, self.json)
    }
}

/// Says what was moved: a JSON object, or a few lines.
fn report(to: &Path, moved: &Transfer, notes: &[(&str, Value)], as_json: bool) -> Result<(), Failure> {
    let Transfer { tensors, parameters, bytes, sha256 } = moved;
    if as_json {
        let mut object = json!({
            "to": to, "tensors": tensors, "parameters": parameters, "bytes": bytes, "sha256": sha256,
        });
        for (key, value) in notes {
            object[*key] = value.clone();
        }
        return say!("{object}");
    }
    let mut text = format!(
        "wrote {}: {tensors} tensors, {parameters} parameters, {:.2} MB\n\
         read back: every tensor is what was to be written, sha256 {sha256}\n",
        to.display(),
        *bytes as f64 / 1e6,
    );
    for (key, value) in notes {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text += &format!("{key}: {value}\n");
    }
    print(format_args!("{text}"))
}

/// A bar that counts tensors, where there is a terminal to see it.
fn tensor_bar(what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {pos}/{len} tensors, {eta} left");
    let bar = ProgressBar::new(0).with_prefix(what.to_owned());
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Bytes of "500MB", "5GB", "1GiB" or a plain number.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("{other:?} is no unit; accepted: B, KB, MB, GB, KiB, MiB, GiB")),
    };
    match number.parse::<f64>() {
        Ok(number) if number * unit >= 1.0 && number * unit < 1e18 => Ok((number * unit) as u64),
        _ => Err("accepted: a number with a unit, as 500MB or 5GB".into()),
    }
}

/// Several paths need as many answers.
fn count_of(name: &str, found: usize, needed: usize) -> Result<(), Failure> {
    if found == needed {
        return Ok(());
    }
    Err(Failure::new(Code::Usage, format!("{name}: {found} given for {needed} models; accepted: one each")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("5GB", 5_000_000_000), ("1.5MB", 1_500_000), ("2 GiB", 2 << 30), ("4096", 4096)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "0", "-1GB", "5 apples", "1e3"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
