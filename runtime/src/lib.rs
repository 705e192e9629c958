//! Distributed expert-parallel training of Mixture-of-Experts models.

pub mod collectives;
pub mod topology;
