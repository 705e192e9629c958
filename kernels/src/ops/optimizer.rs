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

/// The factors of one step in f32, worked out in f64 once. `adamw` of kernels/cuda/optimizer.cu takes them in this layout.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AdamWFactors {
    pub(crate) grad_scale: f32,
    /// 1 − lr · weight_decay.
    pub(crate) keep: f32,
    pub(crate) beta1_rest: f32,
    pub(crate) beta2: f32,
    pub(crate) beta2_rest: f32,
    /// 1/√(1 − β₂ᵗ).
    pub(crate) root_correction: f32,
    pub(crate) eps: f32,
    /// lr / (1 − β₁ᵗ).
    pub(crate) rate: f32,
}

impl AdamW {
    /// What every element of this step is updated with. Panics at step 0.
    pub(crate) fn factors(self) -> AdamWFactors {
        let Self { lr, beta1, beta2, eps, weight_decay, step, grad_scale } = self;
        assert!(step > 0, "steps of AdamW count from 1");
        AdamWFactors {
            grad_scale: grad_scale as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            beta1_rest: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            beta2_rest: (1.0 - beta2) as f32,
            root_correction: (1.0 / (1.0 - beta2.powf(step as f64)).sqrt()) as f32,
            eps: eps as f32,
            rate: (lr / (1.0 - beta1.powf(step as f64))) as f32,
        }
    }
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
