//! `moe-launch`: starts, watches and inspects training runs.
#![forbid(unsafe_code)]

mod status;

use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "moe-launch", version, about)]
enum Cli {
    /// Show how a running job stands
    Status(status::StatusArgs),
}

fn main() -> ExitCode {
    let Cli::Status(args) = Cli::parse();
    match status::run(&args, &mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            error.exit_code().into()
        }
    }
}
