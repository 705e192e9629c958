//! Routing: which experts a token goes to, with which weights, and the losses that keep the load even.
//!
//! Owns gates and balance. It never moves a token: that is `dispatch`.

mod balance;
mod config;
mod gates;
mod input;
pub mod kit;
mod logits;
mod noise;
mod own;
mod pass;
mod router;
mod validate;

pub use balance::{Balance, BalanceLosses, BalanceReport, BatchShare};
pub use config::{BalanceScope, HiddenActivation, Overflow, RouterConfig, RouterKind};
pub use gates::{GateForm, Logits};
pub use logits::{RouterRanges, RouterWeights};
pub use own::{Choices, Gate, GatePass, check_own_gate};
pub use pass::RoutePass;
pub use router::{Router, RouterGradients, RouterLosses, RouterShape, RouterStatistics};
