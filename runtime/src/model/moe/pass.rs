//! What an MoE layer works with in a pass.
//!
//! Owns which of the model's weights go to which stage. It holds nothing beyond the pass.

use moe_kernels::Backend;

use crate::experts::ExpertWeights;
use crate::model::layout::{MoeTensors, RouterTensors, TensorId};
use crate::model::parameters::Weights;
use crate::routing::{RoutePass, RouterWeights};

/// One layer's view of a pass.
pub(in crate::model) struct MoePass<'a, B: Backend, C> {
    /// The queue.
    pub device: &'a B,
    /// The expert group.
    pub group: &'a C,
    /// The pass.
    pub route: RoutePass<'a>,
    /// Weights of the model.
    pub weights: Weights<'a, B>,
    /// Which of them are this layer's.
    pub tensors: MoeTensors,
}

impl<'a, B: Backend, C> MoePass<'a, B, C> {
    /// The same pass over the parts of its tokens.
    pub(super) fn split(&self, parts: usize) -> Self {
        Self { route: self.route.split(parts), ..*self }
    }

    /// What the router works with.
    pub(super) fn router_weights(&self) -> RouterWeights<'a, B> {
        let RouterTensors { matrix, noise, hidden } = self.tensors.router;
        let weight = |id: TensorId| self.weights.get(id);
        RouterWeights { router: matrix.map(weight), noise: noise.map(weight), hidden: hidden.map(|id| id.map(weight)) }
    }

    /// What this rank's experts work with.
    pub(super) fn expert_weights(&self) -> ExpertWeights<'a, B> {
        ExpertWeights {
            gate_up: self.weights.get(self.tensors.experts.gate_up),
            down: self.weights.get(self.tensors.experts.down),
        }
    }
}
