//! Where a model is: a run directory, one checkpoint, or a Hugging Face folder.
//!
//! Owns telling them apart, and the tokenizer that goes with a model. It changes nothing on disk.

use std::path::{Path, PathBuf};

use moe_kernels::{Backend, Cpu};
use moe_runtime::checkpoint::convert::{CheckpointModel, Companions, ModelTensors};
use moe_runtime::checkpoint::{Checkpoint, CheckpointError, HfFolder, Store};
use moe_runtime::collectives::{Context, Groups, HostCommunicator, local};
use moe_runtime::config::{Config, DataConfig};
use moe_runtime::data::{ByteTokenizer, CorpusSpec, FileTokenizer, Tokenizer, tokenizer};
use moe_runtime::dispatch::Room;
use moe_runtime::exit::{ExitCode, Failure};
use moe_runtime::model::{ModelConfig, ModelSetup, Recompute, Transformer};
use moe_runtime::routing::{RouterConfig, check_own_gate};
use moe_runtime::topology::{Grid, Rank};
use moe_runtime::training::load_model;
use moe_runtime::worker::RunDir;

/// What of a Hugging Face folder is kept beside the checkpoints of the run it became: tokenizer, special tokens.
pub(crate) const HUB: &str = "hub";

/// Tokens of a window where no run says how many the model was trained with.
const WINDOW: usize = 512;

/// A model on disk.
pub(crate) enum Place {
    /// A checkpoint, with its run where it is inside one.
    Run {
        /// The run directory with its configuration.
        run: Option<(PathBuf, Box<Config>)>,
        /// The checkpoint named, or the newest of the run.
        checkpoint: Checkpoint,
    },
    /// A folder of Hugging Face's form.
    Folder(HfFolder),
}

/// A model ready to compute on this process alone.
pub(crate) struct Loaded<B: Backend> {
    /// The model.
    pub model: Transformer<B>,
    /// This process as a world.
    pub groups: Groups<HostCommunicator>,
}

impl Place {
    /// What `path` means.
    pub(crate) fn find(path: &Path) -> Result<Self, Failure> {
        let run_dir = RunDir::at(path);
        if run_dir.checkpoints().is_dir() {
            return match Store::new(run_dir.checkpoints(), 0).latest()? {
                Some(checkpoint) => Ok(Self::Run { run: run_at(Some(path))?, checkpoint }),
                None => Err(Failure::new(ExitCode::Io, format!("{}: has no checkpoint yet", path.display()))),
            };
        }
        if path.join("config.json").is_file() {
            return Ok(Self::Folder(HfFolder::open(path)?));
        }
        match Checkpoint::open(path) {
            Ok(checkpoint) => Ok(Self::Run { run: run_at(path.parent().and_then(Path::parent))?, checkpoint }),
            Err(CheckpointError::NoCheckpoint { .. }) => {
                let (found, code) = match path.exists() {
                    true => ("holds no model", ExitCode::Usage),
                    false => ("there is no such folder", ExitCode::Io),
                };
                let accepted =
                    "accepted: a run directory, one checkpoint of it, or a Hugging Face folder with a config.json";
                Err(Failure::new(code, format!("{}: {found}; {accepted}", path.display())))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Where it is.
    pub(crate) fn dir(&self) -> &Path {
        match self {
            Self::Run { checkpoint, .. } => checkpoint.dir(),
            Self::Folder(folder) => folder.dir(),
        }
    }

    /// Sizes and routing.
    pub(crate) fn configs(&self) -> (&ModelConfig, &RouterConfig) {
        match self {
            Self::Run { checkpoint, .. } => (&checkpoint.manifest().model, &checkpoint.manifest().router),
            Self::Folder(folder) => (folder.model_config(), folder.router_config()),
        }
    }

    /// Its tensors; those of a checkpoint after all hashes were compared.
    pub(crate) fn tensors(&self) -> Result<Box<dyn ModelTensors + '_>, CheckpointError> {
        Ok(match self {
            Self::Run { checkpoint, .. } => Box::new(CheckpointModel::verified(checkpoint)?),
            Self::Folder(folder) => Box::new(folder),
        })
    }

    /// What goes beside its tensors in a Hugging Face folder.
    pub(crate) fn companions(&self) -> Result<Companions, Failure> {
        let (run, checkpoint) = match self {
            Self::Folder(folder) => return Ok(Companions::of_folder(folder.dir())?),
            Self::Run { run: None, .. } => return Ok(Companions::default()),
            Self::Run { run: Some(run), checkpoint } => (run, checkpoint),
        };
        let (dir, config) = run;
        let brought = Companions::of_folder(&dir.join(HUB))?;
        if checkpoint.manifest().progress.step == 0 && brought.has_tokenizer() {
            return Ok(brought);
        }
        // What it was trained with counts, not what it came with.
        let own = match tokenizer_of_run(dir, config) {
            name if name == ByteTokenizer::NAME => Companions::of_bytes(),
            file if Path::new(&file).exists() => Companions::of_tokenizer(&FileTokenizer::open(Path::new(&file))?)?,
            _ => Companions::default(),
        };
        Ok(own.or(brought.without_tokenizer()))
    }

    /// The tokenizer: the one `named`, else that of the run or of the folder.
    pub(crate) fn tokenizer(&self, named: Option<&str>) -> Result<Box<dyn Tokenizer>, Failure> {
        let of_place = match self {
            Self::Run { run, .. } => run.as_ref().map(|(dir, config)| tokenizer_of_run(dir, config)),
            Self::Folder(folder) => {
                let path = folder.dir().join("tokenizer.json");
                path.is_file().then(|| path.to_string_lossy().into_owned())
            }
        };
        let Some(name) = named.map(str::to_owned).or(of_place) else {
            let mend = "name the one it was trained with: --tokenizer bytes, or a tokenizer.json";
            return Err(Failure::new(ExitCode::Usage, format!("{}: has no tokenizer; {mend}", self.dir().display())));
        };
        let tokenizer = tokenizer(&name)?;
        let (needed, has) = (tokenizer.vocab_size(), self.configs().0.vocab_size);
        if needed > has {
            let message = format!("--tokenizer {name}: makes {needed} different tokens, the model knows {has}");
            return Err(Failure::new(ExitCode::Usage, message));
        }
        Ok(tokenizer)
    }

    /// Tokens the model sees at once where nothing else is asked for: as in its training, where that is known.
    pub(crate) fn window(&self) -> usize {
        match self {
            Self::Run { run: Some((_, config)), .. } => config.train.sequence_length,
            _ => WINDOW.min(self.configs().0.max_positions),
        }
    }

    /// How texts are read for it: as in its training, where that is known.
    pub(crate) fn reading(&self, paths: &[PathBuf], vocab_size: usize) -> CorpusSpec {
        let plain = CorpusSpec::of_paths(paths, vocab_size);
        let Self::Run { run: Some((_, config)), .. } = self else { return plain };
        let own = DataConfig { paths: paths.to_vec(), sources: Default::default(), ..config.data.clone() };
        let spec = own.corpus(vocab_size).unwrap_or(plain);
        CorpusSpec { validation: Vec::new(), ..spec }
    }

    /// Whether it was trained with documents kept apart.
    pub(crate) fn document_mask(&self) -> bool {
        matches!(self, Self::Run { run: Some((_, config)), .. } if config.train.document_mask)
    }

    /// Loads it onto `device` for passes of up to `sequences` sequences of `sequence_length` tokens.
    pub(crate) fn load<B: Backend>(
        &self,
        device: &B,
        sequence_length: usize,
        sequences: usize,
    ) -> Result<Loaded<B>, Failure> {
        let (model, router) = self.configs();
        check_own_gate(router, None)?;
        let experts = if model.moe_layers().next().is_some() { model.experts } else { 0 };
        let grid = Grid::new(1, 1, experts).map_err(|error| Failure::new(ExitCode::Internal, error))?;
        let setup = ModelSetup {
            model: model.clone(),
            router: router.clone(),
            grid,
            rank: Rank(0),
            seed: 0,
            chunks: 1,
            receive_headroom: Room::HEADROOM,
            direct: false,
            max_sequences: sequences,
            sequence_length,
            // No backward pass comes that anything could be kept for.
            recompute: Recompute::Experts,
            gate: None,
        };
        let mut model =
            Transformer::new(device.clone(), setup).map_err(|error| Failure::new(ExitCode::Usage, error))?;
        let world = local::solo(Context::default());
        match self {
            Self::Run { checkpoint, .. } => load_model(&mut model, &world, checkpoint)?,
            Self::Folder(folder) => folder.load_into(device, model.parameters_mut())?,
        }
        let groups = Groups::of_grid::<Cpu>(world, &grid)?;
        Ok(Loaded { model, groups })
    }
}

/// The tokenizer that a run was trained with: the copy it keeps, or what its configuration names.
fn tokenizer_of_run(dir: &Path, config: &Config) -> String {
    let name = &config.data.tokenizer;
    RunDir::at(dir).kept_tokenizer(name).map_or_else(|| name.clone(), |copy| copy.display().to_string())
}

fn run_at(dir: Option<&Path>) -> Result<Option<(PathBuf, Box<Config>)>, Failure> {
    let Some(dir) = dir else { return Ok(None) };
    Ok(RunDir::at(dir).saved_config()?.map(|config| (dir.to_owned(), Box::new(config))))
}
