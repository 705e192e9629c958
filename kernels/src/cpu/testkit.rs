//! What the tests of this device share: seeded inputs, comparison with an f64 reference, finite differences.
//!
//! Owns no tolerance of its own: bounds follow from f32 and the length of a reduction.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A generator that gives the same numbers on every machine.
pub(super) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `len` numbers between −scale and scale.
pub(super) fn uniform(rng: &mut ChaCha8Rng, len: usize, scale: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

/// The error that f32 may make in a sum of `terms` products whose absolute values sum to `magnitude`: one rounding for each product
/// and each addition.
pub(super) fn rounding(terms: usize, magnitude: f64) -> f64 {
    f64::from(f32::EPSILON) * (terms as f64 + 4.0) * magnitude
}

/// Every element within `tolerance` of the reference; a NaN never is.
#[track_caller]
pub(super) fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= tolerance, "{what}[{i}] = {got}, not {want}: off by {error:e}, allowed {tolerance:e}");
    }
}

/// The gradient of `f` at x by central differences.
pub(super) fn finite_differences(x: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut at: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    (0..at.len())
        .map(|i| {
            let centre = at[i];
            at[i] = centre + STEP;
            let above = f(&at);
            at[i] = centre - STEP;
            let below = f(&at);
            at[i] = centre;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

/// Runs `f` in a pool of its own with that many threads.
pub(super) fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small thread pool").install(f)
}
