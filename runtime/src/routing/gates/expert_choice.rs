//! Expert choice (Zhou et al. 2022): in training each expert takes the k · T / E tokens of the pass that score highest for it, so that loads are
//! even without a loss and a token gets more experts or fewer. Which tokens an expert takes depends on all of the pass, the later ones
//! included: a language model trained so looks ahead. Evaluation therefore gives each token its k highest, which no later token changes.

use super::GateForm;

pub(super) fn form() -> GateForm {
    GateForm { experts_choose: true, ..GateForm::PLAIN }
}
