//! GShard (Lepikhin et al. 2020): two experts, weights divided by their sum; in training the second is dispatched with
//! probability min(1, 2·w₂), which saves capacity where it matters little.

use super::GateForm;

pub(super) fn form() -> GateForm {
    GateForm { renormalize: true, random_second: true, ..GateForm::PLAIN }
}
