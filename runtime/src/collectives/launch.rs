//! Which rank this process is, as its launcher's variables and its flags tell.
//!
//! Owns the names of those variables and what happens where two of them disagree. It reads no environment itself: the caller
//! passes a look-up. It starts nothing.

use std::fmt;

use crate::exit::{Classified, ExitCode};

/// Who says which rank a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Launcher {
    /// Open MPI's mpirun.
    Mpirun,
    /// Slurm's `srun --mpi=pmix`.
    Srun,
    /// Slurm's `srun` without PMIx: ranks without MPI.
    PlainSrun,
    /// An Indexed Job of Kubernetes, or one of a JobSet.
    IndexedJob,
    /// `RANK` and `WORLD_SIZE`.
    Variables,
    /// `--rank` and `--world-size`.
    Flags,
}

impl Launcher {
    /// Whether it starts MPI processes.
    pub fn has_mpi(self) -> bool {
        matches!(self, Self::Mpirun | Self::Srun)
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mpirun => "mpirun (OMPI_COMM_WORLD_RANK)",
            Self::Srun => "srun --mpi=pmix (SLURM_PROCID)",
            Self::PlainSrun => "srun (SLURM_PROCID)",
            Self::IndexedJob => "JOB_COMPLETION_INDEX",
            Self::Variables => "RANK",
            Self::Flags => "--rank",
        })
    }
}

/// What is known of this process's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LauncherFacts {
    /// Who says it.
    pub launcher: Launcher,
    /// Rank in the world.
    pub rank: usize,
    /// Ranks in the world.
    pub size: usize,
    /// Rank among those on this node.
    pub local_rank: Option<usize>,
    /// Ranks on this node, where the launcher says so.
    pub local_size: Option<usize>,
}

/// What the command line says about this process's place; each overrides the launcher's word where no MPI launcher is at work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankFlags {
    /// `--rank`.
    pub rank: Option<usize>,
    /// `--world-size`.
    pub world_size: Option<usize>,
}

/// Facts that do not make up a place in a world.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// A variable that is no number.
    #[error(
        "{variable} = {value:?}: must be a whole number, as a launcher sets it; unset it to start a single process"
    )]
    NotANumber {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// A rank of nobody knows how many.
    #[error(
        "{source_of_rank} = {rank}: nothing says how many ranks there are; add --world-size N or set WORLD_SIZE=N \
         (for a single process: --rank 0 --world-size 1)"
    )]
    WithoutSize {
        /// Who says the rank.
        source_of_rank: Launcher,
        /// The rank.
        rank: usize,
    },
    /// A size without a rank.
    #[error("--world-size {size}: nothing says which of them this process is; add --rank R, from 0 to {}", size.saturating_sub(1))]
    WithoutRank {
        /// The size.
        size: usize,
    },
    /// A rank beyond the world.
    #[error("{source_of_rank} = {rank}: must be below the world size of {size}")]
    BeyondTheWorld {
        /// Who says the rank.
        source_of_rank: Launcher,
        /// The rank.
        rank: usize,
        /// The size.
        size: usize,
    },
    /// A flag against an MPI launcher.
    #[error("{flag} {given}: {launcher} started this process and says {said}; leave the flag out")]
    Disagrees {
        /// The flag.
        flag: &'static str,
        /// Its value.
        given: usize,
        /// The launcher.
        launcher: Launcher,
        /// Its word.
        said: usize,
    },
    /// Several ranks without MPI or a coordinator.
    #[error(
        "rank {} of {} by {}: ranks that no MPI launcher started find each other at a coordinator, and none was named; {}",
        facts.rank, facts.size, facts.launcher, mend(facts)
    )]
    NeedsMpi {
        /// This process's place.
        facts: LauncherFacts,
    },
}

fn mend(facts: &LauncherFacts) -> String {
    match facts.launcher {
        Launcher::PlainSrun => {
            "start it with srun --mpi=pmix, or give all of them --coordinator HOST:PORT and a join token".into()
        }
        _ => format!(
            "start it with mpirun -n {} moe-worker or srun --mpi=pmix, or give all of them --coordinator HOST:PORT and a join token (and --host-coordinator to rank 0), or a single process with --rank 0 --world-size 1",
            facts.size
        ),
    }
}

impl Classified for LaunchError {
    fn exit_code(&self) -> ExitCode {
        ExitCode::Usage
    }
}

/// The facts of an MPI launcher, or none where no MPI launcher started this process: then MPI must not be initialised, since Open
/// MPI would start daemons for a world of one.
///
/// `lookup` reads an environment variable. `srun` without `--mpi=pmix` is no MPI launcher, and neither is the batch script of an
/// allocation: both have Slurm's variables without PMIx's.
pub fn launcher(lookup: impl Fn(&str) -> Option<String>) -> Option<LauncherFacts> {
    let number = |name: &str| lookup(name)?.trim().parse::<usize>().ok();
    let mpirun = || {
        Some(LauncherFacts {
            launcher: Launcher::Mpirun,
            rank: number("OMPI_COMM_WORLD_RANK")?,
            size: number("OMPI_COMM_WORLD_SIZE")?,
            local_rank: number("OMPI_COMM_WORLD_LOCAL_RANK"),
            local_size: number("OMPI_COMM_WORLD_LOCAL_SIZE"),
        })
    };
    let srun = || {
        lookup("PMIX_RANK")?;
        Some(LauncherFacts {
            launcher: Launcher::Srun,
            rank: number("SLURM_PROCID")?,
            size: number("SLURM_NTASKS")?,
            local_rank: number("SLURM_LOCALID"),
            local_size: tasks_on_this_node(&lookup).or_else(|| number("SLURM_NTASKS_PER_NODE")),
        })
    };
    mpirun().or_else(srun)
}

/// The place of this process by its flags and its launcher, whichever there is; none where nobody says anything: then it is alone.
///
/// An MPI launcher's word stands, and flags may only repeat it. Otherwise a flag goes before Slurm's step, that before the index
/// of an Indexed Job with `WORLD_SIZE`, and that before `RANK` with `WORLD_SIZE`.
///
/// # Errors
/// [`LaunchError`], always of class usage: a variable that is no number, half a place, a rank beyond the world, a flag against MPI.
pub fn rank_facts(
    flags: RankFlags,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Option<LauncherFacts>, LaunchError> {
    if let Some(facts) = launcher(&lookup) {
        let said = [("--rank", flags.rank, facts.rank), ("--world-size", flags.world_size, facts.size)];
        return match said.into_iter().find_map(|(flag, given, said)| Some((flag, given.filter(|&g| g != said)?, said)))
        {
            Some((flag, given, said)) => Err(LaunchError::Disagrees { flag, given, launcher: facts.launcher, said }),
            None => Ok(Some(facts)),
        };
    }
    let number = |variable: &'static str| match lookup(variable) {
        Some(value) => match value.trim().parse::<usize>() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(LaunchError::NotANumber { variable, value }),
        },
        None => Ok(None),
    };
    let said = [
        (Launcher::PlainSrun, "SLURM_PROCID", "SLURM_NTASKS"),
        (Launcher::IndexedJob, "JOB_COMPLETION_INDEX", "WORLD_SIZE"),
        (Launcher::Variables, "RANK", "WORLD_SIZE"),
    ];
    // A batch script and a shell of an allocation have Slurm's variables too, but for the step's.
    let in_step = lookup("SLURM_STEP_ID").is_some();
    let source = said
        .into_iter()
        .find(|(launcher, rank, _)| lookup(rank).is_some() && (in_step || *launcher != Launcher::PlainSrun));
    let (launcher, rank, size) = match (flags, source) {
        (RankFlags { rank: Some(rank), world_size: Some(size) }, _) => (Launcher::Flags, Some(rank), Some(size)),
        (RankFlags { rank, world_size }, Some((launcher, of_rank, of_size))) => {
            let by = if rank.is_some() { Launcher::Flags } else { launcher };
            let rank = rank.map_or_else(|| number(of_rank), |rank| Ok(Some(rank)))?;
            (by, rank, world_size.map_or_else(|| number(of_size), |size| Ok(Some(size)))?)
        }
        (RankFlags { rank: Some(rank), .. }, None) => (Launcher::Flags, Some(rank), number("WORLD_SIZE")?),
        (RankFlags { rank: None, world_size }, None) => (Launcher::Flags, None, world_size),
    };
    match (rank, size) {
        (None, None) => Ok(None),
        (None, Some(size)) => Err(LaunchError::WithoutRank { size }),
        (Some(rank), None) => Err(LaunchError::WithoutSize { source_of_rank: launcher, rank }),
        (Some(rank), Some(size)) if rank >= size => {
            Err(LaunchError::BeyondTheWorld { source_of_rank: launcher, rank, size })
        }
        (Some(rank), Some(size)) => Ok(Some(LauncherFacts {
            launcher,
            rank,
            size,
            local_rank: number(if launcher == Launcher::PlainSrun { "SLURM_LOCALID" } else { "LOCAL_RANK" })?,
            local_size: match launcher {
                Launcher::PlainSrun => tasks_on_this_node(&lookup),
                _ => number("LOCAL_WORLD_SIZE")?,
            },
        })),
    }
}

/// The tasks of this step on this node, from Slurm's short form of the tasks of each node: `4(x2),3` is 4, 4 and 3.
fn tasks_on_this_node(lookup: impl Fn(&str) -> Option<String>) -> Option<usize> {
    let mut node = lookup("SLURM_NODEID")?.trim().parse::<usize>().ok()?;
    for part in lookup("SLURM_STEP_TASKS_PER_NODE")?.split(',') {
        let (tasks, nodes) = match part.trim().strip_suffix(')').and_then(|part| part.split_once("(x")) {
            Some((tasks, nodes)) => (tasks.parse().ok()?, nodes.parse::<usize>().ok()?),
            None => (part.trim().parse().ok()?, 1),
        };
        if node < nodes {
            return Some(tasks);
        }
        node -= nodes;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    type Variables = Vec<(&'static str, &'static str)>;

    fn facts_of(variables: &[(&str, &str)]) -> Option<LauncherFacts> {
        launcher(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    fn place(flags: [Option<usize>; 2], variables: &[(&str, &str)]) -> Result<Option<LauncherFacts>, LaunchError> {
        rank_facts(RankFlags { rank: flags[0], world_size: flags[1] }, |name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn facts(launcher: Launcher, [rank, size]: [usize; 2], local: [Option<usize>; 2]) -> LauncherFacts {
        LauncherFacts { launcher, rank, size, local_rank: local[0], local_size: local[1] }
    }

    fn mpirun() -> Variables {
        vec![
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ]
    }

    fn slurm() -> Variables {
        vec![("SLURM_PROCID", "5"), ("SLURM_NTASKS", "6"), ("SLURM_LOCALID", "2")]
    }

    #[test]
    fn mpi_launchers_are_told_apart_by_their_variables() {
        let pmix = [("PMIX_RANK", "5")];
        let two_nodes = [("SLURM_NODEID", "1"), ("SLURM_STEP_TASKS_PER_NODE", "3(x2)")];
        let of_mpirun = facts(Launcher::Mpirun, [3, 8], [Some(1), Some(2)]);
        let of_srun = |local_size| facts(Launcher::Srun, [5, 6], [Some(2), local_size]);
        #[rustfmt::skip]
        let table: [(&str, Vec<_>, _); 7] = [
            ("nothing", vec![], None),
            ("mpirun", mpirun(), Some(of_mpirun)),
            ("srun --mpi=pmix", [&slurm()[..], &pmix].concat(), Some(of_srun(None))),
            ("srun --mpi=pmix on two nodes", [&slurm()[..], &pmix, &two_nodes].concat(), Some(of_srun(Some(3)))),
            ("srun without PMIx, or a batch script", slurm(), None),
            ("mpirun inside an allocation", [&mpirun()[..], &slurm(), &pmix].concat(), Some(of_mpirun)),
            ("a rank without a size", mpirun()[..1].to_vec(), None),
        ];
        for (what, variables, expected) in table {
            assert_eq!(facts_of(&variables), expected, "{what}");
        }
    }

    /// What is tried, rank and world size by flags, the environment, what comes of them.
    type Case = (&'static str, [Option<usize>; 2], Variables, Option<LauncherFacts>);

    #[test]
    fn every_way_to_say_a_place_is_understood() {
        let none = [None, None];
        let step = [&slurm()[..], &[("SLURM_STEP_ID", "0"), ("SLURM_NODEID", "0"), ("SLURM_STEP_TASKS_PER_NODE", "6")]];
        let job = vec![("JOB_COMPLETION_INDEX", "1"), ("WORLD_SIZE", "4")];
        let torch = vec![("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")];
        let indexed = facts(Launcher::IndexedJob, [1, 4], none);
        #[rustfmt::skip]
        let table: [Case; 12] = [
            ("nothing", none, vec![], None),
            ("flags", [Some(1), Some(2)], vec![], Some(facts(Launcher::Flags, [1, 2], none))),
            ("mpirun", none, mpirun(), Some(facts(Launcher::Mpirun, [3, 8], [Some(1), Some(2)]))),
            ("mpirun, repeated by flags", [Some(3), Some(8)], mpirun(), Some(facts(Launcher::Mpirun, [3, 8], [Some(1), Some(2)]))),
            ("a step without PMIx", none, step.concat(), Some(facts(Launcher::PlainSrun, [5, 6], [Some(2), Some(6)]))),
            ("a batch script", none, slurm(), None),
            ("an Indexed Job", none, job.clone(), Some(indexed)),
            ("an Indexed Job, its size by flag", [None, Some(4)], job[..1].to_vec(), Some(indexed)),
            ("an Indexed Job goes before RANK", none, [&job[..], &torch[..1]].concat(), Some(indexed)),
            ("RANK and WORLD_SIZE", none, torch.clone(), Some(facts(Launcher::Variables, [2, 4], [Some(0), Some(2)]))),
            ("flags go before variables", [Some(0), Some(1)], job.clone(), Some(facts(Launcher::Flags, [0, 1], none))),
            ("WORLD_SIZE alone", none, job[1..].to_vec(), None),
        ];
        for (what, flags, variables, expected) in table {
            assert_eq!(place(flags, &variables), Ok(expected), "{what}");
        }
    }

    #[test]
    fn half_a_place_or_two_places_are_refused_with_the_mend() {
        #[rustfmt::skip]
        let table: [([Option<usize>; 2], Variables, &str); 7] = [
            ([Some(1), None], vec![], "--rank = 1: nothing says how many ranks there are; add --world-size N"),
            ([None, Some(2)], vec![], "--world-size 2: nothing says which of them this process is; add --rank R, from 0 to 1"),
            ([Some(2), Some(2)], vec![], "--rank = 2: must be below the world size of 2"),
            ([None, None], vec![("JOB_COMPLETION_INDEX", "1")], "JOB_COMPLETION_INDEX = 1: nothing says how many"),
            ([None, None], vec![("RANK", "one"), ("WORLD_SIZE", "2")], "RANK = \"one\": must be a whole number"),
            ([Some(0), None], mpirun(), "--rank 0: mpirun (OMPI_COMM_WORLD_RANK) started this process and says 3; leave"),
            ([None, Some(4)], mpirun(), "--world-size 4: mpirun (OMPI_COMM_WORLD_RANK) started this process and says 8"),
        ];
        for (flags, variables, message) in table {
            let error = place(flags, &variables).unwrap_err();
            assert!(error.to_string().starts_with(message), "{error}");
            assert_eq!(error.exit_code(), ExitCode::Usage);
        }
    }

    #[test]
    fn slurms_short_form_of_tasks_per_node_is_read() {
        for (text, sizes) in [("4(x2),3", &[4, 4, 3][..]), ("2", &[2]), ("1,8(x2)", &[1, 8, 8]), ("many", &[])] {
            for node in 0..=sizes.len() {
                let found = tasks_on_this_node(|name| {
                    Some(if name == "SLURM_NODEID" { node.to_string() } else { text.to_owned() })
                });
                assert_eq!(found, sizes.get(node).copied(), "{text}, node {node}");
            }
        }
    }
}
