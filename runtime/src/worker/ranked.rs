//! How the ranks of a device come together: what carries their buffers.
//!
//! Owns the choice of the communicator that goes with a device. What the communicators do is `collectives`'.

use moe_kernels::{Backend, Cpu};

use crate::collectives::{CollectiveError, Communicator, HostCommunicator};
use crate::exit::Failure;

/// Brings bytes to all ranks: what each brought, by ascending rank.
pub type Gather<'a> = dyn Fn(Vec<u8>) -> Result<Vec<Vec<u8>>, Failure> + 'a;

/// Told of a collective that failed while the host did not look: its step, and how.
pub type OnFailure = Box<dyn Fn(u64, &CollectiveError) + Send>;

/// What a rank brings to the others.
pub struct Arrival<'a> {
    /// All ranks, for what they exchange in host memory.
    pub control: HostCommunicator,
    /// This rank's number among those of its machine.
    pub local_rank: usize,
    /// How ranks learn of each other what `control` must not be asked for.
    pub gather: &'a Gather<'a>,
    /// See [`OnFailure`].
    pub on_failure: OnFailure,
}

/// A device that several ranks can compute on together.
pub trait Ranked: Backend {
    /// What carries their buffers.
    type Group: Communicator<Self>;

    /// All ranks, connected, and in words what carries their buffers. All of them call this.
    ///
    /// # Errors
    /// What keeps them apart, told by rank 0 alone where all know it.
    fn connect(&self, arrival: Arrival<'_>) -> Result<(Self::Group, Vec<String>), Failure>;
}

impl Ranked for Cpu {
    type Group = HostCommunicator;

    fn connect(&self, arrival: Arrival<'_>) -> Result<(HostCommunicator, Vec<String>), Failure> {
        Ok((arrival.control, Vec::new()))
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use moe_kernels::cuda::{Cuda, CudaAct};

    use super::{Arrival, CollectiveError, Failure, Ranked};
    use crate::collectives::nccl::{MeetError, Meeting, NcclCommunicator};
    use crate::exit::Classified;
    use crate::worker::world::host_name;

    /// What keeps ranks apart: known to all of them, or to one.
    enum Apart {
        Known(MeetError),
        Own(Failure),
    }

    impl From<MeetError> for Apart {
        fn from(error: MeetError) -> Self {
            Self::Known(error)
        }
    }

    impl From<CollectiveError> for Apart {
        fn from(error: CollectiveError) -> Self {
            Self::Own(error.into())
        }
    }

    impl<A: CudaAct> Ranked for Cuda<A>
    where
        Cuda<A>: moe_kernels::Backend,
    {
        type Group = NcclCommunicator<A>;

        fn connect(&self, arrival: Arrival<'_>) -> Result<(NcclCommunicator<A>, Vec<String>), Failure> {
            let Arrival { control, local_rank, gather, on_failure } = arrival;
            let rank = control.rank();
            let gather = |mine| gather(mine).map_err(Apart::Own);
            let meeting = Meeting { control, host: host_name(), ordinal: local_rank, gather: &gather, on_failure };
            NcclCommunicator::connect(self, meeting).map_err(|apart| match apart {
                Apart::Known(error) if rank > 0 => Failure::of_another_rank(error.exit_code().number()),
                Apart::Known(error) => error.into(),
                Apart::Own(failure) => failure,
            })
        }
    }
}
