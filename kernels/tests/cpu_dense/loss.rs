//! Cross-entropy and sums.

use super::support::{assert_close, assert_reproducible, random, tolerance, view, view_mut, with_threads};
use moe_kernels::{Cpu, LossOps};

/// Losses, and gradients times `scale`.
fn reference(vocab: usize, scale: f32, targets: &[i32], logits: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (mut losses, mut gradients) = (vec![], vec![]);
    for (target, row) in targets.iter().zip(logits.chunks(vocab)) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f64> = row.iter().map(|x| (f64::from(*x) - f64::from(largest)).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let Ok(target) = usize::try_from(*target) else {
            losses.push(0.0);
            gradients.extend(vec![0.0; vocab]);
            continue;
        };
        losses.push(sum.ln() + f64::from(largest) - f64::from(row[target]));
        let onehot = |i| if i == target { 1.0 } else { 0.0 };
        gradients.extend(exps.iter().enumerate().map(|(i, e)| (e / sum - onehot(i)) * f64::from(scale)));
    }
    (losses, gradients)
}

/// Rows of logits up to ±30; every third row without a target.
fn case(rows: usize, vocab: usize) -> (Vec<i32>, Vec<f32>) {
    let targets = (0..rows).map(|r| if r % 3 == 2 { -1 } else { (r * 31 % vocab) as i32 }).collect();
    (targets, random(rows as u64, rows * vocab).into_iter().map(|x| 30.0 * x).collect())
}

#[test]
fn losses_and_gradients_match_the_reference() {
    for (rows, vocab) in [(0, 3), (1, 1), (3, 2), (5, 17), (7, 100), (65, 257), (9, 4096)] {
        let (targets, logits) = case(rows, vocab);
        let (exact_losses, exact_gradients) = reference(vocab, 0.125, &targets, &logits);
        let (mut gradients, mut losses, mut alone) = (logits.clone(), vec![f32::NAN; rows], vec![f32::NAN; rows]);
        Cpu.cross_entropy(vocab, 0.125, view(&targets), view_mut(&mut gradients), view_mut(&mut losses));
        Cpu.cross_entropy_loss(vocab, view(&targets), view(&logits), view_mut(&mut alone));
        // A loss is up to 60 and rounded there; a probability is up to 1 and comes from an exponent up to 60, likewise rounded.
        assert_close(&format!("losses {rows}x{vocab}"), &losses, &exact_losses, 60.0 * tolerance(0));
        assert_close(&format!("gradients {rows}x{vocab}"), &gradients, &exact_gradients, 0.125 * tolerance(60));
        assert_eq!(losses, alone, "the losses alone are the same");
    }
}

#[test]
fn huge_and_infinite_logits_stay_finite_where_they_can_and_nan_is_not_hidden() {
    let targets = vec![0, 1, 1, 0];
    let logits = [[3e38, -3e38], [1e30, 1e30], [f32::NEG_INFINITY, 0.0], [f32::NAN, 0.0]].concat();
    let (mut gradients, mut losses) = (logits, vec![0.0; 4]);
    Cpu.cross_entropy(2, 1.0, view(&targets), view_mut(&mut gradients), view_mut(&mut losses));
    assert_eq!(losses[0], 0.0);
    assert!((losses[1] - std::f32::consts::LN_2).abs() < 1e-6);
    assert_eq!(losses[2], 0.0);
    assert_eq!(gradients[..6], [0.0, 0.0, 0.5, -0.5, 0.0, 0.0]);
    assert!(losses[3].is_nan() && gradients[6].is_nan());
}

#[test]
#[should_panic(expected = "target 5 is not in a vocabulary of 5")]
fn a_target_beyond_the_vocabulary_is_refused() {
    let (targets, mut logits, mut losses) = (vec![5], vec![0.0; 5], vec![0.0]);
    Cpu.cross_entropy(5, 1.0, view(&targets), view_mut(&mut logits), view_mut(&mut losses));
}

#[test]
fn sums_are_exact_to_f64_and_the_same_for_every_number_of_threads() {
    for len in [0, 1, 5, 1000, 65_535, 65_536, 200_003] {
        let x = random(1, len);
        let sum = |threads| {
            let mut total = vec![2.0_f64];
            with_threads(threads, || Cpu.sum(view(&x), view_mut(&mut total)));
            total[0]
        };
        let exact = 2.0 + x.iter().map(|x| f64::from(*x)).sum::<f64>();
        assert!((sum(1) - exact).abs() <= 1e-10, "{len}: {} {exact}", sum(1));
        assert_eq!(sum(1).to_bits(), sum(2).to_bits());
        assert_eq!(sum(1).to_bits(), sum(3).to_bits());
    }
    let (integers, mut total) = (vec![i32::MAX; 3], vec![0.0]);
    Cpu.sum(view(&integers), view_mut(&mut total));
    assert_eq!(total, [3.0 * f64::from(i32::MAX)]);
}

#[test]
fn cross_entropy_is_reproducible() {
    let (targets, logits) = case(100, 301);
    assert_reproducible("cross-entropy", 0.0, || {
        let (mut gradients, mut losses) = (logits.clone(), vec![0.0; 100]);
        Cpu.cross_entropy(301, 0.5, view(&targets), view_mut(&mut gradients), view_mut(&mut losses));
        [gradients, losses].concat()
    });
}
