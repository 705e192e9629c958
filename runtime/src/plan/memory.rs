//! Memory of a rank, by kind.
//!
//! Owns the sizes of every buffer that a training step keeps, mirrored from the modules that hold them: a test compares the sums
//! with what they count. Letters as everywhere: T tokens of a pass, H, F, E, k, N expanded rows.

use serde::Serialize;

use super::Job;
use crate::collectives::volume::SEGMENT_BYTES;
use crate::memory::{Kind, Tally};
use crate::model::layout::Layout;
use crate::model::logits_rows;
use crate::model::{BlockNorm, QkNorm, Recompute};
use crate::routing::{BalanceScope, GateForm, Logits, Overflow, RouterKind};
use crate::topology::Rank;

/// Memory of one rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// Buffers by kind.
    pub buffers: Tally,
    /// On top of the buffers while a checkpoint is written, on a rank that writes.
    pub checkpoint_bytes: u64,
    /// The most at any time.
    pub peak_bytes: u64,
    /// Rows that a rank can take.
    pub receive: ReceiveBuffer,
}

/// Expanded rows of one layer and pass.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReceiveBuffer {
    /// Where all experts are equally busy: T·k.
    pub expected_rows: u64,
    /// What is planned for.
    pub planned_rows: u64,
    /// Where every token of the expert group chooses this rank's experts.
    pub most_rows: u64,
    /// Bytes of activations and rows under way that one more row costs, over all layers.
    pub bytes_per_row: u64,
}

/// Rows of one chunk of one layer's pass on a rank.
struct Rows {
    /// Leave the token's rank, those that stay included.
    sent: f64,
    /// Arrive.
    received: f64,
    /// After expansion: N.
    expanded: f64,
}

impl MemoryPlan {
    /// What the program, its threads and MPI take beside all this, and the text of the default corpus.
    pub const PROGRAM_BYTES: u64 = 96 << 20;

    /// That of rank 0, which has the largest share of everything.
    pub fn new(job: &Job) -> Self {
        let layout = job.layout(Rank(0));
        let mut buffers = Tally::default();
        parameters(job, &layout, &mut buffers);
        activations(job, &mut buffers);
        communication(job, &layout, &mut buffers);
        let checkpoint_bytes = checkpoint_bytes(job, &layout);
        Self { peak_bytes: buffers.total() + checkpoint_bytes, checkpoint_bytes, receive: receive_buffer(job), buffers }
    }
}

fn parameters(job: &Job, layout: &Layout, tally: &mut Tally) {
    let len = layout.len() as u64;
    let master = if job.numbers.master { 4 * len } else { 0 };
    tally.add(Kind::Parameters, [len * job.numbers.act_bytes as u64, master]);
    tally.add(Kind::Gradients, [4 * len]);
    // Two moments, and two sums of squares in f64.
    tally.add(Kind::Optimizer, [8 * job.shard(layout, Rank(0)).state_len() as u64, 16]);
}

/// Planned rows: as expected, with headroom where other ranks decide how many come.
fn rows(job: &Job) -> Rows {
    let tokens = job.routed_tokens() as f64 / job.config.parallel.chunks as f64;
    let sent = tokens * job.grid.ep() as f64 * job.visit_probability();
    let c = &job.config.model;
    // Where experts choose, each rounds up.
    let rounded = if job.config.router.slots(c.top_k, c.experts) > c.top_k { c.experts } else { 0 };
    let expanded = tokens * c.top_k as f64 + rounded as f64;
    let headroom = if job.grid.ep() > 1 { job.config.parallel.receive_headroom } else { 1.0 };
    Rows { sent, received: sent * headroom, expanded: expanded * headroom }
}

fn receive_buffer(job: &Job) -> ReceiveBuffer {
    let c = &job.config.model;
    let (tokens, layers) = (job.routed_tokens() as u64, job.moe_layers() as u64);
    let local = c.top_k.min(job.grid.experts_per_rank()) as u64;
    let (h, f, act) = (c.routed_width() as u64, c.expert_ffn_size as u64, job.numbers.act_bytes as u64);
    let chunks = job.config.parallel.chunks as f64;
    let kept = match job.config.train.recompute {
        Recompute::None => layers * c.expert_activation.projections() as u64 * f,
        Recompute::Experts => 0,
    };
    let shared = scratch_widths(job) * f;
    ReceiveBuffer {
        expected_rows: tokens * c.top_k as u64,
        planned_rows: (rows(job).expanded * chunks) as u64,
        most_rows: tokens * job.grid.ep() as u64 * local,
        bytes_per_row: if layers == 0 { 0 } else { act * (kept + 2 * h + shared) },
    }
}

fn activations(job: &Job, tally: &mut Tally) {
    let c = &job.config.model;
    let act = job.numbers.act_bytes as u64;
    let (t, s) = (job.pass_tokens() as u64, job.config.train.sequence_length as u64);
    let (h, heads) = (c.hidden_size as u64, c.heads as u64);
    let (qkv, attention) = (c.qkv_width() as u64, c.attention_width() as u64);
    let th = t * h * act;
    let with_norm = u64::from(c.qk_norm != QkNorm::None);
    let norm_groups = match c.qk_norm {
        QkNorm::None => 0,
        QkNorm::PerHead => heads + c.kv_heads as u64,
        QkNorm::FullWidth => 2,
    };
    let norm = 4 * t + th;
    let sums = if c.block_norm == BlockNorm::Post { 2 } else { 1 };
    let per_block = sums * th // between the halves, and before a norm behind them
        + 2 * norm
        + t * (qkv * (1 + with_norm) + attention) * act
        + 4 * t * (heads + norm_groups);
    let feed_forward = |f: usize| 6 * t * f as u64 * act;
    let layers = c.layers as u64;
    let moe = job.moe_layers() as u64;
    let logits = logits_rows(c.vocab_size, t as usize, act == 2) as u64 * c.vocab_size as u64 * act;
    let world_sums = job.step_sums() as u64;
    tally.add(
        Kind::Activations,
        [
            2 * s * (c.head_width() as u64 / 2) * 4,
            4 * t * (1 + u64::from(job.config.train.document_mask)) + 8,
            (layers + 1) * th,
            layers * per_block,
            (layers - moe) * feed_forward(c.ffn_size),
            t * (attention + qkv * (1 + with_norm)) * act,
            2 * th,
            norm + logits + 8 * t,
            if job.world() > 1 { 8 * world_sums } else { 0 },
            c.padding_token.map_or(0, |_| 4 * h),
        ],
    );
    if moe > 0 {
        let layers: u64 = c.layer_experts().into_iter().map(|experts| moe_layer(&job.with_experts(experts))).sum();
        tally.add(Kind::Activations, [layers, expert_scratch(job)]);
    }
    let groups = if job.config.router.balance_scope == BalanceScope::Sequence { job.micro_batch() as u64 } else { 1 };
    let experts = moe * c.experts as u64;
    // Counts, probabilities, their sums over a step, coefficients; dropped choices, entropies, losses.
    tally.add(Kind::Activations, [5 * 4 * groups * experts, 4 * experts, 8 * moe, 8 * 8]);
}

/// The experts' projections of one layer.
fn projections(job: &Job) -> u64 {
    let rows = rows(job).expanded * job.config.parallel.chunks as f64;
    let c = &job.config.model;
    rows as u64 * (job.numbers.act_bytes * c.expert_activation.projections() * c.expert_ffn_size) as u64
}

/// What is computed again in one pass, in bytes of its results.
pub(super) fn recomputed(job: &Job) -> u64 {
    match job.config.train.recompute {
        Recompute::None => 0,
        Recompute::Experts => job.moe_layers() as u64 * projections(job),
    }
}

/// What one MoE layer keeps: the router, the experts' projections if they are not computed again, the rows that arrived from other ranks, the shared expert.
fn moe_layer(job: &Job) -> u64 {
    let c = &job.config.model;
    let act = job.numbers.act_bytes as u64;
    let (t, h) = (job.pass_tokens() as u64, c.hidden_size as u64);
    let router = router(job);
    let (rows, chunks) = (rows(job), job.config.parallel.chunks as f64);
    let arrived = if job.grid.ep() > 1 { (rows.received * chunks) as u64 * act * h } else { 0 };
    let experts = match job.config.train.recompute {
        Recompute::None => projections(job),
        Recompute::Experts => 0,
    };
    let shared = match (c.shared_expert_ffn_size as u64, c.shared_expert_gate) {
        (0, _) => 0,
        (f, gated) => act * t * (h + 6 * f) + if gated { act * t * h + 8 * t } else { 0 },
    };
    // Parts and their outputs; the sums that norms behind them need.
    let cut = if c.sub_tokens > 1 { 2 * act * t * h } else { 0 };
    router + experts + arrived + shared + cut
}

/// What one layer's router keeps.
fn router(job: &Job) -> u64 {
    let (c, config) = (&job.config.model, &job.config.router);
    let act = job.numbers.act_bytes as u64;
    let (t, width, e) = (job.routed_tokens() as u64, c.routed_width() as u64, c.experts as u64);
    let (k, rows) = (config.slots(c.top_k, c.experts) as u64, config.rows(c.experts) as u64);
    let logits = if config.is_noisy() { 8 } else { 3 };
    let folded = if matches!(GateForm::of(config).logits, Logits::Folded(_)) { 2 * rows } else { 0 };
    let tags = u64::from(config.kind == RouterKind::MultiGate);
    let masked = if config.expert_dropout > 0.0 { e } else { 0 };
    let first = if config.overflow == Overflow::Reroute { k } else { 0 };
    let gate = 4 * (t * (logits * e + folded + tags + 4 * k + first + 1) + 7 * e.max(2) + masked);
    let hidden: u64 = config.hidden_sizes.iter().map(|&width| width as u64).sum();
    let widest = config.hidden_sizes.iter().map(|&width| width as u64).fold(width, u64::max);
    let jitter = config.input_jitter > 0.0;
    let layers = hidden * if config.dropout > 0.0 { 3 } else { 2 } + if jitter { width } else { 0 };
    let gradients = if jitter || hidden > 0 { 2 * widest } else { 0 };
    gate + act * t * (layers + gradients)
}

/// Of an expanded row in the experts' scratch, in widths of F: activations and gradients; where projections are computed again, or rows may
/// come in rounds, of which nothing is kept, those as well.
fn scratch_widths(job: &Job) -> u64 {
    let projected = job.config.model.expert_activation.projections() as u64;
    let again = job.config.train.recompute == Recompute::Experts || job.grid.ep() > 1;
    2 + projected * if again { 2 } else { 1 }
}

/// Expanded rows, the experts' activations and their gradients, which all layers share.
fn expert_scratch(job: &Job) -> u64 {
    let c = &job.config.model;
    let act = job.numbers.act_bytes as u64;
    let row = act * (2 * c.routed_width() as u64 + scratch_widths(job) * c.expert_ffn_size as u64);
    let slots = job.config.router.slots(c.top_k, c.experts);
    let cut = if c.sub_tokens > 1 { 2 * act * (job.pass_tokens() * c.hidden_size) as u64 } else { 0 };
    rows(job).expanded as u64 * row + 4 * (job.routed_tokens() * slots) as u64 + cut
}

fn communication(job: &Job, layout: &Layout, tally: &mut Tally) {
    let c = &job.config.model;
    let act = job.numbers.act_bytes as u64;
    let (h, k) = (c.routed_width() as u64, job.config.router.slots(c.top_k, c.experts) as u64);
    if job.moe_layers() > 0 {
        let Rows { sent, received, expanded } = rows(job);
        let [sent, received, expanded] = [sent, received, expanded].map(|rows| rows as u64);
        let (chunks, tokens) = (job.config.parallel.chunks, job.routed_tokens());
        let ep = job.grid.ep();
        let each = (k as usize).min(ep) as u64;
        let local = job.grid.experts_per_rank() as u64;
        let lists = |tokens: u64| {
            // Counts, offsets, and three lists that say where expanded rows come from.
            let here = ep as u64 + 1 + local + 1;
            if ep == 1 {
                return 4 * (here + tokens * (k + 2 * k.min(local)));
            }
            // A count, the plan's lists at their bound, the arrived rows' lists, those of the expanded.
            let bound = tokens * each;
            4 * (here + 1 + bound * (2 + 3 * k) + received * 3 * k + 2 * expanded)
        };
        let per_layer: u64 =
            (0..chunks).map(|chunk| lists(crate::topology::share(tokens, chunks, chunk).len() as u64)).sum();
        tally.add(
            Kind::Communication,
            [
                job.moe_layers() as u64 * per_layer,
                if ep > 1 { chunks as u64 * (sent + received) * (h * act + 4 * k) } else { 0 },
                // Counts: this rank's, and all ranks'.
                if ep > 1 { (4 * (1 + ep) * chunks * 2 * ep) as u64 } else { 0 },
                staged_rows(job),
            ],
        );
    }
    let shard = job.shard(layout, Rank(0));
    let block = |cut: &crate::optimizer::Cut| if cut.is_shared() { cut.block_len() as u64 } else { 0 };
    let (dense, experts) = (block(&shard.dense), block(&shard.experts));
    let grown = if experts > dense && dense > 0 { experts.max(dense * 5 / 4) } else { dense.max(experts) };
    tally.add(Kind::Communication, [grown * (4 + act)]);
}

/// Messages of the largest exchange, outgoing and incoming, as CPUs stage them.
fn staged_rows(job: &Job) -> u64 {
    if job.numbers != super::Numbers::CPU || job.world() == 1 {
        return 0;
    }
    let tokens = job.routed_tokens() as f64 / job.config.parallel.chunks as f64;
    let rows = 2.0 * job.rows_to_others(tokens) * (job.config.model.routed_width() * job.numbers.act_bytes) as f64;
    (rows as u64).max(2 * SEGMENT_BYTES as u64)
}

/// A tensor's values and their encoding; where state is sharded also the gathered moments.
fn checkpoint_bytes(job: &Job, layout: &Layout) -> u64 {
    let largest = layout.parts().map(|(part, _)| part.range.len() as u64).max().unwrap_or(0);
    let gathered = if job.shard(layout, Rank(0)).dense.is_shared() { 8 * layout.len() as u64 } else { 0 };
    8 * largest + gathered
}
