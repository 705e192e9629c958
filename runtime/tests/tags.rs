//! Multi-gate routing from the text to the gradient: a source's tag picks the router, in training and in evaluation, under any layout.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions, but not in their helpers")]

mod support;

use moe_kernels::Cpu;
use moe_runtime::collectives::local;
use moe_runtime::config::Config;
use moe_runtime::data::{Corpus, Source};
use moe_runtime::model::layout::PartKind;
use moe_runtime::routing::{BalanceScope, RouterKind};
use support::training::{ALONE, Ranks, assert_same_curve, small, take_steps, text, train, trainer};

/// The text as two sources with these tags.
fn tagged(tags: [i32; 2]) -> Corpus {
    let one = text();
    let source = |tag: i32| Source { name: format!("s{tag}"), weight: Some(1.0), tag, ..one.sources[0].clone() };
    Corpus { sources: tags.map(source).to_vec(), ..one }
}

fn multi_gate() -> Config {
    let mut config = small();
    (config.router.kind, config.router.tags) = (RouterKind::MultiGate, 3);
    config.router.balance_scope = BalanceScope::MicroBatch;
    config.train.micro_batch = Some(2);
    config
}

/// The routers that changed in two steps, over all layers.
fn trained(tags: [i32; 2]) -> [bool; 3] {
    let mut config = multi_gate();
    config.optimizer.weight_decay = 0.0;
    local::run(1, |world| {
        let mut trainer = trainer(&config, &tagged(tags), world, 1);
        let routers = |trainer: &support::training::LocalTrainer| -> Vec<Vec<f32>> {
            let parameters = trainer.model.parameters();
            let parts = parameters.layout().parts().filter(|(part, _)| part.id.kind == PartKind::Router);
            parts.map(|(part, _)| parameters.read(&Cpu, part).unwrap()).collect()
        };
        let before = routers(&trainer);
        take_steps(&mut trainer, 1..=2);
        let after = routers(&trainer);
        let changed = |tag: usize| {
            let of_tag = |layer: &[f32]| layer.chunks(layer.len() / 3).nth(tag).unwrap().to_vec();
            before.iter().zip(&after).any(|(before, after)| of_tag(before) != of_tag(after))
        };
        [0, 1, 2].map(changed)
    })
    .swap_remove(0)
}

#[test]
fn only_the_routers_of_tags_that_are_in_the_text_learn() {
    assert_eq!(trained([0, 2]), [true, false, true]);
    assert_eq!(trained([1, 1]), [false, true, false]);
}

#[test]
fn a_tags_router_is_the_same_under_any_layout() {
    let (config, corpus) = (multi_gate(), tagged([0, 2]));
    let expected = train(&config, &corpus, Ranks { world: 4, ep: 1 }, 6);
    for layout in [Ranks { world: 4, ep: 4 }, Ranks { world: 4, ep: 2 }, ALONE] {
        let found = train(&config, &corpus, layout, 6);
        assert_same_curve(&format!("multi-gate, {layout:?}"), &found, &expected, 1e-5, 1e-3);
    }
}

/// Tags that differ are other routers: the evaluation of the same text and weights differs, and is the one of the tag.
#[test]
fn held_out_text_meets_the_router_of_its_source() {
    let loss = |tags| {
        local::run(1, |world| trainer(&multi_gate(), &tagged(tags), world, 1).evaluate().unwrap().unwrap())
            .swap_remove(0)
    };
    let (zeros, ones, both) = (loss([0, 0]), loss([1, 1]), loss([0, 1]));
    assert!((zeros - ones).abs() > 1e-7, "{zeros} {ones}");
    assert!(both != zeros && both != ones, "{zeros} {ones} {both}");
}
