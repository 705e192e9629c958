//! `moe-launch bench gemm`: the experts' grouped products, and a dense one of the same operations beside each.

use std::process::ExitCode;

use clap::Args;
use moe_kernels::{Accumulate, Backend, GemmDims, GroupedDims, View, ViewMut};
use moe_runtime::config::Precision;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked};
use serde::Serialize;

use super::measure::{Conditions, failed, median_ms, print_json, random, tflops};
use super::shapes::{GROUPED, Grouped, SKEWS, chosen, group_offsets};
use crate::out::say;

/// Grouped products of the experts: forward, input gradient, weight gradient.
#[derive(Args)]
pub(crate) struct GemmArgs {
    /// Only this case; may be given several times.
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// One case.
#[derive(Serialize)]
struct Case {
    #[serde(flatten)]
    shape: Grouped,
    skew: f64,
    forward: Figure,
    input_grad: Figure,
    /// Replacing what was there, as in the first pass of a step.
    weight_grad: Figure,
    /// Added to what was there, as in the step's other passes.
    weight_grad_added: Figure,
    /// One product of all rows with one group's weights.
    dense: Figure,
}

/// A product's time and rate.
#[derive(Clone, Copy, Serialize)]
struct Figure {
    ms: f64,
    tflops: f64,
    /// Of the dense ceiling.
    fraction_of_dense: f64,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    conditions: Conditions,
    cases: Vec<Case>,
}

pub(crate) fn run(args: &GemmArgs) -> Result<ExitCode, Failure> {
    let shapes = chosen(&GROUPED, |shape| shape.name, &args.case).map_err(|name| {
        let names: Vec<_> = GROUPED.iter().map(|shape| shape.name).collect();
        Failure::new(Code::Usage, format!("--case {name}: accepted: {}", names.join(", ")))
    })?;
    let device = Device::choose_alone(args.device, Precision::Auto)?;
    let report = device.visit(Measure { shapes, name: device.describe() })?;
    if args.json {
        print_json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    report.conditions.show()?;
    say!(
        "TFLOP/s\n{:<14}{:>6}{:>10}{:>12}{:>13}{:>9}{:>9}",
        "case",
        "skew",
        "forward",
        "input grad",
        "weight grad",
        "added",
        "dense"
    )?;
    for Case { shape, skew, forward, input_grad, weight_grad, weight_grad_added, dense } in &report.cases {
        let [a, b, c, d, e] = [forward, input_grad, weight_grad, weight_grad_added, dense].map(|figure| figure.tflops);
        say!("{:<14}{skew:>6}{a:>10.1}{b:>12.1}{c:>13.1}{d:>9.1}{e:>9.1}", shape.name)?;
    }
    Ok(ExitCode::SUCCESS)
}

struct Measure {
    shapes: Vec<Grouped>,
    name: String,
}

impl OnDevice for Measure {
    type Output = Result<Report, Failure>;

    fn run<B: Ranked>(self, device: B) -> Result<Report, Failure> {
        let conditions = Conditions::measure(&device, self.name)?;
        let mut cases = Vec::new();
        for shape in self.shapes {
            for skew in SKEWS {
                cases.push(case(&device, shape, skew, conditions.dense_tflops)?);
            }
        }
        Ok(Report { conditions, cases })
    }
}

fn case<B: Backend>(device: &B, shape: Grouped, skew: f64, ceiling: f64) -> Result<Case, Failure> {
    let Grouped { e, m, k, n, .. } = shape;
    let host = group_offsets(e, m, skew);
    let mut offsets = device.alloc::<i32>(e + 1, "offsets").map_err(failed)?;
    device.upload(&host, ViewMut::of(&mut offsets));
    let offsets = View::of(&offsets);
    let (x, w, dy) = (random(device, m * k, 1.0)?, random(device, e * n * k, 0.02)?, random(device, m * n, 1.0)?);
    let mut y = device.alloc::<B::Act>(m * n, "outputs").map_err(failed)?;
    let mut dx = device.alloc::<B::Act>(m * k, "input gradients").map_err(failed)?;
    let mut dw = device.alloc::<f32>(e * n * k, "weight gradients").map_err(failed)?;
    let (x, w, dy) = (View::of(&x), View::of(&w), View::of(&dy));
    let dims = GroupedDims { experts: e, n, k };
    let figure = |ms: f64| {
        let rate = tflops(2.0 * m as f64 * n as f64 * k as f64, ms);
        Figure { ms, tflops: rate, fraction_of_dense: rate / ceiling }
    };
    let time = |work: &mut dyn FnMut()| {
        median_ms(device, || {
            work();
            Ok(())
        })
        .map(figure)
    };
    Ok(Case {
        shape,
        skew,
        forward: time(&mut || device.grouped_linear(dims, offsets, x, w, ViewMut::of(&mut y)))?,
        input_grad: time(&mut || device.grouped_linear_grad_input(dims, offsets, dy, w, ViewMut::of(&mut dx)))?,
        weight_grad: time(&mut || {
            device.grouped_linear_grad_weight(dims, offsets, dy, x, ViewMut::of(&mut dw), Accumulate::Overwrite);
        })?,
        weight_grad_added: time(&mut || {
            device.grouped_linear_grad_weight(dims, offsets, dy, x, ViewMut::of(&mut dw), Accumulate::Add);
        })?,
        dense: time(&mut || {
            device.linear(GemmDims { m, n, k }, x, w.slice(0..n * k), None, ViewMut::of(&mut y));
        })?,
    })
}
