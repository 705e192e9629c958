//! What `moe-worker` is told on its command line.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use super::coordinate::Seat;
use crate::config::ConfigBuilder;
use crate::coordination::{CoordinationError, JoinToken};
use crate::exit::{ExitCode, Failure};
use crate::routing::Gate;

const EXAMPLES: &str = "\
Examples:
  moe-worker                                              one process, built-in preset and text
  mpirun -n 16 --oversubscribe moe-worker                 sixteen ranks; EP is chosen from ranks and experts
  mpirun -n 4 moe-worker --preset shakespeare --data input.txt --run-dir runs/a --steps 2000 --ep 4
  mpirun -n 4 moe-worker --run-dir runs/a                 resumes where it stopped
  mpirun -n 4 moe-worker --run-dir runs/a --resume last-good    where the newest checkpoint is damaged
  moe-worker --model HF_DIR --data texts/                 starts from a Hugging Face folder
  moe-worker --steps 5 --trace trace.json                 where the time goes, for ui.perfetto.dev
  moe-worker --set model.experts=16 --set optimizer.lr=1e-3
  MOE_JOIN_TOKEN=… mpirun -x MOE_JOIN_TOKEN -n 4 moe-worker --coordinator head:7400

Exit codes: 0 done, 64 wrong usage or configuration, 65 bad input data, 70 internal error, 74 input/output error,
75 temporary failure (a lost peer, or stopped after a checkpoint): start the same command again, 77 refused.

Places: mpirun and srun --mpi=pmix say which rank a process is. Without them --rank and --world-size do, or the variables
SLURM_PROCID and SLURM_NTASKS (srun), JOB_COMPLETION_INDEX and WORLD_SIZE (Kubernetes), RANK and WORLD_SIZE; several such ranks
need a --coordinator to find each other.

Signals: SIGUSR1 (and Ctrl-C where no mpirun stands between) finishes the step, writes a checkpoint and leaves with 75; a second
one, or SIGTERM, gives up the step.";

/// Trains a Mixture-of-Experts language model. Start it alone, or with mpirun or srun for several ranks.
#[derive(Clone, Debug, Parser)]
#[command(name = "moe-worker", version, allow_negative_numbers = true, after_long_help = EXAMPLES)]
pub struct WorkerArgs {
    /// The gate that the program was built with.
    #[arg(skip)]
    pub gate: Option<Arc<dyn Gate>>,
    /// TOML file laid over the preset.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Built-in configuration to start from: tiny, shakespeare, moe-15m, moe-3b.
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Sets one key, as `model.experts=16`; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Text or JSONL file (also .gz, .zst), token shard, directory or pattern to train on; may be given several times. Default: the
    /// sources of this program's dependencies.
    #[arg(long, value_name = "PATH")]
    pub data: Vec<PathBuf>,
    /// Directory of the run: configuration, metrics, checkpoints. Default: a fresh one under runs/.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Stop after this step.
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Seed of initial weights, data order and gate noise.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Expert-parallel size. Default: the largest that divides both ranks and experts.
    #[arg(long, value_name = "N")]
    pub ep: Option<usize>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Whether to go on from the run directory's newest checkpoint.
    #[arg(long, value_enum, default_value_t = Resume::Auto)]
    pub resume: Resume,
    /// Hugging Face folder to start from: config.json and safetensors.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Rank of this process, from 0, where no launcher says it.
    #[arg(long, value_name = "R")]
    pub rank: Option<usize>,
    /// Number of ranks, where no launcher says it.
    #[arg(long, value_name = "N")]
    pub world_size: Option<usize>,
    /// Seconds that ranks wait for one another before the first step: for all to start, and for rank 0 to have read the text.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub start_timeout: u32,
    /// Coordinator that is hosted elsewhere, as by moe-launch run; otherwise rank 0 hosts it.
    #[arg(long, value_name = "HOST:PORT")]
    pub coordinator: Option<String>,
    /// Join token of that coordinator; better given by the variable, which other users of the machine do not see.
    #[arg(long, value_name = "HEX", env = "MOE_JOIN_TOKEN", hide_env_values = true)]
    pub join_token: Option<String>,
    /// Rank 0 hosts the coordinator itself, on the port that --coordinator names.
    #[arg(long, requires = "coordinator")]
    pub host_coordinator: bool,
    /// Write the spans of all stages, steps and ranks to this file; open it at ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
    /// More log lines; may be given several times.
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// GPUs where this build knows them and every rank has one, else the CPU; the run says which and why.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU for each rank.
    Cuda,
}

/// Whether a run directory's checkpoint is continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Resume {
    /// From the newest checkpoint, if there is one.
    Auto,
    /// Never: a run directory that holds a run already is refused.
    Never,
    /// From the newest checkpoint that is whole; newer ones that are damaged are set aside, not removed.
    LastGood,
}

impl WorkerArgs {
    /// Who hosts the coordinator.
    ///
    /// # Errors
    /// Usage: an address that is none, no token, or one that is none.
    pub(super) fn seat(&self) -> Result<Seat, Failure> {
        let Some(addr) = self.coordinator.clone() else { return Ok(Seat::Rank0) };
        let Some(token) = &self.join_token else {
            let message = format!(
                "--coordinator {addr}: needs the token of the job, the same for all its ranks, in MOE_JOIN_TOKEN or as --join-token HEX"
            );
            return Err(Failure::new(ExitCode::Usage, message));
        };
        let token = token.parse::<JoinToken>().map_err(CoordinationError::from)?;
        match addr.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?))) {
            Some((host, port)) if !host.is_empty() && port > 0 => Ok(match self.host_coordinator {
                true => Seat::Rank0At { addr, port, token },
                false => Seat::Elsewhere { addr, token },
            }),
            _ => {
                let message = format!("--coordinator {addr}: must be HOST:PORT, as node07:7400 or [::1]:7400");
                Err(Failure::new(ExitCode::Usage, message))
            }
        }
    }

    /// What ranks wait for one another before the first step.
    pub fn start_timeout(&self) -> Duration {
        Duration::from_secs(self.start_timeout.into())
    }

    /// Lays what was said over `builder`.
    pub fn configure(&self, builder: ConfigBuilder) -> ConfigBuilder {
        let mut builder = builder.given(self.preset.as_deref(), self.config.as_deref(), &self.set);
        if !self.data.is_empty() {
            builder = builder.flag("--data", "data.paths", self.data.clone());
        }
        if let Some(steps) = self.steps {
            builder = builder.flag("--steps", "train.steps", steps);
        }
        if let Some(seed) = self.seed {
            builder = builder.flag("--seed", "train.seed", seed);
        }
        if let Some(ep) = self.ep {
            builder = builder.flag("--ep", "parallel.ep", ep as u64);
        }
        builder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(arguments: &[&str]) -> Result<Seat, Failure> {
        WorkerArgs::try_parse_from([&["moe-worker"][..], arguments].concat()).unwrap().seat()
    }

    #[test]
    fn the_coordinators_seat_follows_from_its_flags() {
        let token = "00112233445566778899aabbccddeeff";
        assert!(matches!(seat(&[]), Ok(Seat::Rank0)));
        let named = ["--join-token", token, "--coordinator", "[::1]:7400"];
        assert!(matches!(seat(&named), Ok(Seat::Elsewhere { addr, .. }) if addr == "[::1]:7400"));
        let hosted = seat(&[&named[..], &["--host-coordinator"]].concat());
        assert!(matches!(hosted, Ok(Seat::Rank0At { port: 7400, .. })), "{hosted:?}");
        for addr in ["head", ":7400", "head:0", "head:70000"] {
            let failure = seat(&["--join-token", token, "--coordinator", addr]).unwrap_err();
            assert_eq!(failure.exit_code(), ExitCode::Usage);
            assert!(failure.to_string().starts_with(&format!("--coordinator {addr}: must be HOST:PORT")), "{failure}");
        }
        if std::env::var_os("MOE_JOIN_TOKEN").is_none() {
            let failure = seat(&["--coordinator", "head:7400"]).unwrap_err();
            assert!(
                failure.exit_code() == ExitCode::Usage && failure.to_string().contains("MOE_JOIN_TOKEN"),
                "{failure}"
            );
        }
        let failure = seat(&["--join-token", "short", "--coordinator", "head:7400"]).unwrap_err();
        assert_eq!(failure.exit_code(), ExitCode::Usage, "{failure}");
    }
}
