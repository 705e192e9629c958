//! Models on disk: the native checkpoint, and Hugging Face folders.
//!
//! Owns names, file formats, and the rule that a checkpoint is either complete and verified or does not exist. It decides
//! neither when to save nor what to resume.

mod error;
pub mod hf_config;
pub mod import;
pub mod names;
mod tensor_file;

pub use error::{CheckpointError, TensorFault, TensorFaults};
pub use hf_config::HfConfig;
pub use import::HfFolder;
