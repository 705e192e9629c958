//! Balanced assignment by Sinkhorn's algorithm (Clark et al. 2022; Megatron-LM's `sinkhorn`; BASE, Lewis et al. 2021, solves the same
//! assignment exactly): in training the choice is made after all experts were given an even share of the pass's tokens, by a bias on the
//! logits that is found anew each pass; weights are those of the softmax alone. Evaluation chooses the k highest logits, since no token
//! may depend on the ones after it.

use moe_kernels::{Choice, RankedBy};

use super::GateForm;
use crate::routing::RouterConfig;

pub(super) fn form(config: &RouterConfig) -> GateForm {
    GateForm {
        renormalize: config.renormalize,
        sinkhorn_iterations: config.sinkhorn_iterations,
        choice: Choice { by: RankedBy::Logit, ..Choice::default() },
        ..GateForm::PLAIN
    }
}
