//! Models on disk: the native checkpoint, and Hugging Face folders.
//!
//! Owns names, file formats, and the rule that a checkpoint is either complete and verified or does not exist. It decides
//! neither when to save nor what to resume.

mod error;
pub mod hf_config;
pub mod names;

pub use error::CheckpointError;
pub use hf_config::HfConfig;
