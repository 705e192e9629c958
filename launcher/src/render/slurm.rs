//! `moe-launch render slurm`: a batch script of one run.
//!
//! Owns which options and variables of the script a run sets. What the script does stands in deploy/slurm.

use clap::{Args, ValueEnum};
use moe_runtime::exit::Failure;

use super::error::RenderError;
use super::template::{set_options, shell_word};
use super::{Rendered, RunSpec};

const CPU: &str = include_str!("../../../deploy/slurm/moe-worker.sbatch");
const GPU: &str = include_str!("../../../deploy/slurm/moe-worker-gpu.sbatch");

/// The line that ends the options; the script's own part begins behind it.
const END_OF_OPTIONS: &str = "# ---- the same in every script of this directory ----\n";

const EXAMPLES: &str = "\
Examples:
  moe-launch render slurm --config run.toml -n 16 --nodes 2 --name big && sbatch big/big.sbatch
  moe-launch render slurm --config run.toml -n 16 --nodes 2 --gpus --partition gpu --time 2-00:00:00";

/// Write a batch script for one run, and its configuration beside it.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct SlurmArgs {
    #[command(flatten)]
    spec: RunSpec,
    /// What starts the ranks: srun needs Slurm with PMIx.
    #[arg(long, value_enum, default_value_t = Starter::Srun)]
    launcher: Starter,
    /// Run directory, on storage that all nodes see.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<String>,
    /// Time limit, as sbatch takes it; a checkpoint is written five minutes before it and the job requeued.
    #[arg(long, value_name = "TIME", default_value = "24:00:00")]
    time: String,
    /// Partition.
    #[arg(long)]
    partition: Option<String>,
    /// Account.
    #[arg(long)]
    account: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Starter {
    Srun,
    Mpirun,
}

pub(super) fn render(args: &SlurmArgs) -> Result<(&RunSpec, Vec<Rendered>, String), Failure> {
    let spec = &args.spec;
    let (config, _) = spec.checked()?;
    let mut options = vec![
        ("job-name", spec.name.clone()),
        ("nodes", spec.nodes.to_string()),
        ("ntasks-per-node", spec.ranks_per_node().to_string()),
        ("cpus-per-task", spec.cpus_per_rank.to_string()),
        ("time", args.time.clone()),
    ];
    if spec.gpus {
        options.push(("gpus-per-node", spec.ranks_per_node().to_string()));
    }
    let wishes = [("partition", &args.partition), ("account", &args.account)];
    options.extend(wishes.into_iter().filter_map(|(key, value)| Some((key, value.clone()?))));
    let out = std::path::absolute(spec.out()).map_err(|reason| RenderError::Io {
        path: spec.out(),
        action: "found",
        reason,
    })?;
    let variables = [
        ("MOE_CONFIG", out.join("run.toml").to_string_lossy().into_owned()),
        ("MOE_RUN_DIR", args.run_dir.clone().unwrap_or_else(|| format!("runs/{}", spec.name))),
        ("MOE_LAUNCHER", if matches!(args.launcher, Starter::Mpirun) { "mpirun" } else { "srun" }.to_owned()),
    ];
    let mut block = String::from("# This run; a variable that is set goes before.\n");
    for (name, value) in variables {
        block += &format!("{name}=${{{name}:-{}}}\n", shell_word(&value));
    }
    let script = set_options(if spec.gpus { GPU } else { CPU }, &options);
    let script = script.replacen(END_OF_OPTIONS, &block, 1);
    let name = format!("{}.sbatch", spec.name);
    let next = format!("sbatch {}", spec.out().join(&name).display());
    let script = Rendered { mode: 0o755, ..Rendered::new(name, script) };
    Ok((spec, vec![script, Rendered::new("run.toml", config)], next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_differ_in_their_options_only() {
        let (_, cpu) = CPU.split_once(END_OF_OPTIONS).unwrap();
        let (_, gpu) = GPU.split_once(END_OF_OPTIONS).unwrap();
        assert_eq!(cpu, gpu);
    }
}
