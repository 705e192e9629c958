//! MPI: which one, how many slots, and whether two ranks find each other.
//!
//! Owns the trial: this program, started twice by mpirun, each rank telling the other its number.

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use moe_kernels::Cpu;
use moe_runtime::collectives::Communicator;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::worker::World;
use rustix::process::geteuid;

use super::Finding;
use crate::machine;
use crate::out::say;

/// What both ranks of a trial that worked have said.
const HELLO: &str = "two ranks have met";

pub(super) fn findings(timeout: Duration) -> Vec<Finding> {
    let version = version();
    let works = version.is_ok();
    let mut findings = vec![match version {
        Ok(version) => Finding::ok("mpi", version),
        Err(reason) => {
            Finding::problem("mpi", reason, "apt-get install openmpi-bin, or load your site's Open MPI module")
        }
    }];
    findings.push(slots());
    if works {
        findings.push(trial(timeout));
    }
    findings
}

/// The first line that mpirun says of itself.
fn version() -> Result<String, String> {
    let output = Command::new("mpirun").arg("--version").stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("mpirun cannot be started: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(|line| line.trim().to_owned()).ok_or_else(|| "mpirun --version says nothing".to_owned())
}

fn slots() -> Finding {
    if let Ok(job) = std::env::var("SLURM_JOB_ID") {
        let tasks = std::env::var("SLURM_NTASKS").unwrap_or_else(|_| "?".to_owned());
        return Finding::ok("slots", format!("{tasks} in Slurm job {job}"));
    }
    let cores = machine::cores().or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    Finding::ok("slots", format!("{cores}; moe-launch run starts more ranks than that with --oversubscribe"))
}

/// Starts two ranks of this program and waits for them.
fn trial(timeout: Duration) -> Finding {
    let name = "two ranks";
    let mend = "run `mpirun -n 2 hostname` and see what it says; a firewall on the loopback is a usual cause";
    let Ok(here) = std::env::current_exe() else {
        return Finding::warning(name, "this program does not find itself", "start it by its whole path");
    };
    let mut command = Command::new("mpirun");
    command.args(["-n", "2", "--oversubscribe", "--bind-to", "none"]);
    if geteuid().is_root() {
        command.arg("--allow-run-as-root");
    }
    command.arg(here).args(["doctor", "--hello", "--timeout", &timeout.as_secs().to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let began = Instant::now();
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Finding::problem(name, error.to_string(), mend),
    };
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if began.elapsed() < timeout => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                // It is given up either way.
                let _ = child.kill();
                let _ = child.wait();
                return Finding::problem(name, format!("did not meet within {} s", timeout.as_secs()), mend);
            }
            Err(error) => return Finding::problem(name, error.to_string(), mend),
        }
    }
    let said = |pipe: Option<&mut dyn Read>| {
        let mut text = String::new();
        // What cannot be read was not said.
        let _ = pipe.map(|pipe| pipe.read_to_string(&mut text));
        text
    };
    let out = said(child.stdout.as_mut().map(|pipe| pipe as &mut dyn Read));
    let err = said(child.stderr.as_mut().map(|pipe| pipe as &mut dyn Read));
    judge(&out, &err, began.elapsed(), mend)
}

fn judge(out: &str, err: &str, took: Duration, mend: &str) -> Finding {
    let name = "two ranks";
    if out.contains(HELLO) {
        return Finding::ok(name, format!("met over MPI in {:.1} s", took.as_secs_f64()));
    }
    let reason = err
        .lines()
        .map(str::trim)
        .find(|line| line.starts_with("error:"))
        .or(err.lines().map(str::trim).find(|line| !line.is_empty()));
    Finding::problem(name, reason.unwrap_or("ended without a word"), mend)
}

/// One rank of the trial.
pub(super) fn hello(timeout: Duration) -> Result<ExitCode, Failure> {
    let world = World::join(timeout)?;
    let (rank, size) = world.place();
    let met = Communicator::<Cpu>::all_gather_bytes(&world.communicator, &[rank as u8]);
    match met {
        Ok(ranks) if size == 2 && ranks == [[0], [1]] => {
            if rank == 0 {
                say!("{HELLO}")?;
            }
            world.leave(Code::Done)
        }
        Ok(_) => {
            eprintln!("error: mpirun made {size} ranks of 2: this program is linked with another MPI than mpirun's");
            world.leave(Code::Internal)
        }
        Err(error) => {
            eprintln!("error: {error}");
            world.leave(Code::Temporary)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn a_trial_is_judged_by_what_its_ranks_say() {
        let took = Duration::from_millis(300);
        assert_eq!(judge("two ranks have met\n", "a warning", took, "m").found, "met over MPI in 0.3 s");
        let failed = judge("", "----\nerror: all_gather_bytes waited\n", took, "m");
        assert_eq!((failed.level, failed.found.as_str()), (Level::Problem, "error: all_gather_bytes waited"));
        assert_eq!(judge("", "", took, "m").found, "ended without a word");
    }
}
