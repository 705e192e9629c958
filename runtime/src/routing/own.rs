//! Gates of one's own: a trait, and what a router does with one.
//!
//! Owns the way to the host and back: such a gate is plain Rust over slices, on any device, at the price of two reads a layer and pass. What it
//! must keep to is in [`Gate`]; [`super::kit`] checks it.

use std::fmt;
use std::sync::Arc;

use moe_kernels::{Backend, DeviceError, GateDims, View, ViewMut};

use super::config::{RouterConfig, RouterKind};
use crate::invalid::InvalidValue;
use crate::memory::Slot;

/// What a gate is told of a pass.
#[derive(Clone, Copy, Debug)]
pub struct GatePass {
    /// T, E, k.
    pub dims: GateDims,
    /// Training, or evaluation.
    pub training: bool,
    /// Steps before this one.
    pub step: u64,
    /// Place of the first token in the data, for randomness that no layout changes.
    pub first_token: u64,
}

/// The choices of a pass, `[T, k]` each.
pub struct Choices<'a> {
    /// Experts, −1: none. A token's are different.
    pub ids: &'a mut [i32],
    /// What the chosen experts' outputs are multiplied with; 0 where there is none.
    pub weights: &'a mut [f32],
}

/// A gate of one's own: how the logits of `model.experts` experts become choices and weights (`router.kind = "custom"`).
///
/// What the runtime counts on, and [`super::kit::faults`] looks at:
/// - a token has up to k different experts; a place without one is −1 with weight 0
/// - the same arguments give the same choices, on every rank and every time
/// - a pass without tokens is an ordinary case
/// - in evaluation a token's choices follow from its own logits alone, since later tokens are not known in generation
/// - [`Gate::choose_grad`] is the gradient of the weights with the choices as they are
///
/// Logits, balance losses, capacity, dispatch, checkpoints and metrics are the runtime's, whatever the gate. A program with a gate of its own is
/// `fn main() { moe_runtime::worker::main_with_gate(Arc::new(MyGate)) }`; runtime/examples/sparsemax.rs is one.
pub trait Gate: fmt::Debug + Send + Sync {
    /// Fills `choices` from `logits[T, E]`.
    fn choose(&self, pass: GatePass, logits: &[f32], choices: Choices<'_>);

    /// `dlogits[T, E]` (zero before) from the weights' gradient `[T, k]`; `ids` are those that [`Gate::choose`] gave for these `logits`.
    fn choose_grad(&self, pass: GatePass, logits: &[f32], ids: &[i32], dweights: &[f32], dlogits: &mut [f32]);
}

/// Refuses `router.kind = "custom"` in a program without a gate of its own.
///
/// # Errors
/// The kind, and what would do.
pub fn check_own_gate(config: &RouterConfig, gate: Option<&Arc<dyn Gate>>) -> Result<(), InvalidValue> {
    if config.kind == RouterKind::Custom && gate.is_none() {
        let reason = "this program has no gate of its own; docs/routers.md says how one is built in";
        return Err(InvalidValue::new("router.kind", "custom", reason));
    }
    Ok(())
}

/// A gate with its buffers on the host.
pub(super) struct OwnGate<B: Backend> {
    gate: Arc<dyn Gate>,
    logits: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    dlogits: Vec<f32>,
    on_device: Slot<B, f32>,
}

impl<B: Backend> OwnGate<B> {
    /// Around `gate`.
    pub(super) fn new(device: &B, gate: Arc<dyn Gate>) -> Result<Self, DeviceError> {
        let on_device = Slot::new(device, "logit gradients of an own gate")?;
        let (logits, ids, weights, dlogits) = Default::default();
        Ok(Self { gate, logits, ids, weights, dlogits, on_device })
    }

    /// Bytes of its buffers on the device.
    pub(super) fn bytes(&self) -> u64 {
        self.on_device.bytes()
    }

    /// `ids[T, k]` and `weights[T, k]` (overwritten) from `logits[T, E]`.
    pub(super) fn choose(
        &mut self,
        device: &B,
        pass: GatePass,
        logits: View<'_, B, f32>,
        (ids, weights): (ViewMut<'_, B, i32>, ViewMut<'_, B, f32>),
    ) -> Result<(), DeviceError> {
        self.logits.resize(logits.len(), 0.0);
        device.read_to_host(logits, &mut self.logits)?;
        self.ids.clear();
        self.ids.resize(ids.len(), -1);
        self.weights.clear();
        self.weights.resize(weights.len(), 0.0);
        let choices = Choices { ids: &mut self.ids, weights: &mut self.weights };
        self.gate.choose(pass, &self.logits, choices);
        self.check(pass)?;
        device.upload(&self.ids, ids);
        device.upload(&self.weights, weights);
        Ok(())
    }

    /// Refuses choices that no expert could carry out.
    fn check(&self, pass: GatePass) -> Result<(), DeviceError> {
        let GateDims { experts, top_k, .. } = pass.dims;
        for (t, (ids, weights)) in self.ids.chunks(top_k.max(1)).zip(self.weights.chunks(top_k.max(1))).enumerate() {
            for (j, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
                let twice = id >= 0 && ids[..j].contains(&id);
                if id < -1 || id >= experts as i32 || twice || !weight.is_finite() {
                    let found = if twice { "that expert a second time".to_owned() } else { format!("weight {weight}") };
                    return Err(DeviceError::Fault {
                        device: format!("the gate {:?}", self.gate),
                        operation: "choose".into(),
                        reason: format!(
                            "token {t}, choice {j}: expert {id} of {experts}, {found}; routing::kit::faults finds such faults"
                        ),
                    });
                }
            }
        }
        Ok(())
    }

    /// Adds the logits' gradient to `dlogits[T, E]`. The logits and ids are those of [`OwnGate::choose`].
    pub(super) fn choose_grad(
        &mut self,
        device: &B,
        pass: GatePass,
        dweights: View<'_, B, f32>,
        dlogits: ViewMut<'_, B, f32>,
    ) -> Result<(), DeviceError> {
        let n = dlogits.len();
        self.weights.resize(dweights.len(), 0.0);
        device.read_to_host(dweights, &mut self.weights)?;
        self.dlogits.clear();
        self.dlogits.resize(n, 0.0);
        self.gate.choose_grad(pass, &self.logits, &self.ids, &self.weights, &mut self.dlogits);
        self.on_device.reserve(device, n)?;
        device.upload(&self.dlogits, self.on_device.view_mut(n));
        device.add_f32(self.on_device.view(n), dlogits);
        Ok(())
    }
}
