//! Reading a checkpoint: verified first, then each rank its own parts, under any layout.
//!
//! Owns the refusal of what is damaged or of another model. It writes no file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use moe_kernels::{Device, ViewMut};
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use super::CheckpointError;
use super::agree::{SlowPhase, agree};
use super::error::{TensorFault, TensorFaults};
use super::manifest::{FileEntry, MANIFEST, Manifest, Progress};
use super::names::{self, FIRST_MOMENT, SECOND_MOMENT};
use super::tensor_file::{TensorFile, plain_file};
use crate::collectives::Communicator;
use crate::data::hexadecimal;
use crate::model::layout::{Part, PartKind};
use crate::model::{ModelConfig, Parameters};
use crate::routing::RouterConfig;

/// Bytes hashed at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A checkpoint whose manifest is valid and whose files are there, each of its length.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
}

/// Flat buffers of AdamW's moments, in the layout of the parameters, to fill.
pub struct MomentsMut<'a, B: Device> {
    /// First moment.
    pub m: &'a mut B::Buffer<f32>,
    /// Second moment.
    pub v: &'a mut B::Buffer<f32>,
}

/// What a checkpoint is read into, as one rank holds it.
pub struct Target<'a, B: Device> {
    /// Sizes of the model.
    pub model: &'a ModelConfig,
    /// Its routing.
    pub router: &'a RouterConfig,
    /// This rank's parameters.
    pub parameters: &'a mut Parameters<B>,
    /// The optimizer's state; none where no training follows.
    pub moments: Option<MomentsMut<'a, B>>,
}

/// What a checkpoint holds beside tensors of the layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Restored {
    /// How far the run had come.
    pub progress: Progress,
    /// Selection biases: (block, `[E]`).
    pub router_biases: Vec<(usize, Vec<f32>)>,
}

impl Checkpoint {
    /// Opens the directory of one checkpoint. Hashes are not compared yet: [`Checkpoint::load`] and [`Checkpoint::verify`] do.
    ///
    /// # Errors
    /// There is no manifest, it is damaged or of a later version, or a file is missing or of another length.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join(MANIFEST);
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(CheckpointError::NoCheckpoint { dir: dir.to_owned() });
            }
            bytes => bytes.map_err(CheckpointError::io("read", &path))?,
        };
        // A byte that is no character was changed like any other: its seal tells.
        let text = String::from_utf8_lossy(&bytes);
        let manifest = Manifest::parse(&path, &text)?;
        for FileEntry { name, bytes, .. } in &manifest.files {
            let file = plain_file(&path, name)?;
            let found_bytes = file.metadata().map_err(CheckpointError::io("read", &file))?.len();
            if found_bytes != *bytes {
                return Err(CheckpointError::Length { path: file, expected_bytes: *bytes, found_bytes });
            }
        }
        Ok(Self { dir: dir.to_owned(), manifest })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Compares every file with its hash.
    ///
    /// # Errors
    /// A file that cannot be read, and the first whose bytes are not those that were written.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        self.verify_share(0, 1)
    }

    /// Compares every `of`-th file with its hash, from `index` on.
    fn verify_share(&self, index: usize, of: usize) -> Result<(), CheckpointError> {
        for FileEntry { name, sha256, .. } in self.manifest.files.iter().skip(index).step_by(of) {
            let path = self.dir.join(name);
            let found = hash_file(&path).map_err(CheckpointError::io("read", &path))?;
            if found != *sha256 {
                return Err(CheckpointError::Hash { path, expected: sha256.clone(), found });
            }
        }
        Ok(())
    }

    /// Verifies all files, then reads this rank's parts. All ranks of `world` call this. Nothing is changed before every file is
    /// verified. Each file is hashed by one rank, in turn, so that a world verifies as fast as its ranks can together.
    ///
    /// # Errors
    /// Any rank's failure, on all ranks: a model other than the target's, a file that is not what was written.
    pub fn load<B, C>(&self, device: &B, world: &C, target: Target<'_, B>) -> Result<Restored, CheckpointError>
    where
        B: Device,
        C: Communicator<B>,
    {
        let _slow = SlowPhase::begin(world.context());
        let same_model = self.refuse_other_model(target.model, target.router);
        agree(world, same_model.and_then(|()| self.verify_share(world.rank(), world.size())))?;
        let mut reader = Reader::new(self);
        let read = reader.fill(device, target).and_then(|()| reader.router_biases());
        let (router_biases, outcome) = match read {
            Ok(biases) => (biases, Ok(())),
            Err(error) => (Vec::new(), Err(error)),
        };
        agree(world, outcome)?;
        Ok(Restored { progress: self.manifest.progress.clone(), router_biases })
    }

    fn refuse_other_model(&self, model: &ModelConfig, router: &RouterConfig) -> Result<(), CheckpointError> {
        let differences = self.manifest.differences(model, router);
        if differences.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::OtherModel { dir: self.dir.clone(), differences })
    }
}

/// Reads tensors by name, opening each file once. Hashes are not compared here.
pub(super) struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    /// Which file has a tensor.
    places: BTreeMap<&'a str, &'a str>,
    open: BTreeMap<&'a str, TensorFile>,
}

impl<'a> Reader<'a> {
    /// A reader of a checkpoint that is open.
    pub(super) fn new(checkpoint: &'a Checkpoint) -> Self {
        let files = checkpoint.manifest.files.iter();
        let places =
            files.flat_map(|file| file.tensors.iter().map(|tensor| (tensor.name.as_str(), file.name.as_str())));
        Self { checkpoint, places: places.collect(), open: BTreeMap::new() }
    }

    fn fill<B: Device>(&mut self, device: &B, target: Target<'_, B>) -> Result<(), CheckpointError> {
        let Target { parameters, mut moments, .. } = target;
        let parts: Vec<Part> = parameters.layout().parts().map(|(part, _)| part.clone()).collect();
        // A model that was never trained here has none; they start as zeros, which the target's are before it is filled.
        let without_moments = self.checkpoint.manifest.progress.optimizer_step == 0
            && !self.places.keys().any(|name| name.starts_with(FIRST_MOMENT) || name.starts_with(SECOND_MOMENT));
        for part in &parts {
            let name = names::tensor_name(self.checkpoint.manifest.model.family, part.id);
            parameters.set(device, part, &self.read(&name, &part.shape)?);
            if let Some(moments) = moments.as_mut().filter(|_| !without_moments) {
                for (prefix, buffer) in [(FIRST_MOMENT, &mut *moments.m), (SECOND_MOMENT, &mut *moments.v)] {
                    let values = self.read(&format!("{prefix}{name}"), &part.shape)?;
                    device.upload(&values, ViewMut::range(buffer, part.range.clone()));
                }
            }
        }
        Ok(())
    }

    /// The values of a part of the model.
    pub(super) fn read_part(&mut self, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        let name = names::tensor_name(self.checkpoint.manifest.model.family, part.id);
        self.read(&name, &part.shape)
    }

    /// Selection biases: (block, `[E]`).
    pub(super) fn router_biases(&mut self) -> Result<Vec<(usize, Vec<f32>)>, CheckpointError> {
        let Manifest { model, files, .. } = &self.checkpoint.manifest;
        let mut biases = Vec::new();
        for tensor in files.iter().flat_map(|file| &file.tensors) {
            if let Some(id) = names::part_id(model.family, &tensor.name)
                && let (PartKind::RouterBias, Some(layer)) = (id.kind, id.layer)
            {
                biases.push((layer, self.read(&tensor.name, &[model.experts_in(layer)])?));
            }
        }
        Ok(biases)
    }

    fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let dir = &self.checkpoint.dir;
        let refuse = |fault| CheckpointError::Tensors { dir: dir.clone(), faults: TensorFaults(vec![fault]) };
        let missing =
            || refuse(TensorFault::Missing { name: name.to_owned(), expected: shape.to_vec(), promised: None });
        let place = *self.places.get(name).ok_or_else(missing)?;
        if !self.open.contains_key(place) {
            self.open.insert(place, TensorFile::open(&dir.join(place))?);
        }
        let file = &self.open[place];
        let info = file.info(name).ok_or_else(missing)?;
        if info.shape != shape {
            let (found, expected) = (info.shape.clone(), shape.to_vec());
            return Err(refuse(TensorFault::Shape { name: name.to_owned(), file: place.to_owned(), found, expected }));
        }
        if info.dtype != Dtype::F32 {
            let found = info.dtype.to_string();
            return Err(refuse(TensorFault::Dtype { name: name.to_owned(), file: place.to_owned(), found }));
        }
        file.read(name)
    }
}

fn hash_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hexadecimal(&hash.finalize())),
            read => hash.update(&chunk[..read]),
        }
    }
}
