//! `moe-launch doctor`: what this machine has, and what would fail on it.
//!
//! Owns the list of checks and how findings are shown. What is found is judged in the modules beside this one, from text and numbers,
//! so that every judgement is tested without the machine that deserves it.

mod devices;
mod mpi;
mod system;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use moe_runtime::exit::{ExitCode as Code, Failure};
use serde::Serialize;

const EXAMPLES: &str = "\
Examples:
  moe-launch doctor
  moe-launch doctor --run-dir /shared/runs/a
  moe-launch doctor --json | jq '.[] | select(.level == \"problem\")'

Exit code 0: nothing is wrong, warnings aside; 74: something that a run needs is missing.";

/// Say what this machine has, what would fail, and the mend.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct DoctorArgs {
    /// Where runs will write.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    run_dir: PathBuf,
    /// Seconds the two-rank trial may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// One JSON list instead of lines.
    #[arg(long)]
    json: bool,
    /// Be one rank of the trial.
    #[arg(long, hide = true)]
    hello: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Works, but worse than it could.
    Warning,
    /// A run would fail.
    Problem,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    name: &'static str,
    level: Level,
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), mend: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, level: Level::Warning, found: found.into(), mend: Some(mend.into()) }
    }

    fn problem(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, level: Level::Problem, found: found.into(), mend: Some(mend.into()) }
    }
}

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    let timeout = Duration::from_secs(args.timeout);
    if args.hello {
        return mpi::hello(timeout);
    }
    let mut findings = system::findings(&args.run_dir);
    findings.extend(mpi::findings(timeout));
    findings.extend(devices::findings());
    let mut out = crate::out::stdout();
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let written = if args.json {
        let text = serde_json::to_string(&findings).map_err(|error| Failure::new(Code::Internal, error))?;
        writeln!(out, "{text}")
    } else {
        show(&findings, colours, &mut out)
    };
    written.map_err(|error| Failure::new(Code::Io, format!("cannot write the report: {error}")))?;
    let wrong = findings.iter().any(|finding| finding.level == Level::Problem);
    Ok(if wrong { Code::Io.into() } else { ExitCode::SUCCESS })
}

fn show(findings: &[Finding], colours: bool, out: &mut impl Write) -> std::io::Result<()> {
    for Finding { name, level, found, mend } in findings {
        let (word, colour) = match level {
            Level::Ok => ("ok", 32),
            Level::Warning => ("warning", 33),
            Level::Problem => ("problem", 31),
        };
        let padded = format!("{word:<8}");
        let level = if colours { format!("\x1b[{colour}m{padded}\x1b[0m") } else { padded };
        writeln!(out, "{level} {name:<14} {found}")?;
        if let Some(mend) = mend {
            writeln!(out, "{:24}{mend}", "")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_carry_the_mend_and_colours_only_where_asked() {
        let findings = [Finding::ok("cores", "2"), Finding::problem("mpirun", "not found", "install Open MPI")];
        let text = |colours| {
            let mut out = Vec::new();
            show(&findings, colours, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let plain = "\
ok       cores          2
problem  mpirun         not found
                        install Open MPI
";
        assert_eq!(text(false), plain);
        assert!(text(true).contains("\x1b[31mproblem"));
    }
}
