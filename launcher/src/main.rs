//! `moe-launch`: starts, watches and inspects training runs.
#![forbid(unsafe_code)]

mod balance;
mod bench;
mod checkpoint;
mod data;
mod doctor;
mod eval;
mod generate;
mod machine;
mod out;
mod pages;
mod place;
mod plan;
mod render;
mod run;
mod save;
mod status;
mod stop;
mod tokenizer;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use moe_runtime::exit::{Failure, caught};
use moe_runtime::telemetry::{Console, init_logs, log_filter};

const EXAMPLES: &str = "\
Examples:
  moe-launch doctor
  moe-launch plan --preset shakespeare -n 4
  moe-launch run -n 4 -- --preset shakespeare --data input.txt --run-dir runs/a
  moe-launch status --run-dir runs/a
  moe-launch save --run-dir runs/a
  moe-launch stop --run-dir runs/a
  moe-launch data prepare --data texts/ --out shards/
  moe-launch tokenizer train --data texts/ --vocab-size 8192 --out tokenizer.json
  moe-launch generate --checkpoint runs/a --prompt \"ROMEO:\"
  moe-launch eval --checkpoint runs/a --data held-out.txt
  moe-launch checkpoint export runs/a --to exported/
  moe-launch render slurm --config run.toml -n 16 --nodes 2
  moe-launch bench train --preset moe-15m --device cpu --json

Exit codes: 0 done, 64 wrong usage or configuration, 65 bad input data, 70 internal error, 74 input/output error,
75 temporary failure, 77 refused.";

/// Starts, watches and inspects training runs of moe-worker.
#[derive(Parser)]
#[command(name = "moe-launch", version, allow_negative_numbers = true, after_long_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what this machine has, what would fail, and the mend.
    Doctor(doctor::DoctorArgs),
    /// Say what a run will need: groups, memory, traffic, time.
    Plan(plan::PlanArgs),
    /// Start moe-worker on several ranks, see them through, and restart them if asked.
    Run(run::RunArgs),
    /// Show the ranks, step and loss of a running job.
    Status(status::StatusArgs),
    /// Show how evenly a run uses its experts.
    Balance(balance::BalanceArgs),
    /// Have a running job write a checkpoint now and go on.
    Save(save::SaveArgs),
    /// Have a running job write a checkpoint and end.
    Stop(stop::StopArgs),
    /// Prepare text for training, and look into token shards.
    Data(data::DataArgs),
    /// Make a tokenizer.
    Tokenizer(tokenizer::TokenizerArgs),
    /// Let a trained model write.
    Generate(generate::GenerateArgs),
    /// Measure loss and perplexity of a model on texts.
    Eval(eval::EvalArgs),
    /// Look at, check and convert models on disk: inspect, verify, export, import, upcycle, merge.
    Checkpoint(checkpoint::CheckpointArgs),
    /// Write the job files of one run for Slurm or Kubernetes.
    Render(render::RenderArgs),
    /// Measure speed, as a fraction of what the machine can do.
    Bench(bench::BenchArgs),
    /// Write completions for a shell.
    Completions(pages::CompletionArgs),
    /// Write man pages.
    Man(pages::ManArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Err(error) => return usage(&error),
        Ok(cli) => cli,
    };
    let rust_log = std::env::var("RUST_LOG").ok();
    if let Err(error) = init_logs(0, &log_filter(0, 0, rust_log.as_deref()), &Console::new()) {
        report(&error.into());
        return moe_runtime::exit::ExitCode::Usage.into();
    }
    let result = caught(|| match cli {
        Cli { command: Command::Doctor(args) } => doctor::run(&args),
        Cli { command: Command::Plan(args) } => plan::run(&args, &mut out::stdout()),
        Cli { command: Command::Run(args) } => run::run(&args),
        Cli { command: Command::Status(args) } => {
            status::run(&args, &mut out::stdout()).map(|()| ExitCode::SUCCESS).map_err(Failure::from)
        }
        Cli { command: Command::Balance(args) } => {
            balance::run(&args, &mut out::stdout()).map(|()| ExitCode::SUCCESS).map_err(Failure::from)
        }
        Cli { command: Command::Save(args) } => {
            save::run(&args, &mut out::stdout()).map(|()| ExitCode::SUCCESS).map_err(Failure::from)
        }
        Cli { command: Command::Stop(args) } => {
            stop::run(&args, &mut out::stdout()).map(|()| ExitCode::SUCCESS).map_err(Failure::from)
        }
        Cli { command: Command::Data(args) } => data::run(&args),
        Cli { command: Command::Tokenizer(args) } => tokenizer::run(&args),
        Cli { command: Command::Generate(args) } => generate::run(&args),
        Cli { command: Command::Eval(args) } => eval::run(&args),
        Cli { command: Command::Checkpoint(args) } => checkpoint::run(&args),
        Cli { command: Command::Render(args) } => render::run(&args),
        Cli { command: Command::Bench(args) } => bench::run(&args),
        Cli { command: Command::Completions(args) } => pages::completions(&args, Cli::command(), &mut out::stdout()),
        Cli { command: Command::Man(args) } => pages::man(&args, Cli::command()),
    });
    match result {
        Ok(code) => code,
        Err(failure) => {
            report(&failure);
            failure.exit_code().into()
        }
    }
}

fn report(failure: &Failure) {
    eprintln!("error: {failure}");
}

/// Help and version go to stdout and end with 0; wrong usage ends with 64.
fn usage(error: &clap::Error) -> ExitCode {
    // Nothing more can be done where the terminal is gone.
    let _ = error.print();
    if error.use_stderr() { moe_runtime::exit::ExitCode::Usage.into() } else { ExitCode::SUCCESS }
}
