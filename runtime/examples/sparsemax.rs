//! A gate of one's own, built into the worker: sparsemax over the k highest logits (Martins and Astudillo 2016). Weights sum to 1, and experts
//! that come off badly get none at all.
//!
//!     cargo run --release -p moe-runtime --example sparsemax -- --preset tiny --set router.kind=custom
//!     mpirun -n 2 target/release/examples/sparsemax --preset tiny --set router.kind=custom

use std::sync::Arc;

use moe_runtime::routing::{Choices, Gate, GatePass};

fn main() {
    moe_runtime::worker::main_with_gate(Arc::new(Sparsemax))
}

#[derive(Debug)]
struct Sparsemax;

impl Gate for Sparsemax {
    fn choose(&self, pass: GatePass, logits: &[f32], choices: Choices<'_>) {
        let (e, k) = (pass.dims.experts, pass.dims.top_k);
        let places = choices.ids.chunks_mut(k).zip(choices.weights.chunks_mut(k));
        for (logits, (ids, weights)) in logits.chunks(e).zip(places) {
            let mut order: Vec<usize> = (0..e).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            order.truncate(k);
            // As many of the highest as are above the threshold that makes what is left of them sum to 1.
            let (mut sum, mut threshold) = (0.0, 0.0);
            for (n, &expert) in order.iter().enumerate() {
                let lowered = (sum + logits[expert] - 1.0) / (n + 1) as f32;
                if n > 0 && logits[expert] <= lowered {
                    break;
                }
                (sum, threshold) = (sum + logits[expert], lowered);
            }
            for ((id, weight), &expert) in ids.iter_mut().zip(weights).zip(&order) {
                if logits[expert] > threshold {
                    (*id, *weight) = (expert as i32, logits[expert] - threshold);
                }
            }
        }
    }

    fn choose_grad(&self, pass: GatePass, _: &[f32], ids: &[i32], dweights: &[f32], dlogits: &mut [f32]) {
        let (e, k) = (pass.dims.experts, pass.dims.top_k);
        for ((ids, dweights), dlogits) in ids.chunks(k).zip(dweights.chunks(k)).zip(dlogits.chunks_mut(e)) {
            let chosen = || ids.iter().zip(dweights).filter(|&(&id, _)| id >= 0);
            let mean = chosen().map(|(_, d)| d).sum::<f32>() / chosen().count().max(1) as f32;
            chosen().for_each(|(&id, d)| dlogits[id as usize] = d - mean);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparsemax_is_a_gate_that_the_runtime_can_use() {
        assert_eq!(moe_runtime::routing::kit::faults(&Sparsemax), Vec::<String>::new());
    }
}
