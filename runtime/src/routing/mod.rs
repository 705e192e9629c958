//! Routing: which experts a token goes to, with which weights, and the losses that keep the load even.
//!
//! Owns gates and balance. It never moves a token: that is `dispatch`.

mod balance;
mod config;
mod gates;
mod noise;
mod router;

pub use balance::{Balance, BalanceError, BalanceReport, BatchShare};
pub use config::{BalanceScope, Overflow, RouterConfig, RouterKind};
pub use gates::GateForm;
pub use noise::GateNoise;
pub use router::{RoutePass, Router, RouterGradients, RouterLosses, RouterShape, RouterStatistics, RouterWeights};
