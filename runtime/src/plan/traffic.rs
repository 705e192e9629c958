//! Bytes that a rank sends to others in one training step, by purpose and by link.
//!
//! Owns the list of a step's collectives and their sizes. Evaluation and checkpoints are not part of a step.

use std::ops::Range;

use serde::Serialize;

use super::{Job, StepRows};
use crate::collectives::volume;
use crate::model::complete_after;
use crate::routing::BalanceScope;
use crate::topology::Rank;
use crate::training::gaps;

/// What bytes are sent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Tokens to their experts' ranks, and their gradients home.
    Dispatch,
    /// Results home, and their gradients to the experts' ranks.
    Combine,
    /// Counts, expert lists, weights and their gradients; balance statistics.
    Metadata,
    /// Sums of gradients.
    Gradients,
    /// Updated parameters, where the optimizer's state is sharded.
    Parameters,
    /// Loss, norm, requests: a few numbers.
    Sums,
}

/// One line of a step's traffic, of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Flow {
    /// What for.
    pub purpose: Purpose,
    /// The group: world, expert or replica.
    pub group: &'static str,
    /// The collective.
    pub collective: &'static str,
    /// Bytes that the rank sends to others.
    pub bytes: f64,
}

/// A step's traffic of the busiest rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Traffic {
    /// By purpose.
    pub flows: Vec<Flow>,
    /// Bytes to ranks of the same node.
    pub within_node_bytes: f64,
    /// Bytes to ranks of other nodes.
    pub between_nodes_bytes: f64,
}

impl Traffic {
    /// Of the rank that sends most to other nodes, rows being spread evenly.
    pub fn expected(job: &Job) -> Self {
        let of = |rank: usize| Self::of_rank(job, Rank(rank), job.expected_rows(Rank(rank)));
        let busier = |a: Self, b: Self| {
            let key = |traffic: &Self| (traffic.between_nodes_bytes, traffic.total());
            if key(&b) > key(&a) { b } else { a }
        };
        // Ranks of one place in their node and one share of the batch are alike: a node and the ends tell.
        let world = job.world();
        let looked_at = (0..world.min(2 * job.ranks_per_node.max(1))).chain([world - 1]);
        looked_at.map(of).reduce(busier).unwrap_or_else(|| of(0))
    }

    /// Of `rank`, which exchanges these rows with others in the step.
    pub fn of_rank(job: &Job, rank: Rank, rows: StepRows) -> Self {
        let flows = flows(job, rank, rows);
        let between = |flow: &Flow| flow.bytes * share_between_nodes(job, rank, flow.group);
        let between_nodes_bytes = flows.iter().map(between).sum();
        let total: f64 = flows.iter().map(|flow| flow.bytes).sum();
        Self { within_node_bytes: total - between_nodes_bytes, between_nodes_bytes, flows }
    }

    /// All bytes.
    pub fn total(&self) -> f64 {
        self.within_node_bytes + self.between_nodes_bytes
    }

    /// Bytes of one purpose.
    pub fn of(&self, purpose: Purpose) -> f64 {
        self.flows.iter().filter(|flow| flow.purpose == purpose).map(|flow| flow.bytes).sum()
    }

    /// Bytes of one collective of one group, as a rank counts them.
    pub fn counted_as(&self, group: &str, collective: &str) -> f64 {
        let same = |flow: &&Flow| flow.group == group && flow.collective == collective;
        self.flows.iter().filter(same).map(|flow| flow.bytes).sum()
    }
}

impl Job {
    /// Stretches of `run` whose gradients are summed beside the backward pass.
    fn early_sums(&self, rank: Rank, run: Range<usize>) -> Vec<Range<usize>> {
        let (layout, parallel) = (self.layout(rank), &self.config.parallel);
        if !parallel.reduce_early || parallel.shard_optimizer {
            return Vec::new();
        }
        let stretches = (0..layout.blocks.len()).flat_map(|block| complete_after(&layout, block));
        stretches.map(|(range, _)| range).filter(|range| run.start <= range.start && range.end <= run.end).collect()
    }

    /// Whether balance statistics are summed over the world.
    pub(super) fn loads_are_global(&self) -> bool {
        self.config.router.balance_scope == BalanceScope::Global
    }
}

/// Share of a rank's peers in a group that live on other nodes: direct exchanges send every peer the same.
fn share_between_nodes(job: &Job, rank: Rank, group: &str) -> f64 {
    let members = match group {
        "expert" => job.grid.expert_group(rank),
        "replica" => job.grid.replica_group(rank),
        _ => job.grid.all_ranks(),
    };
    let node = |rank: Rank| rank.0 / job.ranks_per_node.max(1);
    let others = members.len().saturating_sub(1);
    let away = members.iter().filter(|peer| node(**peer) != node(rank)).count();
    if others == 0 { 0.0 } else { away as f64 / others as f64 }
}

fn flows(job: &Job, rank: Rank, rows: StepRows) -> Vec<Flow> {
    let mut flows = Vec::new();
    let mut add = |purpose, (group, collective), bytes: f64| {
        if bytes > 0.0 {
            flows.push(Flow { purpose, group, collective, bytes });
        }
    };
    if job.moe_layers() > 0 {
        shuffles(job, rows, &mut add);
        balance(job, rank, &mut add);
    }
    gradients(job, rank, &mut add);
    sums(job, rank, &mut add);
    flows
}

type Add<'a> = dyn FnMut(Purpose, (&'static str, &'static str), f64) + 'a;

/// The journeys of rows: out and home, forward and backward.
fn shuffles(job: &Job, StepRows { sent, received, again }: StepRows, add: &mut Add<'_>) {
    let (ep, k) = (job.grid.ep(), job.config.model.top_k as f64);
    let row = (job.config.model.routed_width() * job.numbers.act_bytes) as f64;
    let (layers, chunks) = (job.passes() * job.moe_layers(), job.config.parallel.chunks);
    let journeys = ("expert", "all_to_all_v");
    add(Purpose::Dispatch, journeys, (sent + received + again) * row);
    add(Purpose::Combine, journeys, (received + sent) * row);
    // Experts and weights go out with a row, the weights' gradients come home.
    add(Purpose::Metadata, journeys, (2.0 * (sent + again) + received) * 4.0 * k);
    // Each rank's rows and choices for each other, of all chunks at once.
    let counts = volume::all_gather(chunks * 2 * ep, 4, ep);
    add(Purpose::Metadata, ("expert", "all_gather"), (layers as u64 * counts) as f64);
}

fn balance(job: &Job, rank: Rank, add: &mut Add<'_>) {
    if !job.loads_are_global() {
        return;
    }
    let (world, layers, experts) = (job.world(), job.moe_layers(), job.config.model.experts);
    let mut each_pass = volume::all_reduce(layers * experts, 4, world, rank.0);
    let router = &job.config.router;
    let of_means = [router.mass_coefficient, router.difference_coefficient, router.batch_entropy_coefficient];
    if !router.is_noisy() && of_means.iter().any(|&coefficient| coefficient > 0.0) {
        // Probabilities as well as loads.
        each_pass *= 2;
    }
    if router.is_noisy() {
        each_pass += 2 * layers as u64 * volume::all_reduce(experts, 4, world, rank.0);
    }
    add(Purpose::Metadata, ("world", "all_reduce"), (job.passes() as u64 * each_pass) as f64);
}

fn gradients(job: &Job, rank: Rank, add: &mut Add<'_>) {
    let shard = job.shard(&job.layout(rank), rank);
    let (world, dp) = (job.world(), job.grid.dp());
    let place = job.grid.coordinate(rank).dp;
    for (group, cut, ranks, place) in [("world", &shard.dense, world, rank.0), ("replica", &shard.experts, dp, place)] {
        if !cut.is_shared() {
            let early = job.early_sums(rank, cut.run());
            let rest = gaps(cut.run(), &mut early.clone());
            let bytes: u64 = early.iter().chain(&rest).map(|run| volume::all_reduce(run.len(), 4, ranks, place)).sum();
            add(Purpose::Gradients, (group, "all_reduce"), bytes as f64);
            continue;
        }
        let (block, tail) = (cut.block_len(), cut.tail().len());
        add(Purpose::Gradients, (group, "reduce_scatter"), volume::reduce_scatter(block, 4, ranks) as f64);
        add(Purpose::Gradients, (group, "all_reduce"), volume::all_reduce(tail, 4, ranks, place) as f64);
        let masters = if job.numbers.master { volume::all_gather(block, 4, ranks) } else { 0 };
        let updated = volume::all_gather(block, job.numbers.act_bytes, ranks) + masters;
        add(Purpose::Parameters, (group, "all_gather"), updated as f64);
    }
}

/// The number of targets, the step's readings, the norm.
fn sums(job: &Job, rank: Rank, add: &mut Add<'_>) {
    let (world, ep) = (job.world(), job.grid.ep());
    let mut bytes = volume::all_reduce(1, 8, world, rank.0) + volume::all_reduce(job.step_sums(), 8, world, rank.0);
    let place = job.grid.coordinate(rank).ep;
    if job.config.parallel.shard_optimizer && world > 1 {
        bytes += volume::all_reduce(2, 8, world, rank.0);
    } else {
        add(Purpose::Sums, ("expert", "all_reduce"), volume::all_reduce(1, 8, ep, place) as f64);
    }
    add(Purpose::Sums, ("world", "all_reduce"), bytes as f64);
}
