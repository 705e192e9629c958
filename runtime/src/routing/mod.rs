//! Routing: which experts a token goes to, with which weights, and the losses that keep the load even.

mod config;

pub use config::{BalanceScope, Overflow, RouterConfig, RouterKind};
