//! Mixtures of whole networks: gradients through gate and experts, any number of ranks, what EM promises, and the edges.

// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use moe_kernels::{ActivationKind, Cpu};
use moe_runtime::collectives::{Context, DEFAULT_DEADLINE, HostCommunicator, local};
use moe_runtime::mixture::{Form, Mixture, MixtureConfig, MixtureError, Network, Samples, Update};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const FORMS: [Form; 2] = [Form::Cooperative, Form::Competitive];
const INPUTS: usize = 4;
const CLASSES: usize = 3;
const UPDATE: Update = Update { lr: 0.01, weight_decay: 0.01 };

fn config(form: Form, experts: usize) -> MixtureConfig {
    MixtureConfig {
        inputs: INPUTS,
        classes: CLASSES,
        experts,
        expert_hidden: vec![7],
        gate_hidden: vec![5, 6],
        activation: ActivationKind::Tanh,
        form,
    }
}

fn alone() -> HostCommunicator {
    local::solo(Context::new(DEFAULT_DEADLINE))
}

fn batch(rows: usize) -> (Vec<f32>, Vec<usize>) {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let x = (0..rows * INPUTS).map(|_| rng.random_range(-2.0..2.0)).collect();
    (x, (0..rows).map(|t| t * 7 % CLASSES).collect())
}

#[test]
fn gradients_of_every_parameter_are_those_of_the_loss() {
    let ((x, labels), group) = (batch(11), alone());
    let samples = Samples { x: &x, labels: &labels };
    for form in FORMS {
        let mut mixture = Mixture::new(Cpu, &group, config(form, 3), 1).unwrap();
        // Away from where biases are 0.
        for _ in 0..3 {
            mixture.step(samples, UPDATE).unwrap();
        }
        mixture.accumulate(samples).unwrap();
        for network in 0..4 {
            // The gate is number 3.
            fn at<'m>(mixture: &'m mut Mixture<'_, Cpu, HostCommunicator>, network: usize) -> &'m mut Network<Cpu> {
                if network == 3 { mixture.gate_mut() } else { mixture.experts_mut().nth(network).unwrap().1 }
            }
            let (values, exact) = (at(&mut mixture, network).parameters(), at(&mut mixture, network).gradients());
            let (values, exact) = (values.unwrap(), exact.unwrap());
            assert!(exact.iter().any(|d| d.abs() > 1e-3), "{form:?}, network {network} learns nothing");
            for i in 0..values.len() {
                let mut loss_at = |offset: f32| {
                    let mut moved = values.clone();
                    moved[i] += offset;
                    at(&mut mixture, network).set_parameters(&moved);
                    mixture.loss(samples).unwrap()
                };
                // The third derivative times 2⁻¹⁴, and f32 outputs' rounding over 2⁻⁶.
                let step = 1.0 / 128.0;
                let numeric = (loss_at(step) - loss_at(-step)) / f64::from(2.0 * step);
                let exact = f64::from(exact[i]);
                assert!((numeric - exact).abs() < 2e-4, "{form:?} {network} {i}: {exact}, by differences {numeric}");
            }
            at(&mut mixture, network).set_parameters(&values);
        }
    }
}

#[test]
fn any_number_of_ranks_gives_the_same_numbers() {
    let (x, labels) = batch(40);
    let samples = Samples { x: &x, labels: &labels };
    for form in FORMS {
        let trained = |ranks| {
            local::run(ranks, |group| {
                let mut mixture = Mixture::new(Cpu, &group, config(form, 6), 1).unwrap();
                let losses: Vec<f64> = (0..5).map(|_| mixture.step(samples, UPDATE).unwrap()).collect();
                if form == Form::Competitive {
                    mixture.em_step(samples, 3, UPDATE).unwrap();
                }
                let own: Vec<usize> = mixture.experts_mut().map(|(e, _)| e).collect();
                assert_eq!(own, mixture.own().collect::<Vec<_>>());
                (losses, mixture.predict(&x).unwrap(), mixture.predict_alone(&x).unwrap())
            })
        };
        let one = trained(1).swap_remove(0);
        assert!(one.0.windows(2).all(|pair| pair[1] < pair[0]), "the loss does not fall: {:?}", one.0);
        for ranks in [2, 3, 6] {
            assert!(trained(ranks).iter().all(|rank| *rank == one), "{form:?} on {ranks} ranks");
        }
    }
}

/// The likelihood gains at least what the M step takes off the expected loss (Jordan and Jacobs 1994).
#[test]
fn an_em_step_raises_the_likelihood_by_what_it_lowers_the_expected_loss() {
    let ((x, labels), group) = (batch(60), alone());
    let samples = Samples { x: &x, labels: &labels };
    let mut mixture = Mixture::new(Cpu, &group, config(Form::Competitive, 3), 1).unwrap();
    let small = Update { lr: 1e-3, weight_decay: 0.0 };
    let mut before = mixture.loss(samples).unwrap();
    for step in 0..20 {
        let posteriors = mixture.posteriors(samples).unwrap();
        let first = mixture.maximise(samples, &posteriors, small).unwrap();
        for _ in 0..3 {
            mixture.maximise(samples, &posteriors, small).unwrap();
        }
        // What an update finds, without keeping it.
        let kept: Vec<_> = mixture.experts_mut().map(|(_, expert)| expert.parameters().unwrap()).collect();
        let (after, gate) = (mixture.loss(samples).unwrap(), mixture.gate().parameters().unwrap());
        let last = mixture.maximise(samples, &posteriors, small).unwrap();
        mixture.gate_mut().set_parameters(&gate);
        mixture.experts_mut().zip(&kept).for_each(|((_, expert), kept)| expert.set_parameters(kept));
        assert!(last < first, "step {step}: small updates lower the expected loss, {first} to {last}");
        assert!(before - after >= first - last - 1e-7, "step {step}: {before} to {after}, expected {first} to {last}");
        before = after;
    }
}

#[test]
fn one_expert_is_a_network_by_itself_and_its_gate_learns_nothing() {
    let ((x, labels), group) = (batch(20), alone());
    let samples = Samples { x: &x, labels: &labels };
    for form in FORMS {
        let mut mixture = Mixture::new(Cpu, &group, config(form, 1), 1).unwrap();
        let mut network = Network::new(&Cpu, &[INPUTS, 7, CLASSES], ActivationKind::Tanh, ("expert 0", 1)).unwrap();
        let gate = mixture.gate().parameters().unwrap();
        let steady = Update { weight_decay: 0.0, ..UPDATE };
        for _ in 0..10 {
            let (mixed, single) = (mixture.step(samples, steady), network.fit(&x, &labels, steady));
            assert!((mixed.unwrap() - single.unwrap()).abs() < 1e-5, "{form:?}");
        }
        assert_eq!(mixture.gate().parameters().unwrap(), gate, "{form:?}");
    }
}

#[test]
fn no_rows_are_an_ordinary_batch() {
    let group = alone();
    for form in FORMS {
        let mut mixture = Mixture::new(Cpu, &group, config(form, 3), 1).unwrap();
        let gate = mixture.gate().parameters().unwrap();
        let none = Samples { x: &[], labels: &[] };
        assert_eq!(mixture.step(none, Update { weight_decay: 0.0, ..UPDATE }).unwrap(), 0.0);
        assert_eq!(mixture.gate().parameters().unwrap(), gate);
        assert!(mixture.predict(&[]).unwrap().is_empty());
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let group = alone();
    let refused = |config| Mixture::new(Cpu, &group, config, 1).err().unwrap().to_string();
    let empty = MixtureConfig { expert_hidden: vec![0], ..config(Form::Cooperative, 2) };
    assert_eq!(refused(empty), "experts: layers of [4, 0, 3]; every width must be at least 1");
    assert_eq!(refused(config(Form::Cooperative, 0)), "gate: layers of [4, 5, 6, 0]; every width must be at least 1");
    let uneven =
        local::run(2, |group| Mixture::new(Cpu, &group, config(Form::Competitive, 3), 1).err().unwrap().to_string());
    assert_eq!(uneven, ["3 experts cannot be shared evenly by 2 ranks"; 2]);

    let mut mixture = Mixture::new(Cpu, &group, config(Form::Competitive, 2), 1).unwrap();
    let short = mixture.loss(Samples { x: &[0.0; 7], labels: &[0, 1] });
    assert!(matches!(short, Err(MixtureError::Rows { numbers: 7, labels: 2, inputs: 4 })), "{short:?}");
    let strange = mixture.loss(Samples { x: &[0.0; 8], labels: &[0, 3] });
    assert!(matches!(strange, Err(MixtureError::Label { label: 3, row: 1, classes: 3 })), "{strange:?}");
}
