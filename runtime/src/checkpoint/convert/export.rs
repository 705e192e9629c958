//! Out to a Hugging Face folder: config.json, safetensors in shards with their index, tokenizer, generation settings.
//!
//! Owns the folder. It is filled under a temporary name, read back, and takes its place only when every tensor in it is what
//! was read.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::account::{Account, Transfer};
use super::companions::Companions;
use super::hf_form::{config_json, families_for, model_type, reasons_against};
use super::{ModelTensors, OnTensor};
use crate::checkpoint::names;
use crate::checkpoint::tensor_file::encode;
use crate::checkpoint::tensor_writer::write_tensors;
use crate::checkpoint::{CheckpointError, HfFolder};
use crate::model::Family;
use crate::model::layout::Part;

/// The type of the tensors in a folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As trained.
    #[default]
    F32,
    /// Rounded to nearest, ties to even.
    Bf16,
}

impl Precision {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// The name that PyTorch gives it.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => encode(values),
            Self::Bf16 => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
        }
    }
}

/// How a folder is written.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Type of the tensors.
    pub precision: Precision,
    /// Bytes of tensors that one file holds at most; a larger tensor has a file of its own.
    pub shard_bytes: u64,
    /// The family to write it as; absent: the model's own.
    pub family: Option<Family>,
    /// What goes beside the tensors.
    pub companions: Companions,
}

impl ExportOptions {
    /// Bytes of a shard where nothing else is asked for.
    pub const SHARD_BYTES: u64 = 5_000_000_000;
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            precision: Precision::F32,
            shard_bytes: Self::SHARD_BYTES,
            family: None,
            companions: Companions::default(),
        }
    }
}

/// Writes a model as the Hugging Face folder `dir`, which must not exist or be empty.
///
/// # Errors
/// No class of the family computes what the model does; the source cannot be read; the folder cannot be written, or what is in
/// it is not what was read. Then there is no folder.
pub fn export(
    source: &mut dyn ModelTensors,
    dir: &Path,
    options: &ExportOptions,
    on_tensor: OnTensor<'_>,
) -> Result<Transfer, CheckpointError> {
    let family = options.family.unwrap_or(source.model().family);
    refuse_other_functions(source, family)?;
    let occupied = fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    if occupied || dir.is_file() {
        return Err(CheckpointError::Exists { path: dir.to_owned() });
    }
    let dir = std::path::absolute(dir).map_err(CheckpointError::io("find", dir))?;
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(CheckpointError::Exists { path: dir });
    };
    fs::create_dir_all(parent).map_err(CheckpointError::io("create", parent))?;
    let unfinished = parent.join(format!(".{}.tmp-{:016x}", name.to_string_lossy(), rand::random::<u64>()));
    fs::create_dir(&unfinished).map_err(CheckpointError::io("create", &unfinished))?;
    let written = fill(source, &unfinished, family, options, on_tensor).and_then(|transfer| {
        fs::rename(&unfinished, &dir).map_err(CheckpointError::io("rename", &unfinished)).map(|()| transfer)
    });
    if written.is_err() {
        // The first error is the one to report; what stays is under a hidden name.
        let _ = fs::remove_dir_all(&unfinished);
    }
    written
}

fn refuse_other_functions(source: &dyn ModelTensors, family: Family) -> Result<(), CheckpointError> {
    let reasons = reasons_against(family, source.model(), source.router());
    if reasons.is_empty() {
        return Ok(());
    }
    let others: Vec<_> = families_for(source.model(), source.router()).into_iter().map(model_type).collect();
    let advice = match &others[..] {
        [] => "no supported family computes this".to_owned(),
        others => format!("what it computes can be written as {}: give it as the family", others.join(" or ")),
    };
    Err(CheckpointError::NotExpressible { family: model_type(family), reasons, advice })
}

fn fill(
    source: &mut dyn ModelTensors,
    dir: &Path,
    family: Family,
    options: &ExportOptions,
    on_tensor: OnTensor<'_>,
) -> Result<Transfer, CheckpointError> {
    let dtype = options.precision.dtype();
    let tensors: Vec<(String, Part)> =
        source.parts().into_iter().map(|part| (names::tensor_name(family, part.id), part)).collect();
    let shards = cut(&tensors, dtype, options.shard_bytes);
    let (mut read, mut done) = (Account::default(), 0);
    let mut map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = file_name(number, shards.len());
        let list: Vec<_> = shard.iter().map(|(name, part)| (name.as_str(), part.shape.as_slice())).collect();
        write_tensors(dir, &file, dtype, &list, |at| {
            let (name, part) = &shard[at];
            let bytes = options.precision.encode(&source.read(part)?);
            read.enter(name, dtype, &part.shape, &bytes);
            done += 1;
            on_tensor(done, tensors.len());
            Ok(bytes)
        })?;
        map.extend(shard.iter().map(|(name, _)| (name.clone(), Value::from(file.as_str()))));
    }
    if shards.len() > 1 {
        let bytes: usize = tensors.iter().map(|(_, part)| part.range.len() * dtype.bitsize() / 8).sum();
        let index = json!({"metadata": {"total_size": bytes}, "weight_map": map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    let form = config_json(family, source.model(), source.router(), options.precision.name(), &options.companions);
    write_json(&dir.join("config.json"), &form)?;
    options.companions.write(dir)?;
    // From the disk, as any reader would: names, shapes and the index are checked by opening it.
    let folder = HfFolder::open(dir)?;
    let mut written = Account::default();
    let stored: Vec<_> =
        folder.tensors().map(|(name, dtype, shape)| (name.to_owned(), dtype, shape.to_vec())).collect();
    for (name, dtype, shape) in stored {
        written.enter(&name, dtype, &shape, &folder.stored(&name)?);
    }
    read.settle(&written, dir)
}

/// Consecutive runs of tensors of at most `shard_bytes` each.
fn cut(tensors: &[(String, Part)], dtype: Dtype, shard_bytes: u64) -> Vec<&[(String, Part)]> {
    let (mut shards, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (at, (_, part)) in tensors.iter().enumerate() {
        let size = (part.range.len() * dtype.bitsize() / 8) as u64;
        if at > start && bytes + size > shard_bytes {
            shards.push(&tensors[start..at]);
            (start, bytes) = (at, 0);
        }
        bytes += size;
    }
    shards.push(&tensors[start..]);
    shards
}

fn file_name(number: usize, of: usize) -> String {
    match of {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{of:05}.safetensors", number + 1),
    }
}

fn write_json(path: &PathBuf, value: &Value) -> Result<(), CheckpointError> {
    let text = format!("{value:#}\n");
    fs::write(path, text).map_err(CheckpointError::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::layout::{PartId, PartKind};

    fn part(elements: usize) -> (String, Part) {
        let id = PartId { kind: PartKind::Embedding, layer: None, expert: None };
        (String::new(), Part { id, range: 0..elements, shape: vec![elements] })
    }

    #[test]
    fn shards_hold_what_fits_and_one_tensor_at_least() {
        let tensors = [part(4), part(4), part(1), part(100), part(2)];
        let sizes =
            |dtype, bytes| -> Vec<usize> { cut(&tensors, dtype, bytes).iter().map(|shard| shard.len()).collect() };
        assert_eq!(sizes(Dtype::F32, 36), [3, 1, 1]);
        assert_eq!(sizes(Dtype::BF16, 36), [3, 1, 1]);
        assert_eq!(sizes(Dtype::F32, 10_000), [5]);
        assert_eq!(sizes(Dtype::F32, 1), [1, 1, 1, 1, 1]);
        assert_eq!(
            (file_name(0, 1), file_name(1, 3)),
            ("model.safetensors".into(), "model-00002-of-00003.safetensors".into())
        );
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        let bits = |value: f32| u16::from_le_bytes(Precision::Bf16.encode(&[value]).try_into().unwrap());
        assert_eq!(bits(1.0 + 1.0 / 256.0), 0x3f80, "a tie goes down to the even one");
        assert_eq!(bits(1.0 + 3.0 / 256.0), 0x3f82, "a tie goes up to the even one");
        assert_eq!(bits(f32::NEG_INFINITY), 0xff80);
    }
}
