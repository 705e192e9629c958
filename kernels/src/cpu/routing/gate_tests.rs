//! The gate against a reference in f64 that follows the definitions word by word, and its gradients against finite differences.

use crate::cpu::testkit::{assert_close, finite_differences, on_threads, rng, uniform};
use crate::{
    BalanceGrad, Choice, Cpu, Enough, GateDims, GateSpec, GroupLimit, GroupRank, RankedBy, RoutingOps, Score,
    TokenLosses, View, ViewMut,
};

/// f32 relative error of a chain of exp, a sum over up to 128 experts and a few products, with room for the library's exp.
const TOLERANCE: f64 = 64.0 * f32::EPSILON as f64;

struct Output {
    scores: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

fn gate(spec: GateSpec, logits: &[f32], bias: Option<&[f32]>) -> Output {
    let GateDims { tokens, experts, top_k } = spec.dims;
    let mut scores = vec![f32::NAN; tokens * experts];
    let mut ids = vec![-7; tokens * top_k];
    let mut weights = vec![f32::NAN; tokens * top_k];
    let bias = bias.map(<[f32]>::to_vec);
    Cpu.gate(
        spec,
        View::of(&logits.to_vec()),
        bias.as_ref().map(View::of),
        ViewMut::of(&mut scores),
        ViewMut::of(&mut ids),
        ViewMut::of(&mut weights),
    );
    Output { scores, ids, weights }
}

fn specs(dims: GateDims) -> impl Iterator<Item = GateSpec> {
    let kinds = [Score::Softmax, Score::Sigmoid].into_iter().flat_map(|score| [(score, false), (score, true)]);
    kinds.map(move |(score, renormalize)| GateSpec { dims, score, renormalize, scale: 2.5, choice: Choice::default() })
}

fn log_sum_exp(logits: &[f64]) -> f64 {
    let max = logits.iter().copied().fold(f64::MIN, f64::max);
    max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln()
}

fn reference_scores(score: Score, logits: &[f64]) -> Vec<f64> {
    let lse = log_sum_exp(logits);
    let of = |l: &f64| match score {
        Score::Softmax => (l - lse).exp(),
        Score::Sigmoid => 1.0 / (1.0 + (-l).exp()),
    };
    logits.iter().map(of).collect()
}

fn reference_weights(spec: GateSpec, scores: &[f64], ids: &[i32]) -> Vec<f64> {
    let chosen: Vec<f64> = ids.iter().map(|&id| usize::try_from(id).map_or(0.0, |e| scores[e])).collect();
    let sum = if spec.renormalize { chosen.iter().sum() } else { 1.0 };
    chosen.iter().map(|s| s / sum * f64::from(spec.scale)).collect()
}

fn reference_probabilities(score: Score, scores: &[f64]) -> Vec<f64> {
    let sum: f64 = match score {
        Score::Softmax => 1.0,
        Score::Sigmoid => scores.iter().sum(),
    };
    scores.iter().map(|s| s / sum).collect()
}

fn entropy(probabilities: &[f64]) -> f64 {
    probabilities.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum()
}

fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

#[test]
fn scores_choices_and_weights_follow_the_definition() {
    for (tokens, experts, top_k) in [(0, 4, 2), (1, 1, 1), (37, 8, 2), (300, 64, 8), (5, 128, 128)] {
        let dims = GateDims { tokens, experts, top_k };
        let mut rng = rng(7);
        let logits = uniform(&mut rng, tokens * experts, 4.0);
        let bias = uniform(&mut rng, experts, 0.3);
        for (spec, bias) in specs(dims).flat_map(|spec| [(spec, None), (spec, Some(bias.as_slice()))]) {
            let got = gate(spec, &logits, bias);
            for t in 0..tokens {
                let row = t * experts..(t + 1) * experts;
                let scores = reference_scores(spec.score, &to_f64(&logits[row.clone()]));
                assert_close("scores", &got.scores[row.clone()], &scores, TOLERANCE);

                let key = |e: usize| got.scores[row.start + e] + bias.map_or(0.0, |bias| bias[e]);
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|&a, &b| key(b).total_cmp(&key(a)));
                let want: Vec<i32> = order[..top_k].iter().map(|&e| e as i32).collect();
                let choices = t * top_k..(t + 1) * top_k;
                assert_eq!(got.ids[choices.clone()], want, "{spec:?}, token {t}");

                let weights = reference_weights(spec, &scores, &want);
                assert_close("weights", &got.weights[choices], &weights, 2.5 * TOLERANCE);
            }
        }
    }
}

/// The experts a token may choose, by the definition of [`GroupLimit`].
fn reference_allowed(limit: GroupLimit, ranks: &[f32]) -> Vec<usize> {
    let size = ranks.len() / limit.groups;
    let of_group = |group: usize| {
        let mut of_group = ranks[group * size..(group + 1) * size].to_vec();
        of_group.sort_by(|a, b| b.total_cmp(a));
        match limit.by {
            GroupRank::Highest => of_group[0],
            GroupRank::TwoHighest => of_group.iter().take(2).sum(),
            GroupRank::All => of_group.iter().sum(),
        }
    };
    let mut groups: Vec<usize> = (0..limit.groups).collect();
    groups.sort_by(|&a, &b| of_group(b).total_cmp(&of_group(a)));
    groups.truncate(limit.chosen);
    (0..ranks.len()).filter(|e| groups.contains(&(e / size))).collect()
}

/// Group limits and sums that are enough, for 12 experts and 3 choices.
fn choices() -> Vec<Choice> {
    let limit = |groups, chosen, by| Some(GroupLimit { groups, chosen, by });
    let limits = [
        None,
        limit(1, 1, GroupRank::Highest),
        limit(4, 1, GroupRank::Highest),
        limit(4, 2, GroupRank::TwoHighest),
        limit(3, 2, GroupRank::All),
        limit(12, 3, GroupRank::TwoHighest),
    ];
    let enough = [None, Some(Enough { mass: 0.35, least: 1 }), Some(Enough { mass: 0.0, least: 2 })];
    let by = [RankedBy::Score, RankedBy::Logit];
    let all = limits.iter().flat_map(|&groups| enough.map(|enough| (groups, enough)));
    all.flat_map(|(groups, enough)| by.map(|by| Choice { by, groups, enough })).collect()
}

#[test]
fn limited_groups_and_enough_choices_follow_the_definition() {
    let dims = GateDims { tokens: 200, experts: 12, top_k: 3 };
    let mut rng = rng(17);
    let logits = uniform(&mut rng, 200 * 12, 3.0);
    let bias = uniform(&mut rng, 12, 0.5);
    let mut ended = 0;
    for (spec, choice) in specs(dims).flat_map(|spec| choices().into_iter().map(move |choice| (spec, choice))) {
        let spec = GateSpec { choice, ..spec };
        for bias in [None, Some(bias.as_slice())] {
            let got = gate(spec, &logits, bias);
            for t in 0..200 {
                let row = t * 12..(t + 1) * 12;
                let scores = &got.scores[row.clone()];
                let ranked = if choice.by == RankedBy::Score { scores } else { &logits[row] };
                let ranks: Vec<f32> = (0..12).map(|e| ranked[e] + bias.map_or(0.0, |bias| bias[e])).collect();
                let mut order = match choice.groups {
                    None => (0..12).collect(),
                    Some(limit) => reference_allowed(limit, &ranks),
                };
                order.sort_by(|&a, &b| ranks[b].total_cmp(&ranks[a]));
                let mut want: Vec<i32> = order[..3].iter().map(|&e| e as i32).collect();
                if let Some(Enough { mass, least }) = choice.enough {
                    let all: f32 = if spec.score == Score::Softmax { 1.0 } else { scores.iter().sum() };
                    let before = |j: usize| order[..j].iter().map(|&e| scores[e] / all).sum::<f32>();
                    let end = (least..3).find(|&j| before(j) >= mass).unwrap_or(3);
                    want[end..].fill(-1);
                    ended += 3 - end;
                }
                let choices = t * 3..(t + 1) * 3;
                assert_eq!(got.ids[choices.clone()], want, "{spec:?}, token {t}");
                let weights = reference_weights(spec, &to_f64(scores), &want);
                assert_close("weights", &got.weights[choices], &weights, 2.5 * TOLERANCE);
            }
        }
    }
    assert!(ended > 1000, "{ended} choices were not needed");
}

#[test]
fn sinkhorns_bias_gives_every_expert_an_even_share_and_two_tokens_of_one_mind_part() {
    let dims = GateDims { tokens: 400, experts: 8, top_k: 1 };
    let mut logits = uniform(&mut rng(23), 400 * 8, 2.0);
    logits.iter_mut().step_by(8).for_each(|logit| *logit += 4.0);
    let bias_after = |iterations: usize| {
        let mut bias = vec![f32::NAN; 8];
        Cpu.sinkhorn_bias(dims, iterations, View::of(&logits), ViewMut::of(&mut bias));
        bias
    };
    assert_eq!(bias_after(0), [0.0; 8]);
    // The same iteration in f64.
    let mut want = [0.0f64; 8];
    for _ in 0..20 {
        let mut sums = [0.0; 8];
        for row in to_f64(&logits).chunks(8) {
            let ranked: Vec<f64> = row.iter().zip(want).map(|(l, b)| l + b).collect();
            let lse = log_sum_exp(&ranked);
            ranked.iter().zip(&mut sums).for_each(|(l, sum)| *sum += (l - lse).exp());
        }
        want.iter_mut().zip(sums).for_each(|(bias, sum)| *bias += (50.0 / sum).ln());
    }
    assert_close("bias", &bias_after(20), &want, 400.0 * TOLERANCE);
    let spec = GateSpec { dims, score: Score::Softmax, renormalize: false, scale: 1.0, choice: Choice::default() };
    let busiest = |by, bias: Option<&[f32]>| {
        let got = gate(GateSpec { choice: Choice { by, ..Choice::default() }, ..spec }, &logits, bias);
        (0..8).map(|e| got.ids.iter().filter(|&&id| id == e).count()).max().unwrap()
    };
    let (plain, balanced) = (busiest(RankedBy::Score, None), busiest(RankedBy::Logit, Some(&bias_after(20))));
    assert!(plain > 300 && balanced < 80, "{plain} of 400 tokens without, {balanced} with the bias");
    // No tokens, and an expert that nothing reaches.
    let mut bias = vec![f32::NAN; 2];
    let none = GateDims { tokens: 0, experts: 2, top_k: 1 };
    Cpu.sinkhorn_bias(none, 3, View::of(&Vec::new()), ViewMut::of(&mut bias));
    assert_eq!(bias, [0.0; 2]);
    let one = GateDims { tokens: 1, experts: 2, top_k: 1 };
    Cpu.sinkhorn_bias(one, 3, View::of(&vec![0.0, f32::NEG_INFINITY]), ViewMut::of(&mut bias));
    assert!(bias.iter().all(|b| b.is_finite()), "{bias:?}");
}

#[test]
fn ties_go_to_the_lower_id_and_a_bias_decides_without_entering_a_weight() {
    let dims = GateDims { tokens: 1, experts: 5, top_k: 3 };
    let spec = GateSpec { dims, score: Score::Sigmoid, renormalize: false, scale: 1.0, choice: Choice::default() };
    assert_eq!(gate(spec, &[0.0, 1.0, 0.0, 1.0, 0.0], None).ids, [1, 3, 0]);
    let biased = gate(spec, &[0.0; 5], Some(&[0.0, 0.0, 0.0, 0.0, 9.0]));
    assert_eq!((biased.ids, biased.weights), (vec![4, 0, 1], vec![0.5; 3]));
}

#[test]
fn nan_and_infinite_logits_still_give_valid_distinct_choices() {
    let dims = GateDims { tokens: 4, experts: 4, top_k: 2 };
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let logits = [nan, 1.0, -nan, 2.0, nan, nan, nan, nan, inf, 0.0, inf, 0.0, -inf, 0.0, -inf, 1.0];
    for spec in specs(dims) {
        let got = gate(spec, &logits, None);
        for ids in got.ids.chunks(2) {
            assert!(ids.iter().all(|id| (0..4).contains(id)) && ids[0] != ids[1], "{spec:?}: {:?}", got.ids);
        }
        assert_eq!(got.ids[6..], [3, 1], "{spec:?}: a logit of minus infinity is never preferred");
        if spec.score == Score::Sigmoid {
            assert_eq!(got.ids[..2], [3, 1], "a NaN ranks below every number");
        }
    }
}

#[test]
fn vanishing_scores_give_zero_weights_not_nan() {
    let dims = GateDims { tokens: 1, experts: 3, top_k: 2 };
    let spec = GateSpec { dims, score: Score::Sigmoid, renormalize: true, scale: 1.0, choice: Choice::default() };
    assert_eq!(gate(spec, &[-300.0; 3], None).weights, [0.0, 0.0]);
}

/// The loss whose gradient `gate_grad` is: weights against fixed gradients, probabilities against coefficients, z-loss.
struct Losses {
    spec: GateSpec,
    ids: Vec<i32>,
    dweights: Vec<f32>,
    coefficients: Option<Vec<f32>>,
    tokens_per_group: usize,
    losses: TokenLosses,
}

impl Losses {
    fn total(&self, logits: &[f64]) -> f64 {
        let GateDims { tokens, experts, top_k } = self.spec.dims;
        let dot = |a: &[f64], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum::<f64>();
        let token = |t: usize| {
            let logits = &logits[t * experts..(t + 1) * experts];
            let scores = reference_scores(self.spec.score, logits);
            let choices = t * top_k..(t + 1) * top_k;
            let weights = reference_weights(self.spec, &scores, &self.ids[choices.clone()]);
            let balance = self.coefficients.as_ref().map_or(0.0, |coefficients| {
                let group = t / self.tokens_per_group;
                let coefficients = &coefficients[group * experts..(group + 1) * experts];
                dot(&reference_probabilities(self.spec.score, &scores), coefficients)
            });
            dot(&weights, &self.dweights[choices])
                + balance
                + f64::from(self.losses.z_scale) * log_sum_exp(logits).powi(2)
                + f64::from(self.losses.entropy_scale) * entropy(&reference_probabilities(self.spec.score, &scores))
        };
        (0..tokens).map(token).sum()
    }

    fn grad(&self, logits: &[f32], scores: &Vec<f32>, threads: usize) -> Vec<f32> {
        let mut dlogits = vec![f32::NAN; logits.len()];
        on_threads(threads, || {
            Cpu.gate_grad(
                self.spec,
                View::of(&logits.to_vec()),
                View::of(scores),
                View::of(&self.ids),
                View::of(&self.dweights),
                self.coefficients.as_ref().map(|coefficients| BalanceGrad {
                    coefficients: View::of(coefficients),
                    tokens_per_group: self.tokens_per_group,
                }),
                self.losses,
                ViewMut::of(&mut dlogits),
            );
        });
        dlogits
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let dims = GateDims { tokens: 7, experts: 6, top_k: 3 };
    let enough = Choice { enough: Some(Enough { mass: 0.5, least: 1 }), ..Choice::default() };
    let mut rng = rng(11);
    let logits = uniform(&mut rng, 42, 2.0);
    let coefficients = uniform(&mut rng, 4 * 6, 1.0);
    for spec in specs(dims).flat_map(|spec| [spec, GateSpec { choice: enough, ..spec }]) {
        for (balance, z_scale, entropy_scale) in
            [(false, 0.0, 0.0), (true, 0.0, 0.0), (false, 0.1, 0.0), (false, 0.0, 0.5), (true, 0.1, 0.5)]
        {
            let forward = gate(spec, &logits, None);
            let losses = Losses {
                spec,
                ids: forward.ids,
                dweights: uniform(&mut rng, 21, 1.0),
                coefficients: balance.then(|| coefficients.clone()),
                tokens_per_group: 2,
                losses: TokenLosses { z_scale, entropy_scale },
            };
            let want = finite_differences(&logits, |logits| losses.total(logits));
            let got = losses.grad(&logits, &forward.scores, 1);
            assert_close(
                &format!("dlogits of {spec:?}, balance {balance}, z {z_scale}, entropy {entropy_scale}"),
                &got,
                &want,
                5.0 * TOLERANCE,
            );
        }
    }
}

#[test]
fn a_dropped_second_expert_gets_no_gradient_of_its_own() {
    let dims = GateDims { tokens: 1, experts: 3, top_k: 2 };
    let spec = GateSpec { dims, score: Score::Softmax, renormalize: false, scale: 1.0, choice: Choice::default() };
    let forward = gate(spec, &[2.0, 1.0, 0.0], None);
    let mut losses = Losses {
        spec,
        ids: vec![0, -1],
        dweights: vec![1.0, f32::NAN],
        coefficients: None,
        tokens_per_group: 1,
        losses: TokenLosses::default(),
    };
    let dropped = losses.grad(&[2.0, 1.0, 0.0], &forward.scores, 1);
    (losses.ids, losses.dweights) = (vec![0, 1], vec![1.0, 0.0]);
    assert_eq!(dropped, losses.grad(&[2.0, 1.0, 0.0], &forward.scores, 1));
}

#[test]
fn every_thread_count_gives_the_same_bits() {
    let dims = GateDims { tokens: 3000, experts: 16, top_k: 4 };
    let logits = uniform(&mut rng(3), 3000 * 16, 3.0);
    for spec in specs(dims) {
        let run = |threads| {
            on_threads(threads, || {
                let forward = gate(spec, &logits, None);
                let sums = statistics(spec, 1024, 3, &logits, &forward);
                (forward.weights, forward.ids, sums)
            })
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(3), run(3));
    }
}

/// Counts, probability sums, and the sums over all tokens.
fn statistics(
    spec: GateSpec,
    tokens_per_group: usize,
    groups: usize,
    logits: &[f32],
    forward: &Output,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut counts = vec![f32::NAN; groups * spec.dims.experts];
    let mut prob_sums = counts.clone();
    let mut sums = vec![f32::NAN; 2];
    Cpu.gate_statistics(
        spec,
        tokens_per_group,
        View::of(&logits.to_vec()),
        View::of(&forward.scores),
        View::of(&forward.ids),
        ViewMut::of(&mut counts),
        ViewMut::of(&mut prob_sums),
        ViewMut::of(&mut sums),
    );
    (counts, prob_sums, sums)
}

#[test]
fn statistics_are_sums_over_groups_of_tokens() {
    // Groups that divide the tokens, that do not, one group, more experts than are summed in one pass, and a rank without tokens.
    for (tokens, experts, top_k, length, groups) in
        [(12, 8, 2, 4, 3), (11, 8, 2, 4, 3), (600, 100, 8, 600, 1), (0, 8, 2, 0, 2), (3, 4, 4, 9, 2)]
    {
        let dims = GateDims { tokens, experts, top_k };
        let logits = uniform(&mut rng(5), tokens * experts, 3.0);
        for spec in specs(dims) {
            let mut forward = gate(spec, &logits, None);
            if let Some(last) = forward.ids.last_mut() {
                *last = -1;
            }
            let (counts, prob_sums, sums) = statistics(spec, length, groups, &logits, &forward);
            let (mut want_counts, mut want_probs) = (vec![0.0; counts.len()], vec![0.0; counts.len()]);
            let mut want = [0.0; 2];
            for t in 0..tokens {
                let logits = to_f64(&logits[t * experts..(t + 1) * experts]);
                let first = t / length * experts;
                let scores = reference_scores(spec.score, &logits);
                for (e, p) in reference_probabilities(spec.score, &scores).into_iter().enumerate() {
                    want_probs[first + e] += p;
                    want[1] -= p * p.ln();
                }
                for &id in forward.ids[t * top_k..(t + 1) * top_k].iter().filter(|&&id| id >= 0) {
                    want_counts[first + id as usize] += 1.0;
                }
                want[0] += log_sum_exp(&logits).powi(2);
            }
            assert_close("counts", &counts, &want_counts, 0.0);
            assert_close("prob_sums", &prob_sums, &want_probs, TOLERANCE * length as f64);
            assert_close("sums", &sums, &want, TOLERANCE * want[0].max(want[1]));
        }
    }
}
