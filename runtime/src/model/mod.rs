//! The model: layers with forward and backward passes, over any device and any communicator.
//!
//! Owns activations, parameters and gradients of one rank. It never names CUDA, MPI or NCCL, reads no file and updates no
//! parameter.

mod attention;
mod block;
pub mod config;
mod feed_forward;
mod head;
pub mod layout;
mod moe;
pub mod parameters;
mod pass;
pub mod rotary;
mod single;
mod transformer;

pub use config::{BlockNorm, Family, ModelConfig, QkNorm, Recompute};
pub use head::logits_rows;
pub use parameters::Parameters;
pub use pass::PassTokens;
pub use rotary::RopeScaling;
pub use single::SingleMoe;
pub(crate) use transformer::complete_after;
pub use transformer::{Complete, LogitsOf, ModelSetup, StepSums, Transformer};

use crate::collectives::CollectiveError;
use crate::dispatch::ShuffleError;
use crate::routing::BalanceError;

/// Why a pass stopped.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] moe_kernels::DeviceError),
    /// Another rank or the way to it failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl From<ShuffleError> for ModelError {
    fn from(error: ShuffleError) -> Self {
        match error {
            ShuffleError::Device(error) => Self::Device(error),
            ShuffleError::Collective(error) => Self::Collective(error),
        }
    }
}

impl From<BalanceError> for ModelError {
    fn from(error: BalanceError) -> Self {
        match error {
            BalanceError::Device(error) => Self::Device(error),
            BalanceError::Collective(error) => Self::Collective(error),
        }
    }
}
