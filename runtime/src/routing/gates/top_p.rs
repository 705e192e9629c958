//! Dynamic k (Huang et al. 2024, "Harder Tasks Need More Experts"): a token takes experts in the order of their probabilities until these
//! sum to `router.top_p`, at least `router.least_choices` of them and at most `model.top_k`.

use moe_kernels::{Choice, Enough};

use super::GateForm;
use crate::routing::RouterConfig;

pub(super) fn form(config: &RouterConfig) -> GateForm {
    let enough = Enough { mass: config.top_p, least: config.least_choices };
    GateForm {
        renormalize: config.renormalize,
        choice: Choice { enough: Some(enough), ..Choice::default() },
        ..GateForm::PLAIN
    }
}
