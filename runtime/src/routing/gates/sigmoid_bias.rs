//! Sigmoid scores with bias-corrected choice (DeepSeek-V3, 2024; Wang et al. 2024, loss-free balancing): a bias an expert is added
//! for the choice alone and moves by a fixed rate towards even load after each step.

use moe_kernels::Score;

use super::GateForm;
use crate::routing::RouterConfig;

pub(super) fn form(config: &RouterConfig) -> GateForm {
    GateForm {
        score: Score::Sigmoid,
        renormalize: config.renormalize,
        scale: config.weight_scale,
        selection_bias: true,
        ..GateForm::PLAIN
    }
}
