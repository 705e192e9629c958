//! The attention half of a block: fused projection, optional norms on queries and keys, rotary embedding, attention, output.
//!
//! Owns its saved activations. It never sees the residual stream: it maps normed input to what is added.

use moe_kernels::{
    Accumulate, AttentionDims, Backend, DeviceError, GemmDims, NormDims, RotaryDirection, View, ViewMut,
};

use super::config::{ModelConfig, QkNorm};
use super::layout::{BlockTensors, TensorId};
use super::parameters::{Gradients, Weights};
use super::rotary::Frequencies;
use crate::memory::{Kind, Slot, Tally};

/// Rotary tables `[S, D/2]`, shared by all blocks.
pub(super) struct RotaryTables<B: Backend> {
    cos: Slot<B, f32>,
    sin: Slot<B, f32>,
    positions: usize,
    half: usize,
}

impl<B: Backend> RotaryTables<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.cos.bytes(), self.sin.bytes()]);
    }

    /// Tables for `positions` positions.
    pub(super) fn new(device: &B, config: &ModelConfig, positions: usize) -> Result<Self, DeviceError> {
        let half = config.head_width() / 2;
        let Frequencies { radians, amplitude } = Frequencies::of(config);
        let angle = |i: usize| (i / half) as f64 * radians[i % half];
        let table = |what, f: fn(f64) -> f64| {
            let mut slot = Slot::new(device, what)?;
            slot.reserve(device, positions * half)?;
            let values: Vec<f32> = (0..positions * half).map(|i| (amplitude * f(angle(i))) as f32).collect();
            device.upload(&values, slot.view_mut(values.len()));
            Ok(slot)
        };
        Ok(Self { cos: table("rotary cosines", f64::cos)?, sin: table("rotary sines", f64::sin)?, positions, half })
    }

    fn views(&self, seq: usize) -> (View<'_, B, f32>, View<'_, B, f32>) {
        assert!(seq <= self.positions, "{seq} positions of {} in the rotary tables", self.positions);
        (self.cos.view(seq * self.half), self.sin.view(seq * self.half))
    }
}

/// One block's attention with what its backward pass needs.
pub(super) struct Attention<B: Backend> {
    config: ModelConfig,
    /// The projection before norms on queries and keys, where there are any.
    raw: Slot<B, B::Act>,
    qkv: Slot<B, B::Act>,
    q_rstd: Slot<B, f32>,
    k_rstd: Slot<B, f32>,
    out: Slot<B, B::Act>,
    lse: Slot<B, f32>,
}

/// Gradients under way, shared by all blocks.
pub(super) struct AttentionScratch<B: Backend> {
    dout: Slot<B, B::Act>,
    dqkv: Slot<B, B::Act>,
    draw: Slot<B, B::Act>,
}

impl<B: Backend> AttentionScratch<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.dout.bytes(), self.dqkv.bytes(), self.draw.bytes()]);
    }

    /// Empty scratch.
    pub(super) fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            dout: Slot::new(device, "attention output gradients")?,
            dqkv: Slot::new(device, "query, key and value gradients")?,
            draw: Slot::new(device, "gradients before query and key norms")?,
        })
    }
}

/// The norm of one of query and key: which elements of a fused row, and its weight.
struct HeadNorm {
    dims: NormDims,
    start: usize,
    weight: TensorId,
}

impl<B: Backend> Attention<B> {
    /// Counts its buffers.
    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(
            Kind::Activations,
            [
                self.raw.bytes(),
                self.qkv.bytes(),
                self.q_rstd.bytes(),
                self.k_rstd.bytes(),
                self.out.bytes(),
                self.lse.bytes(),
            ],
        );
    }

    /// Empty activations.
    pub(super) fn new(device: &B, config: &ModelConfig) -> Result<Self, DeviceError> {
        Ok(Self {
            config: config.clone(),
            raw: Slot::new(device, "projections before query and key norms")?,
            qkv: Slot::new(device, "queries, keys and values")?,
            q_rstd: Slot::new(device, "query norms")?,
            k_rstd: Slot::new(device, "key norms")?,
            out: Slot::new(device, "attention outputs")?,
            lse: Slot::new(device, "attention log-sums")?,
        })
    }

    fn dims(&self, batch: usize, seq: usize) -> AttentionDims {
        let c = &self.config;
        AttentionDims { batch, seq, heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_width() }
    }

    /// The norms on queries and keys.
    fn head_norms(&self, tokens: usize, tensors: &BlockTensors) -> Option<[HeadNorm; 2]> {
        let c = &self.config;
        let (q, k) = tensors.qk_norm?;
        let norm = |heads: usize, start, weight| {
            let (groups, width) = match c.qk_norm {
                QkNorm::PerHead => (heads, c.head_width()),
                QkNorm::FullWidth | QkNorm::None => (1, heads * c.head_width()),
            };
            let dims = NormDims { tokens, groups, width, token_stride: c.qkv_width(), eps: c.norm_eps };
            HeadNorm { dims, start, weight }
        };
        Some([norm(c.heads, 0, q), norm(c.kv_heads, c.attention_width(), k)])
    }

    fn gemms(&self, tokens: usize) -> (GemmDims, GemmDims) {
        let c = &self.config;
        let project = GemmDims { m: tokens, n: c.qkv_width(), k: c.hidden_size };
        (project, GemmDims { m: tokens, n: c.hidden_size, k: c.attention_width() })
    }

    /// `y_TH` (overwritten) from the normed `x_TH` of `batch` sequences of `seq` tokens.
    pub(super) fn forward(
        &mut self,
        device: &B,
        pass: AttentionPass<'_, B>,
        x_TH: View<'_, B, B::Act>,
        y_TH: ViewMut<'_, B, B::Act>,
    ) -> Result<(), DeviceError> {
        let AttentionPass { batch, seq, starts, weights, tensors, rotary } = pass;
        let (dims, t) = (self.dims(batch, seq), batch * seq);
        let (width, out_width) = (t * self.config.qkv_width(), t * self.config.attention_width());
        self.qkv.reserve(device, width)?;
        self.out.reserve(device, out_width)?;
        self.lse.reserve(device, t * self.config.heads)?;
        let (project, output) = self.gemms(t);
        let bias = tensors.qkv_bias.map(|id| weights.get(id));
        if let Some(norms) = self.head_norms(t, tensors) {
            self.raw.reserve(device, width)?;
            device.linear(project, x_TH, weights.get(tensors.qkv), bias, self.raw.view_mut(width));
            device.copy(self.raw.view(width), self.qkv.view_mut(width));
            for (norm, rstd) in norms.into_iter().zip([&mut self.q_rstd, &mut self.k_rstd]) {
                let rows = t * norm.dims.groups;
                rstd.reserve(device, rows)?;
                let (raw, normed) = (self.raw.view(width), self.qkv.view_mut(width));
                let range = norm.start.min(width)..width;
                let w = weights.get(norm.weight);
                device.rms_norm(norm.dims, raw.slice(range.clone()), w, normed.slice(range), rstd.view_mut(rows));
            }
        } else {
            device.linear(project, x_TH, weights.get(tensors.qkv), bias, self.qkv.view_mut(width));
        }
        let (cos, sin) = rotary.views(seq);
        device.rotary(dims, RotaryDirection::Forward, cos, sin, self.qkv.view_mut(width));
        let lse = self.lse.view_mut(t * self.config.heads);
        device.attention(dims, starts, self.qkv.view(width), self.out.view_mut(out_width), lse);
        device.linear(output, self.out.view(out_width), weights.get(tensors.attention_output), None, y_TH);
        Ok(())
    }

    /// Backward: `dx_TH` (overwritten) from `dy_TH` and the forward pass's `x_TH`.
    pub(super) fn backward(
        &mut self,
        device: &B,
        pass: AttentionPass<'_, B>,
        gradients: &mut Gradients<'_, B>,
        scratch: &mut AttentionScratch<B>,
        tensors_TH: AttentionBackward<'_, B>,
    ) -> Result<(), DeviceError> {
        let AttentionPass { batch, seq, starts, weights, tensors, rotary } = pass;
        let AttentionBackward { x_TH, dy_TH, dx_TH } = tensors_TH;
        let (dims, t) = (self.dims(batch, seq), batch * seq);
        let (width, out_width) = (t * self.config.qkv_width(), t * self.config.attention_width());
        scratch.dout.reserve(device, out_width)?;
        scratch.dqkv.reserve(device, width)?;
        let (project, output) = self.gemms(t);
        let (out, w_out) = (self.out.view(out_width), weights.get(tensors.attention_output));
        let dout = scratch.dout.view_mut(out_width);
        device.linear_grad_input(output, dy_TH, w_out, dout, Accumulate::Overwrite);
        device.linear_grad_weight(output, dy_TH, out, gradients.get(tensors.attention_output));
        let (dout, lse) = (scratch.dout.view(out_width), self.lse.view(t * self.config.heads));
        device.attention_grad(dims, starts, self.qkv.view(width), out, lse, dout, scratch.dqkv.view_mut(width));
        let (cos, sin) = rotary.views(seq);
        device.rotary(dims, RotaryDirection::Inverse, cos, sin, scratch.dqkv.view_mut(width));
        let draw = if let Some(norms) = self.head_norms(t, tensors) {
            scratch.draw.reserve(device, width)?;
            device.copy(scratch.dqkv.view(width), scratch.draw.view_mut(width));
            for (norm, rstd) in norms.into_iter().zip([&self.q_rstd, &self.k_rstd]) {
                let range = norm.start.min(width)..width;
                device.rms_norm_grad(
                    norm.dims,
                    scratch.dqkv.view(width).slice(range.clone()),
                    self.raw.view(width).slice(range.clone()),
                    weights.get(norm.weight),
                    rstd.view(t * norm.dims.groups),
                    scratch.draw.view_mut(width).slice(range),
                    gradients.get(norm.weight),
                    Accumulate::Overwrite,
                );
            }
            scratch.draw.view(width)
        } else {
            scratch.dqkv.view(width)
        };
        if let Some(bias) = tensors.qkv_bias {
            device.bias_grad(t, self.config.qkv_width(), draw, gradients.get(bias));
        }
        device.linear_grad_weight(project, draw, x_TH, gradients.get(tensors.qkv));
        device.linear_grad_input(project, draw, weights.get(tensors.qkv), dx_TH, Accumulate::Overwrite);
        Ok(())
    }
}

/// What attention works with in a pass.
#[derive(Clone, Copy)]
pub(super) struct AttentionPass<'a, B: Backend> {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
    /// `[B, S]`: the first position that each token sees; None: the sequence's.
    pub starts: Option<View<'a, B, i32>>,
    /// Weights of the model.
    pub weights: Weights<'a, B>,
    /// Which of them are this block's.
    pub tensors: &'a BlockTensors,
    /// Rotary tables.
    pub rotary: &'a RotaryTables<B>,
}

/// Tensors of [`Attention::backward`].
pub(super) struct AttentionBackward<'a, B: Backend> {
    /// The forward pass's input.
    pub x_TH: View<'a, B, B::Act>,
    /// Gradient of the output.
    pub dy_TH: View<'a, B, B::Act>,
    /// Gradient of the input, overwritten.
    pub dx_TH: ViewMut<'a, B, B::Act>,
}
