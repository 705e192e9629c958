//! `moe-launch run`: moe-worker on several ranks.
//!
//! Owns the life of one mpirun: its start, the signals it is passed, its exit code. It never trains.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use clap::Args;
use moe_runtime::exit::{ExitCode as Code, Failure};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

const EXAMPLES: &str = "\
Examples:
  moe-launch run -n 4
  moe-launch run -n 16 -- --preset shakespeare --data input.txt --run-dir runs/a

Ctrl-C, SIGTERM and SIGUSR1 become a graceful stop: the step is finished, a checkpoint written, exit code 75. A second one gives
up the step, a third kills the ranks. Otherwise the exit code is the workers' own.";

/// Start moe-worker on several ranks with mpirun, and pass a graceful stop on.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct RunArgs {
    /// Number of ranks.
    #[arg(short = 'n', long = "ranks", value_name = "N")]
    ranks: usize,
    /// Arguments of moe-worker.
    #[arg(last = true, value_name = "ARGS")]
    worker: Vec<OsString>,
}

pub(crate) fn run(args: &RunArgs) -> Result<ExitCode, Failure> {
    if args.ranks == 0 {
        return Err(Failure::new(Code::Usage, "-n 0: a job has at least 1 rank"));
    }
    // Listening before the start: a signal in between must not end this process and orphan the ranks.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])
        .map_err(|error| Failure::new(Code::Io, format!("cannot listen to signals: {error}")))?;
    let mut child = start(args)?;
    let pid = Pid::from_child(&child);
    let handle = signals.handle();
    let forward = std::thread::spawn(move || {
        for (count, _) in signals.forever().enumerate() {
            // mpirun passes USR1 on and returns the ranks' own code; asked to end by TERM, it kills them after a second and returns 1.
            let (signal, told) = match count {
                0 => (Signal::USR1, "stopping after this step with a checkpoint; once more gives up the step"),
                1 => (Signal::USR1, "giving up the step; once more kills the ranks"),
                _ => (Signal::TERM, "killing the ranks"),
            };
            eprintln!("moe-launch: {told}");
            // The job may be over already.
            let _ = kill_process(pid, signal);
        }
    });
    let status = child.wait().map_err(|error| Failure::new(Code::Io, format!("cannot wait for mpirun: {error}")));
    handle.close();
    // The thread only forwards; its end changes nothing any more.
    let _ = forward.join();
    let status = status?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(70);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(70)))
}

fn start(args: &RunArgs) -> Result<Child, Failure> {
    let worker = worker()?;
    let mut command = Command::new("mpirun");
    command.arg("-n").arg(args.ranks.to_string());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if args.ranks > cores {
        command.arg("--oversubscribe");
    }
    if geteuid().is_root() {
        command.arg("--allow-run-as-root");
    }
    command.arg(worker).args(&args.worker).stdin(Stdio::null());
    // A group of its own: the terminal's Ctrl-C reaches this process only, which passes it on as a graceful stop.
    command.process_group(0);
    command.spawn().map_err(|error| {
        let mend = "install Open MPI (apt-get install openmpi-bin) or start moe-worker alone";
        Failure::new(Code::Io, format!("cannot start mpirun: {error}; {mend}"))
    })
}

/// moe-worker beside this program, where cargo and packages put it.
fn worker() -> Result<PathBuf, Failure> {
    let here =
        std::env::current_exe().map_err(|error| Failure::new(Code::Io, format!("cannot find myself: {error}")))?;
    let worker = here.with_file_name("moe-worker");
    if worker.exists() {
        return Ok(worker);
    }
    Err(Failure::new(Code::Io, format!("{} is missing: build it with `cargo build --release`", worker.display())))
}
