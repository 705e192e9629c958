//! Stages 2 and 4 of an MoE layer: tokens travel to the ranks that hold their experts, and their results come home.
//!
//! Owns the handle that dispatch returns and combine takes: the plan of one shuffle and the rows it brought. A shuffled row is a
//! (token, destination rank) pair: a token travels once to each rank that holds any of its experts, and comes home as one row
//! already weighted and summed over them. It never decides where a token goes and never computes an expert.
//!
//! The backward passes are the same two journeys: the output's gradient travels out like a token, the input's gradient and the
//! weights' come home like a result.
//!
//! A lone rank's tokens are its rows: nothing is planned, sent, copied or read back, and what a layer keeps are index lists. With more
//! ranks the host reads the counts of all of them once a layer ([`ShuffleScratch::settle`]), and each layer keeps the rows that arrived.
//!
//! A journey is begun in one call and ended in another, so that what is computed in between runs beside it: `send_…` issues exchanges,
//! `receive_…` has the queue wait for them. A layer runs in chunks of its tokens, each with a [`Shuffle`] of its own.
//!
//! Rows go by the communicator's exchange, or, where ranks reach each other's memory, straight to where they are wanted
//! ([`crate::collectives::Landing`]): not gathered first, and without a message.
//!
//! More rows than there is [`Room`] for come in rounds, each with the calls of a whole chunk. Nothing of them is kept: the backward pass
//! has the tokens sent once more.

mod journey;
mod scratch;
mod traffic;

use moe_kernels::{Backend, CombineDims, DeviceError, ExpandPlan, Rows, ShuffleDims, View, ViewMut};

use serde::{Deserialize, Serialize};

use crate::collectives::Communicator;
use crate::experts::{GatedRows, GroupedRows};
use crate::memory::{Kind, Slot, Tally};
use crate::pass_error::PassError;
pub use scratch::ShuffleScratch;
pub use traffic::{Room, visit_probability};

use journey::{Homeward, Journey};
use scratch::{stretch, stretch_mut};
use traffic::Traffic;

/// Rows that crossed from one rank to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShuffledRows {
    /// Left this rank in forward passes.
    pub sent: u64,
    /// Came to it in forward passes.
    pub received: u64,
    /// Leave it once more in the backward pass, since they came in rounds and were not kept.
    #[serde(default)]
    pub again: u64,
}

impl std::ops::AddAssign for ShuffledRows {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
        self.again += other.again;
    }
}

/// The handle of one chunk's shuffle: planned first, used by everything after it until it is planned again.
pub struct Shuffle<B: Backend> {
    dims: ShuffleDims,
    hidden_size: usize,
    /// See [`Shuffle::bound_choices`].
    most_choices: usize,
    /// What goes to each rank and what comes from it; None for a lone rank.
    journey: Option<Journey<B>>,
    /// `[W]`.
    recv_counts: Slot<B, i32>,
    /// `[1]`.
    received: Slot<B, i32>,
    offsets: Slot<B, i32>,
    slots: Slot<B, i32>,
    source: Slot<B, i32>,
    origin: Slot<B, i32>,
    crossed: ShuffledRows,
    extra_rounds: u64,
}

impl<B: Backend> Shuffle<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        let lists = [&self.recv_counts, &self.received, &self.offsets, &self.slots, &self.source, &self.origin];
        tally.add(Kind::Communication, lists.map(Slot::bytes));
        if let Some(journey) = &self.journey {
            journey.tally(tally);
        }
    }

    /// An empty handle. `dims.tokens` is set by each plan; `room` is what a chunk may bring at a time.
    pub fn new(device: &B, dims: ShuffleDims, hidden_size: usize, room: Room) -> Result<Self, DeviceError> {
        let list = |what, len| Slot::sized(device, what, len);
        let journey = || Journey::new(device, (hidden_size, dims.top_k), room);
        Ok(Self {
            dims,
            hidden_size,
            most_choices: usize::MAX,
            journey: (dims.ranks > 1).then(journey).transpose()?,
            recv_counts: list("shuffle receive counts", dims.ranks)?,
            received: list("number of rows received", 1)?,
            offsets: list("expert offsets", dims.local_experts() + 1)?,
            slots: list("expanded rows of arrived rows", 0)?,
            source: list("arrived rows of expanded rows", 0)?,
            origin: list("choices of expanded rows", 0)?,
            crossed: ShuffledRows::default(),
            extra_rounds: 0,
        })
    }

    /// Promises that no more than `most` of this rank's choices are carried out, where that is fewer than there are places for.
    pub fn bound_choices(&mut self, most: usize) {
        self.most_choices = most;
    }

    /// Plans where the tokens of chunk `chunk` of `chunks` go. All chunks of a layer are planned before [`ShuffleScratch::settle`].
    pub fn plan(
        &mut self,
        device: &B,
        scratch: &mut ShuffleScratch<B>,
        (chunk, chunks): (usize, usize),
        tokens: RoutedTokens<'_, B>,
    ) -> Result<(), DeviceError> {
        self.dims.tokens = tokens.kept.len() / self.dims.top_k;
        let Some(journey) = &mut self.journey else { return Ok(()) };
        scratch.begin(device, self.dims.ranks, chunks)?;
        journey.plan(device, scratch, (self.dims, chunk), tokens)
    }

    /// See [`Journey::settle`].
    fn settle(
        &mut self,
        device: &B,
        traffic: &Traffic,
        place: (usize, usize),
        at: (usize, usize),
        direct: bool,
    ) -> Result<(usize, usize), DeviceError> {
        let Some(journey) = &mut self.journey else { return Ok(at) };
        let (ends, crossed) = journey.settle(device, traffic, place, at, (self.dims.local_experts(), direct))?;
        self.crossed += crossed;
        self.extra_rounds += journey.rounds_here() as u64 - 1;
        Ok(ends)
    }

    /// See [`Journey::land`].
    fn land<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        traffic: &Traffic,
        place: (usize, usize),
    ) -> Result<bool, PassError> {
        self.journey.as_mut().map_or(Ok(true), |journey| journey.land(device, group, traffic, place))
    }

    fn use_exchange(&mut self) {
        self.journey.iter_mut().for_each(Journey::use_exchange);
    }

    /// Rounds of this chunk, the same on all ranks; nearly always 1.
    pub fn rounds(&self) -> usize {
        self.journey.as_ref().map_or(1, Journey::rounds)
    }

    /// Whether this rank has rows to compute on in `round`; in the first it always has, perhaps none.
    pub fn computes(&self, round: usize) -> bool {
        round < self.journey.as_ref().map_or(1, Journey::rounds_here)
    }

    /// Whether the rows that came stay for the backward pass.
    pub fn is_kept(&self) -> bool {
        !self.computes(1)
    }

    /// Rows exchanged with other ranks so far.
    pub fn shuffled_rows(&self) -> ShuffledRows {
        self.crossed
    }

    /// Rounds beyond the first that this rank needed so far.
    pub fn extra_rounds(&self) -> u64 {
        self.extra_rounds
    }

    /// Sends each token of `x_TH` to the ranks of its experts, in `round`; `beside`: while something else computes, which should keep the
    /// device.
    pub fn send_tokens<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        (round, beside): (usize, bool),
        x_TH: View<'_, B, B::Act>,
    ) -> Result<(), PassError> {
        let Some(journey) = &mut self.journey else { return Ok(()) };
        Ok(journey.send_tokens(device, group, scratch, (round, beside), x_TH)?)
    }

    /// Plans how the tokens that come in `round` are grouped by local expert. `tokens` are those of [`Shuffle::plan`].
    pub fn receive_tokens(&mut self, device: &B, round: usize, tokens: RoutedTokens<'_, B>) -> Result<(), DeviceError> {
        if let Some(journey) = &mut self.journey {
            journey.wait(device);
        }
        if self.computes(round) { self.expand(device, round, tokens.kept) } else { Ok(()) }
    }

    fn expand(&mut self, device: &B, round: usize, kept: View<'_, B, i32>) -> Result<(), DeviceError> {
        let (k, local, t) = (self.dims.top_k, self.dims.local_experts(), self.dims.tokens);
        let (received, expanded) = self.coming(round);
        let room = self.journey.as_ref().map_or(Room { rows: t, expanded: self.most_expanded(t) }, Journey::room);
        self.slots.reserve(device, room.rows * k)?;
        self.source.reserve(device, room.expanded)?;
        self.origin.reserve(device, room.expanded)?;
        let experts = match &self.journey {
            None => {
                device.fill(self.recv_counts.view_mut(1), t as i32);
                kept
            }
            Some(journey) => {
                let counts: Vec<_> = journey.coming_from(round).map(|rows| rows as i32).collect();
                device.upload(&counts, self.recv_counts.view_mut(counts.len()));
                journey.experts(received)
            }
        };
        let plan = ExpandPlan {
            rows: self.received.view_mut(1),
            offsets: self.offsets.view_mut(local + 1),
            slots: self.slots.view_mut(received * k),
            source: self.source.view_mut(expanded),
            origin: self.origin.view_mut(expanded),
        };
        device.expand_plan(self.dims, self.recv_counts.view(self.dims.ranks), experts, plan);
        Ok(())
    }

    /// The most choices of `t` tokens that are carried out.
    fn most_expanded(&self, t: usize) -> usize {
        (t * self.dims.top_k).min(self.most_choices)
    }

    /// Rows that come in a round, and what they expand to at most.
    fn coming(&self, round: usize) -> (usize, usize) {
        let t = self.dims.tokens;
        self.journey.as_ref().map_or((t, self.most_expanded(t)), |journey| journey.coming(round))
    }

    /// The expanded rows themselves, into `x_NH`: the tokens that the shuffle was planned for, or what arrived for them.
    pub fn expanded(&self, device: &B, round: usize, x_TH: View<'_, B, B::Act>, x_NH: ViewMut<'_, B, B::Act>) {
        let rows = self.journey.as_ref().map_or(x_TH, |journey| journey.arrived(self.coming(round).0));
        self.spread(device, round, rows, x_NH);
    }

    /// Copies each row to the experts it goes to.
    fn spread(&self, device: &B, round: usize, rows: View<'_, B, B::Act>, to_NH: ViewMut<'_, B, B::Act>) {
        let (grouped, (received, _), k) = (self.grouped(round).rows, self.coming(round), self.dims.top_k);
        let dims = CombineDims { slots: k, width: self.hidden_size };
        let (slots, source) = (self.slots.view(received * k), self.source.view(grouped.bound));
        device.expand_rows(Rows::exactly(received), grouped, dims, slots, source, rows, to_NH);
    }

    /// Weights and sums the experts' outputs `y_NH` of each token and sends them home; a lone rank has them in `out_TH` at once. `weights`
    /// `[T, k]` are those of the plan.
    pub fn send_results<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        round: usize,
        weights: View<'_, B, f32>,
        (y_NH, out_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        self.send_reduced(device, group, (scratch, round), Some(weights), (y_NH, out_TH))
    }

    /// Sums what has come home over ranks into `out_TH` (overwritten; a token that was sent nowhere gets 0).
    pub fn receive_results(&mut self, device: &B, scratch: &ShuffleScratch<B>, out_TH: ViewMut<'_, B, B::Act>) {
        let Some(journey) = &mut self.journey else { return };
        journey.wait(device);
        let (t, each) = (self.dims.tokens, self.dims.rows_per_token());
        let (token_rows, _) = journey.lists(self.dims);
        let dims = CombineDims { slots: each, width: self.hidden_size };
        let rows = stretch(&scratch.home, journey.home(), self.hidden_size);
        device.weighted_reduce(Rows::exactly(t), dims, token_rows, None, rows, out_TH);
    }

    /// Sends the gradient `dout_TH` of what [`Shuffle::receive_results`] gave to the experts' ranks, in `round`; `beside` as for
    /// [`Shuffle::send_tokens`]. `x_TH` are the tokens.
    pub fn send_gradients<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        (round, beside): (usize, bool),
        tensors: (View<'_, B, B::Act>, View<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        let Some(journey) = &mut self.journey else { return Ok(()) };
        Ok(journey.send_gradients(device, group, scratch, (round, beside), tensors)?)
    }

    /// The queue goes on once the gradients of `round` have come; rows that are not kept are grouped as in the forward pass.
    pub fn receive_gradients(
        &mut self,
        device: &B,
        round: usize,
        tokens: RoutedTokens<'_, B>,
    ) -> Result<(), DeviceError> {
        if let Some(journey) = &mut self.journey {
            journey.wait(device);
        }
        if self.computes(round) && !self.is_kept() { self.expand(device, round, tokens.kept) } else { Ok(()) }
    }

    /// `dy_NH` (overwritten): the gradient of what each expert's output is a weighted part of, without the weight.
    pub fn gradients(
        &self,
        device: &B,
        scratch: &ShuffleScratch<B>,
        round: usize,
        (dout_TH, dy_NH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) {
        let away = |journey: &Journey<B>| stretch(&scratch.away, journey.away(round), self.hidden_size);
        self.spread(device, round, self.journey.as_ref().map_or(dout_TH, away), dy_NH);
    }

    /// The combine weights as the experts' backward pass takes them: where each expanded row's weight is, and where its gradient goes.
    /// `weights` and `dweights` `[T, k]` are this rank's own; the gradient is complete after [`Shuffle::receive_input_gradients`].
    pub fn gated<'a>(
        &'a self,
        device: &B,
        scratch: &'a mut ShuffleScratch<B>,
        round: usize,
        weights: View<'a, B, f32>,
        dweights: ViewMut<'a, B, f32>,
    ) -> GatedRows<'a, B> {
        let mut dweights = match &self.journey {
            None => dweights,
            Some(journey) => stretch_mut(&mut scratch.row_dweights, journey.away(round), self.dims.top_k),
        };
        // A choice that was dropped has no row that would say so.
        device.fill(dweights.reborrow(), 0.0);
        let origin = self.origin.view(self.coming(round).1);
        GatedRows { origin, weights: self.weights_here(round, weights), dweights }
    }

    /// Sends the gradients of the weights and of the tokens home, the latter summed from `dx_NH`; a lone rank has them in `dx_TH` at once.
    pub fn send_input_gradients<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        round: usize,
        tensors: (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        if let Some(journey) = &mut self.journey {
            journey.send_dweights(device, group, scratch, round)?;
        }
        self.send_reduced(device, group, (scratch, round), None, tensors)
    }

    /// Sums expanded rows and sends the sums home: results, with this rank's own `weights`, or gradients.
    fn send_reduced<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        (scratch, round): (&mut ShuffleScratch<B>, usize),
        weights: Option<View<'_, B, f32>>,
        tensors: (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), PassError> {
        let what = if weights.is_some() { Homeward::Results } else { Homeward::Gradients };
        let (received, _) = self.coming(round);
        if let Some(journey) = &mut self.journey {
            let slots = self.slots.view(received * self.dims.top_k);
            if journey.push_sums(device, scratch, what, (slots, tensors.0))? {
                return Ok(());
            }
        }
        if self.computes(round) {
            let weights = weights.map(|own| self.weights_here(round, own));
            self.reduce(device, scratch, round, weights, tensors);
        }
        let Some(journey) = &mut self.journey else { return Ok(()) };
        Ok(journey.send_home(device, group, scratch, round, what)?)
    }

    /// Sums what has come home: `dx_TH` over ranks (overwritten), and `dweights` `[T, k]`, 0 where a choice was dropped.
    pub fn receive_input_gradients(
        &mut self,
        device: &B,
        scratch: &ShuffleScratch<B>,
        dweights: ViewMut<'_, B, f32>,
        dx_TH: ViewMut<'_, B, B::Act>,
    ) {
        self.receive_results(device, scratch, dx_TH);
        let Some(journey) = &self.journey else { return };
        let ((_, sent), k) = (journey.home(), self.dims.top_k);
        let (_, choices) = journey.lists(self.dims);
        let rows = stretch(&scratch.home_dweights, journey.home(), k);
        device.scatter_choices(Rows::exactly(sent), k, choices, rows, dweights);
    }

    /// Sums expanded rows where the experts are: into the rows that go home, or into `out_TH` of a lone rank.
    fn reduce(
        &self,
        device: &B,
        scratch: &mut ShuffleScratch<B>,
        round: usize,
        weights: Option<View<'_, B, f32>>,
        (y_NH, out_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) {
        let (h, k, (received, _)) = (self.hidden_size, self.dims.top_k, self.coming(round));
        let to = match &self.journey {
            None => out_TH,
            Some(journey) => stretch_mut(&mut scratch.away, journey.away(round), h),
        };
        let dims = CombineDims { slots: k, width: h };
        device.weighted_reduce(Rows::exactly(received), dims, self.slots.view(received * k), weights, y_NH, to);
    }

    /// The weights of the rows that are here, `[R', k]`.
    fn weights_here<'a>(&'a self, round: usize, own: View<'a, B, f32>) -> View<'a, B, f32> {
        self.journey.as_ref().map_or(own, |journey| journey.weights(self.coming(round).0))
    }

    /// The expanded rows of a round, grouped by local expert.
    pub fn grouped(&self, round: usize) -> GroupedRows<'_, B> {
        let (local, (_, expanded)) = (self.dims.local_experts(), self.coming(round));
        GroupedRows {
            rows: Rows { bound: expanded, count: Some(last(&self.offsets, local)) },
            offsets: self.offsets.view(local + 1),
            room: self.journey.as_ref().map_or(expanded, |journey| journey.room().expanded),
        }
    }
}

/// The number of expanded rows on the device: the last offset.
fn last<B: Backend>(offsets: &Slot<B, i32>, local_experts: usize) -> View<'_, B, i32> {
    offsets.view(local_experts + 1).slice(local_experts..local_experts + 1)
}

/// What a shuffle takes along.
pub struct RoutedTokens<'a, B: Backend> {
    /// Tokens.
    pub x_TH: View<'a, B, B::Act>,
    /// `[T, k]`: experts, −1: not sent.
    pub kept: View<'a, B, i32>,
    /// `[T, k]`: their weights.
    pub weights: View<'a, B, f32>,
}

impl<B: Backend> Clone for RoutedTokens<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for RoutedTokens<'_, B> {}
