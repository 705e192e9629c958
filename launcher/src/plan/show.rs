//! A plan as tables.
//!
//! Owns wording and units. It works out nothing but percentages.

use std::io::{self, Write};

use moe_runtime::plan::{Job, Plan, Purpose};
use moe_runtime::system::readable as bytes;

fn purpose(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Dispatch => "dispatch",
        Purpose::Combine => "combine",
        Purpose::Metadata => "metadata",
        Purpose::Gradients => "gradient sums",
        Purpose::Parameters => "updated parameters",
        Purpose::Sums => "loss and norm",
    }
}

/// At most this many groups are spelled out.
const GROUPS_SHOWN: usize = 4;

fn groups(groups: &[Vec<usize>]) -> String {
    let mut shown: Vec<String> = groups.iter().take(GROUPS_SHOWN).map(|group| range(group)).collect();
    if groups.len() > GROUPS_SHOWN {
        shown.push(format!("… {} in all", groups.len()));
    }
    shown.join(" ")
}

fn range(ranks: &[usize]) -> String {
    match ranks {
        [first, .., last] if ranks.len() > GROUPS_SHOWN => format!("[{first} … {last}]"),
        _ => format!("[{}]", ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")),
    }
}

pub(super) fn plan(plan: &Plan, job: &Job, limit_bytes: u64, out: &mut impl Write) -> io::Result<()> {
    let g = &plan.groups;
    writeln!(out, "ranks              {} on {} node{}: EP {} x DP {}", g.world, g.nodes, plural(g.nodes), g.ep, g.dp)?;
    writeln!(out, "expert groups      {}", groups(&g.expert_groups))?;
    writeln!(out, "replica groups     {}", groups(&g.replica_groups))?;
    writeln!(out, "experts per rank   {}", g.experts_per_rank)?;
    let tokens = g.tokens_per_pass;
    writeln!(
        out,
        "a step             {} pass{} of {tokens} tokens a rank",
        g.passes,
        if g.passes == 1 { "" } else { "es" }
    )?;

    let m = &plan.memory;
    writeln!(out, "\nmemory of rank 0")?;
    let sharded = if job.config.parallel.shard_optimizer { "  (shared out over replicas)" } else { "" };
    for (what, size, note) in [
        ("parameters", m.buffers.parameters, ""),
        ("gradients", m.buffers.gradients, ""),
        ("optimizer", m.buffers.optimizer, sharded),
        ("activations", m.buffers.activations, ""),
        ("communication", m.buffers.communication, ""),
        ("a checkpoint", m.checkpoint_bytes, "  (while it is written)"),
    ] {
        writeln!(out, "  {what:<16} {:>12}{note}", bytes(size as f64))?;
    }
    let share = 100.0 * m.peak_bytes as f64 / limit_bytes.max(1) as f64;
    let limit = bytes(limit_bytes as f64);
    writeln!(out, "  {:<16} {:>12}  {share:.0} % of the {limit} it may use", "peak", bytes(m.peak_bytes as f64))?;
    receive(plan, limit_bytes, out)?;

    writeln!(out, "\nsent by a rank in a step, with even routing")?;
    for flow in &plan.traffic.flows {
        let over = format!("{} in the {} group", flow.collective, flow.group);
        writeln!(out, "  {:<18} {:>12}  {over}", purpose(flow.purpose), bytes(flow.bytes))?;
    }
    writeln!(out, "  {:<18} {:>12}", "within its node", bytes(plan.traffic.within_node_bytes))?;
    writeln!(out, "  {:<18} {:>12}", "to other nodes", bytes(plan.traffic.between_nodes_bytes))?;

    let Some(time) = &plan.time else {
        return writeln!(out, "\ntime of a step     not known: give --gemm, --memory-rate and --exchange");
    };
    writeln!(out, "\ntime of a step, nothing overlapping")?;
    for (what, ms) in [
        ("matrix products", time.compute_ms),
        ("memory", time.memory_ms),
        ("exchange", time.exchange_ms),
        ("all", time.step_ms),
    ] {
        writeln!(out, "  {what:<18} {ms:>9.2} ms")?;
    }
    writeln!(out, "  {:<18} {:>9.0} tokens/s", "over all ranks", time.tokens_per_s)
}

/// How much imbalance the receive buffers take.
fn receive(plan: &Plan, limit_bytes: u64, out: &mut impl Write) -> io::Result<()> {
    let r = &plan.memory.receive;
    if r.bytes_per_row == 0 || plan.groups.ep == 1 {
        return Ok(());
    }
    let spare = limit_bytes.saturating_sub(plan.memory.peak_bytes) / r.bytes_per_row;
    let over_mean = |rows: u64| rows as f64 / r.expected_rows.max(1) as f64;
    let most = over_mean((r.planned_rows + spare).min(r.most_rows));
    writeln!(
        out,
        "  rows of a layer: {} expected, {} planned ({:.2} x), {} at worst; memory takes a rank that is {most:.1} x as busy as the mean",
        r.expected_rows,
        r.planned_rows,
        over_mean(r.planned_rows),
        r.most_rows,
    )
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_reads_best() {
        for (size, text) in [(0.0, "0 B"), (1023.0, "1023 B"), (1536.0, "1.5 KiB"), (5.0 * 1024.0 * 1024.0, "5.0 MiB")]
        {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn many_groups_are_counted_and_few_are_named() {
        assert_eq!(groups(&[vec![0, 1], vec![2, 3]]), "[0 1] [2 3]");
        let many: Vec<Vec<usize>> = (0..9).map(|i| (i * 8..i * 8 + 8).collect()).collect();
        assert_eq!(groups(&many), "[0 … 7] [8 … 15] [16 … 23] [24 … 31] … 9 in all");
    }
}
