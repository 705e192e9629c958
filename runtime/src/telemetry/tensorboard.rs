//! TensorBoard event files: the readings of `metrics.jsonl` as scalars.
//!
//! Owns the format: Event messages of TensorFlow's `event.proto`, of which these are the fields that scalars need, in TFRecord
//! framing: length, its checksum, message, its checksum; all little-endian, checksums CRC-32C, rotated and shifted ("masked").

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::{MetricsError, StepMetrics};

/// `tensorflow.Event`.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

/// `tensorflow.Summary.Value` with a plain number.
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// `tensorflow.SessionLog`. A start at a step makes readers forget what earlier files say of that step and later ones.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.START`.
const SESSION_START: i32 = 1;

/// An event file of this start of a run.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `folder`, which is made; `first_step` is the first that will be written.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self, MetricsError> {
        let failed = |path: &Path, reason| MetricsError::Io { path: path.into(), action: "made", reason };
        std::fs::create_dir_all(folder).map_err(|reason| failed(folder, reason))?;
        let (seconds, pid) = (now().trunc() as u64, std::process::id());
        let path = folder.join(format!("events.out.tfevents.{seconds}.moe.{pid}"));
        let file = File::create(&path).map_err(|reason| failed(&path, reason))?;
        let mut events = Self { path, file };
        events.write(0, What::FileVersion("brain.Event:2".into()))?;
        events.write(first_step, What::SessionLog(SessionLog { status: SESSION_START }))?;
        Ok(events)
    }

    /// Appends the readings of a step; they are in the file when this returns.
    pub fn append(&mut self, metrics: &StepMetrics) -> Result<(), MetricsError> {
        let value =
            scalars(metrics).map(|(tag, value)| Scalar { tag: tag.into(), simple_value: Some(value as f32) }).collect();
        self.write(metrics.step, What::Summary(Summary { value }))
    }

    fn write(&mut self, step: u64, what: What) -> Result<(), MetricsError> {
        let event = Event { wall_time: now(), step: step as i64, what: Some(what) };
        let record = record(&event.encode_to_vec());
        self.file.write_all(&record).map_err(|reason| MetricsError::Io {
            path: self.path.clone(),
            action: "written",
            reason,
        })
    }
}

/// Every reading with its tag. Tags stay, since dashboards name them.
fn scalars(metrics: &StepMetrics) -> impl Iterator<Item = (&'static str, f64)> {
    let stages = &metrics.stage_ms;
    let always = [
        ("loss/train", metrics.loss),
        ("loss/balance", metrics.balance_loss),
        ("optimizer/learning_rate", metrics.lr),
        ("optimizer/gradient_norm", metrics.grad_norm),
        ("speed/tokens_per_s", metrics.tokens_per_s),
        ("routing/dropped_fraction", metrics.dropped_fraction),
        ("routing/busiest_over_mean", metrics.load_max_over_mean),
        ("stage_ms/route", stages.route),
        ("stage_ms/dispatch", stages.dispatch),
        ("stage_ms/experts", stages.experts),
        ("stage_ms/combine", stages.combine),
        ("stage_ms/aggregate", stages.aggregate),
    ];
    let sometimes = [
        ("loss/importance", metrics.importance_loss),
        ("loss/load", metrics.load_loss),
        ("loss/device", metrics.device_loss),
        ("loss/difference", metrics.difference_loss),
        ("loss/entropy", metrics.entropy_loss),
        ("loss/batch_entropy", metrics.batch_entropy_loss),
        ("loss/z", metrics.z_loss),
        ("loss/validation", metrics.val_loss),
    ];
    always.into_iter().chain(sometimes.into_iter().filter_map(|(tag, value)| Some((tag, value?))))
}

fn now() -> f64 {
    // A clock before 1970 makes odd times, not wrong readings.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// `message` framed as a TFRecord.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), message, &masked(message)].concat()
}

/// The masked CRC-32C of TFRecord.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// Reads records back, checking every sum.
    fn read(mut bytes: &[u8]) -> io::Result<Vec<Event>> {
        let broken = |what: &str| io::Error::other(what.to_owned());
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at_checked(12).ok_or_else(|| broken("head"))?;
            let length = u64::from_le_bytes(head[..8].try_into().map_err(|_| broken("length"))?) as usize;
            let (message, rest) = rest.split_at_checked(length).ok_or_else(|| broken("message"))?;
            let (sum, rest) = rest.split_at_checked(4).ok_or_else(|| broken("sum"))?;
            if head[8..] != masked(&head[..8]) || sum != masked(message) {
                return Err(broken("checksum"));
            }
            events.push(Event::decode(message).map_err(io::Error::other)?);
            bytes = rest;
        }
        Ok(events)
    }

    #[test]
    fn a_file_begins_with_version_and_start_and_holds_every_reading() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(&folder.path().join("tensorboard"), 41).unwrap();
        let metrics = StepMetrics { step: 41, loss: 2.5, val_loss: Some(2.75), ..StepMetrics::default() };
        file.append(&metrics).unwrap();
        let events = read(&std::fs::read(&file.path).unwrap()).unwrap();
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert_eq!((events[1].step, &events[1].what), (41, &Some(What::SessionLog(SessionLog { status: 1 }))));
        let Some(What::Summary(summary)) = &events[2].what else { panic!("{:?}", events[2]) };
        let value =
            |tag: &str| summary.value.iter().find(|value| value.tag == tag).and_then(|value| value.simple_value);
        assert_eq!((value("loss/train"), value("loss/validation"), value("loss/z")), (Some(2.5), Some(2.75), None));
        assert_eq!((events[2].step, summary.value.len(), events.len()), (41, 13, 3));
    }

    #[test]
    fn checksums_are_those_of_the_format() {
        // CRC-32C of "123456789" is the published check value 0xe3069283.
        let check = 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked(b"123456789"), check.to_le_bytes());
    }
}
