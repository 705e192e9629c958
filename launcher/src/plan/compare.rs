//! A run's own count beside the plan of its configuration.
//!
//! Owns the comparison of each rank's record with what was foreseen for it. It judges nothing: it shows both.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::plan::{Job, MemoryPlan, Numbers, StepRows, Traffic, Usage};
use moe_runtime::system::readable as bytes;
use moe_runtime::topology::{Grid, Rank};
use moe_runtime::worker::RunDir;
use serde::Serialize;

/// One figure, foreseen and counted.
#[derive(Serialize)]
struct Line {
    what: String,
    planned_bytes: f64,
    counted_bytes: f64,
}

impl Line {
    fn new(what: impl Into<String>, planned_bytes: f64, counted_bytes: u64) -> Self {
        Self { what: what.into(), planned_bytes, counted_bytes: counted_bytes as f64 }
    }
}

pub(super) fn run(dir: &Path, json: bool, out: &mut impl Write) -> Result<ExitCode, Failure> {
    let run_dir = RunDir::at(dir);
    let Some(config) = run_dir.saved_config()? else {
        let message = format!("{}: holds no run: config.toml is missing", dir.display());
        return Err(Failure::new(Code::Io, message));
    };
    let usage = Usage::read(&run_dir.logs(), 0)?;
    let experts = if config.model.moe_layers().next().is_some() { config.model.experts } else { 0 };
    let grid = Grid::new(usage.world, usage.ep, experts)
        .map_err(|error| Failure::new(Code::BadData, format!("{}: its record of ranks: {error}", dir.display())))?;
    let job = Job { config, grid, ranks_per_node: usage.world, numbers: Numbers::CPU };
    let lines = lines(&job, &usage);
    let failed = |error: std::io::Error| Failure::new(Code::Io, format!("cannot write the comparison: {error}"));
    if json {
        let text = serde_json::to_string(&lines).map_err(|error| Failure::new(Code::Internal, error))?;
        writeln!(out, "{text}").map_err(failed)?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "rank 0 of {}, EP {}, {} steps", usage.world, usage.ep, usage.steps).map_err(failed)?;
    writeln!(out, "{:<28}{:>12}{:>12}{:>10}", "", "planned", "counted", "off by").map_err(failed)?;
    for Line { what, planned_bytes, counted_bytes } in &lines {
        let off = if *counted_bytes > 0.0 { 100.0 * (planned_bytes / counted_bytes - 1.0) } else { 0.0 };
        let (planned, counted) = (bytes(*planned_bytes), bytes(*counted_bytes));
        writeln!(out, "{what:<28}{planned:>12}{counted:>12}{off:>+9.1}%").map_err(failed)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn lines(job: &Job, usage: &Usage) -> Vec<Line> {
    let memory = MemoryPlan::new(job);
    let (planned, counted) = (memory.buffers, usage.buffers);
    let mut lines = vec![
        Line::new("parameters", planned.parameters as f64, counted.parameters),
        Line::new("gradients", planned.gradients as f64, counted.gradients),
        Line::new("optimizer", planned.optimizer as f64, counted.optimizer),
        Line::new("activations", planned.activations as f64, counted.activations),
        Line::new("communication", planned.communication as f64, counted.communication),
        Line::new("peak above the start", memory.peak_bytes as f64, usage.peak_bytes.saturating_sub(usage.start_bytes)),
    ];
    if usage.steps == 0 {
        return lines;
    }
    // Of a step: rows as counted make the bytes exact, rows as expected show how even the routing was.
    let exact = Traffic::of_rank(job, Rank(0), StepRows::counted(usage.rows, usage.steps));
    let even = Traffic::of_rank(job, Rank(0), job.expected_rows(Rank(0)));
    for sent in usage.sent.iter().filter(|sent| sent.collective != "split") {
        let what = format!("{} {}, a step", sent.group, sent.collective);
        lines.push(Line::new(what, exact.counted_as(&sent.group, &sent.collective), sent.bytes / usage.steps));
    }
    let all: u64 = usage.sent.iter().filter(|sent| sent.collective != "split").map(|sent| sent.bytes).sum();
    lines.push(Line::new("sent, a step, even routing", even.total(), all / usage.steps));
    lines
}
