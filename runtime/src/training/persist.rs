//! A trainer's state to a checkpoint and back.
//!
//! Owns which parts of a trainer make up its state. Files are `checkpoint`'s, and when to save is the caller's.

use std::path::PathBuf;

use moe_kernels::{Backend, Device, DeviceError};
use serde_json::Value;

use super::step::{StepError, Trainer, TrainingData};
use crate::checkpoint::{Checkpoint, CheckpointError, Moments, MomentsMut, Progress, Store, Target, TrainingState};
use crate::collectives::Communicator;
use crate::exit::{Classified, ExitCode};
use crate::model::Transformer;
use crate::pass_error::PassError;

/// First and second moments of all of a rank's parameters.
type WholeMoments<B> = (<B as Device>::Buffer<f32>, <B as Device>::Buffer<f32>);

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

impl From<DeviceError> for PersistError {
    fn from(error: DeviceError) -> Self {
        Self::Step(error.into())
    }
}

impl From<PassError> for PersistError {
    fn from(error: PassError) -> Self {
        Self::Step(error.into())
    }
}

impl<B: Backend, C: Communicator<B>, D: TrainingData> Trainer<B, C, D> {
    /// Writes the state after `step` steps into `store`. All ranks call this.
    pub fn save(&self, store: &Store, step: u64, cursor: Value) -> Result<PathBuf, PersistError> {
        let setup = self.model.setup();
        let (m, v) = self.optimizer.moments();
        let gathered = self.gathered_moments()?;
        let (m, v) = gathered.as_ref().map_or((m, v), |(m, v)| (m, v));
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

    /// Sharded moments in the parameters' layout, on the ranks that write them: those of the first expert group.
    fn gathered_moments(&self) -> Result<Option<WholeMoments<B>>, PersistError> {
        let shard = self.optimizer.shard();
        if !shard.dense.is_shared() {
            return Ok(None);
        }
        let setup = self.model.setup();
        let writes = setup.grid.coordinate(setup.rank).dp == 0;
        let (m, v) = self.optimizer.moments();
        let gather = |state| self.sharing.gather_state(&self.groups, shard, state, writes);
        Ok(Some((gather(m)?, gather(v)?)))
    }

    /// Restores the state that a checkpoint holds and returns how far it had come. All ranks call this.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<Progress, PersistError> {
        let device = self.model.device().clone();
        let setup = self.model.setup().clone();
        let shard = self.optimizer.shard().clone();
        let len = self.model.parameters().len();
        // A checkpoint knows no shards: whole moments are read, and this rank's part of them kept.
        let mut whole = match shard.dense.is_shared() {
            true => Some((device.alloc(len, "loaded moments")?, device.alloc(len, "loaded moments")?)),
            false => None,
        };
        let (m, v) = match &mut whole {
            Some((m, v)) => (m, v),
            None => self.optimizer.moments_mut(),
        };
        let target = Target {
            model: &setup.model,
            router: &setup.router,
            parameters: self.model.parameters_mut(),
            moments: Some(MomentsMut { m, v }),
        };
        let restored = checkpoint.load(&device, &self.groups.world, target)?;
        if let Some((whole_m, whole_v)) = &whole {
            let (m, v) = self.optimizer.moments_mut();
            self.sharing.take_state(&shard, whole_m, m);
            self.sharing.take_state(&shard, whole_v, v);
        }
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
