//! Three experts, each of which has seen two of three classes, and mixtures of them.
//!
//! Owns the data, the order of training and what is measured. The example prints it, a test holds it to its promise.

use moe_kernels::{ActivationKind, Cpu};
use moe_runtime::collectives::local;
use moe_runtime::mixture::{Form, Mixture, MixtureConfig, MixtureError, Samples, Update};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// Rows in all.
const ROWS: usize = 5000;
/// Numbers of a row.
const INPUTS: usize = 4;
/// Classes, experts and ranks.
const THREE: usize = 3;
/// What a row of a class has added to it: (place, shift).
const SHIFTS: [(usize, f32); THREE] = [(0, 1.0), (1, -1.0), (0, -1.0)];
/// The classes that each expert is shown.
const SEEN: [[usize; 2]; THREE] = [[0, 1], [1, 2], [0, 2]];
/// Updates of an expert by itself, on all its rows: a few, after which the three are about as good as those of the published example, and
/// as many as make it no better.
pub(crate) const ALONE: [usize; 2] = [6, 60];
/// How an expert learns by itself.
const UPDATE_ALONE: Update = Update { lr: 0.01, weight_decay: 0.1 };
/// Updates of gate and experts together, on all their rows.
const TOGETHER: usize = 30;
/// How they do.
const UPDATE_TOGETHER: Update = Update { lr: 0.02, weight_decay: 0.1 };
/// Updates of an M step.
const M_STEP: usize = 5;

/// A way to make one of three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The loss of the experts' weighted sum.
    Cooperative,
    /// The likelihood, by its gradient.
    Competitive,
    /// The likelihood, by expectation-maximisation.
    Em,
}

/// The ways, in the order of [`Outcome::mixtures`].
pub(crate) const WAYS: [Way; 3] = [Way::Cooperative, Way::Competitive, Way::Em];

impl Way {
    /// In a table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cooperative => "cooperative",
            Self::Competitive => "competitive, by gradient",
            Self::Em => "competitive, by EM",
        }
    }

    fn form(self) -> Form {
        match self {
            Self::Cooperative => Form::Cooperative,
            Self::Competitive | Self::Em => Form::Competitive,
        }
    }
}

/// Shares of the test's rows that were classified rightly, with one seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// By each expert alone, before any mixture.
    pub(crate) experts: [f64; THREE],
    /// By each of [`WAYS`].
    pub(crate) mixtures: [f64; WAYS.len()],
}

impl Outcome {
    /// The best expert's share.
    pub(crate) fn best_expert(&self) -> f64 {
        self.experts.into_iter().fold(0.0, f64::max)
    }
}

/// Labelled rows of one's own.
#[derive(Default)]
struct Rows {
    x: Vec<f32>,
    labels: Vec<usize>,
}

impl Rows {
    /// Normal numbers, shifted by class; as many rows of each class as can be, in random order.
    fn draw(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut labels: Vec<usize> = (0..ROWS).map(|row| row % THREE).collect();
        labels.shuffle(&mut rng);
        let mut x: Vec<f32> = StandardNormal.sample_iter(&mut rng).take(ROWS * INPUTS).collect();
        for (row, label) in x.chunks_exact_mut(INPUTS).zip(&labels) {
            let (place, shift) = SHIFTS[*label];
            row[place] += shift;
        }
        Self { x, labels }
    }

    /// The rows from here to there.
    fn part(&self, range: std::ops::Range<usize>) -> Samples<'_> {
        Samples { x: &self.x[range.start * INPUTS..range.end * INPUTS], labels: &self.labels[range] }
    }

    /// The rows of some classes.
    fn of_classes(samples: Samples<'_>, classes: [usize; 2]) -> Self {
        let mut kept = Self::default();
        for (row, label) in samples.x.chunks_exact(INPUTS).zip(samples.labels) {
            if classes.contains(label) {
                kept.x.extend_from_slice(row);
                kept.labels.push(*label);
            }
        }
        kept
    }
}

/// Three ranks with an expert each, which is updated by itself `updates_alone` times. One half of the rows is the experts'; of the other, four fifths are the mixture's and the rest tests.
pub(crate) fn run(seed: u64, updates_alone: usize) -> Result<Outcome, MixtureError> {
    let rows = Rows::draw(seed);
    let [alone, together, test] =
        [0..ROWS / 2, ROWS / 2..ROWS * 9 / 10, ROWS * 9 / 10..ROWS].map(|range| rows.part(range));
    let mut outcomes = local::run(THREE, |world| {
        let config = |form| MixtureConfig {
            inputs: INPUTS,
            classes: THREE,
            experts: THREE,
            expert_hidden: vec![32],
            gate_hidden: vec![],
            activation: ActivationKind::Relu,
            form,
        };
        let mut trained = Mixture::new(Cpu, &world, config(Form::Competitive), seed)?;
        for (e, expert) in trained.experts_mut() {
            let rows = Rows::of_classes(alone, SEEN[e]);
            for _ in 0..updates_alone {
                expert.fit(&rows.x, &rows.labels, UPDATE_ALONE)?;
            }
        }
        let mut experts = [0.0; THREE];
        for (share, p) in experts.iter_mut().zip(trained.predict_alone(test.x)?) {
            *share = right(&p, test.labels);
        }
        let mut mixtures = [0.0; WAYS.len()];
        for (share, way) in mixtures.iter_mut().zip(WAYS) {
            let mut mixture = Mixture::new(Cpu, &world, config(way.form()), seed)?;
            for ((_, expert), (_, of)) in mixture.experts_mut().zip(trained.experts_mut()) {
                expert.set_parameters(&of.parameters()?);
            }
            match way {
                Way::Cooperative | Way::Competitive => {
                    (0..TOGETHER).try_for_each(|_| mixture.step(together, UPDATE_TOGETHER).map(drop))?;
                }
                Way::Em => {
                    let step = |_| mixture.em_step(together, M_STEP, UPDATE_TOGETHER).map(drop);
                    (0..TOGETHER / M_STEP).try_for_each(step)?;
                }
            }
            *share = right(&mixture.predict(test.x)?, test.labels);
        }
        Ok(Outcome { experts, mixtures })
    });
    outcomes.swap_remove(0)
}

/// The share of rows whose likeliest class is theirs.
fn right(probabilities: &[f64], labels: &[usize]) -> f64 {
    let likeliest = |p: &[f64]| p.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(class, _)| class);
    let hits = probabilities.chunks_exact(THREE).zip(labels).filter(|(p, label)| likeliest(p) == **label).count();
    hits as f64 / labels.len() as f64
}

/// Mean, and deviation of single values from it.
pub(crate) fn mean_and_spread(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    let squares: f64 = values.map(|x| (x - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0)).sqrt())
}
