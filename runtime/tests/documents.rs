//! Documents packed into one sequence and kept apart compute what each computes alone: logits, loss and gradients.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod tiny_models;

use moe_kernels::{Cpu, Device};
use moe_runtime::collectives::{Context, Groups, HostCommunicator, local};
use moe_runtime::model::{LogitsOf, PassTokens, Transformer};
use moe_runtime::routing::BatchShare;
use moe_runtime::stages::StageClock;
use tiny_models::{LENGTH, alone, config, difference, families, inputs, train};

/// Tokens of the first of two documents that fill a sequence: no multiple of any tile.
const CUT: usize = 13;

/// Where each token's document starts in the packed sequence.
fn starts() -> Vec<i32> {
    (0..LENGTH).map(|at| if at < CUT { 0 } else { CUT as i32 }).collect()
}

/// The tokens after each of `inputs`; none after the last.
fn targets(inputs: &[i32]) -> Vec<i32> {
    inputs[1..].iter().copied().chain([-1]).collect()
}

/// Σ losses and all gradients after one pass over each of `texts`.
fn gradients(
    model: &mut Transformer<Cpu>,
    groups: &Groups<HostCommunicator>,
    texts: &[PassTokens<'_>],
) -> (f64, Vec<f32>) {
    Cpu.fill(model.parameters_mut().grads_mut(), 0.0);
    model.begin_step();
    for &text in texts {
        let all = text.inputs.len();
        let share = BatchShare { global_tokens: LENGTH, tokens_so_far: all, pass_tokens: all };
        model.train_pass(groups, &mut StageClock::default(), text, share, 1.0 / LENGTH as f32).unwrap();
    }
    let parameters = model.parameters();
    let read = |part| parameters.read_grad(&Cpu, part).unwrap();
    (model.step_sums().unwrap().loss, parameters.layout().parts().flat_map(|(part, _)| read(part)).collect())
}

#[test]
fn documents_of_a_sequence_compute_what_each_does_alone() {
    for (name, model, router) in families() {
        // The balance loss is one over all tokens of a pass; two passes have two.
        let router = moe_runtime::routing::RouterConfig { balance_coefficient: 0.0, ..router };
        let mut trainer = alone(&config(&model, &router));
        train(&mut trainer, 10);
        let groups =
            Groups::of_grid::<Cpu>(local::solo(Context::default()), &trainer.model.setup().grid.clone()).unwrap();
        let (ids, starts) = (&inputs()[..LENGTH], starts());
        let (first, second) = ids.split_at(CUT);
        let mut logits = |tokens| trainer.model.read_logits(&groups, tokens, LogitsOf::All).unwrap();
        let alone = [first, second].map(|text| logits(PassTokens::of_inputs(text, text.len()))).concat();
        let whole = PassTokens::of_inputs(ids, LENGTH);
        let packed = PassTokens { starts: Some(&starts), ..whole };
        let (apart, together) = (difference(&logits(packed), &alone), difference(&logits(whole), &alone));
        println!("{name}: logits differ by {apart:.1e} with documents apart, {together:.1e} together");
        assert!(apart <= 2e-5, "{name}: a logit differs by {apart}");
        assert!(together > 1e-2, "{name}: the test sees no difference that a mask could make: {together}");

        let each = [targets(first), targets(second)];
        let texts = [first, second].into_iter().zip(&each);
        let texts: Vec<_> =
            texts.map(|(ids, targets)| PassTokens { targets, ..PassTokens::of_inputs(ids, ids.len()) }).collect();
        let both = each.concat();
        let (expected_loss, expected) = gradients(&mut trainer.model, &groups, &texts);
        let (loss, found) = gradients(&mut trainer.model, &groups, &[PassTokens { targets: &both, ..packed }]);
        assert!((loss - expected_loss).abs() <= 1e-5 * expected_loss, "{name}: loss {loss}, alone {expected_loss}");
        let norm = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
        let error = found.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        println!("{name}: gradients differ by {:.1e} of their norm", error / norm);
        assert!(error <= 1e-5 * norm, "{name}: gradients differ by {error} of {norm}");
    }
}
