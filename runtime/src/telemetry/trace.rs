//! Spans of stages, in the JSON that Perfetto and Chrome's tracing open.
//!
//! Owns the format and the files. A rank writes its spans as they come to a file of its own, which is a whole trace at any time that
//! a tool is patient with a missing end; when the run ends in order, rank 0 puts all ranks into one.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::exit::{Classified, ExitCode};
use crate::stages::Span;

/// A trace that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot be {action}: {reason}", path.display())]
pub struct TraceError {
    path: PathBuf,
    action: &'static str,
    #[source]
    reason: io::Error,
}

impl Classified for TraceError {
    fn exit_code(&self) -> ExitCode {
        ExitCode::Io
    }
}

/// The spans of one rank on their way to a file.
#[derive(Debug)]
pub struct TraceFile {
    path: PathBuf,
    file: BufWriter<File>,
    rank: usize,
    /// One moment on both clocks: spans have the monotonic one, ranks share the other.
    started: (Instant, u128),
}

impl TraceFile {
    /// The file of `rank` beside the trace `path`, begun anew.
    pub fn create(path: &Path, rank: usize) -> Result<Self, TraceError> {
        if path.is_dir() {
            let reason = io::ErrorKind::IsADirectory.into();
            return Err(TraceError { path: path.into(), action: "made", reason });
        }
        let path = part(path, rank);
        let failed = |reason| TraceError { path: path.clone(), action: "made", reason };
        let file = BufWriter::new(File::create(&path).map_err(failed)?);
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros());
        let mut trace = Self { file, rank, started: (Instant::now(), wall), path: path.clone() };
        let name =
            json!({ "name": "process_name", "ph": "M", "pid": rank, "args": { "name": format!("rank {rank}") } });
        trace.line("[\n", &name)?;
        Ok(trace)
    }

    /// Appends the spans of `step`; they are in the file when this returns.
    pub fn step(&mut self, step: u64, spans: &[Span]) -> Result<(), TraceError> {
        if let (Some(first), Some(last)) = (spans.first(), spans.last()) {
            let whole = self.event("step", step, first.begin, last.end);
            self.line(",\n", &whole)?;
        }
        for span in spans {
            let event = self.event(span.stage.name(), step, span.begin, span.end);
            self.line(",\n", &event)?;
        }
        self.file.flush().map_err(|reason| self.failed("written", reason))
    }

    /// Ends the file and returns its path.
    pub fn finish(mut self) -> Result<PathBuf, TraceError> {
        let end = self.file.write_all(b"\n]\n").and_then(|()| self.file.flush());
        end.map_err(|reason| self.failed("written", reason))?;
        Ok(self.path)
    }

    fn event(&self, name: &str, step: u64, begin: Instant, end: Instant) -> serde_json::Value {
        let (instant, wall) = self.started;
        let at = wall as f64 + begin.saturating_duration_since(instant).as_secs_f64() * 1e6;
        let lasts = end.saturating_duration_since(begin).as_secs_f64() * 1e6;
        let args = json!({ "step": step });
        json!({ "name": name, "cat": "stage", "ph": "X", "ts": at, "dur": lasts, "pid": self.rank, "tid": 0, "args": args })
    }

    fn line(&mut self, before: &str, value: &serde_json::Value) -> Result<(), TraceError> {
        write!(self.file, "{before}{value}").map_err(|reason| self.failed("written", reason))
    }

    fn failed(&self, action: &'static str, reason: io::Error) -> TraceError {
        TraceError { path: self.path.clone(), action, reason }
    }
}

/// Puts the finished files of `ranks` ranks into the one trace `path` and removes them.
pub fn merge_traces(path: &Path, ranks: usize) -> Result<(), TraceError> {
    let at = |path: &Path, action| {
        let path = path.to_owned();
        move |reason| TraceError { path: path.clone(), action, reason }
    };
    let mut out = BufWriter::new(File::create(path).map_err(at(path, "made"))?);
    let mut write = |text: &str| out.write_all(text.as_bytes()).map_err(at(path, "written"));
    write("[\n")?;
    for rank in 0..ranks {
        let from = part(path, rank);
        let text = std::fs::read_to_string(&from).map_err(at(&from, "read"))?;
        let events = text.trim().trim_start_matches('[').trim_end_matches(']').trim();
        write(if rank > 0 { ",\n" } else { "" })?;
        write(events)?;
    }
    write("\n]\n")?;
    out.flush().map_err(at(path, "written"))?;
    for rank in 0..ranks {
        let from = part(path, rank);
        std::fs::remove_file(&from).map_err(at(&from, "removed"))?;
    }
    Ok(())
}

/// Where the spans of one rank go until the end.
fn part(path: &Path, rank: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".rank-{rank:05}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stages::Stage;

    #[test]
    fn the_traces_of_all_ranks_become_one_list_of_events() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        for rank in 0..2 {
            let mut trace = TraceFile::create(&path, rank).unwrap();
            let begin = Instant::now();
            let span = |stage, from, to| Span {
                stage,
                begin: begin + Duration::from_micros(from),
                end: begin + Duration::from_micros(to),
            };
            trace.step(7, &[span(Stage::Route, 0, 10), span(Stage::Experts, 10, 40)]).unwrap();
            trace.finish().unwrap();
        }
        merge_traces(&path, 2).unwrap();
        let events: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let of_rank_1: Vec<_> = events.iter().filter(|event| event["pid"] == 1).collect();
        let names: Vec<_> = of_rank_1.iter().map(|event| event["name"].as_str().unwrap()).collect();
        assert_eq!((events.len(), names), (8, vec!["process_name", "step", "route", "experts"]));
        let (step, experts) = (of_rank_1[1], of_rank_1[3]);
        assert!((experts["dur"].as_f64().unwrap() - 30.0).abs() < 0.1 && experts["args"]["step"] == 7, "{experts}");
        assert!((step["dur"].as_f64().unwrap() - 40.0).abs() < 0.1, "{step}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the one trace stays");
    }
}
