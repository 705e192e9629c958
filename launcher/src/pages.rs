//! `moe-launch completions` and `moe-launch man`: files for shells and manuals, made from the commands themselves.
//!
//! Owns where they are written. What they say is clap's, so that they cannot differ from `--help`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::worker::WorkerArgs;

const COMPLETION_EXAMPLES: &str = "\
Examples:
  moe-launch completions bash > ~/.local/share/bash-completion/completions/moe-launch
  moe-launch completions zsh --of moe-worker > ~/.zfunc/_moe-worker
  moe-launch completions fish > ~/.config/fish/completions/moe-launch.fish";

const MAN_EXAMPLES: &str = "\
Examples:
  moe-launch man --out /usr/local/share/man/man1
  moe-launch man --out man && man man/moe-launch-run.1";

/// Write completions for a shell to stdout.
#[derive(Args)]
#[command(after_long_help = COMPLETION_EXAMPLES)]
pub(crate) struct CompletionArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
    /// The program they are for: moe-launch or moe-worker.
    #[arg(long, value_name = "PROGRAM", default_value = "moe-launch", value_parser = ["moe-launch", "moe-worker"])]
    of: String,
}

/// Write man pages of both programs and of every command.
#[derive(Args)]
#[command(after_long_help = MAN_EXAMPLES)]
pub(crate) struct ManArgs {
    /// Directory for the pages; it is made.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn completions(args: &CompletionArgs, launcher: Command, out: &mut impl Write) -> Result<ExitCode, Failure> {
    let mut command = if args.of == "moe-worker" { WorkerArgs::command() } else { launcher };
    // Into memory first: a reader that goes away must not be a panic.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, &args.of, &mut text);
    out.write_all(&text).map_err(|error| Failure::new(Code::Io, format!("cannot write completions: {error}")))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn man(args: &ManArgs, launcher: Command) -> Result<ExitCode, Failure> {
    let failed = |path: &Path, error: std::io::Error| {
        Failure::new(Code::Io, format!("{}: cannot be written: {error}", path.display()))
    };
    std::fs::create_dir_all(&args.out).map_err(|error| failed(&args.out, error))?;
    for command in [launcher, WorkerArgs::command()] {
        clap_mangen::generate_to(command, &args.out).map_err(|error| failed(&args.out, error))?;
    }
    Ok(ExitCode::SUCCESS)
}
