//! mpirun, and the ranks it has started on this machine.
//!
//! Owns finding them: ranks are children of mpirun, and their environment says which is which.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use super::process::Program;

/// `mpirun -n ranks` for the program and arguments that a test adds, also as root and with more ranks than cores. `dir` takes its
/// temporary files, see [`apart`].
pub(crate) fn mpirun(ranks: usize, dir: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--allow-run-as-root", "-n", &ranks.to_string()]);
    apart(&mut command, dir);
    command
}

/// Has Open MPI keep its session in `dir`: by default all jobs of a user share a directory that each makes when it starts and
/// removes when it ends, and two at once get in each other's way.
pub(crate) fn apart(command: &mut Command, dir: &Path) {
    command.env("OMPI_MCA_orte_tmpdir_base", dir);
}

/// Whether mpirun is here. Where it is not, that is told; where it was promised, it is a failure.
pub(crate) fn available() -> bool {
    match Command::new("mpirun").arg("--version").output() {
        Ok(_) => true,
        Err(error) => {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "mpirun cannot be started: {error}");
            eprintln!("notice: not tested here, since mpirun cannot be started: {error}");
            false
        }
    }
}

/// The process of `rank`, once it is there, below the mpirun whose process is `mpirun`.
pub(crate) fn rank_of(mpirun: u32, rank: usize) -> Option<Pid> {
    let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
    let children = std::fs::read_to_string(format!("/proc/{mpirun}/task/{mpirun}/children")).ok()?;
    let is_rank = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|entry| entry == variable.as_bytes())
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_rank).and_then(Pid::from_raw)
}

/// Sends `signal` to `rank` alone.
pub(crate) fn signal_rank(mpirun: &Program, rank: usize, signal: Signal) {
    kill_process(rank_of(mpirun.pid(), rank).unwrap(), signal).unwrap();
}
