//! Training: the step, the run around it, evaluation and sampling.

mod persist;
mod sampling;
mod sharing;
mod step;

pub use persist::{PersistError, load_model};
pub use sampling::{Sampling, generate};
pub use step::{Requests, StepError, Trainer, TrainingData};
