//! Training: the step, evaluation, sampling, and a trainer's state to a checkpoint and back.
//!
//! Owns the arithmetic of a step over ranks. When steps, evaluations and checkpoints happen is `worker`'s.

mod evaluation;
mod persist;
mod sampling;
mod sharing;
mod step;

pub(crate) use sharing::gaps;

pub use evaluation::{EvalText, TextLoss, text_loss};
pub use persist::{PersistError, load_model};
pub use sampling::{Sampling, generate};
pub use step::{Requests, StepError, Trainer, TrainingData};
