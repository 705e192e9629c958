//! Why a pass, or a part of it, stopped.

use moe_kernels::DeviceError;

use crate::collectives::CollectiveError;

/// What can go wrong where ranks compute together.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Another rank or the way to it failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}
