//! Where the ranks of a test compute: all on one device, or each on a GPU of its own. Ranks are threads of this process.

use moe_kernels::Backend;
use moe_runtime::collectives::{Communicator, HostCommunicator, local};

/// A place for ranks.
pub(crate) trait Site {
    /// What a rank computes on.
    type Device: Backend;
    /// What carries its buffers.
    type Group: Communicator<Self::Device>;

    /// What `body` returns on each of `ranks` ranks. None, and a notice: there is no place for so many.
    fn run<R: Send>(&self, ranks: usize, body: impl Fn(&Self::Device, Self::Group) -> R + Sync) -> Option<Vec<R>>;
}

/// All ranks on one device, which exchange their data in host memory.
pub(crate) struct OneDevice<B>(pub(crate) B);

impl<B: Backend> Site for OneDevice<B> {
    type Device = B;
    type Group = HostCommunicator;

    fn run<R: Send>(&self, ranks: usize, body: impl Fn(&B, HostCommunicator) -> R + Sync) -> Option<Vec<R>> {
        Some(local::run(ranks, |world| body(&self.0, world)))
    }
}

/// A GPU for each rank.
#[cfg(feature = "cuda")]
pub(crate) struct Gpus;

#[cfg(feature = "cuda")]
impl Site for Gpus {
    type Device = moe_kernels::cuda::Cuda<f32>;
    type Group = moe_runtime::collectives::nccl::NcclCommunicator<f32>;

    fn run<R: Send>(&self, ranks: usize, body: impl Fn(&Self::Device, Self::Group) -> R + Sync) -> Option<Vec<R>> {
        super::gpus::on_gpus(ranks, body)
    }
}
