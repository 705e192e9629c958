//! Folds and random factors on a GPU against the CPU.
#![cfg(feature = "cuda")]

mod cuda_support;

use cuda_support::{assert_matches, download, filled, gpu, random_below, random_within, tolerance, upload};
use half::bf16;
use moe_kernels::{Accumulate, Activation, Cpu, Fold, LogitOps, Places, Random, RandomFactor, View, ViewMut};

#[test]
fn folds_and_their_gradients_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for (tokens, experts, fold) in [
        (0, 4, Fold::Groups(2)),
        (1, 1, Fold::Groups(1)),
        (37, 12, Fold::Groups(3)),
        (9, 64, Fold::Groups(1)),
        (70, 512, Fold::Groups(8)),
        (33, 96, Fold::Groups(96)),
        (21, 33, Fold::Routers(1)),
        (1000, 8, Fold::Routers(5)),
    ] {
        let raw = random_within(1, tokens * fold.width(experts), 3.0);
        let dlogits = random_within(2, tokens * experts, 1.0);
        let tags: Option<Vec<i32>> = match fold {
            Fold::Groups(_) => None,
            Fold::Routers(n) => Some(random_below(3, tokens, n).into_iter().map(|tag| tag as i32).collect()),
        };
        let (mut want, mut want_draw) = (vec![f32::NAN; dlogits.len()], vec![f32::NAN; raw.len()]);
        let cpu_tags = || tags.as_ref().map(View::of);
        Cpu.fold_logits(fold, experts, View::of(&raw), cpu_tags(), ViewMut::of(&mut want));
        Cpu.fold_logits_grad(
            fold,
            experts,
            View::of(&raw),
            cpu_tags(),
            View::of(&dlogits),
            ViewMut::of(&mut want_draw),
        );

        let (g_raw, g_dlogits) = (upload(&gpu, &raw), upload(&gpu, &dlogits));
        let g_tags = tags.as_ref().map(|tags| upload(&gpu, tags));
        let g_tags = || g_tags.as_ref().map(View::of);
        let (mut got, mut got_draw) = (filled(&gpu, want.len(), f32::NAN), filled(&gpu, raw.len(), f32::NAN));
        gpu.fold_logits(fold, experts, View::of(&g_raw), g_tags(), ViewMut::of(&mut got));
        let (raw, dlogits) = (View::of(&g_raw), View::of(&g_dlogits));
        gpu.fold_logits_grad(fold, experts, raw, g_tags(), dlogits, ViewMut::of(&mut got_draw));
        let what = |name: &str| format!("{name}, {tokens} tokens, {experts} experts, {fold:?}");
        assert_matches(&what("logits"), &download(&gpu, &got), &want, tolerance::<f32>(64, 8.0));
        let allowed = tolerance::<f32>(64, (experts as f32).sqrt() * 2.0);
        assert_matches(&what("draw"), &download(&gpu, &got_draw), &want_draw, allowed);
    }
}

#[test]
fn random_factors_are_the_cpus_to_the_bit() {
    let (Some(wide), Some(narrow)) = (gpu::<f32>(), gpu::<bf16>()) else { return };
    for n in [0, 1, 1000, 70_001] {
        let x = random_within(4, n, 2.0);
        let before = random_within(5, n, 1.0);
        for factor in [RandomFactor::Around1 { spread: 0.01 }, RandomFactor::Dropout { probability: 0.3 }] {
            for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
                let places = Places { seed: 0xfedc_ba98_7654_3210, first: 1 << 40 };
                let mut want = before.clone();
                Cpu.random_factors(factor, places, View::of(&x), ViewMut::of(&mut want), accumulate);
                let (g_x, mut got) = (upload(&wide, &x), upload(&wide, &before));
                wide.random_factors(factor, places, View::of(&g_x), ViewMut::of(&mut got), accumulate);
                assert!(download(&wide, &got) == want, "{n} elements, {factor:?}, {accumulate:?}");

                let rounded: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
                let (g_x, mut got) = (upload(&narrow, &rounded), filled(&narrow, n, bf16::ZERO));
                narrow.random_factors(factor, places, View::of(&g_x), ViewMut::of(&mut got), Accumulate::Overwrite);
                let x: Vec<f32> = rounded.iter().map(|x| Activation::to_f32(*x)).collect();
                let mut want = vec![0.0; n];
                Cpu.random_factors(factor, places, View::of(&x), ViewMut::of(&mut want), Accumulate::Overwrite);
                let want: Vec<bf16> = want.into_iter().map(bf16::from_f32).collect();
                assert!(download(&narrow, &got) == want, "{n} elements in bf16, {factor:?}");
            }
        }
    }
}

#[test]
fn random_numbers_are_the_cpus() {
    let Some(gpu) = gpu::<f32>() else { return };
    for (n, first) in [(0, 0), (1, 0), (1000, 1 << 40), (70_001, 12_345)] {
        let places = Places { seed: 0xfedc_ba98_7654_3210, first };
        for random in [Random::Uniform, Random::Normal { deviation: 0.5 }, Random::Normal { deviation: 0.0 }] {
            let mut want = vec![f32::NAN; n];
            Cpu.random_numbers(random, places, ViewMut::of(&mut want));
            let mut got = filled(&gpu, n, f32::NAN);
            gpu.random_numbers(random, places, ViewMut::of(&mut got));
            let got = download(&gpu, &got);
            match random {
                Random::Uniform => assert!(got == want, "{n} numbers"),
                // A logarithm and a cosine of each side's own.
                Random::Normal { .. } => {
                    assert_matches(&format!("{n} numbers, {random:?}"), &got, &want, tolerance::<f32>(1, 4.0));
                }
            }
        }
    }
}
