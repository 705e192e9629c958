//! A small feed-forward network with its gradients and moments: what an expert is, and the gate.
//!
//! Owns its parameters in one flat buffer, layer by layer: the weights `[out, in]`, then the biases. It knows no other network and no rank.

use std::ops::Range;

use moe_kernels::{Accumulate, Activation, ActivationKind, AdamW, Backend, DeviceError, GemmDims, View, ViewMut};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use sha2::{Digest, Sha256};

use crate::memory::Slot;

/// Settings of one update by AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Linear layers with an activation between each two.
pub struct Network<B: Backend> {
    device: B,
    activation: ActivationKind,
    layers: Vec<Layer<B>>,
    compute: B::Buffer<B::Act>,
    /// What the optimizer updates, where `compute` is rounded.
    master: Option<B::Buffer<f32>>,
    grad: B::Buffer<f32>,
    m: B::Buffer<f32>,
    v: B::Buffer<f32>,
    updates: u64,
    /// The gradient of a layer's activated input.
    by_activated: Slot<B, B::Act>,
}

/// One linear layer and what its passes keep.
struct Layer<B: Backend> {
    inputs: usize,
    outputs: usize,
    weights: Range<usize>,
    biases: Range<usize>,
    sums: Slot<B, B::Act>,
    by_sums: Slot<B, B::Act>,
    /// The sums behind the activation; empty in the last layer.
    activated: Slot<B, B::Act>,
}

impl<B: Backend> Network<B> {
    /// A network of `widths`, from the input's to the output's: one layer fewer than widths. Weights of a layer with n inputs are normal
    /// with deviation 1/√n, from a stream of their own for each seed and `name`; biases are 0.
    pub fn new(
        device: &B,
        widths: &[usize],
        activation: ActivationKind,
        (name, seed): (&str, u64),
    ) -> Result<Self, DeviceError> {
        let mut layers = Vec::with_capacity(widths.len());
        let mut end = 0;
        for pair in widths.windows(2) {
            let (inputs, outputs) = (pair[0], pair[1]);
            let weights = end..end + inputs * outputs;
            let biases = weights.end..weights.end + outputs;
            end = biases.end;
            let slot = |what| Slot::new(device, what);
            let (sums, by_sums, activated) = (slot("sums")?, slot("gradients of sums")?, slot("activations")?);
            layers.push(Layer { inputs, outputs, weights, biases, sums, by_sums, activated });
        }
        let mut network = Self {
            device: device.clone(),
            activation,
            compute: device.alloc(end, "a network's parameters")?,
            master: if B::Act::HOLDS_F32 { None } else { Some(device.alloc(end, "a network's master parameters")?) },
            grad: device.alloc(end, "a network's gradients")?,
            m: device.alloc(end, "a network's first moments")?,
            v: device.alloc(end, "a network's second moments")?,
            updates: 0,
            by_activated: Slot::new(device, "gradients of activations")?,
            layers,
        };
        let values = network.initial_values(name, seed);
        network.set_parameters(&values);
        Ok(network)
    }

    fn initial_values(&self, name: &str, seed: u64) -> Vec<f32> {
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(name);
        let mut rng = ChaCha8Rng::from_seed(hash.finalize().into());
        let mut values = Vec::new();
        for layer in &self.layers {
            let std = 1.0 / (layer.inputs.max(1) as f32).sqrt();
            let drawn = Normal::new(0.0, std).map(|normal| normal.sample_iter(&mut rng).take(layer.weights.len()));
            values.extend(drawn.into_iter().flatten());
            values.resize(layer.biases.end, 0.0);
        }
        values
    }

    /// Outputs `[T, out]` of `x[T, in]`, kept for the backward pass.
    pub fn forward(&mut self, x: View<'_, B, B::Act>) -> Result<View<'_, B, B::Act>, DeviceError> {
        let (device, rows, last) = (&self.device, x.len() / self.layers[0].inputs, self.layers.len() - 1);
        for l in 0..=last {
            let (before, rest) = self.layers.split_at_mut(l);
            let layer = &mut rest[0];
            let input = before.last().map_or(x, |before| before.activated.view(rows * before.outputs));
            let (dims, n) = (layer.dims(rows), rows * layer.outputs);
            layer.sums.reserve(device, n)?;
            let (w, b) = (View::range(&self.compute, layer.weights.clone()), layer.biases.clone());
            device.linear(dims, input, w, Some(View::range(&self.compute, b)), layer.sums.view_mut(n));
            if l < last {
                layer.activated.reserve(device, n)?;
                device.activation(self.activation, layer.sums.view(n), layer.activated.view_mut(n));
            }
        }
        let last = &self.layers[last];
        Ok(last.sums.view(rows * last.outputs))
    }

    /// Adds to the gradients what follows from `dy[T, out]`, the gradient of the last forward pass's outputs for `x`.
    pub fn backward(&mut self, x: View<'_, B, B::Act>, dy: View<'_, B, B::Act>) -> Result<(), DeviceError> {
        let (device, rows) = (&self.device, x.len() / self.layers[0].inputs);
        let (mut layers, mut by_outputs) = (&mut self.layers[..], Some(dy));
        while let Some((layer, before)) = layers.split_last_mut() {
            let dims = layer.dims(rows);
            let dy = by_outputs.take().unwrap_or_else(|| layer.by_sums.view(rows * layer.outputs));
            let input = before.last().map_or(x, |before| before.activated.view(rows * before.outputs));
            device.linear_grad_weight(dims, dy, input, ViewMut::range(&mut self.grad, layer.weights.clone()));
            device.bias_grad(rows, layer.outputs, dy, ViewMut::range(&mut self.grad, layer.biases.clone()));
            if let Some(before) = before.last_mut() {
                let n = rows * layer.inputs;
                self.by_activated.reserve(device, n)?;
                before.by_sums.reserve(device, n)?;
                let w = View::range(&self.compute, layer.weights.clone());
                device.linear_grad_input(dims, dy, w, self.by_activated.view_mut(n), Accumulate::Overwrite);
                let (sums, by_activated) = (before.sums.view(n), self.by_activated.view(n));
                device.activation_grad(self.activation, sums, by_activated, before.by_sums.view_mut(n));
            }
            layers = before;
        }
        Ok(())
    }

    /// One update with the gradients, which are zero afterwards.
    pub fn update(&mut self, Update { lr, weight_decay }: Update) {
        self.updates += 1;
        let (beta1, beta2, eps, grad_scale) = (0.9, 0.999, 1e-8, 1.0);
        let settings = AdamW { lr, beta1, beta2, eps, weight_decay, step: self.updates, grad_scale };
        let (grad, m, v) = (ViewMut::of(&mut self.grad), ViewMut::of(&mut self.m), ViewMut::of(&mut self.v));
        let master = self.master.as_mut().map(|master| ViewMut::of(master));
        self.device.adamw(settings, grad, m, v, master, ViewMut::of(&mut self.compute));
    }

    /// One update on rows `x[T, in]` by cross-entropy, the mean over them, for a network that classifies by itself. Returns the loss before.
    pub fn fit(&mut self, x: &[f32], labels: &[usize], update: Update) -> Result<f64, DeviceError> {
        let device = self.device.clone();
        let (rows, classes) = (labels.len(), self.layers[self.layers.len() - 1].outputs);
        let x = upload(&device, x)?;
        let mut slopes = device.alloc::<B::Act>(rows * classes, "gradients of outputs")?;
        let logits = self.forward(View::of(&x))?;
        device.copy(logits, ViewMut::of(&mut slopes));
        let mut targets = device.alloc::<i32>(rows, "labels")?;
        device.upload(&labels.iter().map(|label| *label as i32).collect::<Vec<_>>(), ViewMut::of(&mut targets));
        let mut losses = device.alloc::<f32>(rows, "losses")?;
        let scale = 1.0 / rows.max(1) as f32;
        let (targets, by_logits) = (View::of(&targets), ViewMut::of(&mut slopes));
        device.cross_entropy(classes, scale, targets, by_logits, ViewMut::of(&mut losses));
        self.backward(View::of(&x), View::of(&slopes))?;
        self.update(update);
        let mut host = vec![0.0; rows];
        device.read_to_host(View::of(&losses), &mut host)?;
        Ok(host.into_iter().map(f64::from).sum::<f64>() / rows.max(1) as f64)
    }

    /// Every parameter, in f32.
    pub fn parameters(&self) -> Result<Vec<f32>, DeviceError> {
        match &self.master {
            Some(master) => read(&self.device, View::of(master)),
            None => {
                Ok(read::<B, B::Act>(&self.device, View::of(&self.compute))?.into_iter().map(B::Act::to_f32).collect())
            }
        }
    }

    /// Replaces every parameter.
    pub fn set_parameters(&mut self, values: &[f32]) {
        if let Some(master) = &mut self.master {
            self.device.upload(values, ViewMut::of(master));
        }
        let rounded: Vec<B::Act> = values.iter().map(|x| B::Act::from_f32(*x)).collect();
        self.device.upload(&rounded, ViewMut::of(&mut self.compute));
    }

    /// The gradients since the last update, in the order of the parameters.
    pub fn gradients(&self) -> Result<Vec<f32>, DeviceError> {
        read(&self.device, View::of(&self.grad))
    }
}

impl<B: Backend> Layer<B> {
    fn dims(&self, rows: usize) -> GemmDims {
        GemmDims { m: rows, n: self.outputs, k: self.inputs }
    }
}

/// Numbers as a device computes with them.
pub(super) fn upload<B: Backend>(device: &B, x: &[f32]) -> Result<B::Buffer<B::Act>, DeviceError> {
    let mut buffer = device.alloc(x.len(), "rows")?;
    let rounded: Vec<B::Act> = x.iter().map(|x| B::Act::from_f32(*x)).collect();
    device.upload(&rounded, ViewMut::of(&mut buffer));
    Ok(buffer)
}

/// A view's numbers on the host.
pub(super) fn read<B: Backend, T: moe_kernels::Element>(
    device: &B,
    view: View<'_, B, T>,
) -> Result<Vec<T>, DeviceError> {
    let mut host = vec![T::default(); view.len()];
    device.read_to_host(view, &mut host)?;
    Ok(host)
}
