//! The k highest logits, then a softmax over them: Mixtral (Jiang et al. 2024). The same numbers as a softmax over all experts
//! whose k highest are divided by their sum, which also gives the probabilities that the balance loss needs.

use super::GateForm;

pub(super) fn form() -> GateForm {
    GateForm { renormalize: true, ..GateForm::PLAIN }
}
