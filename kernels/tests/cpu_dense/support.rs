//! Inputs, views, tolerances and thread counts that all families share.

use moe_kernels::{Cpu, View, ViewMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `len` numbers in −1..1, the same for the same seed.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

pub(crate) fn view<T: moe_kernels::Element>(data: &Vec<T>) -> View<'_, Cpu, T> {
    View::of(data)
}

pub(crate) fn view_mut<T: moe_kernels::Element>(data: &mut Vec<T>) -> ViewMut<'_, Cpu, T> {
    ViewMut::of(data)
}

pub(crate) fn wide(data: &[f32]) -> Vec<f64> {
    data.iter().map(|x| f64::from(*x)).collect()
}

/// What a sum of `depth` products of numbers up to 1 may differ by in f32.
pub(crate) fn tolerance(depth: usize) -> f64 {
    f64::from(f32::EPSILON) * (8 + depth) as f64
}

/// Panics at the first element that is farther from the reference than `tolerance`, or that is NaN.
pub(crate) fn assert_close(what: &str, got: &[f32], exact: &[f64], tolerance: f64) {
    assert_eq!(got.len(), exact.len(), "{what}: lengths");
    for (i, (got, exact)) in got.iter().zip(exact).enumerate() {
        let error = (f64::from(*got) - exact).abs();
        assert!(error <= tolerance, "{what}[{i}] = {got}, exactly {exact}: off by {error:e}, allowed {tolerance:e}");
    }
}

/// The result of `work` in a pool of `threads` threads.
pub(crate) fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.unwrap_or_else(|error| panic!("a pool of {threads} threads: {error}")).install(work)
}

/// Runs `work` twice on two threads and once on one: the two must agree to the bit, the one within `tolerance`.
pub(crate) fn assert_reproducible(what: &str, tolerance: f64, work: impl Fn() -> Vec<f32> + Send + Sync) {
    let two = with_threads(2, &work);
    let again = with_threads(2, &work);
    let bits = |data: &[f32]| data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(&two) == bits(&again), "{what}: other bits in the second run");
    assert_close(what, &with_threads(1, &work), &wide(&two), tolerance);
}

/// Gradient of the scalar `f` at `x` by central differences.
pub(crate) fn numeric_gradient(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + step;
            let above = f(&x);
            x[i] = at - step;
            let below = f(&x);
            x[i] = at;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// Σ a·b.
pub(crate) fn inner(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}
