//! How long a step takes at given rates.
//!
//! Owns the model of time: matrix products at the rate of a large one, everything else at the rate of memory, exchanges at the rate
//! of the link they cross, one after the other. Nothing overlaps and nothing waits for a slower rank, so it is what a balanced step
//! takes at best without overlap.

use serde::Serialize;

use super::{Flops, Job, MemoryPlan, Traffic, memory};
use crate::topology::Rank;

/// What one rank of a machine achieves while its neighbours do the same.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Matrix products, in FLOP/s.
    pub gemm_flops: f64,
    /// Memory, in bytes read or written a second.
    pub memory_bytes: f64,
    /// To ranks of the same node, in bytes sent a second.
    pub within_node_bytes: f64,
    /// To ranks of other nodes.
    pub between_nodes_bytes: f64,
}

/// Milliseconds of a step, by what they are spent on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// Matrix products.
    pub compute_ms: f64,
    /// Passes over activations, gradients and the optimizer's state.
    pub memory_ms: f64,
    /// Exchanges with other ranks.
    pub exchange_ms: f64,
    /// All of it.
    pub step_ms: f64,
    /// Over all ranks.
    pub tokens_per_s: f64,
}

/// Times that a step reads or writes each activation: written and read forward, read, and its gradient written and read backward.
const PASSES_OVER_ACTIVATIONS: f64 = 5.0;
/// The same of what is computed again instead of kept, which is written and read once more.
const PASSES_OVER_RECOMPUTED: f64 = PASSES_OVER_ACTIVATIONS + 2.0;
/// Bytes an update touches per parameter that it updates: gradient, two moments and the parameter read and written.
const BYTES_PER_UPDATE: f64 = 32.0;

impl StepTime {
    /// The time of the busiest rank.
    pub fn new(job: &Job, traffic: &Traffic, rates: &Rates) -> Self {
        let tokens = job.step_tokens(Rank(0)) as f64;
        let layout = job.layout(Rank(0));
        let updated = job.shard(&layout, Rank(0)).state_len() as f64;
        let passes = job.passes() as f64;
        let activations = MemoryPlan::new(job).buffers.activations as f64 * passes;
        let recomputed = memory::recomputed(job) as f64 * passes;
        // Gradients are summed where they lie: read and written once more.
        let touched = PASSES_OVER_ACTIVATIONS * activations
            + PASSES_OVER_RECOMPUTED * recomputed
            + BYTES_PER_UPDATE * updated
            + 8.0 * layout.len() as f64;
        let flops = Flops::of(&job.config).total() + Flops::recomputed(&job.config);
        let compute_ms = 1e3 * flops * tokens / rates.gemm_flops;
        let memory_ms = 1e3 * touched / rates.memory_bytes;
        let exchange_ms = 1e3 * traffic.within_node_bytes / rates.within_node_bytes
            + 1e3 * traffic.between_nodes_bytes / rates.between_nodes_bytes;
        let step_ms = compute_ms + memory_ms + exchange_ms;
        let all_tokens = (job.config.train.global_batch * job.config.train.sequence_length) as f64;
        Self { compute_ms, memory_ms, exchange_ms, step_ms, tokens_per_s: 1e3 * all_tokens / step_ms }
    }
}
