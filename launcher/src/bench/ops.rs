//! `moe-launch bench ops`: operations that only move data, beside a copy.
//!
//! Bytes are those that an operation cannot do without: each input read once, each output written once.

use std::process::ExitCode;

use clap::Args;
use moe_kernels::{Accumulate, Activation, AdamW, Backend, CombineDims, Element, NormDims, Rows, View, ViewMut};
use moe_runtime::config::Precision;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::worker::{Device, DeviceChoice, OnDevice, Ranked};
use serde::Serialize;

use super::measure::{Conditions, failed, gbs, median_ms_in_a_row, print_json, random};
use super::shapes::{LAYERS, Layer, chosen};
use crate::out::say;

/// Words of the vocabulary of the cross-entropy, and rows of it at once.
const VOCABULARY: usize = 32_000;
const LOSS_ROWS: usize = 4096;
/// Sets of rows that the norms' launches take turns with.
const NORM_BUFFERS: usize = 4;

/// Permutation of rows, SwiGLU, norms, cross-entropy, AdamW.
#[derive(Args)]
pub(crate) struct OpsArgs {
    /// The layer whose sizes are taken.
    #[arg(long, value_name = "NAME", default_value = "olmoe-1b-7b")]
    case: String,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Figure {
    op: &'static str,
    ms: f64,
    gbs: f64,
    fraction_of_copy: f64,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    conditions: Conditions,
    layer: Layer,
    ops: Vec<Figure>,
}

pub(crate) fn run(args: &OpsArgs) -> Result<ExitCode, Failure> {
    let layers = chosen(&LAYERS, |shape| shape.name, std::slice::from_ref(&args.case)).map_err(|name| {
        let names: Vec<_> = LAYERS.iter().map(|shape| shape.name).collect();
        Failure::new(Code::Usage, format!("--case {name}: accepted: {}", names.join(", ")))
    })?;
    let device = Device::choose_alone(args.device, Precision::Auto)?;
    let report = device.visit(Measure { layer: layers[0], name: device.describe() })?;
    if args.json {
        print_json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    report.conditions.show()?;
    say!("sizes of {}\n{:<16}{:>9}{:>9}{:>10}", report.layer.name, "operation", "ms", "GB/s", "of copy")?;
    for Figure { op, ms, gbs, fraction_of_copy } in &report.ops {
        say!("{op:<16}{ms:>9.3}{gbs:>9.0}{:>8.0} %", 100.0 * fraction_of_copy)?;
    }
    Ok(ExitCode::SUCCESS)
}

struct Measure {
    layer: Layer,
    name: String,
}

impl OnDevice for Measure {
    type Output = Result<Report, Failure>;

    fn run<B: Ranked>(self, device: B) -> Result<Report, Failure> {
        let conditions = Conditions::measure(&device, self.name)?;
        let bench = Bench { device: &device, layer: self.layer, ceiling: conditions.copy_gbs };
        let ops = [bench.permutations()?, bench.swiglu()?, bench.norm()?, vec![bench.cross_entropy()?, bench.adamw()?]];
        Ok(Report { conditions, layer: self.layer, ops: ops.into_iter().flatten().collect() })
    }
}

struct Bench<'a, B: Backend> {
    device: &'a B,
    layer: Layer,
    ceiling: f64,
}

impl<B: Backend> Bench<'_, B> {
    fn figure(&self, op: &'static str, bytes: usize, work: impl FnMut(usize)) -> Result<Figure, Failure> {
        let ms = median_ms_in_a_row(self.device, work)?;
        let rate = gbs(bytes as f64, ms);
        Ok(Figure { op, ms, gbs: rate, fraction_of_copy: rate / self.ceiling })
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<B::Buffer<T>, Failure> {
        self.device.alloc(len, "benchmark").map_err(failed)
    }

    fn ints(&self, host: &[i32]) -> Result<B::Buffer<i32>, Failure> {
        let mut buffer = self.zeros(host.len())?;
        self.device.upload(host, ViewMut::of(&mut buffer));
        Ok(buffer)
    }

    /// Tokens to the experts' order and back: each token's rows lie T apart.
    fn permutations(&self) -> Result<Vec<Figure>, Failure> {
        let Layer { t, h, k, .. } = self.layer;
        let n = t * k;
        let source: Vec<i32> = (0..n).map(|row| (row % t) as i32).collect();
        let slots: Vec<i32> = (0..n).map(|slot| (slot % k * t + slot / k) as i32).collect();
        let (source, slots) = (self.ints(&source)?, self.ints(&slots)?);
        let tokens = random(self.device, t * h, 1.0)?;
        let (mut rows, mut out) = (self.zeros::<B::Act>(n * h)?, self.zeros::<B::Act>(t * h)?);
        let mut weights = self.zeros::<f32>(n)?;
        self.device.fill(ViewMut::of(&mut weights), 1.0 / k as f32);
        let act = B::Act::BYTES;
        let dims = CombineDims { slots: k, width: h };
        let permute = self.figure("permute", (t + n) * h * act + 4 * n, |_| {
            let to = ViewMut::of(&mut rows);
            let (slots, source) = (View::of(&slots), View::of(&source));
            let (arrived, expanded) = (Rows::exactly(t), Rows::exactly(n));
            self.device.expand_rows(arrived, expanded, dims, slots, source, View::of(&tokens), to);
        })?;
        let unpermute = self.figure("unpermute", (t + n) * h * act + 8 * n, |_| {
            let (slots, weights, to) = (View::of(&slots), Some(View::of(&weights)), ViewMut::of(&mut out));
            let rows = View::of(&rows);
            self.device.weighted_reduce(Rows::exactly(t), dims, slots, weights, rows, to);
        })?;
        Ok(vec![permute, unpermute])
    }

    fn swiglu(&self) -> Result<Vec<Figure>, Failure> {
        let Layer { t, f, k, .. } = self.layer;
        let n = t * k;
        let (h, da) = (random(self.device, n * 2 * f, 1.0)?, random(self.device, n * f, 1.0)?);
        let (mut a, mut dh) = (self.zeros::<B::Act>(n * f)?, self.zeros::<B::Act>(n * 2 * f)?);
        let act = B::Act::BYTES;
        let rows = Rows::exactly(n);
        let forward = self.figure("swiglu", 3 * n * f * act, |_| {
            self.device.swiglu(rows, f, View::of(&h), ViewMut::of(&mut a));
        })?;
        let origin: Vec<i32> = (0..n as i32).collect();
        let (origin, weights) = (self.ints(&origin)?, self.zeros::<f32>(n)?);
        let mut dweights = self.zeros::<f32>(n)?;
        let backward = self.figure("swiglu grad", 6 * n * f * act + 12 * n, |_| {
            let (dh, a, dweights) = (ViewMut::of(&mut dh), ViewMut::of(&mut a), ViewMut::of(&mut dweights));
            let (da, h, weights) = (View::of(&da), View::of(&h), View::of(&weights));
            self.device.weighted_swiglu_grad(rows, f, View::of(&origin), weights, da, h, dh, a, dweights);
        })?;
        Ok(vec![forward, backward])
    }

    /// Rows in several buffers, so that a launch finds nothing of the one before in a cache.
    fn norm(&self) -> Result<Vec<Figure>, Failure> {
        let Layer { t, h, .. } = self.layer;
        let dims = NormDims { tokens: t, groups: 1, width: h, token_stride: h, eps: 1e-5 };
        let rows = || (0..NORM_BUFFERS).map(|_| random(self.device, t * h, 1.0)).collect::<Result<Vec<_>, _>>();
        let (x, dy, mut y, w) = (rows()?, rows()?, rows()?, random(self.device, h, 1.0)?);
        let (mut rstd, mut dw) = (self.zeros::<f32>(t)?, self.zeros::<f32>(h)?);
        let row = h * B::Act::BYTES;
        let forward = self.figure("rms norm", t * (2 * row + 4), |launch| {
            let (x, y) = (&x[launch % NORM_BUFFERS], &mut y[launch % NORM_BUFFERS]);
            self.device.rms_norm(dims, View::of(x), View::of(&w), ViewMut::of(y), ViewMut::of(&mut rstd));
        })?;
        let backward = self.figure("rms norm grad", t * (3 * row + 4), |launch| {
            let buffer = launch % NORM_BUFFERS;
            let (x, w, dy, rstd) = (View::of(&x[buffer]), View::of(&w), View::of(&dy[buffer]), View::of(&rstd));
            let (dx, dw) = (ViewMut::of(&mut y[buffer]), ViewMut::of(&mut dw));
            self.device.rms_norm_grad(dims, dy, x, w, rstd, dx, dw, Accumulate::Overwrite);
        })?;
        Ok(vec![forward, backward])
    }

    fn cross_entropy(&self) -> Result<Figure, Failure> {
        let targets: Vec<i32> = (0..LOSS_ROWS).map(|row| (row * 7 % VOCABULARY) as i32).collect();
        let targets = self.ints(&targets)?;
        let mut logits = random(self.device, LOSS_ROWS * VOCABULARY, 1.0)?;
        let mut losses = self.zeros::<f32>(LOSS_ROWS)?;
        self.figure("cross-entropy", 2 * LOSS_ROWS * VOCABULARY * B::Act::BYTES, |_| {
            let (logits, losses) = (ViewMut::of(&mut logits), ViewMut::of(&mut losses));
            self.device.cross_entropy(VOCABULARY, 1.0, View::of(&targets), logits, losses);
        })
    }

    /// All weights of the experts.
    fn adamw(&self) -> Result<Figure, Failure> {
        let Layer { h, f, e, .. } = self.layer;
        let n = 3 * e * h * f;
        let mut compute = random(self.device, n, 0.02)?;
        let (mut grad, mut m, mut v) = (self.zeros::<f32>(n)?, self.zeros::<f32>(n)?, self.zeros::<f32>(n)?);
        let mut master = if B::Act::HOLDS_F32 { None } else { Some(self.zeros::<f32>(n)?) };
        let settings =
            AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 1.0 };
        // Gradient, moments and master are read and written; a rounded compute copy is written only.
        let bytes = n * (if B::Act::HOLDS_F32 { 32 } else { 32 + B::Act::BYTES });
        self.figure("adamw", bytes, |_| {
            let (grad, m, v) = (ViewMut::of(&mut grad), ViewMut::of(&mut m), ViewMut::of(&mut v));
            let master = master.as_mut().map(|master| ViewMut::of(master));
            self.device.adamw(settings, grad, m, v, master, ViewMut::of(&mut compute));
        })
    }
}
