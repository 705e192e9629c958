//! The op set, one trait a family. [`Backend`] is all of them on one device.
//!
//! Owns signatures and contracts only. `cpu` implements them in f32 and is the oracle for every other implementation.

mod attention;
mod dense;
mod expert;
mod leaving;
mod logits;
mod loss;
mod optimizer;
mod routing;

pub use attention::{AttentionDims, AttentionOps, RotaryDirection};
pub use dense::{Accumulate, ActivationKind, DenseOps, GemmDims, NormDims, Rows};
pub use expert::{CombineDims, ExpandPlan, ExpertOps, GroupedDims, ShuffleDims, ShufflePlan, WeightedSwiglu};
pub use leaving::Leaving;
pub use logits::{Fold, LogitOps, Places, Random, RandomFactor};
pub use loss::LossOps;
pub(crate) use optimizer::AdamWFactors;
pub use optimizer::{AdamW, OptimizerOps};
pub use routing::{
    BalanceFactors, BalanceGrad, BalanceSpec, Capacity, CapacityPolicy, Choice, Enough, GateDims, GateSpec, GroupLimit,
    GroupRank, RankedBy, RoutingOps, Score, TokenLosses,
};

use crate::Device;

/// Panics where a view does not have the elements that its place asks for.
#[track_caller]
pub(crate) fn check_len(what: &str, got: usize, want: usize) {
    assert_eq!(got, want, "elements of `{what}`: got, and expected");
}

/// A device with the whole op set.
pub trait Backend:
    Device + DenseOps + AttentionOps + LogitOps + RoutingOps + ExpertOps + LossOps + OptimizerOps
{
}

impl<D: Device + DenseOps + AttentionOps + LogitOps + RoutingOps + ExpertOps + LossOps + OptimizerOps> Backend for D {}
