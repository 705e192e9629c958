//! `moe-launch save`: a checkpoint of a running job, now.
//!
//! Owns the order. The ranks carry it out after the step they are in, and go on.

use std::io::Write;

use clap::Args;

use crate::status::{JobArgs, StatusError};

const EXAMPLES: &str = "\
Examples:
  moe-launch save --run-dir runs/a      before a change to the machine, or to look at a model that is still being trained

The checkpoint stands under checkpoints/ of the run directory once the step is over; moe-launch status shows the job meanwhile.";

/// Have a running job write a checkpoint now and go on.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct SaveArgs {
    #[command(flatten)]
    job: JobArgs,
}

/// Gives the order and says so.
pub(crate) fn run(args: &SaveArgs, out: &mut impl Write) -> Result<(), StatusError> {
    let operator = args.job.operator()?;
    operator.checkpoint("moe-launch save")?;
    let step = operator.status()?.step;
    writeln!(out, "ordered at step {step}: the ranks write a checkpoint after the step they are in")?;
    Ok(())
}
