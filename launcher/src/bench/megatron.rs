//! `moe-launch bench layer --megatron`: the MoE layers that Megatron-LM publishes times of, measured as it measures them
//! (tests/functional_tests/test_cases/common/moe_perf): bf16, 4096 tokens a GPU that choose experts at random, GELU experts without a gate,
//! logits in f32; forward and backward pass by the device's clock, the mean of 20 after 5, with products queued in front of each run
//! that hide what the host takes to issue it.
//!
//! Unlike there, ranks' devices meet in a small sum behind those products, so that none begins before the others; and the experts' weight
//! gradients are f32.

use std::process::ExitCode;

use moe_kernels::{Backend, GemmDims, View, ViewMut};
use moe_runtime::collectives::{Communicator, Groups, ReduceOp};
use moe_runtime::config::{Config, Precision};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::experts::ExpertActivation;
use moe_runtime::model::{ModelConfig, SingleMoe};
use moe_runtime::routing::{RouterConfig, RouterKind};
use moe_runtime::topology::{Grid, Rank};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked, World, set_threads};
use serde::Serialize;

use super::layer::stopped;
use super::measure::{commit, failed, print_json, random_from, tflops};
use super::ranks::{connect, reduced, together};
use super::stub::Stubbed;
use crate::out::say;

const WARMUP: usize = 5;
const REPEATS: usize = 20;
/// Products in front of each run, and their size.
const PRODUCTS: usize = 3;
const PRODUCT: usize = 8192;

/// A layer of the published ones.
#[derive(Clone, Copy, Serialize)]
struct Shape {
    name: &'static str,
    #[serde(rename = "T")]
    t: usize,
    #[serde(rename = "H")]
    h: usize,
    #[serde(rename = "F")]
    f: usize,
    #[serde(rename = "E")]
    e: usize,
    k: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "mixtral", t: 4096, h: 4096, f: 14336, e: 8, k: 2 },
    Shape { name: "deepseek", t: 4096, h: 7168, f: 2048, e: 32, k: 8 },
];

impl Shape {
    fn model(&self) -> ModelConfig {
        ModelConfig {
            vocab_size: 64,
            hidden_size: self.h,
            layers: 1,
            heads: 8,
            kv_heads: 1,
            experts: self.e,
            top_k: self.k,
            expert_ffn_size: self.f,
            expert_activation: ExpertActivation::Gelu,
            ..ModelConfig::default()
        }
    }

    /// DeepSeek's proxy chooses by sigmoid scores with a bias, in 4 of 8 groups of experts.
    fn router(&self) -> RouterConfig {
        match self.name {
            "deepseek" => RouterConfig {
                kind: RouterKind::SigmoidBias,
                expert_groups: 8,
                groups_per_token: 4,
                ..RouterConfig::default()
            },
            _ => RouterConfig::default(),
        }
    }

    /// Operations of the experts' two products.
    fn forward_flops(&self) -> f64 {
        4.0 * (self.t * self.k) as f64 * (self.h * self.f) as f64
    }
}

/// Mean milliseconds of a pass.
#[derive(Clone, Copy, Serialize)]
struct Means {
    rank_0: f64,
    slowest: f64,
}

#[derive(Serialize)]
struct Case {
    #[serde(flatten)]
    shape: Shape,
    forward_ms: Means,
    backward_ms: Means,
    forward_tflops: f64,
    backward_tflops: f64,
    /// With exchanges stubbed to local copies; None for a rank alone.
    stubbed_forward_ms: Option<f64>,
    stubbed_backward_ms: Option<f64>,
}

#[derive(Serialize)]
struct Report {
    device: String,
    commit: String,
    ranks: usize,
    cases: Vec<Case>,
}

pub(super) fn run(device: DeviceChoice, json: bool) -> Result<ExitCode, Failure> {
    let measure = |world: &World| {
        set_threads(&Config::default(), world)?;
        let device = Device::choose(device, Precision::Auto, world)?;
        device.visit(Measure { world, name: device.describe() })
    };
    together(measure, |report: &Report| if json { print_json(report) } else { show(report) })
}

fn show(report: &Report) -> Result<(), Failure> {
    say!("{}, commit {}, EP {}", report.device, report.commit, report.ranks)?;
    say!(
        "{:<12}{:>10}{:>10}{:>9}{:>10}{:>10}{:>9}{:>16}",
        "layer",
        "fwd ms",
        "slowest",
        "TFLOP/s",
        "bwd ms",
        "slowest",
        "TFLOP/s",
        "stubbed ms"
    )?;
    for case in &report.cases {
        let (fwd, bwd) = (case.forward_ms, case.backward_ms);
        let stubbed = case.stubbed_forward_ms.zip(case.stubbed_backward_ms);
        let stubbed = stubbed.map_or("-".to_owned(), |(fwd, bwd)| format!("{fwd:.3} {bwd:.3}"));
        say!(
            "{:<12}{:>10.3}{:>10.3}{:>9.1}{:>10.3}{:>10.3}{:>9.1}{stubbed:>16}",
            case.shape.name,
            fwd.rank_0,
            fwd.slowest,
            case.forward_tflops,
            bwd.rank_0,
            bwd.slowest,
            case.backward_tflops
        )?;
    }
    Ok(())
}

struct Measure<'a> {
    world: &'a World,
    name: String,
}

impl OnDevice for Measure<'_> {
    type Output = Result<Report, Failure>;

    fn run<B: Ranked>(self, device: B) -> Result<Report, Failure> {
        let Self { world, name } = self;
        let group = connect(world, &device)?;
        let mut cases = Vec::new();
        for shape in SHAPES {
            let grid = Grid::new(group.size(), group.size(), shape.e);
            let grid = grid.map_err(|error| Failure::new(Code::Usage, format!("{}: {error}", shape.name)))?;
            let groups = Groups::of_grid(group.split("world", 0, group.rank())?, &grid)?;
            cases.push(Bench { world, device: &device, groups: &groups, grid: &grid }.measure(shape)?);
        }
        Ok(Report { device: name, commit: commit(), ranks: group.size(), cases })
    }
}

/// Where a layer is measured.
struct Bench<'a, B: Backend, C> {
    world: &'a World,
    device: &'a B,
    groups: &'a Groups<C>,
    grid: &'a Grid,
}

impl<B: Backend, C: Communicator<B>> Bench<'_, B, C> {
    fn measure(&self, shape: Shape) -> Result<Case, Failure> {
        let [forward, backward] = self.times(self.groups, shape)?;
        let stubbed = if self.grid.ep() > 1 { Some(self.times(&Stubbed::groups(self.groups), shape)?) } else { None };
        let flops = shape.forward_flops();
        Ok(Case {
            shape,
            forward_ms: forward,
            backward_ms: backward,
            forward_tflops: tflops(flops, forward.slowest),
            backward_tflops: tflops(2.0 * flops, backward.slowest),
            stubbed_forward_ms: stubbed.map(|[forward, _]| forward.slowest),
            stubbed_backward_ms: stubbed.map(|[_, backward]| backward.slowest),
        })
    }

    /// The forward pass's and the backward pass's.
    fn times<G: Communicator<B>>(&self, groups: &Groups<G>, shape: Shape) -> Result<[Means; 2], Failure> {
        let place = (self.grid, Rank(self.groups.world.rank()));
        let layer = SingleMoe::new(self.device.clone(), &shape.model(), &shape.router(), place, (shape.t, 1, true));
        let Some(mut layer) = layer.map_err(failed)? else {
            return Err(Failure::new(Code::Internal, "the layer has no experts"));
        };
        let (device, n, rank) = (self.device, shape.t * shape.h, self.groups.world.rank() as u64);
        let (x, dout) = (random_from(rank, device, n, 1.0)?, random_from(rank + 1000, device, n, 1.0)?);
        let mut out = device.alloc::<B::Act>(n, "layer outputs").map_err(failed)?;
        let mut dx = device.alloc::<B::Act>(n, "input gradients").map_err(failed)?;
        let side = PRODUCT * PRODUCT;
        let (a, b) = (random_from(7, device, side, 1.0)?, random_from(8, device, side, 1.0)?);
        let mut product = device.alloc::<B::Act>(side, "products in front").map_err(failed)?;
        let mut met = device.alloc::<f32>(1, "a sum to meet at").map_err(failed)?;
        let dims = GemmDims { m: PRODUCT, n: PRODUCT, k: PRODUCT };
        let mut sums = [0.0; 2];
        for run in 0..WARMUP + REPEATS {
            for _ in 0..PRODUCTS {
                device.linear(dims, View::of(&a), View::of(&b), None, ViewMut::of(&mut product));
            }
            device.wait(&self.groups.world.all_reduce(device, ViewMut::of(&mut met), ReduceOp::Sum)?);
            let begin = device.stamp();
            layer.forward(groups, (View::of(&x), ViewMut::of(&mut out))).map_err(stopped)?;
            let between = device.stamp();
            layer.backward(groups, View::of(&x), (View::of(&dout), ViewMut::of(&mut dx))).map_err(stopped)?;
            let end = device.stamp();
            device.synchronize().map_err(failed)?;
            if run >= WARMUP {
                sums[0] += device.between(&begin, &between).as_secs_f64() * 1e3;
                sums[1] += device.between(&between, &end).as_secs_f64() * 1e3;
            }
        }
        let mean = |sum: f64| -> Result<Means, Failure> {
            let rank_0 = sum / REPEATS as f64;
            Ok(Means { rank_0, slowest: reduced(self.world, rank_0, ReduceOp::Max)? })
        };
        Ok([mean(sums[0])?, mean(sums[1])?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_layers_are_legal() {
        for shape in SHAPES {
            shape.model().validate(&shape.router()).unwrap();
        }
        // 6·T·k·H·F is that of experts with a gate.
        assert!((SHAPES[0].forward_flops() - 1.924e12).abs() < 1e9);
    }
}
