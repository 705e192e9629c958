//! What a run will need, before anything is started: groups, memory, traffic, time.
//!
//! Owns the arithmetic: a configuration, a grid and rates in, figures out. It allocates no buffer, moves no byte and looks at no
//! machine; rates and limits are given. What it foresees is held to what a run counts: [`Usage`] is that count.
//!
//! Expected rows. Where no measured rows are given, tokens are taken to choose their k of E experts evenly and independently. A token
//! then visits a given rank of E_local experts with probability p = 1 − C(E − E_local, k) / C(E, k), so that a rank of T tokens sends
//! T·(EP − 1)·p rows to others and expects as many; T·k rows are expanded on arrival, whatever EP is.

mod fit;
mod flops;
mod memory;
mod time;
mod traffic;
mod usage;

use moe_kernels::ShuffleDims;
use serde::Serialize;

pub use fit::{Alternative, DoesNotFit, nearest_that_fit};
pub use flops::Flops;
pub use memory::{MemoryPlan, ReceiveBuffer};
pub use time::{Rates, StepTime};
pub use traffic::{Flow, Purpose, Traffic};
pub use usage::{Sent, Usage, UsageError};

use crate::config::Config;
use crate::dispatch::{ShuffledRows, visit_probability};
use crate::model::layout::Layout;
use crate::optimizer::{Cut, Shard};
use crate::topology::{Coordinate, Grid, Rank, share};

/// What a plan is made for.
#[derive(Clone, Debug)]
pub struct Job {
    /// A valid configuration.
    pub config: Config,
    /// Its grid.
    pub grid: Grid,
    /// Ranks on one node: neighbours.
    pub ranks_per_node: usize,
    /// The numbers it computes in.
    pub numbers: Numbers,
}

/// Element sizes of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Bytes of an activation and of a parameter's compute copy.
    pub act_bytes: usize,
    /// Whether parameters have an f32 master beside the compute copy.
    pub master: bool,
}

impl Numbers {
    /// The CPU's: f32 throughout.
    pub const CPU: Self = Self { act_bytes: 4, master: false };
    /// GPUs': bf16 with f32 masters.
    pub const GPU: Self = Self { act_bytes: 2, master: true };
}

/// The figures of a job.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// W, EP, DP and nodes.
    pub groups: GroupsPlan,
    /// Memory of the rank that needs most: rank 0.
    pub memory: MemoryPlan,
    /// What a rank sends in a step.
    pub traffic: Traffic,
    /// How long a step takes; None where no rates are known.
    pub time: Option<StepTime>,
}

/// Who works with whom.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupsPlan {
    /// W.
    pub world: usize,
    /// EP.
    pub ep: usize,
    /// DP.
    pub dp: usize,
    /// E_local.
    pub experts_per_rank: usize,
    /// Nodes.
    pub nodes: usize,
    /// `[dp]`: the ranks that hold all experts together.
    pub expert_groups: Vec<Vec<usize>>,
    /// `[ep]`: the ranks that hold the same experts.
    pub replica_groups: Vec<Vec<usize>>,
    /// Passes of a step.
    pub passes: usize,
    /// Tokens of the largest pass of a rank.
    pub tokens_per_pass: usize,
}

impl Plan {
    /// The figures of `job`, and of its time where rates are known.
    pub fn new(job: &Job, rates: Option<&Rates>) -> Self {
        let traffic = Traffic::expected(job);
        Self {
            groups: job.groups(),
            memory: MemoryPlan::new(job),
            time: rates.map(|rates| StepTime::new(job, &traffic, rates)),
            traffic,
        }
    }
}

impl Job {
    /// W.
    pub fn world(&self) -> usize {
        self.grid.world()
    }

    /// Nodes, the last perhaps not full.
    pub fn nodes(&self) -> usize {
        self.world().div_ceil(self.ranks_per_node.max(1))
    }

    /// Passes of a step: the same on every rank.
    pub fn passes(&self) -> usize {
        share(self.config.train.global_batch, self.world(), 0).len().div_ceil(self.micro_batch())
    }

    fn micro_batch(&self) -> usize {
        self.config.train.micro_batch_for(self.world())
    }

    /// Tokens of a rank's largest pass: T.
    pub fn pass_tokens(&self) -> usize {
        share(self.config.train.global_batch, self.world(), 0).len().min(self.micro_batch())
            * self.config.train.sequence_length
    }

    /// What is routed by itself in a rank's largest pass: its tokens, or the parts of them.
    pub fn routed_tokens(&self) -> usize {
        self.pass_tokens() * self.config.model.sub_tokens
    }

    /// The same job with `experts` experts in each MoE block: what a block of that many costs.
    fn with_experts(&self, experts: usize) -> Self {
        let grid = Grid::new(self.world(), self.grid.ep(), experts).unwrap_or(self.grid);
        let mut job = Self { grid, ..self.clone() };
        (job.config.model.experts, job.config.model.experts_by_layer) = (experts, Vec::new());
        job
    }

    /// Tokens of `rank` in a step.
    pub fn step_tokens(&self, rank: Rank) -> usize {
        share(self.config.train.global_batch, self.world(), rank.0).len() * self.config.train.sequence_length
    }

    fn moe_layers(&self) -> usize {
        self.config.model.moe_layers().count()
    }

    fn layout(&self, rank: Rank) -> Layout {
        Layout::new(&self.config.model, &self.config.router, self.grid.local_experts(rank))
    }

    /// How `rank` cuts its optimizer state.
    fn shard(&self, layout: &Layout, rank: Rank) -> Shard {
        let whole = Shard::whole(&layout.regions);
        if !self.config.parallel.shard_optimizer {
            return whole;
        }
        let Coordinate { dp, .. } = self.grid.coordinate(rank);
        Shard {
            dense: Cut::new(whole.dense.run(), self.world(), rank.0),
            experts: Cut::new(whole.experts.run(), self.grid.dp(), dp),
        }
    }

    /// Numbers that are summed over the world at the end of a step: losses, requests, rounds, and how each layer's experts were used.
    fn step_sums(&self) -> usize {
        let layers = self.moe_layers();
        let lists = if self.loads_are_global() { 2 } else { 3 };
        11 + layers * (lists * self.config.model.experts + 1)
    }

    /// The probability that a token visits a given rank of its expert group.
    fn visit_probability(&self) -> f64 {
        visit_probability(self.chunk_dims())
    }

    /// Sizes of the largest chunk of a layer's pass.
    fn chunk_dims(&self) -> ShuffleDims {
        let c = &self.config.model;
        let tokens = self.routed_tokens().div_ceil(self.config.parallel.chunks);
        ShuffleDims { tokens, top_k: c.top_k, experts: c.experts, ranks: self.grid.ep() }
    }

    /// Rows of one layer that `tokens` tokens are expected to send to other ranks.
    fn rows_to_others(&self, tokens: f64) -> f64 {
        tokens * (self.grid.ep() - 1) as f64 * self.visit_probability()
    }

    /// Rows of all layers and passes that `rank` is expected to exchange in a step.
    pub fn expected_rows(&self, rank: Rank) -> StepRows {
        let group = self.grid.expert_group(rank);
        let layers = self.moe_layers() as f64;
        let sent = self.rows_to_others((self.step_tokens(rank) * self.config.model.sub_tokens) as f64) * layers;
        let others: usize = group
            .iter()
            .filter(|peer| **peer != rank)
            .map(|peer| self.step_tokens(*peer) * self.config.model.sub_tokens)
            .sum();
        StepRows { sent, received: others as f64 * self.visit_probability() * layers, again: 0.0 }
    }

    fn groups(&self) -> GroupsPlan {
        let numbers = |ranks: Vec<Rank>| ranks.into_iter().map(|rank| rank.0).collect();
        let at = |dp, ep| self.grid.rank_at(Coordinate { dp, ep });
        GroupsPlan {
            world: self.world(),
            ep: self.grid.ep(),
            dp: self.grid.dp(),
            experts_per_rank: self.grid.experts_per_rank(),
            nodes: self.nodes(),
            expert_groups: (0..self.grid.dp()).map(|dp| numbers(self.grid.expert_group(at(dp, 0)))).collect(),
            replica_groups: (0..self.grid.ep()).map(|ep| numbers(self.grid.replica_group(at(0, ep)))).collect(),
            passes: self.passes(),
            tokens_per_pass: self.pass_tokens(),
        }
    }
}

/// Rows that a rank exchanges with others in a step, over all layers and passes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepRows {
    /// Sent in forward passes.
    pub sent: f64,
    /// Received in forward passes.
    pub received: f64,
    /// Sent once more in backward passes.
    pub again: f64,
}

impl StepRows {
    /// Rows as a run has counted them over `steps` steps, for plans that are compared with it.
    pub fn counted(rows: ShuffledRows, steps: u64) -> Self {
        let each = |rows: u64| rows as f64 / steps.max(1) as f64;
        Self { sent: each(rows.sent), received: each(rows.received), again: each(rows.again) }
    }
}

#[cfg(test)]
mod tests;
