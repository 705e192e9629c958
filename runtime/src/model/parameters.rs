//! The parameters of this rank: values, gradients, and the initial values that depend on a name and a seed alone.
//!
//! Owns the flat buffers. It reads no file and knows no other rank.

use std::ops::Range;

use moe_kernels::{Activation, Buffer, Device, DeviceError, View, ViewMut};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::layout::{Init, Layout, Part, TensorId};
use crate::memory::{Kind, Tally, bytes_of};

/// Flat buffers of one rank's parameters, with views per tensor.
pub struct Parameters<B: Device> {
    layout: Layout,
    /// What the layers compute with.
    compute: B::Buffer<B::Act>,
    /// The f32 values that the optimizer updates, where `compute` cannot hold them.
    master: Option<B::Buffer<f32>>,
    /// Sums of gradients.
    grad: B::Buffer<f32>,
}

impl<B: Device> Parameters<B> {
    /// Buffers for `layout`, all zero.
    pub fn new(device: &B, layout: Layout) -> Result<Self, DeviceError> {
        let len = layout.len();
        Ok(Self {
            compute: device.alloc(len, "parameters")?,
            master: if B::Act::HOLDS_F32 { None } else { Some(device.alloc(len, "master parameters")?) },
            grad: device.alloc(len, "gradients")?,
            layout,
        })
    }

    /// Sets every parameter to its initial value for `seed`: the same under any layout, since each logical part draws from a
    /// stream of its own, keyed by the seed and its name.
    pub fn initialize(&mut self, device: &B, seed: u64) {
        let tensors = self.layout.tensors().iter();
        let parts: Vec<_> = tensors.flat_map(|t| t.parts.iter().map(move |part| (t.init, part.clone()))).collect();
        // As many at a time as there are threads: drawing takes longer than anything else at the start of a large model.
        for parts in parts.chunks(rayon::current_num_threads()) {
            let drawn: Vec<_> = parts.par_iter().map(|(init, part)| initial_values(*init, part, seed)).collect();
            for ((_, part), values) in parts.iter().zip(&drawn) {
                self.set(device, part, values);
            }
        }
    }

    /// Where everything lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the layers compute with.
    pub fn weights(&self) -> Weights<'_, B> {
        Weights { compute: &self.compute, layout: &self.layout }
    }

    /// What the layers compute with, beside the gradients that a backward pass adds to.
    pub fn split(&mut self) -> (Weights<'_, B>, Gradients<'_, B>) {
        let weights = Weights { compute: &self.compute, layout: &self.layout };
        (weights, Gradients { flat: ViewMut::of(&mut self.grad), layout: &self.layout })
    }

    /// All gradients.
    pub fn grads(&self) -> View<'_, B, f32> {
        View::of(&self.grad)
    }

    /// All gradients, to reduce or clear.
    pub fn grads_mut(&mut self) -> ViewMut<'_, B, f32> {
        ViewMut::of(&mut self.grad)
    }

    /// Gradient, master (where there is one) and compute copy of a range of the flat buffer, for the optimizer.
    pub fn update_views(&mut self, range: Range<usize>) -> UpdateViews<'_, B> {
        UpdateViews {
            grad: ViewMut::range(&mut self.grad, range.clone()),
            master: self.master.as_mut().map(|master| ViewMut::range(master, range.clone())),
            compute: ViewMut::range(&mut self.compute, range),
        }
    }

    /// What the layers compute with, of a range of the flat buffer, to read.
    pub fn compute(&self, range: Range<usize>) -> View<'_, B, B::Act> {
        View::range(&self.compute, range)
    }

    /// The f32 masters of a range of the flat buffer, where there are any.
    pub fn master(&self, range: Range<usize>) -> Option<View<'_, B, f32>> {
        self.master.as_ref().map(|master| View::range(master, range))
    }

    /// Replaces the values of a part. `values` has the part's length.
    pub fn set(&mut self, device: &B, part: &Part, values: &[f32]) {
        if let Some(master) = &mut self.master {
            device.upload(values, ViewMut::range(master, part.range.clone()));
        }
        let rounded: Vec<B::Act> = values.iter().map(|&x| B::Act::from_f32(x)).collect();
        device.upload(&rounded, ViewMut::range(&mut self.compute, part.range.clone()));
    }

    /// The values of a part, from the master copy.
    pub fn read(&self, device: &B, part: &Part) -> Result<Vec<f32>, DeviceError> {
        match &self.master {
            Some(master) => read(device, master, part),
            None => {
                let mut values = vec![B::Act::default(); part.range.len()];
                device.read_to_host(View::range(&self.compute, part.range.clone()), &mut values)?;
                Ok(values.into_iter().map(B::Act::to_f32).collect())
            }
        }
    }

    /// The gradient of a part.
    pub fn read_grad(&self, device: &B, part: &Part) -> Result<Vec<f32>, DeviceError> {
        read(device, &self.grad, part)
    }

    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        let master = self.master.as_ref().map_or(0, bytes_of::<B, f32>);
        tally.add(Kind::Parameters, [bytes_of::<B, B::Act>(&self.compute), master]);
        tally.add(Kind::Gradients, [bytes_of::<B, f32>(&self.grad)]);
    }

    /// Elements of the flat buffer.
    pub fn len(&self) -> usize {
        self.grad.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The compute copies of all tensors.
pub struct Weights<'a, B: Device> {
    compute: &'a B::Buffer<B::Act>,
    layout: &'a Layout,
}

impl<B: Device> Clone for Weights<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Device> Copy for Weights<'_, B> {}

impl<'a, B: Device> Weights<'a, B> {
    /// A tensor.
    pub fn get(&self, id: TensorId) -> View<'a, B, B::Act> {
        View::range(self.compute, self.layout.range(id))
    }
}

/// The gradients of all tensors.
pub struct Gradients<'a, B: Device> {
    flat: ViewMut<'a, B, f32>,
    layout: &'a Layout,
}

impl<B: Device> Gradients<'_, B> {
    /// A tensor's gradient, to add to.
    pub fn get(&mut self, id: TensorId) -> ViewMut<'_, B, f32> {
        let range = self.layout.range(id);
        self.flat.reborrow().slice(range)
    }

    /// Where a tensor lies in the flat buffer.
    pub fn range(&self, id: TensorId) -> Range<usize> {
        self.layout.range(id)
    }

    /// The whole flat buffer.
    pub fn flat(&mut self) -> ViewMut<'_, B, f32> {
        self.flat.reborrow()
    }

    /// A stretch of the flat buffer.
    pub fn stretch(&mut self, range: Range<usize>) -> ViewMut<'_, B, f32> {
        self.flat.reborrow().slice(range)
    }
}

/// What an optimizer updates at once.
pub struct UpdateViews<'a, B: Device> {
    /// Sums of gradients.
    pub grad: ViewMut<'a, B, f32>,
    /// f32 values, where the compute copy is rounded.
    pub master: Option<ViewMut<'a, B, f32>>,
    /// What the layers compute with.
    pub compute: ViewMut<'a, B, B::Act>,
}

/// The values of `part` in a flat f32 buffer of the layout.
pub fn read<B: Device>(device: &B, buffer: &B::Buffer<f32>, part: &Part) -> Result<Vec<f32>, DeviceError> {
    let mut values = vec![0.0; part.range.len()];
    device.read_to_host(View::range(buffer, part.range.clone()), &mut values)?;
    Ok(values)
}

fn initial_values(init: Init, part: &Part, seed: u64) -> Vec<f32> {
    match init {
        Init::Ones => vec![1.0; part.range.len()],
        Init::Zeros => vec![0.0; part.range.len()],
        Init::Normal(std) => {
            let mut values = Vec::with_capacity(part.range.len());
            fill_normal(&mut values, part, seed, std);
            values
        }
    }
}

fn fill_normal(values: &mut Vec<f32>, part: &Part, seed: u64, std: f32) {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(part.id.to_string());
    let mut rng = ChaCha8Rng::from_seed(hash.finalize().into());
    match Normal::new(0.0f32, std) {
        Ok(normal) => values.extend(normal.sample_iter(&mut rng).take(part.range.len())),
        Err(_) => values.resize(part.range.len(), 0.0), // an infinite deviation: `ModelConfig::validate` refuses it
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::Cpu;

    use super::*;
    use crate::model::ModelConfig;
    use crate::routing::RouterConfig;

    #[test]
    fn initial_values_depend_on_name_and_seed_and_not_on_the_shard() {
        let config = ModelConfig { vocab_size: 13, ..ModelConfig::default() };
        let make = |experts, seed| {
            let mut p = Parameters::new(&Cpu, Layout::new(&config, &RouterConfig::default(), experts)).unwrap();
            p.initialize(&Cpu, seed);
            p
        };
        let (whole, shard, other) = (make(0..8, 1), make(4..6, 1), make(4..6, 2));
        for (part, _) in shard.layout().parts() {
            let twin = whole.layout().parts().find(|(p, _)| p.id == part.id).unwrap().0.clone();
            assert_eq!(shard.read(&Cpu, part).unwrap(), whole.read(&Cpu, &twin).unwrap(), "{}", part.id);
            if part.shape.len() > 1 {
                assert_ne!(shard.read(&Cpu, part).unwrap(), other.read(&Cpu, part).unwrap(), "{}", part.id);
            }
        }
    }
}
