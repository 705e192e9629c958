//! Training: the step, the run around it, evaluation and sampling.

mod sampling;
mod step;

pub use sampling::{Sampling, generate};
pub use step::{Requests, StepError, Trainer, TrainingData};
