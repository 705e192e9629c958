//! Softmax over all experts, then the k highest: OLMoE (Muennighoff et al. 2024), Qwen2-MoE and Qwen3-MoE. Whether the k
//! weights are divided by their sum is the family's choice (`norm_topk_prob`).

use super::GateForm;
use crate::routing::RouterConfig;

pub(super) fn form(config: &RouterConfig) -> GateForm {
    GateForm { renormalize: config.renormalize, ..GateForm::PLAIN }
}
