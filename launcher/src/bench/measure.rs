//! How things are timed, and the ceilings they stand beside.
//!
//! Owns the counting rules: a time is the median of 15 after 4 that are not counted, on the device's own clock, and of eight in a row where
//! only data is moved; a GEMM is 2·m·n·k operations; bytes are those read and those written.

use moe_kernels::{Activation, Backend, Buffer, Device, DeviceError, GemmDims, View, ViewMut};
use moe_runtime::exit::{ExitCode as Code, Failure};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

use crate::out::say;

/// Runs that are not counted.
const WARMUP: usize = 4;
/// Runs that are.
const REPEATS: usize = 15;
/// Launches in a row of what only moves data, as a step issues them: alone, a launch of 50 µs is timed with some 5 µs around it.
const LAUNCHES: usize = 8;

/// Where and from what a figure was measured.
#[derive(Serialize)]
pub(super) struct Conditions {
    /// The device.
    pub(super) device: String,
    /// The commit of the sources; "unknown" where neither the build nor the variable MOE_COMMIT says it.
    pub(super) commit: String,
    /// TFLOP/s of a dense product of `dense_n`³, the ceiling of products.
    pub(super) dense_tflops: f64,
    /// Its size.
    pub(super) dense_n: usize,
    /// GB/s of a copy, read and written bytes, the ceiling of what only moves data.
    pub(super) copy_gbs: f64,
}

impl Conditions {
    /// Measures the ceilings of `device`.
    pub(super) fn measure<B: Backend>(device: &B, name: String) -> Result<Self, Failure> {
        let (n, copied) = if is_host(device)? { (2048, 1 << 24) } else { (8192, 1 << 28) };
        let (x, w) = (random(device, n * n, 1.0)?, random(device, n * n, 0.02)?);
        let mut y = device.alloc::<B::Act>(n * n, "dense product").map_err(failed)?;
        let dims = GemmDims { m: n, n, k: n };
        let ms = median_ms(device, || {
            device.linear(dims, View::of(&x), View::of(&w), None, ViewMut::of(&mut y));
            Ok(())
        })?;
        let dense_tflops = tflops(2.0 * (n as f64).powi(3), ms);
        drop((x, w, y));
        let from = device.alloc::<f32>(copied, "source").map_err(failed)?;
        let mut to = device.alloc::<f32>(copied, "copy").map_err(failed)?;
        let ms = median_ms_in_a_row(device, |_| device.copy(View::of(&from), ViewMut::of(&mut to)))?;
        let copy_gbs = gbs(8.0 * copied as f64, ms);
        Ok(Self { device: name, commit: commit(), dense_tflops, dense_n: n, copy_gbs })
    }

    /// One line above a table.
    pub(super) fn show(&self) -> Result<(), Failure> {
        say!(
            "{}, commit {}; dense {n}^3: {:.1} TFLOP/s, copy: {:.0} GB/s",
            self.device,
            self.commit,
            self.dense_tflops,
            self.copy_gbs,
            n = self.dense_n
        )
    }
}

/// The commit of the sources; see [`Conditions::commit`].
pub(super) fn commit() -> String {
    let built = option_env!("MOE_COMMIT").map(str::to_owned);
    std::env::var("MOE_COMMIT").ok().or(built).unwrap_or_else(|| "unknown".to_owned())
}

/// Whether the device is the host itself.
pub(super) fn is_host<B: Device>(device: &B) -> Result<bool, Failure> {
    let probe = device.alloc::<f32>(1, "probe").map_err(failed)?;
    Ok(B::host_view(View::of(&probe)).is_some())
}

/// Milliseconds of `work` on the device.
pub(super) fn median_ms<B: Device>(device: &B, work: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    median_ms_between(device, || Ok(()), work)
}

/// As [`median_ms`], where `begin` comes before each run and is not timed.
pub(super) fn median_ms_between<B: Device>(
    device: &B,
    mut begin: impl FnMut() -> Result<(), Failure>,
    mut work: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    let mut times = Vec::with_capacity(REPEATS);
    for run in 0..WARMUP + REPEATS {
        begin()?;
        let from = device.stamp();
        work()?;
        let to = device.stamp();
        device.synchronize().map_err(failed)?;
        if run >= WARMUP {
            times.push(device.between(&from, &to).as_secs_f64() * 1e3);
        }
    }
    Ok(median(&mut times))
}

/// Milliseconds of one `work` among several in a row, which are numbered from 0. On the host there is no launch to hide.
pub(super) fn median_ms_in_a_row<B: Device>(device: &B, mut work: impl FnMut(usize)) -> Result<f64, Failure> {
    let launches = if is_host(device)? { 1 } else { LAUNCHES };
    let ms = median_ms(device, || {
        (0..launches).for_each(&mut work);
        Ok(())
    })?;
    Ok(ms / launches as f64)
}

/// The middle of some values.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// TFLOP/s of `flops` in `ms`.
pub(super) fn tflops(flops: f64, ms: f64) -> f64 {
    flops / ms / 1e9
}

/// GB/s of `bytes` in `ms`.
pub(super) fn gbs(bytes: f64, ms: f64) -> f64 {
    bytes / ms / 1e6
}

/// Normal numbers of deviation `std`, the same ones again and again beyond the first million.
pub(super) fn random<B: Device>(device: &B, len: usize, std: f32) -> Result<B::Buffer<B::Act>, Failure> {
    random_from(len as u64, device, len, std)
}

/// As [`random`], others for each seed.
pub(super) fn random_from<B: Device>(
    seed: u64,
    device: &B,
    len: usize,
    std: f32,
) -> Result<B::Buffer<B::Act>, Failure> {
    const DISTINCT: usize = 1 << 20;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let draw = |_| B::Act::from_f32(std * Distribution::<f32>::sample(&StandardNormal, &mut rng));
    let drawn: Vec<B::Act> = (0..len.min(DISTINCT)).map(draw).collect();
    let mut buffer = device.alloc::<B::Act>(len, "random numbers").map_err(failed)?;
    for start in (0..Buffer::len(&buffer)).step_by(DISTINCT) {
        let end = (start + DISTINCT).min(len);
        device.upload(&drawn[..end - start], ViewMut::range(&mut buffer, start..end));
    }
    Ok(buffer)
}

/// A failure of the device; too little memory is the user's to mend.
pub(super) fn failed(error: DeviceError) -> Failure {
    let code = match error {
        DeviceError::OutOfMemory { .. } => Code::Usage,
        DeviceError::Fault { .. } => Code::Internal,
    };
    Failure::new(code, error)
}

/// Prints one JSON object.
pub(super) fn print_json(report: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(report).map_err(|error| Failure::new(Code::Internal, error))?;
    say!("{text}")
}
