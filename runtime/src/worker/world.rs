//! How this process became part of a world: alone, started by an MPI launcher, or placed by flags and variables.
//!
//! Owns the start and the end of MPI. It knows nothing of training.

#[cfg(feature = "mpi")]
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use moe_kernels::Cpu;

use super::cores::{Spot, threads};
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
    /// Where this rank computes.
    spot: Spot,
    /// Where each rank computes.
    spots: Vec<Spot>,
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
                spot: Spot::here(),
                spots: vec![Spot::here()],
                #[cfg(feature = "mpi")]
                mpi: None,
            }),
        }
    }

    /// A world whose ranks have found each other without MPI; `spots` are theirs by rank.
    pub(super) fn connected(
        communicator: HostCommunicator,
        facts: LauncherFacts,
        spot: Spot,
        spots: Vec<Spot>,
    ) -> Self {
        Self {
            communicator,
            facts: Some(facts),
            spot,
            spots,
            #[cfg(feature = "mpi")]
            mpi: None,
        }
    }

    #[cfg(feature = "mpi")]
    fn launched(facts: LauncherFacts, context: Context) -> Result<Self, Failure> {
        let arrival = Arrival::within(context.deadline(), &facts)?;
        let (mpi, communicator) = crate::collectives::mpi::MpiWorld::init(&facts, context, Default::default())?;
        drop(arrival);
        // Launchers do not always say how many ranks share a machine, nor whether they are bound: the ranks themselves do.
        let spot = Spot::here();
        let spots = Communicator::<Cpu>::all_gather_bytes(&communicator, &spot.to_bytes())?;
        let spots = spots.iter().map(|bytes| Spot::from_bytes(bytes)).collect();
        Ok(Self { communicator, facts: Some(facts), spot, spots, mpi: Some(mpi) })
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

    /// Threads for this rank to compute with, so that all ranks together use each of their CPUs once.
    pub fn threads(&self) -> usize {
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        threads(available, &self.spot, &self.spots)
    }

    /// This rank's number among those of its machine, from 0: which of the machine's GPUs is its own.
    pub fn local_rank(&self) -> usize {
        let before = &self.spots[..self.place().0.min(self.spots.len())];
        before.iter().filter(|spot| spot.host == self.spot.host).count()
    }

    /// Ranks on this machine.
    pub fn neighbours(&self) -> usize {
        self.spots.iter().filter(|spot| spot.host == self.spot.host).count()
    }

    /// Whether all ranks are on this machine.
    pub fn is_one_machine(&self) -> bool {
        self.spots.iter().all(|spot| spot.host == self.spot.host)
    }

    /// Ends the process where all ranks have agreed to leave. MPI is ended in order: mpirun ends the other ranks as soon as one
    /// leaves with another code than 0, and ending MPI waits until all of them have come this far.
    pub fn leave(self, code: ExitCode) -> ! {
        // What was sent last is on its way when this returns.
        drop(self.communicator);
        #[cfg(feature = "mpi")]
        drop(self.mpi);
        std::process::exit(i32::from(code.number()))
    }

    /// Ends the process after a failure: no peer is waited for.
    pub fn abandon(self, code: ExitCode) -> ! {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = self.mpi {
            mpi.abandon(i32::from(code.number()));
        }
        std::process::exit(i32::from(code.number()))
    }
}

/// A limit to the start of MPI, which waits for every rank without one of its own: dropped in time, nothing happens; otherwise
/// the process ends.
#[cfg(feature = "mpi")]
struct Arrival {
    _in_time: Sender<()>,
}

#[cfg(feature = "mpi")]
impl Arrival {
    fn within(limit: Duration, facts: &LauncherFacts) -> Result<Self, Failure> {
        let (in_time, started) = mpsc::channel::<()>();
        let LauncherFacts { rank, size, .. } = *facts;
        let watch = move || {
            if started.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                let mend = "see whether moe-worker runs on each machine, or give more time with --start-timeout";
                eprintln!(
                    "error: rank {rank}: not all {size} ranks have started within {} s: one never arrived; {mend}",
                    limit.as_secs_f64()
                );
                std::process::exit(i32::from(ExitCode::Temporary.number()));
            }
        };
        match std::thread::Builder::new().name("arrival".into()).spawn(watch) {
            Ok(_) => Ok(Self { _in_time: in_time }),
            Err(error) => Err(Failure::new(ExitCode::Internal, format!("cannot start a thread: {error}"))),
        }
    }
}

/// The name of this machine; empty where the system tells none.
pub(super) fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}
