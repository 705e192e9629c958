//! The operations of a Mixture-of-Experts transformer: one op set, implemented per device.
//!
//! Owns buffers, the queue that operations are issued to, and the operations themselves. It knows no model, no rank and no
//! token text: shapes and buffers come in, buffers are filled.
//!
//! Letters used in names and documentation: T tokens, H hidden size, F expert feed-forward size, E experts (of this call),
//! k experts per token, R shuffled rows (one a token and destination rank), N expanded rows (one a token and local expert),
//! V vocabulary, B sequences, S positions of a sequence, D head dimension.
//!
//! Conventions that every implementation keeps:
//! - An operation is issued to the queue it is called on and may return before it has run. Operations of one queue run in
//!   order; [`Device::record`] and [`Device::wait`] order two queues.
//! - Shapes that do not fit are programming errors and panic with both shapes. A fault of the device is sticky: it comes out of
//!   the next [`Device::synchronize`] or [`Device::read_to_host`].
//! - No operation allocates what the caller will read; outputs are buffers the caller supplies. Rows beyond the counted ones
//!   are neither read nor written: they may hold NaN.
//! - Same inputs, same device, same number of threads: the same bits. There are no floating-point atomics.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
pub mod ops;

pub use cpu::Cpu;
pub use device::{Activation, Buffer, Device, DeviceError, Element, View, ViewMut};
pub use ops::{
    Accumulate, ActivationKind, AdamW, AttentionDims, AttentionOps, Backend, BalanceFactors, BalanceGrad, BalanceSpec,
    Capacity, CapacityPolicy, Choice, CombineDims, DenseOps, Enough, ExpandPlan, ExpertOps, Fold, GateDims, GateSpec,
    GemmDims, GroupLimit, GroupRank, GroupedDims, Leaving, LogitOps, LossOps, NormDims, OptimizerOps, Places, Random,
    RandomFactor, RankedBy, RotaryDirection, RoutingOps, Rows, Score, ShuffleDims, ShufflePlan, TokenLosses,
    WeightedSwiglu,
};
