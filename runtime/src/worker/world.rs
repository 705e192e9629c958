//! How this process became part of a world: alone, started by an MPI launcher, or placed by flags and variables.
//!
//! Owns the start and the end of MPI. It knows nothing of training.

use std::time::Duration;

use moe_kernels::Cpu;

use crate::collectives::{
    Communicator, Context, HostCommunicator, LaunchError, LauncherFacts, RankFlags, local, rank_facts,
};
use crate::exit::{ExitCode, Failure};

/// This process's place among the ranks, until it leaves.
pub struct World {
    /// All ranks.
    pub communicator: HostCommunicator,
    /// What the launcher says, where there is one.
    pub facts: Option<LauncherFacts>,
    #[cfg(feature = "mpi")]
    mpi: Option<crate::collectives::mpi::MpiWorld>,
}

impl World {
    /// Joins the world that a launcher made; without a launcher, a world of one.
    pub fn join(deadline: Duration) -> Result<Self, Failure> {
        Self::join_as(RankFlags::default(), deadline)
    }

    /// As [`World::join`], where the command line says something about this process's place too.
    ///
    /// # Errors
    /// [`LaunchError`]: facts that make up no place, or several CPU ranks without MPI.
    pub fn join_as(flags: RankFlags, deadline: Duration) -> Result<Self, Failure> {
        let context = Context::new(deadline);
        let facts = rank_facts(flags, |name| std::env::var(name).ok())?;
        match facts {
            Some(facts) if facts.launcher.has_mpi() => Self::launched(facts, context),
            Some(facts) if facts.size > 1 => Err(LaunchError::NeedsMpi { facts }.into()),
            facts => Ok(Self {
                communicator: local::solo(context),
                facts,
                #[cfg(feature = "mpi")]
                mpi: None,
            }),
        }
    }

    #[cfg(feature = "mpi")]
    fn launched(facts: LauncherFacts, context: Context) -> Result<Self, Failure> {
        let (mpi, communicator) = crate::collectives::mpi::MpiWorld::init(&facts, context, Default::default())?;
        Ok(Self { communicator, facts: Some(facts), mpi: Some(mpi) })
    }

    #[cfg(not(feature = "mpi"))]
    fn launched(facts: LauncherFacts, _: Context) -> Result<Self, Failure> {
        let message = format!(
            "started as rank {} of {} by an MPI launcher, but this program was built without MPI; build it with --features mpi",
            facts.rank, facts.size
        );
        Err(Failure::new(ExitCode::Usage, message))
    }

    /// This rank and the number of ranks.
    pub fn place(&self) -> (usize, usize) {
        let world = &self.communicator;
        (Communicator::<Cpu>::rank(world), Communicator::<Cpu>::size(world))
    }

    /// Ranks that share this machine; all of them where nobody says.
    pub fn ranks_here(&self) -> usize {
        self.facts.and_then(|facts| facts.local_size).unwrap_or(self.place().1).max(1)
    }

    /// Whether all ranks are on this machine, as far as is known.
    pub fn is_one_machine(&self) -> bool {
        self.facts.is_none_or(|facts| facts.size == facts.local_size.unwrap_or(1))
    }

    /// Ends the process. After a success MPI is ended in order; after a failure no peer is waited for.
    pub fn leave(self, code: ExitCode) -> ! {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = self.mpi {
            if code != ExitCode::Done {
                mpi.abandon(i32::from(code.number()));
            }
            drop(self.communicator);
            drop(mpi);
        }
        std::process::exit(i32::from(code.number()))
    }
}
