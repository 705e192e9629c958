//! Distributed expert-parallel training of Mixture-of-Experts models.
//!
//! See ARCHITECTURE.md for the map. Arrows point down: `training` knows everything below it; `model` never names a device,
//! a transport or a file.
//!
//! Where to enter: [`worker`] is the program `moe-worker`, from command line to exit code; [`training::Trainer`] is the step,
//! generic over a device ([`moe_kernels::Backend`]) and a group of ranks ([`collectives::Communicator`]);
//! [`model::Transformer`] is the model on one rank; [`config::ConfigBuilder`] makes the configuration all of them are built
//! from. [`collectives::local::run`] runs a body on several ranks as threads of one process, which is how tests do it.

// Shape letters (x_TH, y_NH) stand in names throughout.
#![allow(non_snake_case)]

pub mod checkpoint;
pub mod collectives;
pub mod config;
pub mod coordination;
pub mod data;
pub mod dispatch;
pub mod exit;
pub mod experts;
pub mod invalid;
pub mod memory;
pub mod mixture;
pub mod model;
pub mod optimizer;
pub mod pass_error;
pub mod plan;
pub mod routing;
pub mod stages;
pub mod system;
pub mod telemetry;
pub mod topology;
pub mod training;
pub mod worker;
