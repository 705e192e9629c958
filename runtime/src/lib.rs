//! Distributed expert-parallel training of Mixture-of-Experts models.
//!
//! See ARCHITECTURE.md for the map. Arrows point down: `training` knows everything below it; `model` never names a device,
//! a transport or a file.

// Shape letters (x_TH, y_NH) stand in names throughout, as DESIGN's terms define them.
#![allow(non_snake_case)]

pub mod checkpoint;
pub mod collectives;
pub mod dispatch;
pub mod experts;
pub mod invalid;
pub mod memory;
pub mod model;
pub mod routing;
pub mod stages;
pub mod topology;
