//! Models from one form on disk to another: out to Hugging Face, in from it, from dense to experts, several into one.
//!
//! Owns the way of every tensor from where it is to where it goes, and the rule that no way ends in success unless each tensor
//! was read back and is what was to be written. A source is read one tensor at a time, so that a model larger than memory passes
//! through. It computes with no model and reads no text.

mod account;
mod companions;
mod export;
mod hf_form;
mod merge;
mod native;
mod upcycle;

pub use account::Transfer;
pub use companions::Companions;
pub use export::{ExportOptions, Precision, export};
pub use hf_form::{families_for, reasons_against};
pub use merge::{MergeError, Merged, weights_from_losses};
pub use native::write_checkpoint;
pub use upcycle::{ExpertsFrom, Slices, UpcycleError, UpcycleOptions, Upcycled};

use super::{Checkpoint, CheckpointError, HfFolder};
use crate::checkpoint::load::Reader;
use crate::model::ModelConfig;
use crate::model::layout::{Layout, Part};
use crate::routing::RouterConfig;

/// A model whose tensors can be had one after the other.
pub trait ModelTensors {
    /// Sizes; valid.
    fn model(&self) -> &ModelConfig;
    /// Routing.
    fn router(&self) -> &RouterConfig;
    /// The values of a part of the model's layout.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&mut self, part: &Part) -> Result<Vec<f32>, CheckpointError>;
    /// Selection biases of the gates that have one: (block, `[E]`).
    ///
    /// # Errors
    /// They cannot be read.
    fn router_biases(&mut self) -> Result<Vec<(usize, Vec<f32>)>, CheckpointError> {
        Ok(Vec::new())
    }

    /// Every part, whoever holds it.
    fn parts(&self) -> Vec<Part> {
        let layout = Layout::new(self.model(), self.router(), 0..self.model().experts);
        layout.parts().map(|(part, _)| part.clone()).collect()
    }
}

impl ModelTensors for &HfFolder {
    fn model(&self) -> &ModelConfig {
        self.model_config()
    }

    fn router(&self) -> &RouterConfig {
        self.router_config()
    }

    fn read(&mut self, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        HfFolder::read(self, part)
    }
}

/// The model of a checkpoint, whose files were compared with their hashes.
pub struct CheckpointModel<'a> {
    checkpoint: &'a Checkpoint,
    reader: Reader<'a>,
}

impl<'a> CheckpointModel<'a> {
    /// Verifies every file first.
    ///
    /// # Errors
    /// A file cannot be read, or is not what was written.
    pub fn verified(checkpoint: &'a Checkpoint) -> Result<Self, CheckpointError> {
        checkpoint.verify()?;
        Ok(Self { checkpoint, reader: Reader::new(checkpoint) })
    }
}

impl ModelTensors for CheckpointModel<'_> {
    fn model(&self) -> &ModelConfig {
        &self.checkpoint.manifest().model
    }

    fn router(&self) -> &RouterConfig {
        &self.checkpoint.manifest().router
    }

    fn read(&mut self, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        self.reader.read_part(part)
    }

    fn router_biases(&mut self) -> Result<Vec<(usize, Vec<f32>)>, CheckpointError> {
        self.reader.router_biases()
    }
}

/// Hears how many of all tensors are done.
pub type OnTensor<'a> = &'a mut dyn FnMut(usize, usize);
