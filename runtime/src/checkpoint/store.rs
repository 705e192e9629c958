//! The checkpoints of a run: its directories, which of them count, and how one comes and goes.
//!
//! Owns the rule that a checkpoint is complete or does not exist. A directory is filled under a temporary name, flushed to the
//! disk, and renamed; one that goes is renamed to a temporary name before anything in it is removed. Only a directory named
//! `step-00000040` with a valid manifest is a checkpoint. It knows no tensor.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use moe_kernels::Device;

use super::CheckpointError;
use super::agree::{agree, gather};
use super::load::Checkpoint;
use super::manifest::{MANIFEST, Manifest};
use crate::collectives::Communicator;

/// Between a step directory's name and what makes a temporary one unique.
const TEMPORARY: &str = ".tmp-";

/// Between a damaged step directory's name and what makes the name unique under which it is set aside.
const ASIDE: &str = ".damaged-";

/// The directory of a run's checkpoints.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    keep: usize,
}

/// What [`Store::last_good`] found.
#[derive(Clone, Debug, Default)]
pub struct LastGood {
    /// The newest checkpoint that is whole; None: there is none at all.
    pub checkpoint: Option<Checkpoint>,
    /// The directories of newer ones, which are damaged, newest first.
    pub damaged: Vec<PathBuf>,
}

impl Store {
    /// The store in `dir`, which keeps the newest `keep` checkpoints; 0: all. The directory is made by the first save.
    pub fn new(dir: impl Into<PathBuf>, keep: usize) -> Self {
        Self { dir: dir.into(), keep }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of the checkpoint of a step.
    pub fn step_dir(&self, step: u64) -> PathBuf {
        self.dir.join(step_name(step))
    }

    /// The newest checkpoint, as this process sees it; its files are not hashed.
    ///
    /// # Errors
    /// A directory or manifest cannot be read, the newest checkpoint is of a later version than this program reads, or it is damaged:
    /// going back to an older one would lose what came since, which only [`Store::last_good`] does.
    pub fn latest(&self) -> Result<Option<Checkpoint>, CheckpointError> {
        Ok(self.newest()?.map(|(_, checkpoint)| checkpoint))
    }

    /// The newest checkpoint whose every byte is what was written, and what is newer and damaged. Files are hashed.
    ///
    /// # Errors
    /// A directory or manifest cannot be read, a checkpoint is of a later version than this program reads, or all are damaged.
    pub fn last_good(&self) -> Result<LastGood, CheckpointError> {
        let mut damaged = Vec::new();
        let mut first_fault = None;
        for step in self.steps()?.into_iter().rev() {
            let dir = self.step_dir(step);
            match Checkpoint::open(&dir).and_then(|checkpoint| checkpoint.verify().map(|()| checkpoint)) {
                Ok(checkpoint) => return Ok(LastGood { checkpoint: Some(checkpoint), damaged }),
                Err(error) if !error.is_damage() => return Err(error),
                Err(error) => {
                    first_fault.get_or_insert(error);
                    damaged.push(dir);
                }
            }
        }
        match first_fault {
            None => Ok(LastGood { checkpoint: None, damaged }),
            Some(fault) => {
                Err(CheckpointError::NoneGood { dir: self.dir.clone(), count: damaged.len(), newest: Box::new(fault) })
            }
        }
    }

    /// Gives damaged directories names under which they are no checkpoints any more. Nothing is removed. Only one rank calls this.
    pub fn set_aside(&self, damaged: &[PathBuf]) -> Result<(), CheckpointError> {
        for dir in damaged {
            let mut name = dir.file_name().unwrap_or_default().to_owned();
            name.push(format!("{ASIDE}{:08x}", rand::random::<u32>()));
            let aside = self.dir.join(name);
            fs::rename(dir, &aside).map_err(CheckpointError::io("rename", dir))?;
            tracing::warn!("{} is damaged and was set aside as {}", dir.display(), aside.display());
        }
        if damaged.is_empty() { Ok(()) } else { sync_dir(&self.dir) }
    }

    /// [`Store::latest`] as rank 0 sees it, opened by all ranks. All ranks of the world call this.
    ///
    /// # Errors
    /// As [`Store::latest`], on any rank; also where a rank does not see what rank 0 sees.
    pub fn latest_of_world<B, C>(&self, world: &C) -> Result<Option<Checkpoint>, CheckpointError>
    where
        B: Device,
        C: Communicator<B>,
    {
        let found = if world.rank() == 0 { self.newest() } else { Ok(None) };
        let steps = gather(world, found.map(|found| found.map(|(step, _)| step)))?;
        let Some(step) = steps[0] else { return Ok(None) };
        let (opened, outcome) = match Checkpoint::open(&self.step_dir(step)) {
            Ok(checkpoint) => (Some(checkpoint), Ok(())),
            Err(error) => (None, Err(error)),
        };
        agree(world, outcome)?;
        Ok(opened)
    }

    fn newest(&self) -> Result<Option<(u64, Checkpoint)>, CheckpointError> {
        let steps = self.steps()?;
        let Some((&step, older)) = steps.split_last() else { return Ok(None) };
        match Checkpoint::open(&self.step_dir(step)) {
            Ok(checkpoint) => Ok(Some((step, checkpoint))),
            Err(fault) if fault.is_damage() => {
                let older = older.last().map(|&step| self.step_dir(step));
                Err(CheckpointError::NewestDamaged { fault: Box::new(fault), older })
            }
            Err(error) => Err(error),
        }
    }

    /// The steps that have a directory, complete or not, ascending.
    fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let mut steps: Vec<u64> = self.entries()?.iter().filter_map(|name| step_of(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Names in the directory; none where it does not exist.
    fn entries(&self) -> Result<Vec<String>, CheckpointError> {
        let read = || {
            let entries = match fs::read_dir(&self.dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<Vec<_>>>()
        };
        read().map_err(CheckpointError::io("list", &self.dir))
    }

    /// Removes what earlier writers left unfinished and makes a temporary directory for `step`. Only one rank calls this.
    pub(super) fn begin(&self, step: u64) -> Result<String, CheckpointError> {
        fs::create_dir_all(&self.dir).map_err(CheckpointError::io("create", &self.dir))?;
        for name in self.entries()?.iter().filter(|name| is_temporary(name)) {
            let stale = self.dir.join(name);
            fs::remove_dir_all(&stale).map_err(CheckpointError::io("remove", &stale))?;
        }
        let name = temporary(step);
        let dir = self.dir.join(&name);
        fs::create_dir(&dir).map_err(CheckpointError::io("create", &dir))?;
        Ok(name)
    }

    /// Completes the temporary directory `name`, whose files are written and flushed, and gives it its place. Only one rank
    /// calls this. Older checkpoints are then pruned; that this fails is no failure of the new one.
    pub(super) fn commit(&self, name: &str, manifest: &Manifest) -> Result<(), CheckpointError> {
        let (dir, place) = (self.dir.join(name), self.step_dir(manifest.progress.step));
        let path = dir.join(MANIFEST);
        let text = manifest.to_text().map_err(|source| CheckpointError::Json { path: path.clone(), source })?;
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().map_err(CheckpointError::io("write", &path))?;
        sync_dir(&dir)?;
        if fs::read_to_string(place.join(MANIFEST)).is_ok_and(|existing| existing == text) {
            // The same state again, as when a stop is asked for right after a periodic checkpoint: the first one stays.
            self.discard(name)?;
        } else {
            self.replace(&dir, &place, manifest.progress.step)?;
        }
        if let Err(error) = self.prune(manifest.progress.step) {
            tracing::warn!("old checkpoints were not all removed: {error}");
        }
        Ok(())
    }

    /// Removes an unfinished directory.
    pub(super) fn discard(&self, name: &str) -> Result<(), CheckpointError> {
        let dir = self.dir.join(name);
        fs::remove_dir_all(&dir).map_err(CheckpointError::io("remove", &dir))
    }

    /// Renames `dir` to `place`. What is there already, of an abandoned run or unfinished, makes room first.
    fn replace(&self, dir: &Path, place: &Path, step: u64) -> Result<(), CheckpointError> {
        let aside = self.dir.join(temporary(step));
        let occupied = match fs::rename(place, &aside) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(CheckpointError::io("rename", place)(error)),
        };
        if let Err(error) = fs::rename(dir, place) {
            if occupied {
                // If this fails as well, the first error is the one to report.
                let _ = fs::rename(&aside, place);
            }
            return Err(CheckpointError::io("rename", dir)(error));
        }
        sync_dir(&self.dir)?;
        if occupied {
            fs::remove_dir_all(&aside).map_err(CheckpointError::io("remove", &aside))?;
        }
        Ok(())
    }

    /// Removes all but the newest checkpoints, never the one `just_written`. Directories that are no checkpoints are left to
    /// whoever made them.
    fn prune(&self, just_written: u64) -> Result<(), CheckpointError> {
        if self.keep == 0 {
            return Ok(());
        }
        let complete = |step: &u64| Checkpoint::open(&self.step_dir(*step)).is_ok();
        let newest_first = self.steps()?.into_iter().rev().filter(complete);
        for step in newest_first.skip(self.keep).filter(|step| *step != just_written) {
            let (dir, gone) = (self.step_dir(step), self.dir.join(temporary(step)));
            fs::rename(&dir, &gone).map_err(CheckpointError::io("rename", &dir))?;
            fs::remove_dir_all(&gone).map_err(CheckpointError::io("remove", &gone))?;
        }
        Ok(())
    }
}

/// Checks that all ranks see what rank 0 writes to `dir`, which is made where it is not: a run directory on storage of its own
/// for each machine would lose checkpoints. All ranks of the world call this.
///
/// # Errors
/// Rank 0 cannot write there, or the ranks that do not see it.
pub fn probe_shared<B: Device, C: Communicator<B>>(world: &C, dir: &Path) -> Result<(), CheckpointError> {
    let token = format!("{:032x}", rand::random::<u128>());
    let write = |token: &str| {
        fs::create_dir_all(dir).map_err(CheckpointError::io("create", dir))?;
        let path = dir.join(probe_name(token));
        fs::write(&path, token).map_err(CheckpointError::io("write", &path))
    };
    let written = if world.rank() == 0 { write(&token).map(|()| token) } else { Ok(String::new()) };
    let token = gather(world, written)?.swap_remove(0);
    let path = dir.join(probe_name(&token));
    let sees = fs::read_to_string(&path).is_ok_and(|text| text == token);
    let seen = gather(world, Ok(sees));
    if world.rank() == 0 {
        // A file that stays is untidy and nothing more.
        let _ = fs::remove_file(&path);
    }
    let blind = seen?.into_iter().zip(world.members()).filter(|(sees, _)| !sees);
    let ranks: Vec<_> = blind.map(|(_, rank)| *rank).collect();
    if ranks.is_empty() { Ok(()) } else { Err(CheckpointError::NotShared { dir: dir.to_owned(), ranks }) }
}

fn probe_name(token: &str) -> String {
    format!(".probe-{token}")
}

/// Flushes a directory's entries to the disk.
fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(CheckpointError::io("flush", dir))
}

fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_name(step) == name).then_some(step)
}

fn temporary(step: u64) -> String {
    format!("{}{TEMPORARY}{:016x}", step_name(step), rand::random::<u64>())
}

fn is_temporary(name: &str) -> bool {
    name.split_once(TEMPORARY).is_some_and(|(step, _)| step_of(step).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_as_written_here_are_steps() {
        for (name, step) in [
            ("step-00000040", Some(40)),
            ("step-123456789", Some(123_456_789)),
            ("step-40", None),
            ("step-+0000040", None),
            ("step-00000040.tmp-0f", None),
            ("step-00000040.damaged-0f", None),
            ("step-", None),
            ("best", None),
        ] {
            assert_eq!(step_of(name), step, "{name}");
        }
        assert!(is_temporary(&temporary(40)) && is_temporary("step-00000040.tmp-"));
        assert!(!is_temporary("step-00000040") && !is_temporary("notes.tmp-1"));
        assert!(!is_temporary("step-00000040.damaged-0f"), "what is set aside is never removed");
    }
}
