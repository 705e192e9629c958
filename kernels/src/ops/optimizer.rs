//! AdamW over flat buffers, and the norm that clips it.

use crate::{Device, View, ViewMut};

/// One step's settings (Loshchilov and Hutter 2019), as PyTorch's AdamW applies them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: weights are multiplied by `1 − lr · weight_decay` first.
    pub weight_decay: f64,
    /// Number of this step, from 1, for the bias corrections.
    pub step: u64,
    /// Every gradient is multiplied by this first: the clipping factor.
    pub grad_scale: f64,
}

/// Updates of flat parameter buffers.
pub trait OptimizerOps: Device {
    /// One AdamW step on views of equal length. `master` is the f32 copy that is updated and then rounded into `compute`; None
    /// where `Act` is f32 and `compute` is itself the master. The gradient is set to zero, ready for the next step.
    fn adamw(
        &self,
        settings: AdamW,
        grad: ViewMut<'_, Self, f32>,
        m: ViewMut<'_, Self, f32>,
        v: ViewMut<'_, Self, f32>,
        master: Option<ViewMut<'_, Self, f32>>,
        compute: ViewMut<'_, Self, Self::Act>,
    );
    /// `total[0] += Σ x²`, summed in f64.
    fn sum_of_squares(&self, x: View<'_, Self, f32>, total: ViewMut<'_, Self, f64>);
}
