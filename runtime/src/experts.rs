//! Stage 3 of an MoE layer: the local experts' feed-forward over rows grouped by expert, forward and backward.
//!
//! Owns the experts' activations. It knows nothing of where rows come from or go to.

use moe_kernels::{Accumulate, Backend, DeviceError, GroupedDims, Rows, View, ViewMut, WeightedSwiglu};
use serde::{Deserialize, Serialize};

use crate::memory::{Kind, Slot, Tally};

/// What an expert does between its projections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExpertActivation {
    /// `silu(gate · x) ∘ up · x`: three matrices (Shazeer 2020).
    #[default]
    Swiglu,
    /// `gelu(up · x)`, with the normal distribution itself and not an approximation by tanh: two matrices, no gate.
    Gelu,
}

impl ExpertActivation {
    /// Projections in front of it, each of F columns.
    pub fn projections(self) -> usize {
        match self {
            Self::Swiglu => 2,
            Self::Gelu => 1,
        }
    }

    /// Matrices of an expert.
    pub fn matrices(self) -> usize {
        self.projections() + 1
    }
}

/// Sizes of this rank's experts.
#[derive(Clone, Copy, Debug)]
pub struct ExpertShape {
    /// E_local.
    pub experts: usize,
    /// H.
    pub hidden_size: usize,
    /// F.
    pub ffn_size: usize,
    /// Between the projections.
    pub activation: ExpertActivation,
}

impl ExpertShape {
    /// Width of the projections in front of the activation: 2F, or F without a gate.
    fn projected(&self) -> usize {
        self.activation.projections() * self.ffn_size
    }
}

/// `gate_up` `[E_local, 2F, H]`, or `[E_local, F, H]` without a gate; `down` `[E_local, H, F]`.
#[derive(Clone, Copy)]
pub struct ExpertWeights<'a, B: Backend> {
    /// Gate rows, if there is a gate, then up rows.
    pub gate_up: View<'a, B, B::Act>,
    /// Down projection.
    pub down: View<'a, B, B::Act>,
}

/// What the experts of one chunk of one layer keep for their backward pass: `h[N, 2F]`, the gate and up projections, of which
/// experts without a gate have the latter `[N, F]`, or nothing where
/// these are computed again. All else is computed again or not needed, since the combine weight is applied in front of the down
/// projection there.
pub struct Experts<B: Backend> {
    shape: ExpertShape,
    h: Option<Slot<B, B::Act>>,
    /// Whether the rows under way are too many to keep anything of them.
    passing: bool,
}

const PROJECTIONS: &str = "expert projections";

/// Activations and their gradients under way, shared by all layers.
pub struct ExpertScratch<B: Backend> {
    /// `[N, H]`: the input. It stays until the next comes: the backward pass that follows its forward pass at once need not form it again.
    input: Slot<B, B::Act>,
    inputs: u64,
    /// `[N, H]`: forward the output; backward its gradient, then the input's. Each is done with when the next is written.
    rows: Slot<B, B::Act>,
    /// `[N, F]`: activations, in the backward pass weighted.
    a: Slot<B, B::Act>,
    da: Slot<B, B::Act>,
    dh: Slot<B, B::Act>,
    /// `[N, 2F]` or `[N, F]`: the projections of experts that do not keep them.
    h: Slot<B, B::Act>,
}

impl<B: Backend> ExpertScratch<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [&self.input, &self.rows, &self.a, &self.da, &self.dh, &self.h].map(Slot::bytes));
    }

    /// Empty scratch.
    pub fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            input: Slot::new(device, "expanded rows")?,
            inputs: 0,
            rows: Slot::new(device, "results of expanded rows")?,
            a: Slot::new(device, "expert activations")?,
            da: Slot::new(device, "expert activation gradients")?,
            dh: Slot::new(device, "expert projection gradients")?,
            h: Slot::new(device, PROJECTIONS)?,
        })
    }

    /// Room for the input, rows of `width` elements, to be filled.
    pub fn input_mut(
        &mut self,
        device: &B,
        grouped: GroupedRows<'_, B>,
        width: usize,
    ) -> Result<ViewMut<'_, B, B::Act>, DeviceError> {
        self.inputs += 1;
        self.input.reserve(device, grouped.room * width)?;
        Ok(self.input.view_mut(grouped.rows.bound * width))
    }

    /// The number of the input that is there; no other ever has it.
    pub fn input_number(&self) -> u64 {
        self.inputs
    }

    /// Room for the output's gradient, rows of `width` elements, to be filled.
    pub fn rows_mut(
        &mut self,
        device: &B,
        grouped: GroupedRows<'_, B>,
        width: usize,
    ) -> Result<ViewMut<'_, B, B::Act>, DeviceError> {
        self.rows.reserve(device, grouped.room * width)?;
        Ok(self.rows.view_mut(grouped.rows.bound * width))
    }

    /// The output, or the input's gradient.
    pub fn rows(&self, grouped: GroupedRows<'_, B>, width: usize) -> View<'_, B, B::Act> {
        self.rows.view(grouped.rows.bound * width)
    }
}

/// The rows of one grouped pass: how many there are, and where each expert's begin.
pub struct GroupedRows<'a, B: Backend> {
    /// Upper bound and, on the device, the number of rows.
    pub rows: Rows<'a, B>,
    /// `[E_local + 1]`.
    pub offsets: View<'a, B, i32>,
    /// Rows that buffers get room for, at least the bound: so many that a later pass does not need more.
    pub room: usize,
}

impl<B: Backend> Clone for GroupedRows<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for GroupedRows<'_, B> {}

/// The combine weights of expanded rows, for the backward pass.
pub struct GatedRows<'a, B: Backend> {
    /// `[N]`: which weight is each row's.
    pub origin: View<'a, B, i32>,
    /// The weights.
    pub weights: View<'a, B, f32>,
    /// Their gradient: entries that belong to a row are overwritten.
    pub dweights: ViewMut<'a, B, f32>,
}

impl<B: Backend> Experts<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, self.h.iter().map(Slot::bytes));
    }

    /// Experts that keep their projections; empty.
    pub fn keeping(device: &B, shape: ExpertShape) -> Result<Self, DeviceError> {
        Ok(Self { shape, h: Some(Slot::new(device, PROJECTIONS)?), passing: false })
    }

    /// Experts that keep nothing: [`Experts::project`] comes before their backward pass.
    pub fn recomputing(shape: ExpertShape) -> Self {
        Self { shape, h: None, passing: false }
    }

    /// What comes next is kept for the backward pass as far as these experts keep anything, or passes by: as of experts that keep nothing.
    pub fn keep(&mut self, kept: bool) {
        self.passing = !kept;
    }

    /// Whether the backward pass needs the projections again.
    pub fn recomputes(&self) -> bool {
        self.h.is_none() || self.passing
    }

    fn up(&self) -> GroupedDims {
        GroupedDims { experts: self.shape.experts, n: self.shape.projected(), k: self.shape.hidden_size }
    }

    fn down(&self) -> GroupedDims {
        GroupedDims { experts: self.shape.experts, n: self.shape.hidden_size, k: self.shape.ffn_size }
    }

    /// `y[i] = down_e · swiglu(gate_up_e · x[i])`, or gelu, for the rows of each expert e: x is the scratch's input, y its rows.
    pub fn forward(
        &mut self,
        device: &B,
        scratch: &mut ExpertScratch<B>,
        grouped: GroupedRows<'_, B>,
        weights: ExpertWeights<'_, B>,
    ) -> Result<(), DeviceError> {
        self.project(device, scratch, grouped, weights.gate_up)?;
        let (n, h, f) = (grouped.rows.bound, self.shape.hidden_size, self.shape.ffn_size);
        scratch.rows.reserve(device, grouped.room * h)?;
        let (a, y) = (scratch.a.view(n * f), scratch.rows.view_mut(n * h));
        device.grouped_linear(self.down(), grouped.offsets, a, weights.down, y);
        Ok(())
    }

    /// The first half of [`Experts::forward`], in the same operation and so with the same bits: gate and up projections and activations of
    /// the scratch's input, which stays. The projections lie in the scratch where they are not kept.
    pub fn project(
        &mut self,
        device: &B,
        scratch: &mut ExpertScratch<B>,
        grouped: GroupedRows<'_, B>,
        gate_up: View<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let (n, h, f, wide) = (grouped.rows.bound, self.shape.hidden_size, self.shape.ffn_size, self.shape.projected());
        let (up, offsets) = (self.up(), grouped.offsets);
        let projections = self.h.as_mut().filter(|_| !self.passing).unwrap_or(&mut scratch.h);
        projections.reserve(device, grouped.room * wide)?;
        scratch.a.reserve(device, grouped.room * f)?;
        let (x_NH, projections, a) =
            (scratch.input.view(n * h), projections.view_mut(n * wide), scratch.a.view_mut(n * f));
        match self.shape.activation {
            ExpertActivation::Swiglu => {
                device.grouped_linear_swiglu(grouped.rows, up, offsets, x_NH, gate_up, projections, a);
            }
            ExpertActivation::Gelu => {
                device.grouped_linear_gelu(grouped.rows, up, offsets, x_NH, gate_up, projections, a);
            }
        }
        Ok(())
    }

    /// Backward, but for the gradient of `gate_up`: the gradient of the combined output of each row, unweighted, is in the scratch's rows,
    /// and the input's gradient takes its place. [`Experts::grad_gate_up`] comes after it, once that has been used.
    pub fn backward(
        &mut self,
        device: &B,
        scratch: &mut ExpertScratch<B>,
        grouped: GroupedRows<'_, B>,
        tensors: ExpertBackward<'_, B>,
    ) -> Result<(), DeviceError> {
        let (n, h, f, wide) = (grouped.rows.bound, self.shape.hidden_size, self.shape.ffn_size, self.shape.projected());
        scratch.a.reserve(device, grouped.room * f)?;
        scratch.da.reserve(device, grouped.room * f)?;
        scratch.dh.reserve(device, grouped.room * wide)?;
        let (up, down, offsets) = (self.up(), self.down(), grouped.offsets);
        let ExpertBackward { gated, weights, grad_down, accumulate } = tensors;
        let GatedRows { origin, weights: row_weights, dweights } = gated;
        let projections = self.h.as_ref().filter(|_| !self.passing).unwrap_or(&scratch.h).view(n * wide);
        let (da, dh, a) = (scratch.da.view_mut(n * f), scratch.dh.view_mut(n * wide), scratch.a.view_mut(n * f));
        let (rows, dy) = (grouped.rows, scratch.rows.view(n * h));
        match self.shape.activation {
            ExpertActivation::Swiglu => {
                let swiglu = WeightedSwiglu { origin, weights: row_weights, h: projections, dh, a, dweights };
                device.grouped_linear_grad_swiglu(rows, down, offsets, dy, weights.down, da, swiglu);
            }
            ExpertActivation::Gelu => {
                device.grouped_linear_grad_input(down, offsets, dy, weights.down, da);
                let da = scratch.da.view(n * f);
                device.weighted_gelu_grad(rows, f, origin, row_weights, da, projections, dh, a, dweights);
            }
        }
        let (dy, a) = (scratch.rows.view(n * h), scratch.a.view(n * f));
        device.grouped_linear_grad_weight(down, offsets, dy, a, grad_down, accumulate);
        let (dh, dx) = (scratch.dh.view(n * wide), scratch.rows.view_mut(n * h));
        device.grouped_linear_grad_input(up, offsets, dh, weights.gate_up, dx);
        Ok(())
    }

    /// The gradient of `gate_up`, the last of the backward pass: nothing but the optimizer waits for it, so the input's gradient travels
    /// home meanwhile. The forward pass's input is the scratch's.
    pub fn grad_gate_up(
        &mut self,
        device: &B,
        scratch: &mut ExpertScratch<B>,
        grouped: GroupedRows<'_, B>,
        (gradient, accumulate): (ViewMut<'_, B, f32>, Accumulate),
    ) {
        let (n, h, wide) = (grouped.rows.bound, self.shape.hidden_size, self.shape.projected());
        let (dh, x) = (scratch.dh.view(n * wide), scratch.input.view(n * h));
        device.grouped_linear_grad_weight(self.up(), grouped.offsets, dh, x, gradient, accumulate);
    }
}

/// Tensors of the experts' backward pass.
pub struct ExpertBackward<'a, B: Backend> {
    /// The combine weights.
    pub gated: GatedRows<'a, B>,
    /// The experts' weights.
    pub weights: ExpertWeights<'a, B>,
    /// The gradient of `down`.
    pub grad_down: ViewMut<'a, B, f32>,
    /// Whether what is there is added to, or replaced, which saves reading it.
    pub accumulate: Accumulate,
}
