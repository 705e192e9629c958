//! `moe-launch run`: moe-worker on several ranks, from the start to the exit code.
//!
//! Owns the attempts at a job: each has a coordinator of its own epoch, hosted here so that it outlives any rank, and one starter
//! process. It decides when another attempt is worth it. It never trains.

mod starter;
mod stop;

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use clap::{Args, Parser};
use moe_runtime::coordination::{CoordinatorHandle, Epoch, JobSpec, JoinToken, Operator, Phase};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::topology::Grid;
use moe_runtime::worker::{WorkerArgs, coordinator_listener, grid_of, reachable_addr, resolved_config};
use signal_hook::consts::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};

use starter::{Places, Starter};
use stop::{Forming, Stop};

const EXAMPLES: &str = "\
Examples:
  moe-launch run -n 4
  moe-launch run -n 16 -- --preset shakespeare --data input.txt --run-dir runs/a
  moe-launch run -n 8 --hosts node1:4,node2:4 -- --config run.toml --run-dir /shared/runs/a
  moe-launch run -n 4 --restarts 3 -- --run-dir runs/a      goes on from the last checkpoint when a rank is lost

Inside a Slurm allocation the ranks are started with srun, elsewhere with mpirun; one rank alone needs neither.
Ctrl-C, SIGTERM and SIGUSR1 become a graceful stop: the step is finished, a checkpoint written, exit code 75. A second one gives
up the step, a third kills the ranks. Otherwise the exit code is the workers' own; 75 also where a rank was killed.";

/// Start moe-worker on several ranks, see them through, and restart them if asked.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct RunArgs {
    /// Number of ranks.
    #[arg(short = 'n', long = "ranks", value_name = "N")]
    ranks: usize,
    /// Machines and their ranks, as `node1:4,node2:4`; a name alone takes one rank. Default: this machine, or the allocation.
    #[arg(long, value_name = "HOST[:N],…", value_delimiter = ',')]
    hosts: Vec<String>,
    /// Attempts after the first, when the job ended with 75 or a rank was killed, and nobody asked it to stop.
    #[arg(long, value_name = "K", default_value_t = 0)]
    restarts: u32,
    /// Start on this machine with mpirun, even inside a Slurm allocation.
    #[arg(long, conflicts_with = "hosts")]
    local: bool,
    /// Arguments of moe-worker.
    #[arg(last = true, value_name = "ARGS")]
    worker: Vec<OsString>,
}

/// The wait before the first restart; it doubles from one to the next.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long the coordinator of this process may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &RunArgs) -> Result<ExitCode, Failure> {
    let worker = match WorkerArgs::try_parse_from(std::iter::once(&OsString::from("moe-worker")).chain(&args.worker)) {
        Ok(worker) => worker,
        Err(error) => return Ok(crate::usage(&error)),
    };
    let places = Places::parse(args.ranks, &args.hosts)?;
    if args.restarts > 0 && worker.run_dir.is_none() {
        let message = "--restarts: give moe-worker a --run-dir after --, or a restart would begin another run";
        return Err(Failure::new(Code::Usage, message));
    }
    // Wrong settings end here, before any rank is started.
    let config = resolved_config(&worker, args.ranks)?;
    let job = Job {
        grid: grid_of(&config, args.ranks)?,
        own_threads: config.run.threads > 0,
        starter: Starter::choose(&places, args.local, |name| std::env::var(name).ok()),
        places,
        hosted: worker.coordinator.is_none(),
        start_timeout: worker.start_timeout(),
        args,
    };
    job.see_through()
}

struct Job<'a> {
    args: &'a RunArgs,
    grid: Grid,
    /// Whether the user chose the number of threads.
    own_threads: bool,
    starter: Starter,
    places: Places,
    /// Whether the coordinator is hosted here.
    hosted: bool,
    /// What it waits for all ranks to join.
    start_timeout: Duration,
}

impl Job<'_> {
    fn see_through(&self) -> Result<ExitCode, Failure> {
        // Listening before the start: a signal in between must not end this process and orphan the ranks.
        let stop = Stop::listen()?;
        let mut pause = FIRST_PAUSE;
        for epoch in 1.. {
            let (status, ordered) = self.attempt(Epoch(epoch), &stop)?;
            let left = u64::from(self.args.restarts) + 1 - epoch;
            let asked = ordered || stop.is_asked();
            let code = number_of(status, asked);
            if !asked && !is_workers_own(status) {
                self.explain(status)?;
            }
            if left == 0 || asked || code != Code::Temporary.number() {
                return Ok(code.into());
            }
            eprintln!(
                "moe-launch: the job ended with {}; starting it again, {left} of {} restarts left",
                told(status),
                self.args.restarts
            );
            if stop.sleep(pause) {
                return Ok(code.into());
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        unreachable!("attempts are counted down")
    }

    /// One start of all ranks, to their end; and whether its coordinator was asked to stop them.
    fn attempt(&self, epoch: Epoch, stop: &Stop) -> Result<(ExitStatus, bool), Failure> {
        let host = if self.hosted { Some(self.host(epoch)?) } else { None };
        let mut command = self.starter.command(&self.places, self.own_threads, &self.args.worker)?;
        if let Some((handle, addr)) = &host {
            command.args(["--coordinator", addr]).env("MOE_JOIN_TOKEN", handle.token().expose());
        }
        let mut child = command.spawn().map_err(|error| self.starter.cannot_start(&error))?;
        stop.watch(&child, host.as_ref().and_then(|(handle, _)| forming(handle)));
        let status = child.wait();
        stop.unwatch();
        let failed = |error| Failure::new(Code::Io, format!("cannot wait for {}: {error}", self.starter.program()));
        Ok((status.map_err(failed)?, host.is_some_and(|(handle, _)| handle.is_asked_to_stop())))
    }

    /// A start that the same command line will not bring about either, in one line; what mpirun says of it is long.
    fn explain(&self, status: ExitStatus) -> Result<(), Failure> {
        let (Starter::Mpirun, Some((name, error))) = (self.starter, self.places.unknown_host()) else { return Ok(()) };
        let message = format!(
            "--hosts {name}: mpirun ended with {}, and this machine does not know that name ({error}); \
             give names that `ssh NAME` reaches without a password, or addresses",
            told(status)
        );
        Err(Failure::new(Code::Usage, message))
    }

    /// The coordinator of one attempt, and how ranks reach it.
    fn host(&self, epoch: Epoch) -> Result<(CoordinatorHandle, String), Failure> {
        let one_machine = self.places.is_this_machine() && !matches!(self.starter, Starter::Srun { .. });
        let listener = coordinator_listener(one_machine)?;
        let spec = JobSpec {
            epoch,
            world_size: self.grid.world() as u32,
            ep_size: self.grid.ep() as u32,
            forming_deadline: self.start_timeout,
            ..JobSpec::default()
        };
        let handle = CoordinatorHandle::serve(listener, spec, JoinToken::generate())?;
        let addr = reachable_addr(one_machine, handle.addr().port());
        Ok((handle, addr))
    }
}

/// Asks a coordinator of this process whether ranks are still awaited.
fn forming(handle: &CoordinatorHandle) -> Option<Forming> {
    let operator = Operator::new(&handle.addr().to_string(), handle.token(), ANSWER).ok()?;
    Some(Box::new(move || operator.status().is_ok_and(|status| status.phase == Phase::Forming)))
}

/// Signals that a process gets for a fault of its own.
const FAULTS: [i32; 7] = [SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS];

/// The signal that ended a rank, or the starter itself: of a rank mpirun and srun say 128 and its number.
fn signal_of(status: ExitStatus) -> Option<i32> {
    status.signal().or_else(|| status.code().filter(|code| (129..=192).contains(code)).map(|code| code - 128))
}

/// Whether the exit code is one that ranks leave with, and neither the starter's nor a signal.
fn is_workers_own(status: ExitStatus) -> bool {
    signal_of(status).is_none() && matches!(status.code(), Some(0 | 64..=78))
}

/// The exit code of a job: its workers' own. A rank that was killed is lost to its peers, which is temporary, unless it fell by a
/// fault of the program; so are a machine that mpirun cannot reach (205, 255) and whatever becomes of ranks that were `asked` to stop.
fn number_of(status: ExitStatus, asked: bool) -> u8 {
    match (signal_of(status), status.code()) {
        (None, Some(code)) if is_workers_own(status) => code as u8,
        _ if asked => Code::Temporary.number(),
        (Some(signal), _) if FAULTS.contains(&signal) => Code::Internal.number(),
        (None, Some(code @ 1..=128)) => code as u8,
        _ => Code::Temporary.number(),
    }
}

fn told(status: ExitStatus) -> String {
    match (status.code(), signal_of(status)) {
        (Some(code), Some(signal)) => format!("exit code {code}: a rank was killed by signal {signal}"),
        (Some(code), None) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_the_code_of_its_workers_or_of_what_became_of_them() {
        // The raw status (the exit code in the second byte, or the signal in the first), and the code it comes to where nobody asked
        // the job to stop and where somebody did.
        #[rustfmt::skip]
        let table = [
            (0 << 8, 0, 0), (64 << 8, 64, 64), (70 << 8, 70, 70), (75 << 8, 75, 75),
            (1 << 8, 1, 75), // mpirun's own
            (137 << 8, 75, 75), (143 << 8, 75, 75), (9, 75, 75), // KILL, TERM
            (139 << 8, 70, 75), (134 << 8, 70, 75), (11, 70, 75), // SEGV, ABRT
            (205 << 8, 75, 75), (255 << 8, 75, 75), // a machine that mpirun has lost, or never reached
        ];
        for (raw, code, when_asked) in table {
            let status = ExitStatus::from_raw(raw);
            assert_eq!((number_of(status, false), number_of(status, true)), (code, when_asked), "{}", told(status));
        }
        assert_eq!(told(ExitStatus::from_raw(137 << 8)), "exit code 137: a rank was killed by signal 9");
        assert_eq!(told(ExitStatus::from_raw(255 << 8)), "exit code 255");
    }
}
