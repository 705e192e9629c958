//! `moe-launch render`: the files of one run for Slurm or Kubernetes.
//!
//! Owns what is common: what a run is said to be, the check of its configuration, the writing of files. The files themselves are
//! those of deploy/, built into the program, with this run's values; nothing is submitted.

mod error;
mod k8s;
mod slurm;
mod template;

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use moe_runtime::config::{Config, ConfigBuilder, DEFAULT_PRESET};
use moe_runtime::exit::Failure;

use crate::out::say;
use error::RenderError;

const EXAMPLES: &str = "\
Examples:
  moe-launch render slurm --config run.toml -n 16 --nodes 2 --name big
  moe-launch render k8s --config run.toml -n 16 --nodes 2 --gpus --name big";

/// Write the job files of one run.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct RenderArgs {
    #[command(subcommand)]
    target: Target,
}

#[derive(Subcommand)]
enum Target {
    /// A batch script for sbatch.
    Slurm(slurm::SlurmArgs),
    /// A kustomize folder for kubectl.
    K8s(k8s::K8sArgs),
}

/// What is said about a run, wherever it goes.
#[derive(Args)]
struct RunSpec {
    /// TOML file of the run; it is copied beside the job files. Default: the preset `tiny`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Number of ranks.
    #[arg(short = 'n', long = "ranks", value_name = "N")]
    ranks: usize,
    /// Nodes (Slurm) or pods (MPIJob) that share the ranks evenly.
    #[arg(long, value_name = "N", default_value_t = 1)]
    nodes: usize,
    /// One GPU a rank.
    #[arg(long)]
    gpus: bool,
    /// Compute threads, and CPUs, of a rank.
    #[arg(long, value_name = "N", default_value_t = 4)]
    cpus_per_rank: usize,
    /// Name of the run and of everything that is made for it.
    #[arg(long, default_value = "moe-run")]
    name: String,
    /// Directory that is written. Default: the name.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Write over files that are there.
    #[arg(long)]
    force: bool,
}

/// A file to be written.
#[derive(Debug, PartialEq, Eq)]
struct Rendered {
    /// Its name in the directory.
    name: String,
    text: String,
    /// Permission bits.
    mode: u32,
}

impl Rendered {
    fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into(), mode: 0o644 }
    }
}

pub(crate) fn run(args: &RenderArgs) -> Result<ExitCode, Failure> {
    let (spec, files, next) = match &args.target {
        Target::Slurm(args) => slurm::render(args)?,
        Target::K8s(args) => k8s::render(args)?,
    };
    let out = spec.out();
    write(&out, &files, spec.force)?;
    for file in &files {
        say!("{}", out.join(&file.name).display())?;
    }
    say!("next: {next}")?;
    Ok(ExitCode::SUCCESS)
}

impl RunSpec {
    fn out(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| PathBuf::from(&self.name))
    }

    fn ranks_per_node(&self) -> usize {
        self.ranks / self.nodes
    }

    /// The text of the run's configuration, checked for its ranks, with the configuration it means.
    fn checked(&self) -> Result<(String, Config), Failure> {
        if self.ranks == 0 {
            return Err(RenderError::NoRanks.into());
        }
        if self.nodes == 0 || !self.ranks.is_multiple_of(self.nodes) {
            let fits = (1..=self.ranks).filter(|nodes| self.ranks.is_multiple_of(*nodes)).collect();
            return Err(RenderError::Uneven { ranks: self.ranks, nodes: self.nodes, fits }.into());
        }
        if self.cpus_per_rank == 0 {
            return Err(RenderError::NoCpus.into());
        }
        if !is_dns_label(&self.name) {
            return Err(RenderError::Name { name: self.name.clone() }.into());
        }
        let (builder, text) = match &self.config {
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|reason| RenderError::Io {
                    path: path.clone(),
                    action: "read",
                    reason,
                })?;
                (ConfigBuilder::new().file(path), text)
            }
            None => (ConfigBuilder::new(), format!("preset = \"{DEFAULT_PRESET}\"\n")),
        };
        let resolved = builder.build()?;
        resolved.validate(self.ranks)?;
        Ok((text, resolved.config))
    }
}

/// Whether Kubernetes takes `name` for everything made of it; pods add an index to it.
fn is_dns_label(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= 40
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.ends_with(legal)
        && name.chars().all(|c| legal(c) || c == '-')
}

fn write(out: &Path, files: &[Rendered], force: bool) -> Result<(), RenderError> {
    let failed = |path: &Path, action, reason| RenderError::Io { path: path.into(), action, reason };
    if let Some(file) = files.iter().find(|file| !force && out.join(&file.name).exists()) {
        return Err(RenderError::Exists { path: out.join(&file.name) });
    }
    fs::create_dir_all(out).map_err(|reason| failed(out, "made", reason))?;
    for file in files {
        let path = out.join(&file.name);
        // Anew, so that the permissions are those of this file and not of one that was there.
        match fs::remove_file(&path) {
            Err(reason) if reason.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed(&path, "replaced", reason));
            }
            _ => {}
        }
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(file.mode)
            .open(&path)
            .and_then(|mut open| open.write_all(file.text.as_bytes()))
            .map_err(|reason| failed(&path, "written", reason))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_must_do_for_pods() {
        for (name, legal) in
            [("a", true), ("moe-run", true), ("", false), ("Moe", false), ("a-", false), ("1a", false), ("a.b", false)]
        {
            assert_eq!(is_dns_label(name), legal, "{name}");
        }
        assert!(!is_dns_label(&"a".repeat(41)));
    }
}
