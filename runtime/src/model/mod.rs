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
