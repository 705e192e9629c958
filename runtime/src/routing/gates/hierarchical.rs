//! Hierarchical mixtures of experts (Jordan and Jacobs 1994; Shazeer et al. 2017, appendix B): a softmax over `router.expert_groups` groups, and
//! one over the experts inside each. An expert's probability is the product of both; a token's k experts are the likeliest of its
//! `router.groups_per_token` likeliest groups, and both levels weigh what they give.

use moe_kernels::Fold;

use super::{GateForm, Logits};
use crate::routing::RouterConfig;

pub(super) fn form(config: &RouterConfig) -> GateForm {
    GateForm {
        renormalize: config.renormalize,
        logits: Logits::Folded(Fold::Groups(config.expert_groups)),
        ..GateForm::PLAIN
    }
}
