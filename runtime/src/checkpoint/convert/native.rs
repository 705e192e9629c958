//! In: a native checkpoint of a model that was not trained here.
//!
//! Owns the checkpoint of step 0: the model's tensors, no optimizer state, read back before it counts.

use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::Value;

use super::account::{Account, Transfer};
use super::{CheckpointModel, ModelTensors, OnTensor};
use crate::checkpoint::manifest::{Manifest, Progress};
use crate::checkpoint::save::file_of;
use crate::checkpoint::tensor_file::encode;
use crate::checkpoint::tensor_writer::write_tensors;
use crate::checkpoint::{Checkpoint, CheckpointError, Store, names};
use crate::model::layout::{Part, PartId, PartKind};

/// Where a tensor's values are.
enum Source {
    Part(Part),
    Bias(Vec<f32>),
}

type Planned = (String, Vec<usize>, Source);

/// Writes a model as the checkpoint of step 0 of `store`, which must have none: training starts from it as from initial weights.
///
/// # Errors
/// The store has checkpoints; the source cannot be read; the checkpoint cannot be written, or what is in it is not what was
/// read. Then there is no checkpoint.
pub fn write_checkpoint(
    source: &mut dyn ModelTensors,
    store: &Store,
    on_tensor: OnTensor<'_>,
) -> Result<(PathBuf, Transfer), CheckpointError> {
    if let Some(existing) = store.latest()? {
        return Err(CheckpointError::Exists { path: existing.dir().to_owned() });
    }
    let progress = Progress { step: 0, optimizer_step: 0, cursor: Value::Null };
    let name = store.begin(progress.step)?;
    let outcome = fill(source, store, &name, progress, on_tensor);
    if outcome.is_err() {
        // The first error is the one to report; what stays is removed by the next writer.
        let _ = store.discard(&name);
    }
    let (read, manifest) = outcome?;
    store.commit(&name, &manifest)?;
    let dir = store.step_dir(0);
    let settled = read_back(&dir).and_then(|written| read.settle(&written, &dir));
    match settled {
        Ok(transfer) => Ok((dir, transfer)),
        Err(error) => {
            // As above: a checkpoint that is not what was read must not stay.
            let _ = std::fs::remove_dir_all(&dir);
            Err(error)
        }
    }
}

fn fill(
    source: &mut dyn ModelTensors,
    store: &Store,
    name: &str,
    progress: Progress,
    on_tensor: OnTensor<'_>,
) -> Result<(Account, Manifest), CheckpointError> {
    let dir = store.dir().join(name);
    let mut files = BTreeMap::<String, Vec<Planned>>::new();
    let model = source.model().clone();
    let family = model.family;
    for part in source.parts() {
        let (name, shape) = (names::tensor_name(family, part.id), part.shape.clone());
        files.entry(file_of("model", &model, part.id)).or_default().push((name, shape, Source::Part(part)));
    }
    for (layer, bias) in source.router_biases()? {
        let id = PartId { kind: PartKind::RouterBias, layer: Some(layer), expert: None };
        let (name, shape) = (names::tensor_name(family, id), vec![bias.len()]);
        files.entry(file_of("model", &model, id)).or_default().push((name, shape, Source::Bias(bias)));
    }
    let all = files.values().map(Vec::len).sum();
    let (mut read, mut done) = (Account::default(), 0);
    let mut entries = Vec::new();
    for (file, tensors) in &files {
        let list: Vec<_> = tensors.iter().map(|(name, shape, _)| (name.as_str(), shape.as_slice())).collect();
        entries.push(write_tensors(&dir, file, Dtype::F32, &list, |at| {
            let (name, shape, values) = &tensors[at];
            let bytes = match values {
                Source::Part(part) => encode(&source.read(part)?),
                Source::Bias(bias) => encode(bias),
            };
            read.enter(name, Dtype::F32, shape, &bytes);
            done += 1;
            on_tensor(done, all);
            Ok(bytes)
        })?);
    }
    Ok((read, Manifest::new(progress, source.model().clone(), source.router().clone(), entries)))
}

/// What a checkpoint holds, from the disk.
fn read_back(dir: &std::path::Path) -> Result<Account, CheckpointError> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut model = CheckpointModel::verified(&checkpoint)?;
    let family = model.model().family;
    let mut written = Account::default();
    for part in model.parts() {
        let bytes = encode(&model.read(&part)?);
        written.enter(&names::tensor_name(family, part.id), Dtype::F32, &part.shape, &bytes);
    }
    for (layer, bias) in model.router_biases()? {
        let id = PartId { kind: PartKind::RouterBias, layer: Some(layer), expert: None };
        written.enter(&names::tensor_name(family, id), Dtype::F32, &[bias.len()], &encode(&bias));
    }
    Ok(written)
}
