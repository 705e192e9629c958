//! Frozen and tied tensors: what stays, what is counted, and whose gradient is whose.

// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used)]

mod tiny_models;

use std::collections::BTreeMap;

use moe_kernels::Cpu;
use moe_runtime::checkpoint::names::tensor_name;
use moe_runtime::collectives::{Context, Groups, local};
use moe_runtime::config::Config;
use moe_runtime::data::Batch;
use moe_runtime::model::{ModelConfig, Parameters, PassTokens};
use moe_runtime::routing::{BalanceScope, BatchShare, RouterConfig};
use moe_runtime::stages::StageClock;
use moe_runtime::training::TrainingData;
use tiny_models::{LENGTH, SEQUENCES, alone, config, dense, families, train, trainer};

fn values(parameters: &Parameters<Cpu>, family: moe_runtime::model::Family) -> BTreeMap<String, Vec<u32>> {
    let read = |part| parameters.read(&Cpu, part).unwrap().into_iter().map(f32::to_bits).collect();
    parameters.layout().parts().map(|(part, _)| (tensor_name(family, part.id), read(part))).collect()
}

fn frozen_config() -> Config {
    let (_, model, router) = families().swap_remove(0);
    let mut config = config(&model, &router);
    config.train.freeze = vec!["*.q_proj.*".into(), "*.experts.[0-3].*".into(), "model.norm.weight".into()];
    config.train.trainable = vec!["model.layers.*".into(), "model.norm.weight".into()];
    // Statistics of a micro-batch are those of another batch where more ranks share the batch.
    config.router.balance_scope = BalanceScope::Global;
    config.validate(4).unwrap();
    config
}

fn is_frozen(name: &str) -> bool {
    let expert = |e: usize| name.contains(&format!(".experts.{e}."));
    !name.starts_with("model.layers.") || name.contains(".q_proj.") || (0..4).any(expert)
}

#[test]
fn frozen_tensors_keep_every_bit_and_the_others_move_on_any_number_of_ranks() {
    let config = frozen_config();
    let family = config.model.family;
    let losses: Vec<Vec<(f64, f64)>> = [1, 2, 4]
        .map(|ranks| {
            let mut all = local::run(ranks, |world| {
                let mut trainer = trainer(world, &config);
                let before = values(trainer.model.parameters(), family);
                let steps = train(&mut trainer, 3);
                let after = values(trainer.model.parameters(), family);
                let (m, v) = trainer.optimizer.moments();
                for (part, _) in trainer.model.parameters().layout().parts() {
                    let name = tensor_name(family, part.id);
                    assert_eq!(before[&name] == after[&name], is_frozen(&name), "{name} on {ranks} ranks");
                    let moved = [m, v].map(|moment| {
                        moe_runtime::model::parameters::read(&Cpu, moment, part).unwrap().iter().any(|x| *x != 0.0)
                    });
                    assert_eq!(moved, [!is_frozen(&name); 2], "moments of {name}");
                }
                steps.into_iter().map(|step| (step.loss, step.grad_norm)).collect::<Vec<_>>()
            });
            all.swap_remove(0)
        })
        .into();
    for other in &losses[1..] {
        for (a, b) in losses[0].iter().zip(other) {
            assert!((a.0 - b.0).abs() <= 1e-5 * a.0 && (a.1 - b.1).abs() <= 1e-4 * a.1, "{a:?} and {b:?}");
        }
    }
}

#[test]
fn the_gradient_norm_is_that_of_what_is_trained() {
    let config = frozen_config();
    let norm = train(&mut alone(&config), 1)[0].grad_norm;
    let gradients = gradients(&config);
    let square = |name: &&String| gradients[*name].iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let trained: f64 = gradients.keys().filter(|name| !is_frozen(name)).map(|name| square(&name)).sum();
    let all: f64 = gradients.keys().map(|name| square(&name)).sum();
    assert!((norm - trained.sqrt()).abs() <= 1e-5 * norm, "{norm}, of what is trained {}", trained.sqrt());
    assert!(norm < 0.99 * all.sqrt());
}

/// The gradient of every tensor in one pass over the first batch.
fn gradients(config: &Config) -> BTreeMap<String, Vec<f32>> {
    let mut trainer = alone(config);
    gradients_of(&mut trainer.model, config)
}

fn gradients_of(model: &mut moe_runtime::model::Transformer<Cpu>, config: &Config) -> BTreeMap<String, Vec<f32>> {
    let mut batch = Batch::default();
    alone(config).data().train_pass(0, 0, &mut batch);
    let tokens = PassTokens { targets: &batch.targets, ..PassTokens::of_inputs(&batch.inputs, LENGTH) };
    let all = SEQUENCES * LENGTH;
    let share = BatchShare { global_tokens: all, tokens_so_far: all, pass_tokens: all };
    let groups = Groups::of_grid::<Cpu>(local::solo(Context::default()), &model.setup().grid.clone()).unwrap();
    model.begin_step();
    model.train_pass(&groups, &mut StageClock::default(), tokens, share, 1.0 / all as f32).unwrap();
    let parameters = model.parameters();
    let read = |part| parameters.read_grad(&Cpu, part).unwrap();
    parameters.layout().parts().map(|(part, _)| (tensor_name(config.model.family, part.id), read(part))).collect()
}

#[test]
fn a_tied_matrix_gets_the_gradients_of_both_its_uses_but_the_embeddings_of_padding() {
    const PADDING: usize = 6;
    for padding_token in [None, Some(PADDING)] {
        let model = ModelConfig { padding_token, ..dense() };
        let untied = config(&model, &RouterConfig::default());
        let tied = config(&ModelConfig { tie_embeddings: true, ..model }, &RouterConfig::default());
        let (mut separate, mut shared) = (alone(&untied), alone(&tied));
        // The same function: the untied head takes the embedding's values.
        let embedding = |p: &Parameters<Cpu>| {
            let (part, _) =
                p.layout().parts().find(|(part, _)| part.range == p.layout().range(p.layout().embedding)).unwrap();
            p.read(&Cpu, part).unwrap()
        };
        let table = embedding(separate.model.parameters());
        assert_eq!(table, embedding(shared.model.parameters()));
        let layout = separate.model.parameters().layout();
        let head = layout.parts().find(|(part, _)| part.range == layout.range(layout.head)).unwrap().0.clone();
        separate.model.parameters_mut().set(&Cpu, &head, &table);
        let apart = gradients_of(&mut separate.model, &untied);
        let together = gradients_of(&mut shared.model, &tied);
        let (embedding, head) = (&apart["model.embed_tokens.weight"], &apart["lm_head.weight"]);
        assert_eq!(together.len() + 1, apart.len());
        let found = &together["model.embed_tokens.weight"];
        for ((found, a), b) in found.iter().zip(embedding).zip(head) {
            assert!((found - (a + b)).abs() <= 1e-6, "{found}, expected {}", a + b);
        }
        let row = PADDING * 32..(PADDING + 1) * 32;
        assert_eq!(embedding[row.clone()].iter().all(|x| *x == 0.0), padding_token.is_some());
        assert!(found[row].iter().any(|x| *x != 0.0), "the head's share stays");
    }
}
