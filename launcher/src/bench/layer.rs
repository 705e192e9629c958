//! `moe-launch bench layer`: a whole MoE layer, router, dispatch, experts and combine, forward and forward with backward.
//!
//! Operations are the experts' products alone: 6·T·k·H·F forward, three times that with the backward pass. Several ranks share the experts
//! out, each with T tokens; figures are a rank's, times the slowest rank's. What is exposed of the communication is the layer's time
//! less that with exchanges stubbed to copies on each device.

use std::process::ExitCode;

use clap::Args;
use moe_kernels::{Backend, DeviceError, View, ViewMut};
use moe_runtime::collectives::{Communicator, Groups};
use moe_runtime::config::{Config, Precision};
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::model::{ModelConfig, SingleMoe};
use moe_runtime::pass_error::PassError;
use moe_runtime::routing::RouterConfig;
use moe_runtime::topology::{Grid, Rank};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked, World, set_threads};
use serde::Serialize;

use super::measure::{Conditions, failed, print_json, random_from, tflops};
use super::megatron;
use super::ranks::{connect, slowest_ms, together};
use super::shapes::{LAYERS, Layer, chosen};
use super::stub::Stubbed;
use crate::out::say;

/// A whole MoE layer with routing, forward and backward.
#[derive(Args)]
pub(crate) struct LayerArgs {
    /// Only this layer; may be given several times.
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// Tokens in place of the layer's own, for devices that are too slow or too small for them.
    #[arg(long, value_name = "T")]
    tokens: Option<usize>,
    /// Parts that the tokens are cut into, so that one part's shuffle runs beside another's experts.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    chunks: u16,
    /// Rows go through NCCL, and not straight into other GPUs' memory.
    #[arg(long)]
    no_direct: bool,
    /// The layers that Megatron-LM publishes times of, measured as it measures them.
    #[arg(long, conflicts_with_all = ["case", "tokens", "chunks", "no_direct"])]
    megatron: bool,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// One layer.
#[derive(Serialize)]
struct Case {
    #[serde(flatten)]
    shape: Layer,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Measured {
        fwd_ms: f64,
        fwd_tflops: f64,
        fwd_bwd_ms: f64,
        fwd_bwd_tflops: f64,
        /// Of the dense ceiling, forward and backward.
        fraction_of_dense: f64,
        /// Between ranks.
        #[serde(flatten)]
        exposed: Option<Exposed>,
    },
    Failed {
        failed: String,
    },
}

/// What of the layer's time is waiting for other ranks.
#[derive(Clone, Copy, Serialize)]
struct Exposed {
    /// The layer with exchanges stubbed to local copies.
    stubbed_fwd_ms: f64,
    stubbed_fwd_bwd_ms: f64,
    /// Of the forward pass.
    exposed_fwd: f64,
    /// Of both passes.
    exposed_fwd_bwd: f64,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    conditions: Conditions,
    /// EP: all ranks share the experts.
    ranks: usize,
    #[serde(flatten)]
    way: Way,
    cases: Vec<Case>,
}

/// How rows travel.
#[derive(Clone, Copy, Serialize)]
struct Way {
    chunks: u16,
    /// Whether straight into other GPUs' memory, where that can be.
    direct: bool,
}

pub(crate) fn run(args: &LayerArgs) -> Result<ExitCode, Failure> {
    if args.megatron {
        return megatron::run(args.device, args.json);
    }
    let mut shapes = chosen(&LAYERS, |shape| shape.name, &args.case).map_err(|name| {
        let names: Vec<_> = LAYERS.iter().map(|shape| shape.name).collect();
        Failure::new(Code::Usage, format!("--case {name}: accepted: {}", names.join(", ")))
    })?;
    if let Some(tokens) = args.tokens {
        if tokens == 0 {
            return Err(Failure::new(Code::Usage, "--tokens 0: must be at least 1"));
        }
        shapes.iter_mut().for_each(|shape| shape.t = tokens);
    }
    let measure = |world: &World| {
        set_threads(&Config::default(), world)?;
        let device = Device::choose(args.device, Precision::Auto, world)?;
        let way = Way { chunks: args.chunks, direct: !args.no_direct };
        device.visit(Measure { shapes, world, way, name: device.describe() })
    };
    together(measure, |report| show(report, args.json))
}

fn show(report: &Report, json: bool) -> Result<(), Failure> {
    if json {
        return print_json(report);
    }
    report.conditions.show()?;
    let direct = if report.way.direct { "" } else { ", through NCCL" };
    say!("EP {}, {} chunks{direct}", report.ranks, report.way.chunks)?;
    say!(
        "{:<20}{:>9}{:>9}{:>11}{:>9}{:>10}{:>13}{:>9}",
        "layer",
        "fwd ms",
        "TFLOP/s",
        "fwd+bwd ms",
        "TFLOP/s",
        "of dense",
        "exposed fwd",
        "+bwd"
    )?;
    for Case { shape, outcome } in &report.cases {
        match outcome {
            Outcome::Measured { fwd_ms, fwd_tflops, fwd_bwd_ms, fwd_bwd_tflops, fraction_of_dense, exposed } => {
                let share = |of: fn(&Exposed) -> f64| {
                    exposed.as_ref().map_or("-".to_owned(), |exposed| format!("{:.1} %", 100.0 * of(exposed)))
                };
                say!(
                    "{:<20}{fwd_ms:>9.3}{fwd_tflops:>9.1}{fwd_bwd_ms:>11.3}{fwd_bwd_tflops:>9.1}{:>8.0} %{:>13}{:>9}",
                    shape.name,
                    100.0 * fraction_of_dense,
                    share(|exposed| exposed.exposed_fwd),
                    share(|exposed| exposed.exposed_fwd_bwd)
                )?;
            }
            Outcome::Failed { failed } => say!("{:<20}{failed}", shape.name)?,
        }
    }
    Ok(())
}

struct Measure<'a> {
    shapes: Vec<Layer>,
    world: &'a World,
    way: Way,
    name: String,
}

impl OnDevice for Measure<'_> {
    type Output = Result<Report, Failure>;

    fn run<B: Ranked>(self, device: B) -> Result<Report, Failure> {
        let Self { shapes, world, way, name } = self;
        let group = connect(world, &device)?;
        let conditions = Conditions::measure(&device, name)?;
        let mut cases = Vec::new();
        for shape in shapes {
            let grid = Grid::new(group.size(), group.size(), shape.e);
            let grid = grid.map_err(|error| Failure::new(Code::Usage, format!("{}: {error}", shape.name)))?;
            let groups = Groups::of_grid(group.split("world", 0, group.rank())?, &grid)?;
            let bench = Bench { world, device: &device, groups: &groups, grid: &grid, way };
            let outcome = match bench.measure(shape, conditions.dense_tflops) {
                Ok(outcome) => outcome,
                // A layer that does not fit says nothing about the others; with other ranks, it does to them.
                Err(failure) if failure.exit_code() == Code::Usage && group.size() == 1 => {
                    Outcome::Failed { failed: failure.to_string() }
                }
                Err(failure) => return Err(failure),
            };
            cases.push(Case { shape, outcome });
        }
        Ok(Report { conditions, ranks: group.size(), way, cases })
    }
}

/// Where a layer is measured.
struct Bench<'a, B: Backend, C> {
    world: &'a World,
    device: &'a B,
    groups: &'a Groups<C>,
    grid: &'a Grid,
    way: Way,
}

impl<B: Backend, C: Communicator<B>> Bench<'_, B, C> {
    fn measure(&self, shape: Layer, ceiling: f64) -> Result<Outcome, Failure> {
        let Layer { t, h, f, e, k, .. } = shape;
        let config = ModelConfig {
            vocab_size: 64,
            hidden_size: h,
            layers: 1,
            heads: h / 128,
            kv_heads: 1,
            experts: e,
            top_k: k,
            expert_ffn_size: f,
            ..ModelConfig::default()
        };
        let (fwd_ms, fwd_bwd_ms) = self.times(&config, self.groups, t)?;
        let exposed = if self.grid.ep() > 1 {
            let (stubbed_fwd_ms, stubbed_fwd_bwd_ms) = self.times(&config, &Stubbed::groups(self.groups), t)?;
            let share = |ms: f64, stubbed: f64| (1.0 - stubbed / ms).max(0.0);
            let (exposed_fwd, exposed_fwd_bwd) = (share(fwd_ms, stubbed_fwd_ms), share(fwd_bwd_ms, stubbed_fwd_bwd_ms));
            Some(Exposed { stubbed_fwd_ms, stubbed_fwd_bwd_ms, exposed_fwd, exposed_fwd_bwd })
        } else {
            None
        };
        let flops = 6.0 * (t * k) as f64 * (h * f) as f64;
        let both = tflops(3.0 * flops, fwd_bwd_ms);
        Ok(Outcome::Measured {
            fwd_ms,
            fwd_tflops: tflops(flops, fwd_ms),
            fwd_bwd_ms,
            fwd_bwd_tflops: both,
            fraction_of_dense: both / ceiling,
            exposed,
        })
    }

    /// Milliseconds of the forward pass, and of both, over `t` tokens of a rank.
    fn times<G: Communicator<B>>(
        &self,
        config: &ModelConfig,
        groups: &Groups<G>,
        t: usize,
    ) -> Result<(f64, f64), Failure> {
        let (device, rank, n) = (self.device, self.groups.world.rank() as u64, t * config.hidden_size);
        let place = (self.grid, Rank(self.groups.world.rank()));
        let passes = (t, self.way.chunks.into(), self.way.direct);
        let layer = SingleMoe::new(device.clone(), config, &RouterConfig::default(), place, passes).map_err(failed)?;
        let Some(mut layer) = layer else {
            return Err(Failure::new(Code::Internal, "the layer has no experts"));
        };
        let (x, dout) = (random_from(rank, device, n, 1.0)?, random_from(rank + 1000, device, n, 1.0)?);
        let mut out = device.alloc::<B::Act>(n, "layer outputs").map_err(failed)?;
        let mut dx = device.alloc::<B::Act>(n, "input gradients").map_err(failed)?;
        let (x, dout) = (View::of(&x), View::of(&dout));
        let fwd_ms = slowest_ms(self.world, device, &self.groups.world, || {
            layer.forward(groups, (x, ViewMut::of(&mut out))).map_err(stopped)
        })?;
        let fwd_bwd_ms = slowest_ms(self.world, device, &self.groups.world, || {
            layer.forward(groups, (x, ViewMut::of(&mut out))).map_err(stopped)?;
            layer.backward(groups, x, (dout, ViewMut::of(&mut dx))).map_err(stopped)
        })?;
        Ok((fwd_ms, fwd_bwd_ms))
    }
}

pub(super) fn stopped(error: PassError) -> Failure {
    match error {
        PassError::Device(error @ DeviceError::OutOfMemory { .. }) => failed(error),
        error => Failure::new(Code::Internal, error),
    }
}
