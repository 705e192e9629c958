//! A dense Llama becomes a Mixture-of-Experts model (as a Mixtral).
//!
//! Owns what each expert gets of the dense feed-forward. By copying (Komatsuzaki et al. 2023) every expert is the whole of it:
//! the chosen weights sum to 1, so that the model computes what the dense one did. By slicing (LLaMA-MoE, Zhu et al. 2024) each
//! expert is a part of it: the sum over all slices is the whole, so a slice's output is multiplied by the number of experts,
//! which makes the weighted sum over k slices an estimate of it, exact where every slice is chosen with the same weight.

use std::ops::Range;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use super::ModelTensors;
use crate::checkpoint::CheckpointError;
use crate::experts::ExpertActivation;
use crate::invalid::InvalidValue;
use crate::model::layout::{Part, PartId, PartKind};
use crate::model::{Family, ModelConfig};
use crate::routing::{BalanceScope, RouterConfig, RouterKind};

/// Which neurons of the dense feed-forward a slice has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slices {
    /// Neighbours.
    Contiguous,
    /// Drawn at random, block by block.
    Random,
}

/// What an expert is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertsFrom {
    /// The whole feed-forward.
    Copies,
    /// A part of it each.
    Slices(Slices),
}

/// What the new model is like.
#[derive(Clone, Debug, PartialEq)]
pub struct UpcycleOptions {
    /// E.
    pub experts: usize,
    /// k.
    pub top_k: usize,
    /// What an expert is made from.
    pub from: ExpertsFrom,
    /// Standard deviation of the router's weights; 0: every token weighs all experts alike.
    pub router_std: f32,
    /// Seeds the router and the draw of slices.
    pub seed: u64,
}

/// Why a model is not upcycled.
#[derive(Debug, thiserror::Error)]
pub enum UpcycleError {
    /// It is not a dense Llama.
    #[error("is a {family:?} with {experts} experts a layer; upcycling takes a dense Llama")]
    NotDense {
        /// What it is.
        family: Family,
        /// What it has already.
        experts: usize,
    },
    /// An option cannot be, with this model.
    #[error(transparent)]
    Option(#[from] InvalidValue),
}

/// A dense model seen as a Mixture-of-Experts model.
pub struct Upcycled<'a> {
    dense: &'a mut dyn ModelTensors,
    model: ModelConfig,
    router: RouterConfig,
    options: UpcycleOptions,
}

impl<'a> Upcycled<'a> {
    /// Prepares a dense model. No tensor is read yet.
    ///
    /// # Errors
    /// The model has experts already, is not a Llama, or its feed-forward cannot be cut so.
    pub fn new(dense: &'a mut dyn ModelTensors, options: UpcycleOptions) -> Result<Self, UpcycleError> {
        let from = dense.model();
        if from.family != Family::Llama || from.moe_layers().next().is_some() {
            return Err(UpcycleError::NotDense { family: from.family, experts: from.experts });
        }
        let UpcycleOptions { experts, top_k, from: made_from, router_std, .. } = options;
        if experts == 0 {
            return Err(InvalidValue::new("experts", experts, "must be at least 1").into());
        }
        if top_k == 0 || top_k > experts {
            return Err(InvalidValue::new("top-k", top_k, format!("a token can choose 1 to {experts} experts")).into());
        }
        if !(router_std.is_finite() && router_std >= 0.0) {
            return Err(InvalidValue::new("router-std", router_std, "must be a number of at least 0").into());
        }
        let expert_ffn_size = match made_from {
            ExpertsFrom::Copies => from.ffn_size,
            ExpertsFrom::Slices(_) if from.ffn_size.is_multiple_of(experts) => from.ffn_size / experts,
            ExpertsFrom::Slices(_) => {
                let near = |e: &usize| from.ffn_size.is_multiple_of(*e);
                let below = (1..experts).rev().find(near);
                let nearest: Vec<_> = below.into_iter().chain((experts + 1..=from.ffn_size).find(near)).collect();
                let reason = format!(
                    "a feed-forward of {} neurons cannot be cut into so many; nearest that work: {nearest:?}",
                    from.ffn_size
                );
                return Err(InvalidValue::new("experts", experts, reason).into());
            }
        };
        let model = ModelConfig {
            family: Family::Mixtral,
            experts,
            top_k,
            expert_ffn_size,
            expert_activation: ExpertActivation::Swiglu,
            ffn_size: 0,
            moe_every: 1,
            dense_layers: Vec::new(),
            ..from.clone()
        };
        let router = RouterConfig {
            kind: RouterKind::TopkSoftmax,
            balance_scope: BalanceScope::Global,
            balance_pooled: true,
            ..RouterConfig::default()
        };
        model.validate(&router)?;
        Ok(Self { dense, model, router, options })
    }

    /// The neurons of an expert in a block.
    fn neurons(&self, layer: usize, expert: usize) -> Vec<usize> {
        let f = self.model.expert_ffn_size;
        let mine: Range<usize> = expert * f..(expert + 1) * f;
        match self.options.from {
            ExpertsFrom::Copies => (0..f).collect(),
            ExpertsFrom::Slices(Slices::Contiguous) => mine.collect(),
            ExpertsFrom::Slices(Slices::Random) => {
                let mut all: Vec<usize> = (0..f * self.model.experts).collect();
                all.shuffle(&mut self.draws("slices", layer));
                let mut mine = all[mine].to_vec();
                // The order within an expert changes nothing but the place in memory.
                mine.sort_unstable();
                mine
            }
        }
    }

    /// A stream of its own for each use and block, so that none depends on what is read first.
    fn draws(&self, what: &str, layer: usize) -> ChaCha8Rng {
        use sha2::{Digest, Sha256};
        let key = Sha256::new().chain_update(self.options.seed.to_le_bytes()).chain_update(format!("{what} {layer}"));
        ChaCha8Rng::from_seed(key.finalize().into())
    }

    fn router_values(&self, part: &Part, layer: usize) -> Vec<f32> {
        match Normal::new(0.0f32, self.options.router_std) {
            Ok(normal) => normal.sample_iter(self.draws("router", layer)).take(part.range.len()).collect(),
            Err(_) => unreachable!("checked to be finite"),
        }
    }

    /// The dense part that an expert's is cut from.
    fn dense_part(&self, kind: PartKind, layer: usize) -> Part {
        let (h, f) = (self.model.hidden_size, self.dense.model().ffn_size);
        let shape = if kind == PartKind::DenseDown { vec![h, f] } else { vec![f, h] };
        Part { id: PartId { kind, layer: Some(layer), expert: None }, range: 0..h * f, shape }
    }

    fn expert_values(&mut self, id: PartId, kind: PartKind) -> Result<Vec<f32>, CheckpointError> {
        let (Some(layer), Some(expert)) = (id.layer, id.expert) else { unreachable!("an expert is in a block") };
        let part = self.dense_part(kind, layer);
        let whole = self.dense.read(&part)?;
        if self.options.from == ExpertsFrom::Copies {
            return Ok(whole);
        }
        let neurons = self.neurons(layer, expert);
        let width = part.shape[1];
        if kind == PartKind::DenseDown {
            let scale = self.model.experts as f32;
            let row = |row: &[f32]| neurons.iter().map(|&neuron| row[neuron] * scale).collect::<Vec<_>>();
            return Ok(whole.chunks_exact(width).flat_map(row).collect());
        }
        Ok(neurons.iter().flat_map(|&neuron| whole[neuron * width..(neuron + 1) * width].iter().copied()).collect())
    }
}

impl ModelTensors for Upcycled<'_> {
    fn model(&self) -> &ModelConfig {
        &self.model
    }

    fn router(&self) -> &RouterConfig {
        &self.router
    }

    fn read(&mut self, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        match part.id.kind {
            PartKind::Router => Ok(self.router_values(part, part.id.layer.unwrap_or_default())),
            PartKind::ExpertGate => self.expert_values(part.id, PartKind::DenseGate),
            PartKind::ExpertUp => self.expert_values(part.id, PartKind::DenseUp),
            PartKind::ExpertDown => self.expert_values(part.id, PartKind::DenseDown),
            _ => self.dense.read(part),
        }
    }
}
