//! Switch (Fedus, Zoph and Shazeer 2021): one expert, weighted by its softmax probability, so that the router has a gradient.

use super::GateForm;

pub(super) fn form() -> GateForm {
    GateForm::PLAIN
}
