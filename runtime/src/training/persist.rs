//! A trainer's state to a checkpoint and back.
//!
//! Owns which parts of a trainer make up its state. Files are `checkpoint`'s, and when to save is the caller's.

use std::path::PathBuf;

use moe_kernels::Backend;
use serde_json::Value;

use super::step::{StepError, Trainer, TrainingData};
use crate::checkpoint::{Checkpoint, CheckpointError, Moments, MomentsMut, Progress, Store, Target, TrainingState};
use crate::collectives::Communicator;
use crate::exit::{Classified, ExitCode};
use crate::model::{ModelError, Transformer};

/// A state that could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The files, or another rank's.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device.
    #[error(transparent)]
    Step(#[from] StepError),
}

impl Classified for PersistError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Checkpoint(error) => error.exit_code(),
            Self::Step(error) => error.exit_code(),
        }
    }
}

impl From<ModelError> for PersistError {
    fn from(error: ModelError) -> Self {
        Self::Step(error.into())
    }
}

impl<B: Backend, C: Communicator<B>, D: TrainingData> Trainer<B, C, D> {
    /// Writes the state after `step` steps into `store`. All ranks call this.
    pub fn save(&self, store: &Store, step: u64, cursor: Value) -> Result<PathBuf, PersistError> {
        let setup = self.model.setup();
        let (m, v) = self.optimizer.moments();
        let biases = self.model.selection_biases()?;
        let progress = Progress { step, optimizer_step: self.optimizer.updates(), cursor };
        let state = TrainingState {
            model: &setup.model,
            router: &setup.router,
            parameters: self.model.parameters(),
            moments: Moments { m, v },
            router_biases: &biases,
            progress: &progress,
        };
        Ok(store.save(self.model.device(), &self.groups().world, &setup.grid, &state)?)
    }

    /// Restores the state that a checkpoint holds and returns how far it had come. All ranks call this.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<Progress, PersistError> {
        let device = self.model.device().clone();
        let setup = self.model.setup().clone();
        let (m, v) = self.optimizer.moments_mut();
        let target = Target {
            model: &setup.model,
            router: &setup.router,
            parameters: self.model.parameters_mut(),
            moments: Some(MomentsMut { m, v }),
        };
        let restored = checkpoint.load(&device, &self.groups.world, target)?;
        set_biases(&mut self.model, &restored.router_biases);
        self.optimizer.set_updates(restored.progress.optimizer_step);
        Ok(restored.progress)
    }
}

/// Loads the model of a checkpoint, without the optimizer's state. All ranks of `world` call this.
pub fn load_model<B: Backend, C: Communicator<B>>(
    model: &mut Transformer<B>,
    world: &C,
    checkpoint: &Checkpoint,
) -> Result<(), PersistError> {
    let device = model.device().clone();
    let setup = model.setup().clone();
    let target =
        Target { model: &setup.model, router: &setup.router, parameters: model.parameters_mut(), moments: None };
    let restored = checkpoint.load(&device, world, target)?;
    set_biases(model, &restored.router_biases);
    Ok(())
}

fn set_biases<B: Backend>(model: &mut Transformer<B>, biases: &[(usize, Vec<f32>)]) {
    for (layer, bias) in biases {
        // The configurations agree, so the gate has a bias.
        model.set_selection_bias(*layer, bias);
    }
}
