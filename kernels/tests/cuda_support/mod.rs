//! What the tests of the GPU's operations share: a GPU if there is one, inputs, poisoned outputs, comparison.

#![allow(dead_code, unreachable_pub)] // each test binary uses its part
#![allow(clippy::expect_used)] // a test ends where a GPU fails

use moe_kernels::cuda::{Cuda, CudaAct, CudaBuffer, OpenError};
use moe_kernels::{Activation, Device, Element, View, ViewMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Elements behind an output that no operation may touch.
const GUARD: usize = 64;

/// The first GPU; a notice and none on a machine without.
pub fn gpu<A: CudaAct>() -> Option<Cuda<A>> {
    match Cuda::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error @ (OpenError::NoDriver | OpenError::NoDevice)) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// `len` numbers in −1..1, the same for the same seed.
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// As [`random`], between −scale and scale.
pub fn random_within(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    random(seed, len).into_iter().map(|x| x * scale).collect()
}

/// Integers from 0 to `below` − 1, the same for the same seed.
pub fn random_below(seed: u64, len: usize, below: usize) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..below)).collect()
}

/// As activations.
pub fn narrow<A: Activation>(data: &[f32]) -> Vec<A> {
    data.iter().map(|x| A::from_f32(*x)).collect()
}

/// As f32, without loss.
pub fn widen<A: Activation>(data: &[A]) -> Vec<f32> {
    data.iter().map(|x| x.to_f32()).collect()
}

/// What an activation of type `A` keeps of each number.
pub fn rounded<A: Activation>(data: &[f32]) -> Vec<f32> {
    data.iter().map(|x| A::from_f32(*x).to_f32()).collect()
}

/// The numbers on the GPU.
pub fn upload<A: CudaAct, T: Element>(gpu: &Cuda<A>, data: &[T]) -> CudaBuffer<T> {
    let mut buffer = gpu.alloc(data.len(), "a test's input").expect("memory for a test");
    gpu.upload(data, ViewMut::of(&mut buffer));
    buffer
}

/// The numbers on the GPU, as activations.
pub fn upload_act<A: CudaAct>(gpu: &Cuda<A>, data: &[f32]) -> CudaBuffer<A> {
    upload(gpu, &data.iter().map(|x| A::from_f32(*x)).collect::<Vec<_>>())
}

/// `len` times the number on the GPU: NaN, or what no operation writes.
pub fn filled<A: CudaAct, T: Element>(gpu: &Cuda<A>, len: usize, value: T) -> CudaBuffer<T> {
    upload(gpu, &vec![value; len])
}

/// `len` NaNs for an operation to overwrite, and some more for it to leave.
pub fn poisoned<A: CudaAct, T: Activation>(gpu: &Cuda<A>, len: usize) -> CudaBuffer<T> {
    let mut buffer = gpu.alloc(len + GUARD, "a test's output").expect("memory for a test");
    gpu.fill(ViewMut::of(&mut buffer), T::from_f32(f32::NAN));
    buffer
}

/// All of a buffer, on the host.
pub fn download<A: CudaAct, T: Element>(gpu: &Cuda<A>, buffer: &CudaBuffer<T>) -> Vec<T> {
    let view = View::of(buffer);
    let mut host = vec![T::default(); view.len()];
    gpu.read_to_host(view, &mut host).expect("a result");
    host
}

/// What an operation wrote to a [`poisoned`] buffer, which must end in the NaNs that it began with.
pub fn written<A: CudaAct, T: Activation>(gpu: &Cuda<A>, buffer: &CudaBuffer<T>) -> Vec<f32> {
    let mut all: Vec<f32> = download(gpu, buffer).into_iter().map(T::to_f32).collect();
    let guard = all.split_off(all.len() - GUARD);
    assert!(guard.iter().all(|x| x.is_nan()), "written behind the end");
    all
}

/// Panics at the first element that is farther from the expected one than its tolerance, or that is NaN.
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: impl Fn(usize) -> f32) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let (error, allowed) = ((got - expected).abs(), tolerance(i));
        assert!(error <= allowed, "{what}[{i}] = {got}, expected {expected}: off by {error:e}, allowed {allowed:e}");
    }
}

/// What a number may be off by that follows from `terms` products whose magnitudes sum to `magnitude`: the roundings of f32 on two devices,
/// and one of the activation type.
pub fn tolerance<A: Activation>(terms: usize, magnitude: f32) -> f32 {
    let of_result = if A::HOLDS_F32 { 0.0 } else { 1.0 / 256.0 };
    (2.0 * f32::EPSILON * (terms as f32 + 8.0) + of_result) * magnitude
}

/// As [`assert_close`], with one tolerance, and NaN and infinity where they are expected.
#[track_caller]
pub fn assert_matches(what: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs();
        let matches = error <= tolerance || got == expected || (got.is_nan() && expected.is_nan());
        assert!(matches, "{what}[{i}] = {got}, expected {expected}: off by {error:e}, allowed {tolerance:e}");
    }
}
