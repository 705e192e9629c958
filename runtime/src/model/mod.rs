//! The model: layers with forward and backward passes, over any device and any communicator.

pub mod config;

pub use config::{Family, InvalidValue, ModelConfig, QkNorm};
