//! Which launcher started this process, as its variables tell.
//!
//! Owns the names of those variables. It reads no environment itself: the caller passes a look-up.

/// What starts MPI processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Launcher {
    /// Open MPI's mpirun.
    Mpirun,
    /// Slurm's `srun --mpi=pmix`.
    Srun,
}

/// What the launcher says about this process.
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

/// The launcher's facts, or none where no MPI launcher started this process: then MPI must not be initialised, since Open MPI
/// would start daemons for a world of one.
///
/// `lookup` reads an environment variable. `srun` without `--mpi=pmix` counts as no MPI launcher, and so does the batch script
/// of an allocation: both have Slurm's variables without PMIx's.
pub fn launcher(lookup: impl Fn(&str) -> Option<String>) -> Option<LauncherFacts> {
    let number = |name: &str| lookup(name)?.trim().parse::<usize>().ok();
    let facts = |launcher, [rank, size, local_rank, local_size]: [&str; 4]| {
        let (local_rank, local_size) = (number(local_rank), number(local_size));
        Some(LauncherFacts { launcher, rank: number(rank)?, size: number(size)?, local_rank, local_size })
    };
    let mpirun = facts(
        Launcher::Mpirun,
        ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"],
    );
    let srun = || {
        lookup("PMIX_RANK")?;
        facts(Launcher::Srun, ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"])
    };
    mpirun.or_else(srun)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts_of(variables: &[(&str, &str)]) -> Option<LauncherFacts> {
        launcher(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn launchers_are_told_apart_by_their_variables() {
        let mpirun = [
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let slurm = [("SLURM_PROCID", "5"), ("SLURM_NTASKS", "6"), ("SLURM_LOCALID", "2")];
        let pmix = [("PMIX_RANK", "5")];
        let of_mpirun =
            LauncherFacts { launcher: Launcher::Mpirun, rank: 3, size: 8, local_rank: Some(1), local_size: Some(2) };
        let of_srun =
            LauncherFacts { launcher: Launcher::Srun, rank: 5, size: 6, local_rank: Some(2), local_size: None };
        #[rustfmt::skip]
        let table: [(&str, Vec<_>, _); 6] = [
            ("nothing", vec![], None),
            ("mpirun", mpirun.to_vec(), Some(of_mpirun)),
            ("srun --mpi=pmix", [&slurm[..], &pmix].concat(), Some(of_srun)),
            ("srun without PMIx, or a batch script", slurm.to_vec(), None),
            ("mpirun inside an allocation", [&mpirun[..], &slurm, &pmix].concat(), Some(of_mpirun)),
            ("a rank without a size", mpirun[..1].to_vec(), None),
        ];
        for (what, variables, expected) in table {
            assert_eq!(facts_of(&variables), expected, "{what}");
        }
    }
}
