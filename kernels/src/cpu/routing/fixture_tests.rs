//! Noisy top-k gating as a whole against what PyTorch computes: gates, load, importance, loss and every gradient.
//!
//! Owns a reader of just as much of the safetensors format as that one file needs. Where the fixtures are not beside the workspace
//! (and `MOE_FIXTURES` does not name their folder) it says so and passes: the runtime's parity tests insist on them.

use std::path::PathBuf;

use crate::cpu::testkit::assert_close;
use crate::{Cpu, GateDims, GateSpec, RoutingOps, Score, View, ViewMut};

struct Fixture {
    header: String,
    data: Vec<u8>,
}

impl Fixture {
    fn load() -> Option<Self> {
        let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures");
        let folder = std::env::var_os("MOE_FIXTURES").map_or_else(beside, PathBuf::from);
        let file = std::fs::read(folder.join("noisy-topk/reference.safetensors")).ok()?;
        let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let text = String::from_utf8(file[8..8 + header].to_vec()).unwrap();
        Some(Self { header: text, data: file[8 + header..].to_vec() })
    }

    /// The numbers between the brackets of a key of one tensor's entry.
    fn list(&self, tensor: &str, key: &str) -> Vec<usize> {
        let entry = self.header.split_once(&format!("\"{tensor}\":{{")).unwrap().1;
        let list = entry.split_once(&format!("\"{key}\":[")).unwrap().1.split_once(']').unwrap().0;
        list.split(',').map(|number| number.trim().parse().unwrap()).collect()
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let range = self.list(name, "data_offsets");
        let bytes = self.data[range[0]..range[1]].as_chunks::<4>().0;
        bytes.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn tensor_f64(&self, name: &str) -> Vec<f64> {
        self.tensor(name).iter().map(|&v| f64::from(v)).collect()
    }
}

/// `a[m, k] · b[k, n]` by strides (row, column) of each, in f64.
fn product((m, k, n): (usize, usize, usize), a: &[f32], sa: (usize, usize), b: &[f32], sb: (usize, usize)) -> Vec<f32> {
    let dot = |i: usize, j: usize| {
        (0..k).map(|l| f64::from(a[i * sa.0 + l * sa.1]) * f64::from(b[l * sb.0 + j * sb.1])).sum::<f64>() as f32
    };
    (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| dot(i, j)).collect()
}

#[test]
fn noisy_top_k_agrees_with_pytorch() {
    let Some(fixture) = Fixture::load() else {
        eprintln!("no fixtures beside the workspace: noisy top-k was not compared with PyTorch");
        return;
    };
    let [tokens, hidden] = fixture.list("x", "shape")[..] else { panic!("x is a matrix") };
    let experts = fixture.list("w_gate", "shape")[1];
    let (x, w_gate, w_noise) = (fixture.tensor("x"), fixture.tensor("w_gate"), fixture.tensor("w_noise"));
    let gates = fixture.tensor_f64("gates");
    let top_k = gates[..experts].iter().filter(|&&gate| gate != 0.0).count();
    let dims = GateDims { tokens, experts, top_k };
    let (row, column) = ((hidden, 1), (experts, 1));

    let clean = product((tokens, hidden, experts), &x, row, &w_gate, column);
    let raw = product((tokens, hidden, experts), &x, row, &w_noise, column);
    let noise = fixture.tensor("noise");
    let (mut noisy, mut load) = (vec![0.0; tokens * experts], vec![0.0; experts]);
    let inputs = (View::of(&clean), View::of(&raw), View::of(&noise));
    Cpu.noisy_logits(dims, inputs.0, inputs.1, inputs.2, ViewMut::of(&mut noisy), ViewMut::of(&mut load));

    let spec = GateSpec { dims, score: Score::Softmax, renormalize: true, scale: 1.0 };
    let (mut scores, mut ids, mut weights) = (noisy.clone(), vec![0; tokens * top_k], vec![0.0; tokens * top_k]);
    let outputs = (ViewMut::of(&mut scores), ViewMut::of(&mut ids), ViewMut::of(&mut weights));
    Cpu.gate(spec, View::of(&noisy), None, outputs.0, outputs.1, outputs.2);
    let mut importance = vec![0.0; experts];
    Cpu.importance(dims, View::of(&ids), View::of(&weights), ViewMut::of(&mut importance));

    let mut dense = vec![0.0; tokens * experts];
    for (choice, &id) in ids.iter().enumerate() {
        dense[choice / top_k * experts + id as usize] = weights[choice];
    }
    // Both sides round in f32; sums over T tokens and H products are the longest.
    let unit = f64::from(f32::EPSILON);
    assert_close("gates", &dense, &gates, unit * 32.0);
    assert_close("load", &load, &fixture.tensor_f64("load"), unit * 8.0 * tokens as f64);
    assert_close("importance", &importance, &fixture.tensor_f64("importance"), unit * 8.0 * tokens as f64);

    let (mut loss, mut dimportance, mut dload) = (vec![0.0], vec![0.0; experts], vec![0.0; experts]);
    Cpu.cv_squared(0.01, View::of(&importance), ViewMut::of(&mut loss), ViewMut::of(&mut dimportance));
    Cpu.cv_squared(0.01, View::of(&load), ViewMut::of(&mut loss), ViewMut::of(&mut dload));
    let want = fixture.tensor_f64("loss");
    assert_close("loss", &[0.01 * loss[0] as f32], &want, unit * 32.0 * want[0]);

    let (mut dweights, mut dnoisy) = (vec![0.0; ids.len()], vec![0.0; noisy.len()]);
    Cpu.importance_grad(dims, View::of(&ids), View::of(&dimportance), ViewMut::of(&mut dweights));
    let (logits, scores, ids, dweights) = (View::of(&noisy), View::of(&scores), View::of(&ids), View::of(&dweights));
    Cpu.gate_grad(spec, logits, scores, ids, dweights, None, 0.0, ViewMut::of(&mut dnoisy));
    let (mut dclean, mut draw) = (vec![0.0; noisy.len()], vec![0.0; noisy.len()]);
    let (dnoisy, dload) = (View::of(&dnoisy), View::of(&dload));
    let outputs = (ViewMut::of(&mut dclean), ViewMut::of(&mut draw));
    Cpu.noisy_logits_grad(dims, inputs.0, inputs.1, inputs.2, logits, dnoisy, dload, outputs.0, outputs.1);

    let compare = |name: &str, got: &[f32]| {
        let want = fixture.tensor_f64(name);
        let largest = want.iter().fold(0.0, |largest: f64, v| largest.max(v.abs()));
        assert_close(name, got, &want, unit * 4.0 * tokens as f64 * largest);
    };
    compare("grad.w_gate", &product((hidden, tokens, experts), &x, (1, hidden), &dclean, column));
    compare("grad.w_noise", &product((hidden, tokens, experts), &x, (1, hidden), &draw, column));
    let through_gate = product((tokens, experts, hidden), &dclean, (experts, 1), &w_gate, (1, experts));
    let through_noise = product((tokens, experts, hidden), &draw, (experts, 1), &w_noise, (1, experts));
    let dx: Vec<f32> = through_gate.iter().zip(&through_noise).map(|(a, b)| a + b).collect();
    compare("grad.x", &dx);
}
