//! The nearest jobs that fit where one does not.
//!
//! Owns the search: one lever at a time, each moved no further than needed.

use serde::Serialize;

use super::{Job, MemoryPlan, Numbers};
use crate::exit::{Classified, ExitCode};
use crate::model::Recompute;
use crate::system::readable;
use crate::topology::Grid;

/// A change that makes a job fit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alternative {
    /// What to say, as on the command line.
    pub change: String,
    /// Peak memory of a rank then.
    pub peak_bytes: u64,
}

/// A job that cannot run in the memory it has.
#[derive(Debug, thiserror::Error)]
#[error("{}", told(self))]
pub struct DoesNotFit {
    /// Bytes that a rank needs.
    pub peak_bytes: u64,
    /// Bytes that it has.
    pub limit_bytes: u64,
    /// What would fit.
    pub alternatives: Vec<Alternative>,
}

fn told(refusal: &DoesNotFit) -> String {
    let (peak, limit) = (readable(refusal.peak_bytes as f64), readable(refusal.limit_bytes as f64));
    let nearest: Vec<_> = refusal
        .alternatives
        .iter()
        .map(|alternative| format!("{} ({})", alternative.change, readable(alternative.peak_bytes as f64)))
        .collect();
    let advice = match nearest.as_slice() {
        [] => "nothing that is known makes it fit: choose a smaller model or shorter sequences".to_owned(),
        nearest => format!("nearest that fit: {}", nearest.join(", ")),
    };
    format!("a rank needs {peak} and has {limit}; {advice}")
}

impl Classified for DoesNotFit {
    fn exit_code(&self) -> ExitCode {
        ExitCode::Usage
    }
}

/// Nodes are not multiplied further than this.
const MOST_TIMES: usize = 1 << 10;

/// Jobs like one that was given, each with what was changed, the smallest change first.
type Lever = fn(&Job) -> Vec<(String, Job)>;

/// The changes to `job` that bring a rank's peak to `limit_bytes`, each by itself; where none does, several together. Empty: nothing
/// that is known helps.
pub fn nearest_that_fit(job: &Job, limit_bytes: u64) -> Vec<Alternative> {
    let fits = |job: &Job| MemoryPlan::new(job).peak_bytes <= limit_bytes;
    let found = |change: String, job: &Job| Alternative { change, peak_bytes: MemoryPlan::new(job).peak_bytes };
    let levers: [Lever; 5] = [smaller_passes, recomputing, sharded, larger_groups, more_ranks];
    let mut alternatives = Vec::new();
    for lever in levers {
        let first = lever(job).into_iter().find(|(_, changed)| fits(changed));
        alternatives.extend(first.map(|(change, changed)| found(change, &changed)));
    }
    if !alternatives.is_empty() {
        return alternatives;
    }
    // Every lever as far as it goes: larger groups, or more ranks, which form the largest there are.
    let mut all = (Vec::new(), job.clone());
    for lever in [smaller_passes, recomputing, sharded] {
        pull(lever, &mut all);
    }
    let mut grouped = all.clone();
    pull(larger_groups, &mut grouped);
    let with_more = more_ranks(&all.1)
        .into_iter()
        .map(|(change, changed)| (all.0.iter().cloned().chain([change]).collect(), changed));
    let nearest = std::iter::once(grouped).chain(with_more).find(|(_, changed)| fits(changed));
    nearest.map(|(changes, changed)| found(changes.join(" "), &changed)).into_iter().collect()
}

/// Adds the furthest change of a lever, if there is one, to those made already.
fn pull(lever: Lever, (changes, job): &mut (Vec<String>, Job)) {
    if let Some((change, changed)) = lever(job).pop() {
        changes.push(change);
        *job = changed;
    }
}

/// Fewer sequences a pass, largest first.
fn smaller_passes(job: &Job) -> Vec<(String, Job)> {
    let now = job.pass_tokens() / job.config.train.sequence_length;
    let smaller = |size: usize| {
        let mut changed = job.clone();
        changed.config.train.micro_batch = Some(size);
        (format!("--set train.micro_batch={size}"), changed)
    };
    (1..now).rev().map(smaller).collect()
}

/// The experts' projections computed again.
fn recomputing(job: &Job) -> Vec<(String, Job)> {
    if job.config.train.recompute == Recompute::Experts || job.moe_layers() == 0 {
        return Vec::new();
    }
    let mut changed = job.clone();
    changed.config.train.recompute = Recompute::Experts;
    vec![("--set train.recompute=experts".to_owned(), changed)]
}

/// The optimizer's state shared out.
fn sharded(job: &Job) -> Vec<(String, Job)> {
    if job.config.parallel.shard_optimizer || job.world() == 1 {
        return Vec::new();
    }
    let mut changed = job.clone();
    changed.config.parallel.shard_optimizer = true;
    vec![("--set parallel.shard_optimizer=true".to_owned(), changed)]
}

/// Larger expert groups on the same ranks.
fn larger_groups(job: &Job) -> Vec<(String, Job)> {
    let divisible = job.config.model.divisible_experts();
    let legal = (job.grid.ep() + 1..=job.world()).filter(|&ep| Grid::new(job.world(), ep, divisible).is_ok());
    let grids = legal.filter_map(|ep| Grid::new(job.world(), ep, job.grid.experts()).ok());
    let changed = |grid: Grid| {
        let mut changed = Job { grid, ..job.clone() };
        changed.config.parallel.ep = Some(grid.ep());
        (format!("--set parallel.ep={}", grid.ep()), changed)
    };
    grids.map(changed).collect()
}

/// Twice, four times… the nodes, each with as many ranks as now, with expert groups as large as they can be.
fn more_ranks(job: &Job) -> Vec<(String, Job)> {
    let times = std::iter::successors(Some(2_usize), |times| (*times < MOST_TIMES).then_some(times * 2));
    let changed = |times: usize| {
        let world = job.world() * times;
        // Ranks beyond the batch would have nothing to do.
        let divisible = Grid::automatic(world, job.config.model.divisible_experts());
        let ep = divisible.ok().filter(|_| world <= job.config.train.global_batch)?.ep();
        let grid = Grid::new(world, ep, job.grid.experts()).ok()?;
        let mut changed = Job { grid, ..job.clone() };
        let mut change = match job.numbers == Numbers::GPU {
            true => format!("--nodes {}", changed.nodes()),
            false => format!("-n {world} --nodes {}", changed.nodes()),
        };
        if changed.config.parallel.ep.replace(grid.ep()).is_some_and(|asked| asked != grid.ep()) {
            change += &format!(" --set parallel.ep={}", grid.ep());
        }
        Some((change, changed))
    };
    times.filter_map(changed).collect()
}
