//! What share of the MoE layers' time goes into deciding where tokens go.
//!
//! Owns the counting: the route stage, forward and backward, which forms the losses too, and the plan of the rows' way, over the time of
//! route, dispatch, experts and combine in the median step. The plan is part of the dispatch stage and is timed by itself, with choices as
//! even as can be.

use moe_kernels::{ExpandPlan, ShuffleDims, View, ViewMut};
use moe_runtime::config::Config;
use moe_runtime::exit::{ExitCode as Code, Failure};
use moe_runtime::stages::Stage;
use moe_runtime::worker::{OnDevice, Ranked};
use serde::Serialize;

use super::super::measure::{commit, failed, median, median_ms};
use super::Setting;
use super::session::{Noted, Session, WARMUP};
use crate::out::say;

/// Times a few steps with every gate.
pub(super) struct Costs<'a>(pub(super) &'a Setting<'a>);

/// What was measured.
#[derive(Serialize)]
pub(super) struct CostReport {
    preset: String,
    device: String,
    commit: String,
    gates: Vec<Cost>,
}

/// One gate's milliseconds in a step, over all MoE layers.
#[derive(Serialize)]
struct Cost {
    name: &'static str,
    layers_ms: f64,
    route_ms: f64,
    plan_ms: f64,
    /// Route and plan over all.
    share: f64,
}

impl OnDevice for Costs<'_> {
    type Output = Result<CostReport, Failure>;

    fn run<B: Ranked>(self, queue: B) -> Result<CostReport, Failure> {
        let setting = self.0;
        let session = Session::new(setting, queue)?;
        let mut gates = Vec::new();
        for (row, config, corpus) in &setting.configured {
            let ran = session.train((config, corpus), || {}, |_| Ok(()))?;
            let (steps, ()) = ran.map_err(|reason| Failure::new(Code::Internal, format!("{}: {reason}", row.name)))?;
            let timed = &steps[WARMUP.min(steps.len() - 1)..];
            let middle = |of: fn(&Noted) -> f64| median(&mut timed.iter().map(of).collect::<Vec<_>>());
            let (layers_ms, route_ms) = (middle(Noted::layer_ms), middle(|step| step.ms(Stage::Route)));
            let plan_ms = plan_ms(session.queue(), config)?;
            gates.push(Cost { name: row.name, layers_ms, route_ms, plan_ms, share: (route_ms + plan_ms) / layers_ms });
        }
        Ok(CostReport {
            preset: setting.args.preset().to_owned(),
            device: setting.device.describe(),
            commit: commit(),
            gates,
        })
    }
}

/// Milliseconds of a step's plans on one rank: one a layer and pass, which its backward pass uses again.
fn plan_ms<B: Ranked>(device: &B, config: &Config) -> Result<f64, Failure> {
    let (model, train) = (&config.model, &config.train);
    let sequences = train.micro_batch_for(1);
    let (tokens, experts) = (sequences * train.sequence_length * model.sub_tokens, model.experts);
    // A gate whose experts choose has more places for choices than choices.
    let (chosen_of, slots_of) = (model.top_k, config.router.slots(model.top_k, experts));
    let choices = tokens * slots_of;
    let buffer = |len| device.alloc::<i32>(len, "a plan").map_err(failed);
    let id = |place: usize| {
        let (token, j) = (place / slots_of, place % slots_of);
        if j < chosen_of { ((token * chosen_of + j) % experts) as i32 } else { -1 }
    };
    let ids: Vec<i32> = (0..choices).map(id).collect();
    let (mut rows, mut offsets, mut counts) = (buffer(1)?, buffer(experts + 1)?, buffer(1)?);
    let (mut slots, mut source, mut origin) = (buffer(choices)?, buffer(choices)?, buffer(choices)?);
    let mut chosen = buffer(choices)?;
    device.upload(&ids, ViewMut::of(&mut chosen));
    device.fill(ViewMut::of(&mut counts), tokens as i32);
    let dims = ShuffleDims { tokens, top_k: slots_of, experts, ranks: 1 };
    let ms = median_ms(device, || {
        let plan = ExpandPlan {
            rows: ViewMut::of(&mut rows),
            offsets: ViewMut::of(&mut offsets),
            slots: ViewMut::of(&mut slots),
            source: ViewMut::of(&mut source),
            origin: ViewMut::of(&mut origin),
        };
        device.expand_plan(dims, View::of(&counts), View::of(&chosen), plan);
        Ok(())
    })?;
    Ok(ms * (model.moe_layers().count() * train.global_batch.div_ceil(sequences)) as f64)
}

impl CostReport {
    pub(super) fn show(&self) -> Result<(), Failure> {
        let Self { preset, device, commit, gates } = self;
        say!("{preset} on {device}, commit {commit}; ms a step, all MoE layers")?;
        say!("{:<18}{:>10}{:>10}{:>10}{:>16}", "gate", "layers", "route", "plan", "route and plan")?;
        for Cost { name, layers_ms, route_ms, plan_ms, share } in gates {
            say!("{name:<18}{layers_ms:>10.2}{route_ms:>10.2}{plan_ms:>10.2}{:>14.1} %", 100.0 * share)?;
        }
        Ok(())
    }
}
