//! Noisy top-k (Shazeer et al. 2017): logits + noise · softplus(x·W_noise), softmax over the k highest; cv² losses of importance
//! (summed weights) and of load (a smooth count of tokens) keep the experts even. Evaluation adds no noise.

use super::GateForm;

pub(super) fn form() -> GateForm {
    GateForm { renormalize: true, noisy: true, ..GateForm::PLAIN }
}
