//! What examples/three_experts shows: together, experts of which each knows two of three classes are better by far than the best of them.

// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../examples/three_experts/experiment.rs"]
mod experiment;

use experiment::{ALONE, Outcome, WAYS, mean_and_spread, run};

/// Points by which each way must be better than the best expert, for each of [`ALONE`]. Of experts that cannot be improved none could be
/// 10: of these test rows the best classifier there is gets 66.1 % right, and the best one that knows but two classes 56.4 %.
const GAINS: [f64; 2] = [10.0, 8.5];

#[test]
fn every_mixture_beats_the_best_of_its_experts() {
    for (updates, least) in ALONE.into_iter().zip(GAINS) {
        let outcomes: Vec<Outcome> = (0..10).map(|seed| run(seed, updates).unwrap()).collect();
        for (w, way) in WAYS.into_iter().enumerate() {
            let gains = outcomes.iter().map(|outcome| 100.0 * (outcome.mixtures[w] - outcome.best_expert()));
            let (gain, spread) = mean_and_spread(gains);
            let what = format!("{updates} updates, {}: {gain:.1} points more, {spread:.1} between seeds", way.name());
            println!("{what}");
            assert!(gain >= least, "{what}: {outcomes:?}");
        }
    }
}
