//! `moe-launch bench layer`: a whole MoE layer, router, dispatch, experts and combine, forward and forward with backward.
//!
//! Operations are the experts' products alone: 6·T·k·H·F forward, three times that with the backward pass.

use std::process::ExitCode;

use clap::Args;
use moe_kernels::{Backend, Cpu, DeviceError, View, ViewMut};
use moe_runtime::collectives::{Context, Groups, local};
use moe_runtime::config::Precision;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::model::{ModelConfig, ModelError, SingleMoe};
use moe_runtime::routing::RouterConfig;
use moe_runtime::topology::{Grid, Rank};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked};
use serde::Serialize;

use super::measure::{Conditions, failed, median_ms, print_json, random, tflops};
use super::shapes::{LAYERS, Layer, chosen};
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
    },
    Failed {
        failed: String,
    },
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    conditions: Conditions,
    cases: Vec<Case>,
}

pub(crate) fn run(args: &LayerArgs) -> Result<ExitCode, Failure> {
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
    let device = Device::choose_alone(args.device, Precision::Auto)?;
    let report = device.visit(Measure { shapes, name: device.describe() })?;
    if args.json {
        print_json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    report.conditions.show()?;
    say!("{:<20}{:>9}{:>9}{:>11}{:>9}{:>10}", "layer", "fwd ms", "TFLOP/s", "fwd+bwd ms", "TFLOP/s", "of dense")?;
    for Case { shape, outcome } in &report.cases {
        match outcome {
            Outcome::Measured { fwd_ms, fwd_tflops, fwd_bwd_ms, fwd_bwd_tflops, fraction_of_dense } => say!(
                "{:<20}{fwd_ms:>9.3}{fwd_tflops:>9.1}{fwd_bwd_ms:>11.3}{fwd_bwd_tflops:>9.1}{:>8.0} %",
                shape.name,
                100.0 * fraction_of_dense
            )?,
            Outcome::Failed { failed } => say!("{:<20}{failed}", shape.name)?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

struct Measure {
    shapes: Vec<Layer>,
    name: String,
}

impl OnDevice for Measure {
    type Output = Result<Report, Failure>;

    fn run<B: Ranked>(self, device: B) -> Result<Report, Failure> {
        let conditions = Conditions::measure(&device, self.name)?;
        let mut cases = Vec::new();
        for shape in self.shapes {
            let outcome = match measure(&device, shape, conditions.dense_tflops) {
                Ok(outcome) => outcome,
                // A layer that does not fit says nothing about the others.
                Err(failure) if failure.exit_code() == Code::Usage => Outcome::Failed { failed: failure.to_string() },
                Err(failure) => return Err(failure),
            };
            cases.push(Case { shape, outcome });
        }
        Ok(Report { conditions, cases })
    }
}

fn measure<B: Backend>(device: &B, shape: Layer, ceiling: f64) -> Result<Outcome, Failure> {
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
    let grid = Grid::new(1, 1, e).map_err(|error| Failure::new(Code::Internal, error))?;
    let groups = Groups::of_grid::<Cpu>(local::solo(Context::default()), &grid)?;
    let layer = SingleMoe::new(device.clone(), &config, &RouterConfig::default(), (&grid, Rank(0)));
    let Some(mut layer) = layer.map_err(failed)? else {
        return Err(Failure::new(Code::Internal, "the layer has no experts"));
    };
    let (x, dout) = (random(device, t * h, 1.0)?, random(device, t * h, 1.0)?);
    let mut out = device.alloc::<B::Act>(t * h, "layer outputs").map_err(failed)?;
    let mut dx = device.alloc::<B::Act>(t * h, "input gradients").map_err(failed)?;
    let (x, dout) = (View::of(&x), View::of(&dout));
    let fwd_ms = median_ms(device, || layer.forward(&groups, (x, ViewMut::of(&mut out))).map_err(stopped))?;
    let fwd_bwd_ms = median_ms(device, || {
        layer.forward(&groups, (x, ViewMut::of(&mut out))).map_err(stopped)?;
        layer.backward(&groups, x, (dout, ViewMut::of(&mut dx))).map_err(stopped)
    })?;
    let flops = 6.0 * (t * k) as f64 * (h * f) as f64;
    let both = tflops(3.0 * flops, fwd_bwd_ms);
    Ok(Outcome::Measured {
        fwd_ms,
        fwd_tflops: tflops(flops, fwd_ms),
        fwd_bwd_ms,
        fwd_bwd_tflops: both,
        fraction_of_dense: both / ceiling,
    })
}

fn stopped(error: ModelError) -> Failure {
    match error {
        ModelError::Device(error @ DeviceError::OutOfMemory { .. }) => failed(error),
        error => Failure::new(Code::Internal, error),
    }
}
