//! `RoutingOps` on the CPU: unpacks views and hands slices to the modules below.
//!
//! Owns the checks of shapes. It computes nothing itself, and nothing below it knows a view.

mod balance_loss;
mod capacity;
mod columns;
pub(super) mod gate;
mod noisy;
mod normal;
mod reroute;
mod sinkhorn;
mod statistics;

#[cfg(test)]
mod gate_tests;
#[cfg(test)]
mod noisy_tests;

use super::{slice, slice_mut};
use crate::ops::check_len;
use crate::{BalanceGrad, BalanceSpec, Capacity, Cpu, GateDims, GateSpec, RoutingOps, TokenLosses, View, ViewMut};

impl RoutingOps for Cpu {
    fn gate(
        &self,
        spec: GateSpec,
        logits: View<'_, Self, f32>,
        bias: Option<View<'_, Self, f32>>,
        scores: ViewMut<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
        weights: ViewMut<'_, Self, f32>,
    ) {
        check_len("logits", logits.len(), spec.logits_len());
        check_len("scores", scores.len(), logits.len());
        check_len("ids", ids.len(), spec.dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        if let Some(bias) = bias {
            check_len("bias", bias.len(), spec.dims.experts);
        }
        gate::gate(spec, slice(logits), bias.map(slice), slice_mut(scores), slice_mut(ids), slice_mut(weights));
    }

    fn sinkhorn_bias(
        &self,
        dims: GateDims,
        iterations: usize,
        logits: View<'_, Self, f32>,
        bias: ViewMut<'_, Self, f32>,
    ) {
        check_len("logits", logits.len(), dims.logits_len());
        check_len("bias", bias.len(), dims.experts);
        sinkhorn::bias(dims, iterations, slice(logits), slice_mut(bias));
    }

    fn gate_grad(
        &self,
        spec: GateSpec,
        logits: View<'_, Self, f32>,
        scores: View<'_, Self, f32>,
        ids: View<'_, Self, i32>,
        dweights: View<'_, Self, f32>,
        balance: Option<BalanceGrad<'_, Self>>,
        losses: TokenLosses,
        dlogits: ViewMut<'_, Self, f32>,
    ) {
        check_len("logits", logits.len(), spec.logits_len());
        check_len("scores", scores.len(), logits.len());
        check_len("dlogits", dlogits.len(), logits.len());
        check_len("ids", ids.len(), spec.dims.choices_len());
        check_len("dweights", dweights.len(), ids.len());
        let balance = balance.map(|balance| {
            let tokens_per_group = balance.tokens_per_group.max(1);
            let groups = spec.dims.tokens.div_ceil(tokens_per_group);
            let given = balance.coefficients.len();
            assert!(given >= groups * spec.dims.experts, "{given} coefficients for {groups} groups of {:?}", spec.dims);
            (slice(balance.coefficients), tokens_per_group)
        });
        let given = gate::Given {
            logits: slice(logits),
            scores: slice(scores),
            ids: slice(ids),
            dweights: slice(dweights),
            balance,
            losses,
        };
        gate::gate_grad(spec, &given, slice_mut(dlogits));
    }

    fn gate_statistics(
        &self,
        spec: GateSpec,
        tokens_per_group: usize,
        logits: View<'_, Self, f32>,
        scores: View<'_, Self, f32>,
        ids: View<'_, Self, i32>,
        counts: ViewMut<'_, Self, f32>,
        prob_sums: ViewMut<'_, Self, f32>,
        sums: ViewMut<'_, Self, f32>,
    ) {
        check_len("logits", logits.len(), spec.logits_len());
        check_len("scores", scores.len(), logits.len());
        check_len("ids", ids.len(), spec.dims.choices_len());
        check_len("prob_sums", prob_sums.len(), counts.len());
        check_len("sums", sums.len(), 2);
        let routed = statistics::Routed { spec, logits: slice(logits), scores: slice(scores), ids: slice(ids) };
        let (counts, prob_sums) = (slice_mut(counts), slice_mut(prob_sums));
        statistics::group_sums(&routed, tokens_per_group, counts, prob_sums);
        let sums = slice_mut(sums);
        [sums[0], sums[1]] = [statistics::z_sum(&routed), statistics::entropy_sum(&routed)];
    }

    fn balance_loss(
        &self,
        spec: BalanceSpec,
        counts: View<'_, Self, f32>,
        prob_sums: View<'_, Self, f32>,
        losses: ViewMut<'_, Self, f64>,
        coefficients: ViewMut<'_, Self, f32>,
    ) {
        check_len("losses", losses.len(), BalanceSpec::LOSSES);
        check_len("counts", counts.len(), spec.layers * spec.groups * spec.experts);
        check_len("prob_sums", prob_sums.len(), counts.len());
        check_len("coefficients", coefficients.len(), counts.len());
        let formed = balance_loss::form(spec, slice(counts), slice(prob_sums), slice_mut(coefficients));
        slice_mut(losses).iter_mut().zip(formed).for_each(|(sum, loss)| *sum += loss);
    }

    fn apply_capacity(
        &self,
        dims: GateDims,
        capacity: Capacity,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        kept: ViewMut<'_, Self, i32>,
        dropped: ViewMut<'_, Self, f32>,
    ) {
        check_len("ids", ids.len(), dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        check_len("kept", kept.len(), ids.len());
        check_len("dropped", dropped.len(), dims.experts);
        capacity::apply(dims, capacity, slice(ids), slice(weights), slice_mut(kept), slice_mut(dropped));
    }

    fn reroute(
        &self,
        dims: GateDims,
        per_expert: usize,
        rounds: usize,
        scores: View<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
        kept: ViewMut<'_, Self, i32>,
        dropped: ViewMut<'_, Self, f32>,
    ) {
        check_len("scores", scores.len(), dims.logits_len());
        check_len("ids", ids.len(), dims.choices_len());
        check_len("kept", kept.len(), ids.len());
        check_len("dropped", dropped.len(), dims.experts);
        let choices = reroute::Choices { ids: slice_mut(ids), kept: slice_mut(kept) };
        reroute::reroute(dims, (per_expert, rounds), slice(scores), choices, slice_mut(dropped));
    }

    fn weigh(
        &self,
        spec: GateSpec,
        scores: View<'_, Self, f32>,
        ids: View<'_, Self, i32>,
        weights: ViewMut<'_, Self, f32>,
    ) {
        check_len("scores", scores.len(), spec.logits_len());
        check_len("ids", ids.len(), spec.dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        gate::weigh_all(spec, slice(scores), slice(ids), slice_mut(weights));
    }

    fn drop_second(
        &self,
        dims: GateDims,
        uniform: View<'_, Self, f32>,
        weights: View<'_, Self, f32>,
        ids: ViewMut<'_, Self, i32>,
    ) {
        check_len("uniform", uniform.len(), dims.tokens);
        check_len("ids", ids.len(), dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        capacity::drop_second(dims, slice(uniform), slice(weights), slice_mut(ids));
    }

    fn noisy_logits(
        &self,
        dims: GateDims,
        clean: View<'_, Self, f32>,
        raw: View<'_, Self, f32>,
        noise: View<'_, Self, f32>,
        noisy: ViewMut<'_, Self, f32>,
        load: ViewMut<'_, Self, f32>,
    ) {
        check_len("clean", clean.len(), dims.logits_len());
        check_len("raw", raw.len(), clean.len());
        check_len("noise", noise.len(), clean.len());
        check_len("noisy", noisy.len(), clean.len());
        check_len("load", load.len(), dims.experts);
        let noisy = slice_mut(noisy);
        let (clean, raw) = (slice(clean), slice(raw));
        noisy::perturb(clean, raw, slice(noise), noisy);
        noisy::load(&noisy::Perturbed { dims, clean, raw, noisy }, slice_mut(load));
    }

    fn noisy_logits_grad(
        &self,
        dims: GateDims,
        clean: View<'_, Self, f32>,
        raw: View<'_, Self, f32>,
        noise: View<'_, Self, f32>,
        noisy: View<'_, Self, f32>,
        dnoisy: View<'_, Self, f32>,
        dload: View<'_, Self, f32>,
        dclean: ViewMut<'_, Self, f32>,
        draw: ViewMut<'_, Self, f32>,
    ) {
        check_len("clean", clean.len(), dims.logits_len());
        check_len("raw", raw.len(), clean.len());
        check_len("noise", noise.len(), clean.len());
        check_len("noisy", noisy.len(), clean.len());
        check_len("dnoisy", dnoisy.len(), clean.len());
        check_len("dload", dload.len(), dims.experts);
        check_len("dclean", dclean.len(), clean.len());
        check_len("draw", draw.len(), clean.len());
        let saved = noisy::Perturbed { dims, clean: slice(clean), raw: slice(raw), noisy: slice(noisy) };
        let incoming = noisy::Incoming { noise: slice(noise), dnoisy: slice(dnoisy), dload: slice(dload) };
        noisy::grad(&saved, &incoming, slice_mut(dclean), slice_mut(draw));
    }

    fn importance(
        &self,
        dims: GateDims,
        ids: View<'_, Self, i32>,
        weights: View<'_, Self, f32>,
        importance: ViewMut<'_, Self, f32>,
    ) {
        check_len("ids", ids.len(), dims.choices_len());
        check_len("weights", weights.len(), ids.len());
        check_len("importance", importance.len(), dims.experts);
        statistics::importance(dims, slice(ids), slice(weights), slice_mut(importance));
    }

    fn importance_grad(
        &self,
        dims: GateDims,
        ids: View<'_, Self, i32>,
        dimportance: View<'_, Self, f32>,
        dweights: ViewMut<'_, Self, f32>,
    ) {
        check_len("ids", ids.len(), dims.choices_len());
        check_len("dweights", dweights.len(), ids.len());
        check_len("dimportance", dimportance.len(), dims.experts);
        statistics::importance_grad(slice(ids), slice(dimportance), slice_mut(dweights));
    }

    fn cv_squared(
        &self,
        weight: f32,
        coefficient: f32,
        x: View<'_, Self, f32>,
        loss: ViewMut<'_, Self, f64>,
        dx: ViewMut<'_, Self, f32>,
    ) {
        check_len("dx", dx.len(), x.len());
        slice_mut(loss)[0] += statistics::cv_squared((weight, coefficient), slice(x), slice_mut(dx));
    }
}
