//! `moe-launch stop`: a running job ends after its step, with a checkpoint.
//!
//! Owns the order. The ranks carry it out: they finish the step they are in, save, and end with exit code 75.

use std::io::Write;

use clap::Args;
use moe_runtime::coordination::Phase;

use crate::status::{JobArgs, StatusError};

const EXAMPLES: &str = "\
Examples:
  moe-launch stop --run-dir runs/a      from another terminal or machine that sees the run directory

It is what Ctrl-C on moe-launch run is, without its terminal: the ranks finish the step they are in, write a checkpoint and end with
exit code 75, and moe-launch run does not restart them. The command that started the job goes on from the checkpoint. It returns at
once; moe-launch status shows the job meanwhile.";

/// Have a running job write a checkpoint and end.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    job: JobArgs,
}

/// Gives the order and says so.
pub(crate) fn run(args: &StopArgs, out: &mut impl Write) -> Result<(), StatusError> {
    let operator = args.job.operator()?;
    let step = operator.status()?.step;
    match operator.drain("moe-launch stop")? {
        Phase::Draining => {
            writeln!(
                out,
                "ordered at step {step}: the ranks finish the step they are in, write a checkpoint and end with 75"
            )?;
        }
        phase => writeln!(out, "the job had not begun; it is {phase}")?,
    }
    Ok(out.flush()?)
}
