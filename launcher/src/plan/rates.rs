//! The rates a plan is made with: given, or measured here.
//!
//! Owns three short measurements, on all cores at once: a matrix product, a copy, an exchange between two ranks as threads. A rank's
//! rate is its share of the machine's.

use std::time::Instant;

use clap::Args;
use moe_kernels::{Cpu, DenseOps, Device, GemmDims, View, ViewMut};
use moe_runtime::collectives::{Communicator, local};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::plan::{Job, Numbers, Rates};
use rayon::prelude::*;

/// Rates of one rank; what is left out is measured.
#[derive(Args)]
pub(crate) struct RateArgs {
    /// Matrix products of a rank in GFLOP/s.
    #[arg(long, value_name = "GFLOPS")]
    gemm: Option<f64>,
    /// Memory of a rank in GB/s, read and written.
    #[arg(long, value_name = "GB/S")]
    memory_rate: Option<f64>,
    /// What a rank sends to ranks of its node in GB/s.
    #[arg(long, value_name = "GB/S")]
    exchange: Option<f64>,
    /// What a rank sends to other nodes in GB/s. Default: 1.25, that is 10 Gbit/s.
    #[arg(long, value_name = "GB/S")]
    network: Option<f64>,
}

/// 10 Gbit/s.
const NETWORK_BYTES: f64 = 1.25e9;
/// Side of the matrix product.
const N: usize = 1024;
/// Elements copied: far beyond any cache.
const COPIED: usize = 32 << 20;
/// Elements that each rank sends the other.
const SENT: usize = 2 << 20;
const REPEATS: usize = 5;

impl RateArgs {
    /// The rates of a rank of `job`; None: a GPU's are not known.
    pub(crate) fn resolve(&self, job: &Job) -> Result<Option<Rates>, Failure> {
        for (flag, rate) in [
            ("--gemm", self.gemm),
            ("--memory-rate", self.memory_rate),
            ("--exchange", self.exchange),
            ("--network", self.network),
        ] {
            if let Some(rate) = rate.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
                return Err(Failure::new(Code::Usage, format!("{flag} {rate}: must be a number above 0")));
            }
        }
        let between_nodes_bytes = self.network.map_or(NETWORK_BYTES, giga);
        if job.numbers != Numbers::CPU {
            let given = self.gemm.zip(self.memory_rate).zip(self.exchange);
            return Ok(given.map(|((gemm, memory), exchange)| Rates {
                gemm_flops: giga(gemm),
                memory_bytes: giga(memory),
                within_node_bytes: giga(exchange),
                between_nodes_bytes,
            }));
        }
        // All ranks of a node work at once: each has its share.
        let share = 1.0 / job.ranks_per_node.max(1) as f64;
        let measured = |given: Option<f64>, measure: fn() -> Result<f64, Failure>| match given {
            Some(rate) => Ok(giga(rate)),
            None => measure().map(|rate| rate * share),
        };
        Ok(Some(Rates {
            gemm_flops: measured(self.gemm, gemm)?,
            memory_bytes: measured(self.memory_rate, memory)?,
            within_node_bytes: measured(self.exchange, exchange)?,
            between_nodes_bytes,
        }))
    }
}

fn giga(rate: f64) -> f64 {
    rate * 1e9
}

fn failed(error: moe_kernels::DeviceError) -> Failure {
    Failure::new(Code::Internal, error)
}

/// The rate of `work` units, from the median of some repeats.
fn rate(work: f64, mut once: impl FnMut()) -> f64 {
    once();
    let mut times: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let started = Instant::now();
            once();
            started.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    work / times[REPEATS / 2].max(1e-9)
}

/// FLOP/s of an N³ product in f32 on all cores.
fn gemm() -> Result<f64, Failure> {
    let x = Cpu.alloc::<f32>(N * N, "x").map_err(failed)?;
    let w = Cpu.alloc::<f32>(N * N, "w").map_err(failed)?;
    let mut y = Cpu.alloc::<f32>(N * N, "y").map_err(failed)?;
    let dims = GemmDims { m: N, n: N, k: N };
    Ok(rate(2.0 * (N as f64).powi(3), || Cpu.linear(dims, View::of(&x), View::of(&w), None, ViewMut::of(&mut y))))
}

/// Bytes read and written a second on all cores.
fn memory() -> Result<f64, Failure> {
    let from = Cpu.alloc::<f32>(COPIED, "source").map_err(failed)?;
    let mut to = Cpu.alloc::<f32>(COPIED, "copy").map_err(failed)?;
    let piece = COPIED / rayon::current_num_threads().max(1);
    let bytes = (2 * COPIED * size_of::<f32>()) as f64;
    Ok(rate(bytes, || {
        to.par_chunks_mut(piece).zip(from.par_chunks(piece)).for_each(|(to, from)| to.copy_from_slice(from))
    }))
}

/// Bytes a second that two ranks of this machine together send each other.
fn exchange() -> Result<f64, Failure> {
    let rates = local::run(2, |world| {
        let send = vec![1.0_f32; 2 * SENT];
        let mut recv = vec![0.0_f32; 2 * SENT];
        let mut outcome = Ok(());
        let bytes = (2 * SENT * size_of::<f32>()) as f64;
        let rate = rate(bytes, || {
            let done = world.all_to_all(&Cpu, View::of(&send), ViewMut::of(&mut recv));
            if outcome.is_ok() {
                outcome = done;
            }
        });
        outcome.map(|()| rate)
    });
    let mut least = f64::INFINITY;
    for rate in rates {
        least = least.min(rate?);
    }
    Ok(least)
}
