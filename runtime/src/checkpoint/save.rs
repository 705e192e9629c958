//! Writing a checkpoint: every logical tensor once, by the rank that has it.
//!
//! Owns which rank writes which file. The cut into files follows the model, one for what is replicated and one for each expert,
//! so that the same state gives the same bytes whatever the layout that writes it. When and where to save is not decided here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moe_kernels::Device;
use safetensors::Dtype;

use super::CheckpointError;
use super::agree::{SlowPhase, agree, gather};
use super::manifest::{FileEntry, Manifest, Progress};
use super::names::{self, FIRST_MOMENT, SECOND_MOMENT};
use super::store::Store;
use super::tensor_file::encode;
use super::tensor_writer::write_tensors;
use crate::collectives::Communicator;
use crate::model::layout::{Ownership, Part, PartId, PartKind};
use crate::model::{ModelConfig, Parameters, parameters};
use crate::routing::RouterConfig;
use crate::topology::{Grid, Rank};

/// Flat buffers of AdamW's moments, in the layout of the parameters.
pub struct Moments<'a, B: Device> {
    /// First moment.
    pub m: &'a B::Buffer<f32>,
    /// Second moment.
    pub v: &'a B::Buffer<f32>,
}

/// All that a run needs to go on, as one rank holds it.
pub struct TrainingState<'a, B: Device> {
    /// Sizes of the model.
    pub model: &'a ModelConfig,
    /// Its routing.
    pub router: &'a RouterConfig,
    /// This rank's parameters.
    pub parameters: &'a Parameters<B>,
    /// The optimizer's state of the same.
    pub moments: Moments<'a, B>,
    /// Selection biases, the same on all ranks: (block, `[E]`).
    pub router_biases: &'a [(usize, Vec<f32>)],
    /// How far the run has come.
    pub progress: &'a Progress,
}

/// Where a tensor's values are.
enum Source<'a> {
    Parameter(&'a Part),
    FirstMoment(&'a Part),
    SecondMoment(&'a Part),
    Bias(&'a [f32]),
}

/// A tensor to write.
struct Planned<'a> {
    name: String,
    shape: Vec<usize>,
    source: Source<'a>,
}

impl Store {
    /// Writes a checkpoint of the step that `state` has come to, and prunes older ones. Each expert is written by its rank of the
    /// first expert group, everything else by rank 0. All ranks of `world`, which is that of `grid`, call this.
    ///
    /// # Errors
    /// Any rank's failure, on all ranks; then there is no such checkpoint, and nothing is left of it.
    pub fn save<B, C>(
        &self,
        device: &B,
        world: &C,
        grid: &Grid,
        state: &TrainingState<'_, B>,
    ) -> Result<PathBuf, CheckpointError>
    where
        B: Device,
        C: Communicator<B>,
    {
        let _slow = SlowPhase::begin(world.context());
        let step = state.progress.step;
        let first = world.rank() == 0;
        let begun = if first { self.begin(step) } else { Ok(String::new()) };
        let name = gather(world, begun)?.swap_remove(0);
        let plan = plan(state, grid, Rank(world.rank()));
        let written = gather(world, write_files(device, state, &self.dir().join(&name), &plan));
        let outcome = written.and_then(|files| {
            let files = files.into_iter().flatten().collect();
            let manifest = Manifest::new(state.progress.clone(), state.model.clone(), state.router.clone(), files);
            if first { self.commit(&name, &manifest) } else { Ok(()) }
        });
        if first && outcome.is_err() {
            // What cannot be removed now is removed by the next writer; the first error is the one to report.
            let _ = self.discard(&name);
        }
        agree(world, outcome)?;
        Ok(self.step_dir(step))
    }
}

/// The files that `rank` writes, by name, and the tensors in each, in an order that no layout changes.
fn plan<'a, B: Device>(state: &'a TrainingState<'_, B>, grid: &Grid, rank: Rank) -> BTreeMap<String, Vec<Planned<'a>>> {
    let mut files: BTreeMap<String, Vec<Planned<'a>>> = BTreeMap::new();
    let family = state.model.family;
    let writes_experts = grid.coordinate(rank).dp == 0;
    for (part, ownership) in state.parameters.layout().parts() {
        let mine = match ownership {
            Ownership::Replicated => rank == Rank(0),
            Ownership::Expert => writes_experts,
        };
        if !mine {
            continue;
        }
        let name = names::tensor_name(family, part.id);
        let mut add = |file: String, name: String, source| {
            files.entry(file).or_default().push(Planned { name, shape: part.shape.clone(), source });
        };
        let optimizer = file_of("optimizer", state.model, part.id);
        add(optimizer.clone(), format!("{FIRST_MOMENT}{name}"), Source::FirstMoment(part));
        add(optimizer, format!("{SECOND_MOMENT}{name}"), Source::SecondMoment(part));
        add(file_of("model", state.model, part.id), name, Source::Parameter(part));
    }
    if rank == Rank(0) {
        let file = files.entry("model.safetensors".to_owned()).or_default();
        file.extend(state.router_biases.iter().map(|(layer, bias)| {
            let id = PartId { kind: PartKind::RouterBias, layer: Some(*layer), expert: None };
            let (name, shape) = (names::tensor_name(family, id), vec![bias.len()]);
            Planned { name, shape, source: Source::Bias(bias) }
        }));
    }
    files
}

/// The file of a part of `model` among those whose names begin with `prefix`: one an expert, which one rank has in all layers; where layers have
/// different numbers of experts, one a layer and expert.
pub(super) fn file_of(prefix: &str, model: &ModelConfig, id: PartId) -> String {
    let uneven = model.layer_experts().iter().any(|&experts| experts != model.experts);
    match (id.expert, id.layer.filter(|_| uneven)) {
        (None, _) => format!("{prefix}.safetensors"),
        (Some(expert), None) => format!("{prefix}.expert-{expert:05}.safetensors"),
        (Some(expert), Some(layer)) => format!("{prefix}.layer-{layer:05}.expert-{expert:05}.safetensors"),
    }
}

fn write_files<B: Device>(
    device: &B,
    state: &TrainingState<'_, B>,
    dir: &Path,
    plan: &BTreeMap<String, Vec<Planned<'_>>>,
) -> Result<Vec<FileEntry>, CheckpointError> {
    let write = |(name, tensors): (&String, &Vec<Planned<'_>>)| {
        let list = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())).collect::<Vec<_>>();
        write_tensors(dir, name, Dtype::F32, &list, |at| Ok(encode(&state.values(device, &tensors[at].source)?)))
    };
    plan.iter().map(write).collect()
}

impl<B: Device> TrainingState<'_, B> {
    fn values(&self, device: &B, source: &Source<'_>) -> Result<Vec<f32>, CheckpointError> {
        Ok(match source {
            Source::Parameter(part) => self.parameters.read(device, part)?,
            Source::FirstMoment(part) => parameters::read(device, self.moments.m, part)?,
            Source::SecondMoment(part) => parameters::read(device, self.moments.v, part)?,
            Source::Bias(bias) => bias.to_vec(),
        })
    }
}
