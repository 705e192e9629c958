//! What starts the ranks: mpirun, srun inside a Slurm allocation, or nothing for a rank alone.
//!
//! Owns the command lines and the places ranks go to. It starts nothing itself.

use std::ffi::OsString;
use std::net::ToSocketAddrs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use moe_runtime::exit::{ExitCode as Code, Failure};
use rustix::process::geteuid;

use crate::machine;

/// Where ranks go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Places {
    ranks: usize,
    /// Machines and their ranks; empty: this machine, or what the allocation has.
    hosts: Vec<(String, usize)>,
}

impl Places {
    /// `ranks` ranks on `hosts`, each `NAME` or `NAME:RANKS`.
    pub(super) fn parse(ranks: usize, hosts: &[String]) -> Result<Self, Failure> {
        let usage = |text: String| Err(Failure::new(Code::Usage, text));
        if ranks == 0 {
            return usage("-n 0: a job has at least 1 rank".to_owned());
        }
        let mut places = Vec::new();
        for host in hosts {
            let (name, slots) = host.split_once(':').unwrap_or((host, "1"));
            match slots.parse::<usize>() {
                Ok(slots) if slots > 0 && !name.is_empty() => places.push((name.to_owned(), slots)),
                _ => return usage(format!("--hosts {host}: write NAME or NAME:RANKS, for example node1:4,node2:4")),
            }
        }
        let room: usize = places.iter().map(|(_, slots)| slots).sum();
        if !places.is_empty() && room < ranks {
            return usage(format!("--hosts {}: has room for {room} ranks of -n {ranks}", hosts.join(",")));
        }
        Ok(Self { ranks, hosts: places })
    }

    /// The first machine whose name this one cannot resolve, with the system's reason. What only ssh knows by that name is one too, so
    /// that this explains a failure and is none by itself.
    pub(super) fn unknown_host(&self) -> Option<(&str, std::io::Error)> {
        self.hosts
            .iter()
            .find_map(|(name, _)| (name.as_str(), 0).to_socket_addrs().err().map(|error| (name.as_str(), error)))
    }

    /// Whether no other machine is named.
    pub(super) fn is_this_machine(&self) -> bool {
        self.hosts.iter().all(|(name, _)| name == "localhost" || name == "127.0.0.1")
    }
}

/// What starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Starter {
    /// Open MPI's mpirun.
    Mpirun,
    /// Slurm's srun, inside an allocation.
    Srun {
        /// CPUs of a rank, where the allocation says so: srun does not take that over by itself.
        cpus_per_rank: Option<usize>,
    },
    /// Nothing: a rank alone is an ordinary process.
    Alone,
}

impl Starter {
    /// The right one here. `lookup` reads an environment variable.
    pub(super) fn choose(places: &Places, local: bool, lookup: impl Fn(&str) -> Option<String>) -> Self {
        let allocation = !local && places.hosts.is_empty() && lookup("SLURM_JOB_ID").is_some();
        match (allocation, places) {
            (true, _) => {
                Self::Srun { cpus_per_rank: lookup("SLURM_CPUS_PER_TASK").and_then(|cpus| cpus.trim().parse().ok()) }
            }
            (false, Places { ranks: 1, hosts }) if hosts.is_empty() => Self::Alone,
            _ => Self::Mpirun,
        }
    }

    /// The program that is started.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Mpirun => "mpirun",
            Self::Srun { .. } => "srun",
            Self::Alone => "moe-worker",
        }
    }

    /// Why it could not be started, with the mend.
    pub(super) fn cannot_start(self, error: &std::io::Error) -> Failure {
        let mend = match self {
            Self::Mpirun => "install Open MPI (apt-get install openmpi-bin) or start one rank alone",
            Self::Srun { .. } => "install Slurm's client, or give --local to use mpirun",
            Self::Alone => "build it with `cargo build --release`",
        };
        Failure::new(Code::Io, format!("cannot start {}: {error}; {mend}", self.program()))
    }

    /// The command that starts moe-worker with `worker` arguments on all ranks; more arguments may follow.
    pub(super) fn command(self, places: &Places, own_threads: bool, worker: &[OsString]) -> Result<Command, Failure> {
        let mut command = Command::new(match self {
            Self::Alone => worker_program()?.into_os_string(),
            starter => starter.program().into(),
        });
        command.args(self.options(places, machine::cores(), geteuid().is_root()));
        if self != Self::Alone {
            command.arg(worker_program()?);
        }
        command.args(worker);
        // Slurm need not bind ranks to what it gives them; those that mpirun binds see it themselves.
        if let (Self::Srun { cpus_per_rank: Some(cpus) }, false) = (self, own_threads) {
            command.args(["--set", &format!("run.threads={cpus}")]);
        }
        command.stdin(Stdio::null());
        // A group of its own: the terminal's Ctrl-C reaches this process only, which passes it on as a graceful stop.
        command.process_group(0);
        Ok(command)
    }

    /// The command line between the starter and the worker; `cores` are those that ranks can be bound to.
    fn options(self, places: &Places, cores: Option<usize>, root: bool) -> Vec<String> {
        let ranks = places.ranks.to_string();
        let mut options: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| options.extend(words.iter().map(|word| (*word).to_owned()));
        match self {
            Self::Alone => {}
            // A rank that is lost must end the job: nobody would answer its peers.
            Self::Srun { cpus_per_rank } => {
                add(&["--mpi=pmix", "--ntasks", &ranks, "--kill-on-bad-exit=1"]);
                if let Some(cpus) = cpus_per_rank {
                    add(&["--cpus-per-task", &cpus.to_string()]);
                }
            }
            Self::Mpirun => {
                add(&["-n", &ranks]);
                match cores.filter(|cores| places.hosts.is_empty() && places.ranks <= *cores) {
                    Some(cores) => {
                        let map = format!("slot:PE={}", cores / places.ranks);
                        add(&["--map-by", &map, "--bind-to", "core"]);
                    }
                    // More ranks than cores, or machines whose cores are not known here.
                    None => add(&["--bind-to", "none", "--oversubscribe"]),
                }
                if !places.hosts.is_empty() {
                    let hosts: Vec<_> = places.hosts.iter().map(|(name, slots)| format!("{name}:{slots}")).collect();
                    add(&["--host", &hosts.join(","), "-x", "MOE_JOIN_TOKEN"]);
                }
                if root {
                    add(&["--allow-run-as-root"]);
                }
            }
        }
        options
    }
}

/// moe-worker beside this program, where cargo and packages put it.
fn worker_program() -> Result<PathBuf, Failure> {
    let here =
        std::env::current_exe().map_err(|error| Failure::new(Code::Io, format!("cannot find myself: {error}")))?;
    let worker = here.with_file_name("moe-worker");
    if worker.exists() {
        return Ok(worker);
    }
    Err(Failure::new(Code::Io, format!("{} is missing: build it with `cargo build --release`", worker.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(ranks: usize, hosts: &[&str]) -> Places {
        Places::parse(ranks, &hosts.iter().map(|host| (*host).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_starter_follows_the_place() {
        #[rustfmt::skip]
        let table = [
            // ranks, hosts, --local, inside an allocation, starter
            (4, &[][..], false, false, Starter::Mpirun),
            (1, &[], false, false, Starter::Alone),
            (1, &["a"], false, false, Starter::Mpirun),
            (4, &[], false, true, Starter::Srun { cpus_per_rank: Some(3) }),
            (4, &[], true, true, Starter::Mpirun),
            (4, &["a:2", "b:2"], false, true, Starter::Mpirun),
        ];
        for (ranks, hosts, local, allocation, starter) in table {
            let lookup = |name: &str| match name {
                "SLURM_JOB_ID" if allocation => Some("7".to_owned()),
                "SLURM_CPUS_PER_TASK" if allocation => Some("3".to_owned()),
                _ => None,
            };
            assert_eq!(Starter::choose(&places(ranks, hosts), local, lookup), starter, "{ranks} on {hosts:?}");
        }
    }

    #[test]
    fn options_bind_ranks_where_there_are_cores_for_them() {
        let options = |starter: Starter, ranks, hosts: &[&str], cores| {
            starter.options(&places(ranks, hosts), cores, false).join(" ")
        };
        assert_eq!(options(Starter::Mpirun, 4, &[], Some(8)), "-n 4 --map-by slot:PE=2 --bind-to core");
        assert_eq!(options(Starter::Mpirun, 16, &[], Some(8)), "-n 16 --bind-to none --oversubscribe");
        assert_eq!(options(Starter::Mpirun, 4, &[], None), "-n 4 --bind-to none --oversubscribe");
        let over_hosts = "-n 4 --bind-to none --oversubscribe --host a:3,b:1 -x MOE_JOIN_TOKEN";
        assert_eq!(options(Starter::Mpirun, 4, &["a:3", "b"], Some(8)), over_hosts);
        let srun = |cpus_per_rank| options(Starter::Srun { cpus_per_rank }, 4, &[], Some(8));
        assert_eq!(srun(None), "--mpi=pmix --ntasks 4 --kill-on-bad-exit=1");
        assert_eq!(srun(Some(3)), "--mpi=pmix --ntasks 4 --kill-on-bad-exit=1 --cpus-per-task 3");
        assert_eq!(options(Starter::Alone, 1, &[], Some(8)), "");
    }

    #[test]
    fn places_that_cannot_be_are_refused() {
        for (ranks, hosts, message) in [
            (0, &[][..], "at least 1 rank"),
            (2, &["a:x"], "write NAME or NAME:RANKS"),
            (2, &[":2"], "write NAME or NAME:RANKS"),
            (5, &["a:2", "b:2"], "has room for 4 ranks of -n 5"),
        ] {
            let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
            let error = Places::parse(ranks, &hosts).unwrap_err();
            assert!(error.to_string().contains(message) && error.exit_code() == Code::Usage, "{error}");
        }
    }
}
