//! Training: the step, the run around it, evaluation and sampling.

mod evaluation;
mod persist;
mod sampling;
mod step;

pub use evaluation::{TextLoss, text_loss};
pub use persist::{PersistError, load_model};
pub use sampling::{Sampling, generate};
pub use step::{Requests, StepError, Trainer, TrainingData};
