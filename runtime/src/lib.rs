//! Distributed expert-parallel training of Mixture-of-Experts models.

pub mod coordination;
