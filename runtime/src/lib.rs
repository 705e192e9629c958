//! Distributed expert-parallel training of Mixture-of-Experts models.
//!
//! See ARCHITECTURE.md for the map. Arrows point down: `training` knows everything below it; `model` never names a device,
//! a transport or a file.

pub mod config;
pub mod data;
pub mod exit;
pub mod model;
pub mod routing;
pub mod telemetry;
