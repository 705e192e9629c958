//! `metrics.jsonl`: one JSON object a step.
//!
//! Owns the keys, which stay since scripts read them, and the file. Numbers that are not finite are written as null, which is what
//! JSON has for them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::exit::{Classified, ExitCode};

/// Milliseconds of a step in each stage of the MoE layers, forward and backward, over all layers and passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageMs {
    /// Gate and choice of experts.
    pub route: f64,
    /// Shuffle to the experts' ranks.
    pub dispatch: f64,
    /// The experts.
    pub experts: f64,
    /// Shuffle home.
    pub combine: f64,
    /// Residual, shared experts.
    pub aggregate: f64,
}

/// The readings of one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean cross-entropy over the global batch, in nats per token, without the balance losses.
    pub loss: f64,
    /// The balance loss before its coefficient.
    pub balance_loss: f64,
    /// The learning rate of this step.
    pub lr: f64,
    /// Norm of the gradient before clipping, every parameter counted once.
    pub grad_norm: f64,
    /// Tokens per second, over all ranks.
    pub tokens_per_s: f64,
    /// Model-FLOPs utilisation: the model's own operations over what all ranks' devices could do in the step's time. Only where a
    /// device's peak is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Share of the choices that capacity dropped.
    pub dropped_fraction: f64,
    /// The busiest expert's load over the mean, the largest over the layers.
    pub load_max_over_mean: f64,
    /// Time in each stage, on rank 0.
    pub stage_ms: StageMs,
    /// Losses whose coefficient is set, before it: cv² of importance, averaged over layers as those that follow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub importance_loss: Option<f64>,
    /// cv² of a noisy gate's load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_loss: Option<f64>,
    /// The balance loss over groups of experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_loss: Option<f64>,
    /// Σ (usage − importance)².
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference_loss: Option<f64>,
    /// Entropy of a token's probabilities in nats, summed over layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy_loss: Option<f64>,
    /// What the entropy of the mean probabilities lacks, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_entropy_loss: Option<f64>,
    /// Where the z-loss is on: mean over tokens of the squared log-sum of router logits, summed over layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub z_loss: Option<f64>,
    /// Where experts are shared out over ranks: rounds beyond the first that ranks needed because more rows came than
    /// `parallel.receive_headroom` has room for, over all ranks, layers and chunks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extra_rounds: Option<u64>,
    /// Mean cross-entropy on held-out text, after the steps that evaluate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
}

/// A metrics file that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The system refuses.
    #[error("{}: cannot be {action}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        #[source]
        reason: io::Error,
    },
    /// A line is no reading.
    #[error("{}:{line}: is no JSON object with a step: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The parser's reason.
        reason: String,
    },
}

impl Classified for MetricsError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Io { .. } => ExitCode::Io,
            Self::Line { .. } => ExitCode::BadData,
        }
    }
}

/// What every line has.
#[derive(Deserialize)]
struct Line {
    step: u64,
}

/// Much more than a line.
const TAIL_BYTES: u64 = 64 << 10;

/// `metrics.jsonl` or `balance.jsonl`, open for appending.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens `path` at its end, or makes it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, MetricsError> {
        let path = path.into();
        match OpenOptions::new().create(true).append(true).open(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(reason) => Err(MetricsError::Io { path, action: "opened", reason }),
        }
    }

    /// Appends one line, an object with a `step`, in one write, so that a reader never sees half of it for longer than that takes.
    pub fn append(&mut self, line: &impl Serialize) -> Result<(), MetricsError> {
        let mut write = || {
            let mut line = serde_json::to_vec(line)?;
            line.push(b'\n');
            self.file.write_all(&line)?;
            self.file.flush()
        };
        write().map_err(|reason| MetricsError::Io { path: self.path.clone(), action: "written", reason })
    }

    /// The step of the last whole line; None: there is no line, or no file.
    pub fn last_step(path: &Path) -> Result<Option<u64>, MetricsError> {
        let failed = |reason| MetricsError::Io { path: path.into(), action: "read", reason };
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut tail = Vec::new();
        let read = |file: &mut File, tail: &mut Vec<u8>| {
            let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
            file.seek(SeekFrom::Start(start))?;
            file.read_to_end(tail)
        };
        read(&mut file, &mut tail).map_err(failed)?;
        let lines = tail.split_inclusive(|&byte| byte == b'\n').rev().filter(|line| line.ends_with(b"\n"));
        Ok(lines.filter_map(|line| serde_json::from_slice::<Line>(line).ok()).map(|line| line.step).next())
    }

    /// Cuts off what comes after `step`, for a run that resumes from there; a last line that a crash left unfinished goes as well.
    /// Returns the lines kept. The new file replaces the old one whole: a crash in between leaves one of the two. No file is as good
    /// as an empty one.
    pub fn truncate_after(path: &Path, step: u64) -> Result<usize, MetricsError> {
        let failed = |action| move |reason| MetricsError::Io { path: path.into(), action, reason };
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(failed("read")(error)),
        };
        let mut kept = Vec::with_capacity(text.len());
        let mut lines = 0;
        for (index, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
            match serde_json::from_slice::<Line>(line) {
                Ok(_) if !line.ends_with(b"\n") => {}
                Ok(read) if read.step > step => {}
                Ok(_) => {
                    kept.extend_from_slice(line);
                    lines += 1;
                }
                Err(_) if !line.ends_with(b"\n") => {}
                Err(error) => {
                    return Err(MetricsError::Line { path: path.into(), line: index + 1, reason: error.to_string() });
                }
            }
        }
        if kept.len() < text.len() {
            replace(path, &kept).map_err(failed("replaced"))?;
        }
        Ok(lines)
    }
}

/// Puts `content` in the place of the file at `path`: a file beside it, made durable, then renamed.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("jsonl.partial");
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    let written = write();
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u64) -> StepMetrics {
        StepMetrics { step, loss: 1.0 / step as f64, ..StepMetrics::default() }
    }

    /// A file with the readings of steps 1 to `steps`.
    fn written(steps: u64) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path).unwrap();
        for step in 1..=steps {
            file.append(&at(step)).unwrap();
        }
        (folder, path)
    }

    #[test]
    fn a_line_has_exactly_the_documented_keys() {
        let keys = |metrics: &StepMetrics| {
            let value = serde_json::to_value(metrics).unwrap();
            let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys.join(" ")
        };
        let nine = "balance_loss dropped_fraction grad_norm load_max_over_mean loss lr stage_ms step tokens_per_s";
        assert_eq!(keys(&at(1)), nine);
        assert_eq!(keys(&StepMetrics { val_loss: Some(2.0), ..at(1) }), format!("{nine} val_loss"));
        let stages = serde_json::to_string(&StageMs::default()).unwrap();
        assert_eq!(stages, r#"{"route":0.0,"dispatch":0.0,"experts":0.0,"combine":0.0,"aggregate":0.0}"#);
    }

    #[test]
    fn the_last_step_is_that_of_the_last_whole_line() {
        let (_folder, path) = written(2000);
        assert!(fs::metadata(&path).unwrap().len() > 2 * TAIL_BYTES);
        assert_eq!(MetricsFile::last_step(&path).unwrap(), Some(2000));
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":2001,\"lo").unwrap();
        assert_eq!(MetricsFile::last_step(&path).unwrap(), Some(2000));
        fs::write(&path, "").unwrap();
        assert_eq!(MetricsFile::last_step(&path).unwrap(), None);
        assert_eq!(MetricsFile::last_step(&path.with_extension("absent")).unwrap(), None);
    }

    #[test]
    fn readings_are_there_as_soon_as_they_are_appended() {
        let (_folder, path) = written(3);
        let mut file = MetricsFile::open(&path).unwrap();
        file.append(&StepMetrics { loss: f64::NAN, ..at(4) }).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(lines[3]["loss"].is_null());
    }

    #[test]
    fn resuming_cuts_off_what_the_checkpoint_does_not_know() {
        let (folder, path) = written(40);
        let whole = fs::read_to_string(&path).unwrap();
        assert_eq!(MetricsFile::truncate_after(&path, 40).unwrap(), 40);
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
        fs::write(&path, format!("{whole}{{\"step\":41,\"lo")).unwrap();
        assert_eq!(MetricsFile::truncate_after(&path, 50).unwrap(), 40, "an unfinished line goes");
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
        assert_eq!(MetricsFile::truncate_after(&path, 20).unwrap(), 20);
        let mut file = MetricsFile::open(&path).unwrap();
        for step in 21..=40 {
            file.append(&at(step)).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), whole, "cut and continued is the same as at a stretch");
        assert_eq!(MetricsFile::truncate_after(&path, 0).unwrap(), 0);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        assert_eq!(MetricsFile::truncate_after(&folder.path().join("absent"), 3).unwrap(), 0);
    }

    #[test]
    fn a_damaged_line_is_named_and_the_file_left_alone() {
        let (_folder, path) = written(2);
        let damaged = format!("{}nonsense\n{{\"step\":9}}\n", fs::read_to_string(&path).unwrap());
        fs::write(&path, &damaged).unwrap();
        let error = MetricsFile::truncate_after(&path, 1).unwrap_err();
        assert!(error.to_string().contains("metrics.jsonl:3: is no JSON object with a step"), "{error}");
        assert_eq!(error.exit_code(), ExitCode::BadData);
        assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
        let error = MetricsFile::open(path.join("below")).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Io);
    }
}
