//! Multi-gate mixtures of experts (MMoE, Ma et al. 2018): one router a task or domain over the same experts, softmax-topk each. A sequence's
//! tag (`data.sources.NAME.tag`) says which of the `router.tags` routers its tokens meet; text without a tag meets the first.

use moe_kernels::Fold;

use super::{GateForm, Logits};
use crate::routing::RouterConfig;

pub(super) fn form(config: &RouterConfig) -> GateForm {
    GateForm {
        renormalize: config.renormalize,
        logits: Logits::Folded(Fold::Routers(config.tags.max(1))),
        ..GateForm::PLAIN
    }
}
