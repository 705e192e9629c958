//! What all ranks agree on before anything is built: configuration, run directory, what is resumed, the text.
//!
//! Owns the agreement: rank 0 reads and decides, the others are told, so that no two ranks can see different files. A refusal is
//! shared as well, so that every rank leaves with the same exit code and only rank 0 speaks.

use std::fs::File;
use std::path::{Path, PathBuf};

use moe_kernels::Cpu;
use serde::{Deserialize, Serialize};

use super::args::{Resume, WorkerArgs};
use super::device::check_device;
use super::run_dir::{RunDir, RunDirError};
use crate::checkpoint::convert::Companions;
use crate::checkpoint::{HfFolder, LastGood, Store};
use crate::collectives::{Communicator, HostCommunicator};
use crate::config::{Config, ConfigBuilder};
use crate::data::{
    Corpus, FileTokenizer, Loader, Tokenizer, cargo_registry, check_vocabulary, default_corpus, is_path, tokenizer,
};
use crate::exit::{ExitCode, Failure};
use crate::routing::check_own_gate;

/// What rank 0 decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The configuration as resolved.
    pub config: Config,
    /// The run directory.
    pub run_dir: PathBuf,
    /// The checkpoint to go on from.
    pub resume: Option<PathBuf>,
    /// The Hugging Face folder whose weights a fresh run starts from.
    pub weights: Option<PathBuf>,
    /// Whether the directory is that of a run which has left no checkpoint.
    pub again: bool,
}

/// What a rank is told: a value, or that rank 0 was refused and with which exit code.
#[derive(Serialize, Deserialize)]
enum Told<T> {
    Value(T),
    Refused(u8),
}

/// Has rank 0 `decide` and tells every rank. Where it was refused, rank 0 gets its failure and the others a silent one of the same
/// class.
pub(super) fn from_rank_0<T>(
    world: &HostCommunicator,
    decide: impl FnOnce() -> Result<T, Failure>,
) -> Result<Result<T, Failure>, Failure>
where
    T: Serialize + for<'a> Deserialize<'a>,
{
    let malformed = |error: serde_json::Error| Failure::new(ExitCode::Internal, format!("rank 0's decision: {error}"));
    if Communicator::<Cpu>::rank(world) == 0 {
        let decided = decide();
        let told = match &decided {
            Ok(value) => Told::Value(value),
            Err(failure) => Told::Refused(failure.exit_code().number()),
        };
        let mut bytes = serde_json::to_vec(&told).map_err(malformed)?;
        Communicator::<Cpu>::broadcast_bytes(world, &mut bytes, 0)?;
        return Ok(decided);
    }
    let mut bytes = Vec::new();
    Communicator::<Cpu>::broadcast_bytes(world, &mut bytes, 0)?;
    Ok(match serde_json::from_slice(&bytes).map_err(malformed)? {
        Told::Value(value) => Ok(value),
        Told::Refused(code) => Err(Failure::of_another_rank(code)),
    })
}

/// What rank 0 keeps of its decision.
#[derive(Default)]
pub(super) struct Kept {
    /// The lock of the run directory, held as long as the run.
    lock: Option<File>,
    corpus: Option<Corpus>,
}

/// What the command line and the run directory come to, before anything is changed.
struct Resolution {
    config: Config,
    tokenizer: Box<dyn Tokenizer>,
    given: Option<RunDir>,
    newest: Option<PathBuf>,
    /// Directories that are newer and damaged.
    damaged: Vec<PathBuf>,
    /// See [`Plan::again`].
    again: bool,
    /// Whether no step of it is saved.
    untrained: bool,
}

/// Resolves and checks the configuration of `args` for `world` ranks, and finds what would be resumed. Reads only.
fn resolve(args: &WorkerArgs, world: usize) -> Result<Resolution, Failure> {
    // Only checked here: rank 0 alone speaks, and nothing is made yet.
    args.seat()?;
    let given = args.run_dir.as_ref().map(RunDir::at);
    if let Some(path) = args.run_dir.as_ref().filter(|path| path.is_file()) {
        return Err(RunDirError::NotADirectory { path: path.clone() }.into());
    }
    if let Some(path) = args.run_dir.as_ref().filter(|path| path.to_str().is_none()) {
        let message = format!("--run-dir {path:?}: is not UTF-8; give the directory another name");
        return Err(Failure::new(ExitCode::Usage, message));
    }
    let saved = given.as_ref().map(RunDir::saved_config).transpose()?.flatten();
    let LastGood { checkpoint: newest, damaged } = match given.as_ref().map(checkpoints) {
        Some(store) if args.resume == Resume::LastGood => store.last_good()?,
        Some(store) => LastGood { checkpoint: store.latest()?, damaged: Vec::new() },
        None => LastGood::default(),
    };
    // A run that ended before its first checkpoint, or a model that was brought in and not trained yet: nothing is lost with other settings.
    let untrained = newest.as_ref().is_none_or(|checkpoint| checkpoint.manifest().progress.step == 0);
    let newest = newest.map(|checkpoint| checkpoint.dir().to_owned());
    if let (Some(dir), None, Some(checkpoint)) = (&given, &saved, &newest) {
        let (path, checkpoint) = (dir.config(), checkpoint.clone());
        return Err(RunDirError::NoSettings { path, checkpoint }.into());
    }
    if let (Some(dir), Some(_), None, Resume::LastGood) = (&given, &saved, &newest, args.resume) {
        return Err(RunDirError::NothingToResume { path: dir.checkpoints() }.into());
    }
    let occupied = given.as_ref().filter(|_| saved.is_some() && args.resume == Resume::Never);
    if let Some(dir) = occupied {
        return Err(RunDirError::Occupied { path: dir.path().into() }.into());
    }
    let mut base = saved;
    if let (Some(base), Some(dir)) = (&mut base, &given) {
        use_kept_tokenizer(base, dir)?;
    }
    if let Some(base) = base.as_mut().filter(|base| untrained && base.schedule.steps == Some(base.train.steps)) {
        base.schedule.steps = None;
    }
    let mut builder = args.configure(ConfigBuilder::new());
    if let (Some(base), Some(dir)) = (&base, &given) {
        builder = builder.resume_from(base.clone(), dir.config());
    }
    if let Some(folder) = &args.model {
        let folder_read = HfFolder::open(folder)?;
        builder = builder.model(folder_read.model_config().clone(), folder_read.router_config().clone(), folder);
        builder = builder.tokenizer_of_model(folder.join(FileTokenizer::FILE));
    }
    let mut resolved = builder.build()?;
    absolute_paths(&mut resolved.config)?;
    let name = &resolved.config.data.tokenizer;
    // A file has reasons of its own why it cannot be read, and those come first.
    let from_file = is_path(name).then(|| tokenizer(name)).transpose()?;
    resolved.validate(world)?;
    check_own_gate(&resolved.config.router, args.gate.as_ref())?;
    if let (Some(base), Some(dir), false) = (&base, &given, untrained) {
        resolved.config.check_resumes(base, &dir.config())?;
    }
    let tokenizer = from_file.map_or_else(|| tokenizer(name), Ok)?;
    check_vocabulary(tokenizer.as_ref(), resolved.config.model.vocab_size)?;
    let again = base.is_some() && newest.is_none();
    Ok(Resolution { config: resolved.config, tokenizer, given, newest, damaged, again, untrained })
}

/// Where the tokenizer's file is no more where it was, the copy in the run directory takes its place.
fn use_kept_tokenizer(base: &mut Config, dir: &RunDir) -> Result<(), Failure> {
    let name = &mut base.data.tokenizer;
    if let Some(copy) = dir.kept_tokenizer(name).filter(|_| !Path::new(&*name).exists()) {
        *name = absolute(&copy)?.display().to_string();
    }
    Ok(())
}

/// Copies the tokenizer's files into the run directory, which is then whole by itself: other commands and later starts need them.
fn keep_tokenizer(config: &Config, dir: &RunDir) -> Result<(), Failure> {
    let name = &config.data.tokenizer;
    if is_path(name) {
        Companions::of_tokenizer(&FileTokenizer::open(Path::new(name))?)?.keep(&dir.tokenizer())?;
    }
    Ok(())
}

/// The checkpoints of a run, all of which stay.
fn checkpoints(dir: &RunDir) -> Store {
    Store::new(dir.checkpoints(), 0)
}

/// The configuration that `args` come to on `world` ranks, as a launcher needs it before it starts them. Changes nothing.
pub fn resolved_config(args: &WorkerArgs, world: usize) -> Result<Config, Failure> {
    Ok(resolve(args, world)?.config)
}

/// Decides on rank 0: resolves and checks the configuration, reads the text, finds what to resume and, once nothing is left to
/// refuse, claims the run directory.
pub(super) fn decide(args: &WorkerArgs, world: usize, kept: &mut Kept) -> Result<Plan, Failure> {
    let Resolution { config, tokenizer, given, newest, damaged, again, untrained } = resolve(args, world)?;
    if let Some(folder) = args.model.as_ref().filter(|_| newest.is_none() && !is_path(&config.data.tokenizer)) {
        let (folder, name) = (folder.display(), &config.data.tokenizer);
        tracing::warn!("{folder} has no {}: the text is cut by data.tokenizer = {name}", FileTokenizer::FILE);
    }
    let corpus = configured_corpus(&config, tokenizer.as_ref())?;
    Loader::new(&corpus, config.loader_spec(0, world))?;
    kept.corpus = Some(corpus);
    check_device(args.device, config.train.precision)?;
    let run_dir = given.map_or_else(RunDir::fresh, Ok)?;
    kept.lock = Some(run_dir.claim()?);
    checkpoints(&run_dir).set_aside(&damaged)?;
    // A later start with another text, which is refused when it resumes, must not have replaced it.
    if untrained || run_dir.kept_tokenizer(&config.data.tokenizer).is_none() {
        keep_tokenizer(&config, &run_dir)?;
    }
    // Of a run that goes on, once it did: a start that is refused leaves its settings alone.
    if newest.is_none() {
        run_dir.save_config(&config)?;
    }
    Ok(Plan {
        config,
        run_dir: run_dir.path().into(),
        weights: args.model.clone().filter(|_| newest.is_none()),
        resume: newest,
        again,
    })
}

/// Relative paths mean another place in the next start's working directory.
fn absolute_paths(config: &mut Config) -> Result<(), Failure> {
    for path in config.data.paths_mut() {
        *path = absolute(path)?;
    }
    let name = &mut config.data.tokenizer;
    if is_path(name) {
        *name = absolute(Path::new(name))?.display().to_string();
    }
    Ok(())
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::new(ExitCode::Io, format!("{}: {error}", path.display())))
}

/// The corpus that rank 0 read, on every rank: text travels, token shards are mapped by every rank.
pub(super) fn share_corpus(world: &HostCommunicator, kept: &mut Kept) -> Result<Corpus, Failure> {
    let mut bytes = match &kept.corpus {
        Some(corpus) if Communicator::<Cpu>::size(world) > 1 => corpus.to_bytes(),
        _ => Vec::new(),
    };
    Communicator::<Cpu>::broadcast_bytes(world, &mut bytes, 0)?;
    let mine = match kept.corpus.take() {
        Some(corpus) => Ok(corpus),
        None => Corpus::from_bytes(&bytes).map_err(Failure::from),
    };
    agreed(world, mine)
}

/// What this rank has, if every rank has its own; otherwise a failure, told by the first rank that met it.
pub(super) fn agreed<T>(world: &HostCommunicator, mine: Result<T, Failure>) -> Result<T, Failure> {
    let report = match &mine {
        Ok(_) => [0, 0],
        Err(failure) => [failure.exit_code().number(), u8::from(!failure.is_told_elsewhere())],
    };
    let all = match Communicator::<Cpu>::all_gather_bytes(world, &report) {
        Ok(all) => all,
        Err(error) => return mine.and(Err(error.into())),
    };
    let failed = all.iter().position(|report| matches!(report[..], [code, 1] if code != 0));
    match failed {
        None => mine,
        Some(rank) if rank == Communicator::<Cpu>::rank(world) => mine,
        Some(rank) => Err(Failure::of_another_rank(all[rank][0])),
    }
}

/// The corpus of a configuration, with its tokenizer; where it names none, the default.
pub fn configured_corpus(config: &Config, tokenizer: &dyn Tokenizer) -> Result<Corpus, Failure> {
    match config.data.corpus(config.model.vocab_size) {
        Some(spec) => Ok(Corpus::read(&spec, tokenizer)?),
        None => read_corpus(&[], tokenizer),
    }
}

/// The text that `paths` hold; where there are none, the default.
pub fn read_corpus(paths: &[PathBuf], tokenizer: &dyn Tokenizer) -> Result<Corpus, Failure> {
    if paths.is_empty() {
        let registry = cargo_registry();
        return Ok(default_corpus(registry.as_deref().map(Path::new), tokenizer)?);
    }
    Ok(Corpus::from_paths(paths, tokenizer)?)
}
