//! Models on disk: the native checkpoint, and Hugging Face folders.
//!
//! Owns names, file formats, and the rule that a checkpoint is either complete and verified or does not exist. It decides
//! neither when to save nor what to resume.

mod agree;
pub mod convert;
mod error;
pub mod hf_config;
mod hf_rope;
pub mod import;
mod load;
pub mod manifest;
pub mod names;
mod save;
mod selection;
mod store;
mod tensor_file;
mod tensor_writer;

pub use error::{CheckpointError, GO_BACK, TensorFault, TensorFaults};
pub use hf_config::HfConfig;
pub use import::HfFolder;
pub use load::{Checkpoint, MomentsMut, Restored, Target};
pub use manifest::{Manifest, Progress};
pub use save::{Moments, TrainingState};
pub use selection::Selection;
pub use store::{LastGood, Store, probe_shared};
