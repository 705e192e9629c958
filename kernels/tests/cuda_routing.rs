//! Routing on a GPU against the CPU. It is f32 whatever the activation type; choices and counts must be the same to the last one.
#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{assert_matches, download, filled, gpu, random_below, random_within, tolerance, upload};
use half::bf16;
use moe_kernels::cuda::{Cuda, CudaBuffer};
use moe_kernels::{
    BalanceFactors, BalanceGrad, BalanceSpec, Buffer, Capacity, CapacityPolicy, Choice, Cpu, Enough, GateDims,
    GateSpec, GroupLimit, GroupRank, RankedBy, RoutingOps, Score, TokenLosses, View, ViewMut,
};

/// (T, E, k): none, one, k = E, off the warp, each length of row that there is a kernel for, many blocks.
const SIZES: [(usize, usize, usize); 10] = [
    (0, 4, 2),
    (1, 1, 1),
    (37, 8, 8),
    (9, 33, 3),
    (70, 64, 6),
    (300, 128, 8),
    (33, 200, 1),
    (65, 256, 32),
    (40, 512, 10),
    (5000, 60, 4),
];

/// More tokens than there are, so that all are one group.
const ONE_GROUP: usize = 1 << 40;

fn dims((tokens, experts, top_k): (usize, usize, usize)) -> GateDims {
    GateDims { tokens, experts, top_k }
}

fn specs(size: (usize, usize, usize)) -> impl Iterator<Item = GateSpec> {
    let kinds = [Score::Softmax, Score::Sigmoid].into_iter().flat_map(|score| [(score, false), (score, true)]);
    kinds.map(move |(score, renormalize)| GateSpec {
        dims: dims(size),
        score,
        renormalize,
        scale: 2.5,
        choice: Choice::default(),
    })
}

/// Numbers on a coarse grid: those that are not equal are far apart, so that rounding decides no choice, and many are equal.
fn on_grid(seed: u64, len: usize) -> Vec<f32> {
    random_below(seed, len, 17).into_iter().map(|step| step as f32 * 0.5 - 4.0).collect()
}

struct Gated {
    scores: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

fn gate_on_cpu(spec: GateSpec, logits: &Vec<f32>, bias: Option<&Vec<f32>>) -> Gated {
    let choices = spec.dims.tokens * spec.dims.top_k;
    let mut out =
        Gated { scores: vec![f32::NAN; logits.len()], ids: vec![-7; choices], weights: vec![f32::NAN; choices] };
    let (scores, ids) = (ViewMut::of(&mut out.scores), ViewMut::of(&mut out.ids));
    Cpu.gate(spec, View::of(logits), bias.map(View::of), scores, ids, ViewMut::of(&mut out.weights));
    out
}

fn gate_on_gpu(gpu: &Cuda<f32>, spec: GateSpec, logits: &[f32], bias: Option<&Vec<f32>>) -> Gated {
    let choices = spec.dims.tokens * spec.dims.top_k;
    let (mut scores, mut ids) = (filled(gpu, logits.len(), f32::NAN), filled(gpu, choices, -7));
    let mut weights = filled(gpu, choices, f32::NAN);
    let (logits, bias) = (upload(gpu, logits), bias.map(|bias| upload(gpu, bias)));
    let (scores_view, ids_view) = (ViewMut::of(&mut scores), ViewMut::of(&mut ids));
    let bias = bias.as_ref().map(View::of);
    gpu.gate(spec, View::of(&logits), bias, scores_view, ids_view, ViewMut::of(&mut weights));
    Gated { scores: download(gpu, &scores), ids: download(gpu, &ids), weights: download(gpu, &weights) }
}

#[test]
fn scores_choices_and_weights_are_the_cpus() {
    let Some(gpu) = gpu() else { return };
    for size in SIZES {
        let logits = on_grid(1, size.0 * size.1);
        // Steps so small that equal scores stay near each other, and large enough to be seen.
        let bias: Vec<f32> = random_below(2, size.1, 5).into_iter().map(|step| step as f32 * 0.037).collect();
        for (spec, bias) in specs(size).flat_map(|spec| [(spec, None), (spec, Some(&bias))]) {
            let (got, want) = (gate_on_gpu(&gpu, spec, &logits, bias), gate_on_cpu(spec, &logits, bias));
            let what = |name: &str| format!("{name}, {spec:?}");
            assert_matches(&what("scores"), &got.scores, &want.scores, tolerance::<f32>(16, 1.0));
            if bias.is_none() {
                assert!(got.ids == want.ids, "{}", what("ids"));
                assert_matches(&what("weights"), &got.weights, &want.weights, tolerance::<f32>(32, 2.5));
            }
            // With a bias, sums of different parts may nearly tie: the choice is checked against the GPU's own scores.
            let experts = size.1;
            for (t, ids) in got.ids.chunks(size.2).enumerate() {
                let value = |e: usize| got.scores[t * experts + e] + bias.map_or(0.0, |bias| bias[e]);
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
                assert!(ids.iter().zip(&order).all(|(&id, &e)| id as usize == e), "{}: token {t}", what("ids"));
            }
        }
    }
}

/// Limits by few and by many groups, and sums that are enough.
fn limited((_, experts, top_k): (usize, usize, usize)) -> Vec<Choice> {
    let counts: Vec<usize> = (2..=GroupLimit::MOST).filter(|n| experts.is_multiple_of(*n)).collect();
    let limits = [counts.first(), counts.last()].into_iter().flatten().flat_map(|&groups| {
        let chosen = top_k.div_ceil(experts / groups);
        [GroupRank::Highest, GroupRank::TwoHighest, GroupRank::All].map(|by| Some(GroupLimit { groups, chosen, by }))
    });
    let enough = [None, Some(Enough { mass: 0.3, least: 1 })];
    limits
        .chain([None])
        .flat_map(|groups| enough.map(|enough| Choice { by: RankedBy::Logit, groups, enough }))
        .collect()
}

#[test]
fn limited_groups_and_enough_choices_are_the_cpus() {
    let Some(gpu) = gpu() else { return };
    for size in SIZES {
        let logits = random_within(7, size.0 * size.1, 3.0);
        let bias = random_within(8, size.1, 0.5);
        for (spec, choice) in specs(size).flat_map(|spec| limited(size).into_iter().map(move |choice| (spec, choice))) {
            let spec = GateSpec { choice, ..spec };
            for bias in [None, Some(&bias)] {
                let (got, want) = (gate_on_gpu(&gpu, spec, &logits, bias), gate_on_cpu(spec, &logits, bias));
                assert!(got.ids == want.ids, "ids, {spec:?}");
                assert_matches(&format!("weights, {spec:?}"), &got.weights, &want.weights, tolerance::<f32>(32, 2.5));
            }
        }
    }
}

#[test]
fn sinkhorns_bias_is_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for size in SIZES {
        let logits = random_within(9, size.0 * size.1, 3.0);
        for iterations in [0, 1, 10] {
            let mut want = vec![f32::NAN; size.1];
            Cpu.sinkhorn_bias(dims(size), iterations, View::of(&logits), ViewMut::of(&mut want));
            let (on_gpu, mut got) = (upload(&gpu, &logits), filled(&gpu, size.1, f32::NAN));
            gpu.sinkhorn_bias(dims(size), iterations, View::of(&on_gpu), ViewMut::of(&mut got));
            let what = format!("bias of {size:?} after {iterations}");
            assert_matches(&what, &download(&gpu, &got), &want, tolerance::<f32>(64, 4.0));
        }
    }
}

#[test]
fn nan_and_infinite_logits_give_the_cpus_choices() {
    let Some(gpu) = gpu() else { return };
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let logits = vec![nan, 1.0, -nan, 2.0, nan, nan, nan, nan, inf, 0.0, inf, 0.0, -inf, 0.0, -inf, 1.0];
    for spec in specs((4, 4, 2)) {
        let (got, want) = (gate_on_gpu(&gpu, spec, &logits, None), gate_on_cpu(spec, &logits, None));
        assert_eq!(got.ids, want.ids, "{spec:?}");
        assert_matches("scores", &got.scores, &want.scores, tolerance::<f32>(4, 1.0));
    }
    let vanishing = GateSpec {
        dims: dims((1, 3, 2)),
        score: Score::Sigmoid,
        renormalize: true,
        scale: 1.0,
        choice: Choice::default(),
    };
    assert_eq!(gate_on_gpu(&gpu, vanishing, &[-300.0; 3], None).weights, [0.0, 0.0]);
}

#[test]
fn the_activation_type_decides_nothing() {
    let (Some(narrow), Some(wide)) = (gpu::<bf16>(), gpu::<f32>()) else { return };
    let spec = GateSpec {
        dims: dims((20, 16, 2)),
        score: Score::Softmax,
        renormalize: true,
        scale: 1.0,
        choice: Choice::default(),
    };
    let logits = random_within(1, 320, 3.0);
    let on_gpu = upload(&narrow, &logits);
    let (mut scores, mut ids, mut weights) =
        (filled(&narrow, 320, 0.0), filled(&narrow, 40, 0), filled(&narrow, 40, 0.0));
    let (s, i, w) = (ViewMut::of(&mut scores), ViewMut::of(&mut ids), ViewMut::of(&mut weights));
    narrow.gate(spec, View::of(&on_gpu), None, s, i, w);
    let other = gate_on_gpu(&wide, spec, &logits, None);
    assert_eq!((download(&narrow, &ids), download(&narrow, &weights)), (other.ids, other.weights));
}

#[test]
fn gate_gradients_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for size in SIZES {
        let (tokens, experts, top_k) = size;
        let logits = random_within(3, tokens * experts, 4.0);
        let dweights = random_within(4, tokens * top_k, 1.0);
        for spec in specs(size) {
            let gated = gate_on_cpu(spec, &logits, None);
            for (tokens_per_group, balanced, z_scale, entropy_scale) in
                [(1, false, 0.0, 0.0), (ONE_GROUP, true, 0.0, 0.5), (7, true, 0.01, 0.0)]
            {
                let losses = TokenLosses { z_scale, entropy_scale };
                let groups = tokens.div_ceil(tokens_per_group);
                let coefficients = random_within(5, groups * experts, 1.0);
                let mut want = vec![f32::NAN; logits.len()];
                let (l, s, i, d) =
                    (View::of(&logits), View::of(&gated.scores), View::of(&gated.ids), View::of(&dweights));
                let balance = BalanceGrad { coefficients: View::of(&coefficients), tokens_per_group };
                Cpu.gate_grad(spec, l, s, i, d, balanced.then_some(balance), losses, ViewMut::of(&mut want));

                let (l, s, i) = (upload(&gpu, &logits), upload(&gpu, &gated.scores), upload(&gpu, &gated.ids));
                let (d, c) = (upload(&gpu, &dweights), upload(&gpu, &coefficients));
                let mut dlogits = filled(&gpu, logits.len(), f32::NAN);
                let (l, s, i, d) = (View::of(&l), View::of(&s), View::of(&i), View::of(&d));
                let balance = BalanceGrad { coefficients: View::of(&c), tokens_per_group };
                gpu.gate_grad(spec, l, s, i, d, balanced.then_some(balance), losses, ViewMut::of(&mut dlogits));
                let what = format!("{spec:?}, groups of {tokens_per_group}, {losses:?}");
                assert_matches(&what, &download(&gpu, &dlogits), &want, tolerance::<f32>(experts.min(32) + 16, 8.0));
            }
        }
    }
}

#[test]
fn statistics_are_the_cpus_and_repeat_to_the_bit() {
    let Some(gpu) = gpu::<f32>() else { return };
    for size in SIZES {
        let (tokens, experts, _) = size;
        let logits = random_within(6, tokens * experts, 4.0);
        for spec in specs(size) {
            let mut gated = gate_on_cpu(spec, &logits, None);
            gated.ids.iter_mut().skip(3).step_by(11).for_each(|id| *id = -1);
            // One more group than tokens fill, so that one is empty.
            for tokens_per_group in [ONE_GROUP, 100, 7] {
                let groups = tokens.div_ceil(tokens_per_group) + 1;
                let nan = |len: usize| vec![f32::NAN; len];
                let (mut counts, mut probs, mut sums) = (nan(groups * experts), nan(groups * experts), nan(2));
                let (l, s, i) = (View::of(&logits), View::of(&gated.scores), View::of(&gated.ids));
                let (c, p, all) = (ViewMut::of(&mut counts), ViewMut::of(&mut probs), ViewMut::of(&mut sums));
                Cpu.gate_statistics(spec, tokens_per_group, l, s, i, c, p, all);

                let (l, s, i) = (upload(&gpu, &logits), upload(&gpu, &gated.scores), upload(&gpu, &gated.ids));
                let run = || {
                    let nan = |len: usize| filled(&gpu, len, f32::NAN);
                    let (mut counts, mut probs, mut sums) = (nan(groups * experts), nan(groups * experts), nan(2));
                    let (l, s, i) = (View::of(&l), View::of(&s), View::of(&i));
                    let (c, p, all) = (ViewMut::of(&mut counts), ViewMut::of(&mut probs), ViewMut::of(&mut sums));
                    gpu.gate_statistics(spec, tokens_per_group, l, s, i, c, p, all);
                    [counts, probs, sums].map(|buffer| download(&gpu, &buffer))
                };
                let got = run();
                assert!(got == run(), "{spec:?}, groups of {tokens_per_group}: not the same twice");
                let what = |name: &str| format!("{name}, {spec:?}, groups of {tokens_per_group}");
                assert!(got[0] == counts, "{}", what("counts"));
                let members = tokens.min(tokens_per_group) as f32;
                assert_matches(&what("probabilities"), &got[1], &probs, tolerance::<f32>(24, members));
                assert_matches(&what("z and entropy"), &got[2], &sums, tolerance::<f32>(24, 128.0 * tokens as f32));
            }
        }
    }
}

#[test]
fn balance_losses_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for (layers, groups, experts, pooled) in [(1, 1, 1, false), (3, 5, 60, false), (3, 5, 60, true), (4, 40, 128, true)]
    {
        let factors = BalanceFactors { switch: 0.5, devices: 0.25, importance: 0.5, difference: 2.0, entropy: 1.0 };
        let spec = BalanceSpec {
            layers,
            groups,
            experts,
            pooled,
            f_scale: 0.01,
            p_scale: 0.02,
            loss_scale: 0.5,
            factors,
            devices: if experts > 1 { 4 } else { 1 },
            least_entropy: (experts as f32).ln(),
        };
        let len = layers * groups * experts;
        let [counts, sums] =
            [7, 8].map(|seed| random_within(seed, len, 25.0).iter().map(|x| x + 25.0).collect::<Vec<_>>());
        let (mut loss, mut coefficients) = (vec![1.5f64; BalanceSpec::LOSSES], vec![f32::NAN; len]);
        let (loss_view, c) = (ViewMut::of(&mut loss), ViewMut::of(&mut coefficients));
        Cpu.balance_loss(spec, View::of(&counts), View::of(&sums), loss_view, c);

        let (counts, sums) = (upload(&gpu, &counts), upload(&gpu, &sums));
        let (mut got_loss, mut got) = (upload(&gpu, &[1.5f64; BalanceSpec::LOSSES]), filled(&gpu, len, f32::NAN));
        let (loss_view, c) = (ViewMut::of(&mut got_loss), ViewMut::of(&mut got));
        gpu.balance_loss(spec, View::of(&counts), View::of(&sums), loss_view, c);
        assert_matches("coefficients", &download(&gpu, &got), &coefficients, tolerance::<f32>(1, 5.0));
        for (got, want) in download(&gpu, &got_loss).iter().zip(&loss) {
            assert!((got - want).abs() <= 1e-10 * len as f64, "{spec:?}: {got} {want}");
        }
    }
}

#[test]
fn capacity_drops_what_the_cpu_drops() {
    let Some(gpu) = gpu::<f32>() else { return };
    for size in SIZES {
        let (tokens, experts, top_k) = size;
        let spec = GateSpec {
            dims: dims(size),
            score: Score::Softmax,
            renormalize: false,
            scale: 1.0,
            choice: Choice::default(),
        };
        let mut gated = gate_on_cpu(spec, &on_grid(9, tokens * experts), None);
        gated.ids.iter_mut().skip(2).step_by(13).for_each(|id| *id = -1);
        // Equal, negative and missing numbers among the weights.
        gated.weights = on_grid(10, tokens * top_k);
        gated.weights.iter_mut().skip(1).step_by(17).for_each(|weight| *weight = f32::NAN);
        let even = (tokens * top_k).div_ceil(experts);
        for policy in [CapacityPolicy::Position, CapacityPolicy::Probability] {
            for per_expert in [0, 1, even, even * 2, usize::MAX] {
                let capacity = Capacity { per_expert, policy };
                let (mut kept, mut dropped) = (vec![-7; gated.ids.len()], vec![f32::NAN; spec.dims.experts]);
                let (k, d) = (ViewMut::of(&mut kept), ViewMut::of(&mut dropped));
                Cpu.apply_capacity(spec.dims, capacity, View::of(&gated.ids), View::of(&gated.weights), k, d);

                let (ids, weights) = (upload(&gpu, &gated.ids), upload(&gpu, &gated.weights));
                let (mut got, mut got_dropped) = (filled(&gpu, kept.len(), -7), filled(&gpu, dropped.len(), f32::NAN));
                let (k, d) = (ViewMut::of(&mut got), ViewMut::of(&mut got_dropped));
                gpu.apply_capacity(spec.dims, capacity, View::of(&ids), View::of(&weights), k, d);
                assert_eq!(download(&gpu, &got_dropped), dropped, "{capacity:?} of {:?}", spec.dims);
                assert!(download(&gpu, &got) == kept, "{capacity:?} of {:?}", spec.dims);
            }
        }
    }
}

#[test]
fn rerouted_choices_and_their_weights_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for size in SIZES {
        let (tokens, experts, top_k) = size;
        for spec in specs(size) {
            let gated = gate_on_cpu(spec, &random_within(22, tokens * experts, 2.0), None);
            for (per_expert, rounds) in [(0, 2), ((tokens * top_k).div_ceil(experts), 6), (3, 1)] {
                let capacity = Capacity { per_expert, policy: CapacityPolicy::Position };
                let (mut kept, mut dropped) = (vec![-7; gated.ids.len()], vec![f32::NAN; experts]);
                let (k, d) = (ViewMut::of(&mut kept), ViewMut::of(&mut dropped));
                Cpu.apply_capacity(spec.dims, capacity, View::of(&gated.ids), View::of(&gated.weights), k, d);
                let (scores, g_ids, g_kept) =
                    (upload(&gpu, &gated.scores), upload(&gpu, &gated.ids), upload(&gpu, &kept));
                let (mut g_ids, mut g_kept, mut g_dropped) = (g_ids, g_kept, filled(&gpu, experts, f32::NAN));
                let (i, k, d) = (ViewMut::of(&mut g_ids), ViewMut::of(&mut g_kept), ViewMut::of(&mut g_dropped));
                gpu.reroute(spec.dims, per_expert, rounds, View::of(&scores), i, k, d);
                let mut g_weights = filled(&gpu, gated.ids.len(), f32::NAN);
                gpu.weigh(spec, View::of(&scores), View::of(&g_ids), ViewMut::of(&mut g_weights));

                let mut ids = gated.ids.clone();
                let (i, k, d) = (ViewMut::of(&mut ids), ViewMut::of(&mut kept), ViewMut::of(&mut dropped));
                Cpu.reroute(spec.dims, per_expert, rounds, View::of(&gated.scores), i, k, d);
                let mut weights = vec![f32::NAN; ids.len()];
                Cpu.weigh(spec, View::of(&gated.scores), View::of(&ids), ViewMut::of(&mut weights));
                let what = |name: &str| format!("{name} of {spec:?}, {per_expert} an expert, {rounds} rounds");
                assert!(download(&gpu, &g_ids) == ids, "{}", what("ids"));
                assert!(download(&gpu, &g_kept) == kept, "{}", what("kept"));
                assert_eq!(download(&gpu, &g_dropped), dropped, "{}", what("dropped"));
                assert_matches(&what("weights"), &download(&gpu, &g_weights), &weights, tolerance::<f32>(32, 2.5));
            }
        }
    }
}

#[test]
fn the_second_expert_is_dropped_where_the_cpu_drops_it() {
    let Some(gpu) = gpu::<f32>() else { return };
    let spec = GateDims { tokens: 700, experts: 8, top_k: 2 };
    let (uniform, weights) = (random_within(11, 700, 1.0), random_within(12, 1400, 0.5));
    let mut want = vec![3; 1400];
    Cpu.drop_second(spec, View::of(&uniform), View::of(&weights), ViewMut::of(&mut want));
    let (uniform, weights, mut ids) = (upload(&gpu, &uniform), upload(&gpu, &weights), filled(&gpu, 1400, 3));
    gpu.drop_second(spec, View::of(&uniform), View::of(&weights), ViewMut::of(&mut ids));
    assert_eq!(download(&gpu, &ids), want);
}

#[test]
fn noisy_logits_and_their_gradients_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for size in SIZES {
        let (tokens, experts, _) = size;
        let [clean, raw, noise, dnoisy] = [13, 14, 15, 16].map(|seed| random_within(seed, tokens * experts, 2.0));
        let dload = random_within(17, experts, 1.0);
        let (mut noisy, mut load) = (vec![f32::NAN; clean.len()], vec![f32::NAN; experts]);
        let (c, r, n) = (View::of(&clean), View::of(&raw), View::of(&noise));
        Cpu.noisy_logits(dims(size), c, r, n, ViewMut::of(&mut noisy), ViewMut::of(&mut load));
        let (mut dclean, mut draw) = (vec![f32::NAN; clean.len()], vec![f32::NAN; clean.len()]);
        let (x, dx, dl) = (View::of(&noisy), View::of(&dnoisy), View::of(&dload));
        let (dc, dr) = (ViewMut::of(&mut dclean), ViewMut::of(&mut draw));
        Cpu.noisy_logits_grad(dims(size), c, r, n, x, dx, dl, dc, dr);

        let on_gpu: [CudaBuffer<f32>; 6] = [&clean, &raw, &noise, &noisy, &dnoisy, &dload].map(|x| upload(&gpu, x));
        let [c, r, n, x, dx, dl] = on_gpu.each_ref().map(View::of);
        let (mut got, mut got_load) = (filled(&gpu, clean.len(), f32::NAN), filled(&gpu, experts, f32::NAN));
        gpu.noisy_logits(dims(size), c, r, n, ViewMut::of(&mut got), ViewMut::of(&mut got_load));
        let (mut got_dclean, mut got_draw) = (filled(&gpu, clean.len(), f32::NAN), filled(&gpu, clean.len(), f32::NAN));
        let (dc, dr) = (ViewMut::of(&mut got_dclean), ViewMut::of(&mut got_draw));
        gpu.noisy_logits_grad(dims(size), c, r, n, x, dx, dl, dc, dr);
        let what = |name: &str| format!("{name}, {size:?}");
        assert_matches(&what("noisy"), &download(&gpu, &got), &noisy, tolerance::<f32>(4, 8.0));
        assert_matches(
            &what("load"),
            &download(&gpu, &got_load),
            &load,
            tolerance::<f32>(8, tokens as f32 + 1.0) * 8.0,
        );
        // The least deviation is 0.13, so slopes go up to 3, and a threshold collects those of all experts.
        let allowed = tolerance::<f32>(64, 3.0 * experts as f32);
        assert_matches(&what("dclean"), &download(&gpu, &got_dclean), &dclean, allowed);
        assert_matches(&what("draw"), &download(&gpu, &got_draw), &draw, allowed);
    }
}

#[test]
fn importance_and_its_variation_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for size in SIZES {
        let (tokens, experts, top_k) = size;
        let choices = tokens * top_k;
        let ids: Vec<i32> = random_below(18, choices, experts + 1).into_iter().map(|id| id as i32 - 1).collect();
        let (weights, dimportance) = (random_within(19, choices, 1.0), random_within(20, experts, 1.0));
        let (mut importance, mut dweights) = (vec![f32::NAN; experts], random_within(21, choices, 1.0));
        let before = dweights.clone();
        Cpu.importance(dims(size), View::of(&ids), View::of(&weights), ViewMut::of(&mut importance));
        let d = View::of(&dimportance);
        Cpu.importance_grad(dims(size), View::of(&ids), d, ViewMut::of(&mut dweights));
        let (mut loss, mut dx) = (vec![0.25f64], vec![f32::NAN; experts]);
        Cpu.cv_squared(0.5, 0.6, View::of(&importance), ViewMut::of(&mut loss), ViewMut::of(&mut dx));

        let (on_gpu, w, d) = (upload(&gpu, &ids), upload(&gpu, &weights), upload(&gpu, &dimportance));
        let (mut got, mut got_dweights) = (filled(&gpu, experts, f32::NAN), upload(&gpu, &before));
        gpu.importance(dims(size), View::of(&on_gpu), View::of(&w), ViewMut::of(&mut got));
        gpu.importance_grad(dims(size), View::of(&on_gpu), View::of(&d), ViewMut::of(&mut got_dweights));
        let x = upload(&gpu, &importance);
        assert_eq!(Buffer::len(&x), experts);
        let (mut got_loss, mut got_dx) = (upload(&gpu, &[0.25f64]), filled(&gpu, experts, f32::NAN));
        gpu.cv_squared(0.5, 0.6, View::of(&x), ViewMut::of(&mut got_loss), ViewMut::of(&mut got_dx));
        let allowed = tolerance::<f32>(1, choices as f32 + 1.0);
        assert_matches(&format!("importance, {size:?}"), &download(&gpu, &got), &importance, allowed);
        assert_eq!(download(&gpu, &got_dweights), dweights, "{size:?}");
        let (loss_off, largest) =
            ((download(&gpu, &got_loss)[0] - loss[0]).abs(), dx.iter().fold(0.0f32, |m, d| m.max(d.abs())));
        assert!(loss_off <= 1e-9 * loss[0].abs(), "loss of {size:?}: off by {loss_off:e}");
        assert_matches(&format!("dx, {size:?}"), &download(&gpu, &got_dx), &dx, 1e-6 * largest);
    }
}
