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
//! ranks the host reads the counts, since buffers must fit what comes, and each layer keeps the rows that arrived.

use moe_kernels::{Backend, CombineDims, DeviceError, ExpandPlan, Rows, ShuffleDims, ShufflePlan, View, ViewMut};

use serde::{Deserialize, Serialize};

use crate::collectives::{CollectiveError, Communicator};
use crate::experts::{GatedRows, GroupedRows};
use crate::memory::{Kind, Slot, Tally};

/// Why a shuffle stopped.
#[derive(Debug, thiserror::Error)]
pub enum ShuffleError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Another rank or the way to it failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// Rows under way, shared by all layers: each journey is over before the next begins. A lone rank has none.
pub struct ShuffleScratch<B: Backend> {
    /// Rows at their token's rank.
    home: Slot<B, B::Act>,
    /// Rows at their experts' rank, but for the tokens of the forward pass, which stay.
    away: Slot<B, B::Act>,
    row_dweights: Slot<B, f32>,
    home_dweights: Slot<B, f32>,
}

impl<B: Backend> ShuffleScratch<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(
            Kind::Communication,
            [self.home.bytes(), self.away.bytes(), self.row_dweights.bytes(), self.home_dweights.bytes()],
        );
    }

    /// Empty scratch.
    pub fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            home: Slot::new(device, "rows at their token's rank")?,
            away: Slot::new(device, "rows at their expert's rank")?,
            row_dweights: Slot::new(device, "weight gradients at their expert's rank")?,
            home_dweights: Slot::new(device, "weight gradients at their token's rank")?,
        })
    }
}

/// The handle of one shuffle: made by [`Shuffle::dispatch`], used by everything after it until the next dispatch.
pub struct Shuffle<B: Backend> {
    dims: ShuffleDims,
    hidden_size: usize,
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
    bounds: Bounds,
    crossed: ShuffledRows,
}

/// The lists of a shuffle between ranks, and the rows that came.
struct Journey<B: Backend> {
    send_counts: Slot<B, i32>,
    /// `[2, W]`: send and receive counts side by side, so that one read brings both.
    counts: Slot<B, i32>,
    row_token: Slot<B, i32>,
    row_experts: Slot<B, i32>,
    row_choice: Slot<B, i32>,
    row_weights: Slot<B, f32>,
    token_rows: Slot<B, i32>,
    sent: Slot<B, i32>,
    recv_experts: Slot<B, i32>,
    recv_weights: Slot<B, f32>,
    /// `[R', H]`: the tokens that arrived. The backward pass expands them again.
    arrived: Slot<B, B::Act>,
    host_counts: Vec<i32>,
}

impl<B: Backend> Journey<B> {
    fn new(device: &B, ranks: usize) -> Result<Self, DeviceError> {
        let slot = |what, len| sized(device, what, len);
        Ok(Self {
            send_counts: slot("shuffle send counts", ranks)?,
            counts: slot("shuffle counts", 2 * ranks)?,
            row_token: slot("tokens of shuffled rows", 0)?,
            row_experts: slot("experts of shuffled rows", 0)?,
            row_choice: slot("choices of shuffled rows", 0)?,
            row_weights: Slot::new(device, "weights of shuffled rows")?,
            token_rows: slot("shuffled rows of tokens", 0)?,
            sent: slot("number of rows sent", 1)?,
            recv_experts: slot("experts of arrived rows", 0)?,
            recv_weights: Slot::new(device, "weights of arrived rows")?,
            arrived: Slot::new(device, "arrived rows")?,
            host_counts: vec![0; 2 * ranks],
        })
    }

    fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.arrived.bytes()]);
        let lists = [
            &self.send_counts,
            &self.counts,
            &self.row_token,
            &self.row_experts,
            &self.row_choice,
            &self.token_rows,
            &self.sent,
            &self.recv_experts,
        ];
        tally.add(Kind::Communication, lists.map(Slot::bytes));
        tally.add(Kind::Communication, [self.row_weights.bytes(), self.recv_weights.bytes()]);
    }

    fn plan(&mut self, device: &B, dims: ShuffleDims, tokens: RoutedTokens<'_, B>) -> Result<(), DeviceError> {
        let (k, bound) = (dims.top_k, dims.tokens * dims.rows_per_token());
        self.row_token.reserve(device, bound)?;
        self.row_experts.reserve(device, bound * k)?;
        self.row_choice.reserve(device, bound * k)?;
        self.row_weights.reserve(device, bound * k)?;
        self.token_rows.reserve(device, bound)?;
        let plan = ShufflePlan {
            send_counts: self.send_counts.view_mut(dims.ranks),
            row_token: self.row_token.view_mut(bound),
            row_experts: self.row_experts.view_mut(bound * k),
            row_choice: self.row_choice.view_mut(bound * k),
            row_weights: self.row_weights.view_mut(bound * k),
            token_rows: self.token_rows.view_mut(bound),
            rows: self.sent.view_mut(1),
        };
        device.shuffle_plan(dims, tokens.kept, tokens.weights, plan);
        Ok(())
    }

    /// Reads the exchanged counts, which say how much memory the rows need.
    fn learn_counts<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        recv_counts: &Slot<B, i32>,
    ) -> Result<Learned, ShuffleError> {
        let ranks = self.host_counts.len() / 2;
        device.copy(self.send_counts.view(ranks), self.counts.view_mut(2 * ranks).slice(0..ranks));
        device.copy(recv_counts.view(ranks), self.counts.view_mut(2 * ranks).slice(ranks..2 * ranks));
        device.read_to_host(self.counts.view(2 * ranks), &mut self.host_counts)?;
        // Counts of an exchange that was given up are anything.
        group.check()?;
        let me = group.rank();
        let (send, recv) = self.host_counts.split_at(ranks);
        let total = |counts: &[i32]| counts.iter().map(|&n| n as usize).sum::<usize>();
        let elsewhere = |counts: &[i32]| (total(counts) - counts[me] as usize) as u64;
        Ok(Learned {
            sent: total(send),
            received: total(recv),
            crossed: ShuffledRows { sent: elsewhere(send), received: elsewhere(recv) },
        })
    }

    fn sent_rows(&self, bound: usize) -> Rows<'_, B> {
        Rows { bound, count: Some(self.sent.view(1)) }
    }
}

/// What the counts of a journey say.
struct Learned {
    sent: usize,
    received: usize,
    crossed: ShuffledRows,
}

fn sized<B: Backend>(device: &B, what: &'static str, len: usize) -> Result<Slot<B, i32>, DeviceError> {
    let mut slot = Slot::new(device, what)?;
    slot.reserve(device, len)?;
    Ok(slot)
}

/// Rows of forward passes that crossed from one rank to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShuffledRows {
    /// Left this rank.
    pub sent: u64,
    /// Came to it.
    pub received: u64,
}

impl std::ops::AddAssign for ShuffledRows {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
    }
}

/// What the host knows of the numbers of rows: enough to size buffers.
#[derive(Clone, Copy, Debug, Default)]
struct Bounds {
    sent: usize,
    received: usize,
    expanded: usize,
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

    /// An empty handle. `dims.tokens` is set by each dispatch.
    pub fn new(device: &B, dims: ShuffleDims, hidden_size: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            dims,
            hidden_size,
            journey: (dims.ranks > 1).then(|| Journey::new(device, dims.ranks)).transpose()?,
            recv_counts: sized(device, "shuffle receive counts", dims.ranks)?,
            received: sized(device, "number of rows received", 1)?,
            offsets: sized(device, "expert offsets", dims.local_experts() + 1)?,
            slots: sized(device, "expanded rows of arrived rows", 0)?,
            source: sized(device, "arrived rows of expanded rows", 0)?,
            origin: sized(device, "choices of expanded rows", 0)?,
            bounds: Bounds::default(),
            crossed: ShuffledRows::default(),
        })
    }

    /// Sends each token of `x_TH` to the ranks of its `kept` experts `[T, k]` and plans how what arrives is grouped by local expert.
    pub fn dispatch<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        tokens: RoutedTokens<'_, B>,
    ) -> Result<(), ShuffleError> {
        self.dims.tokens = tokens.kept.len() / self.dims.top_k;
        if self.journey.is_none() {
            let t = self.dims.tokens;
            self.bounds = Bounds { sent: t, received: t, expanded: t * self.dims.top_k };
            device.fill(self.recv_counts.view_mut(1), t as i32);
            return Ok(self.expand(device, tokens)?);
        }
        self.travel(device, group, scratch, tokens)?;
        self.expand(device, tokens)?;
        let mut expanded = [0];
        device.read_to_host(last(&self.offsets, self.dims.local_experts()), &mut expanded)?;
        group.check()?;
        self.bounds.expanded = expanded[0] as usize;
        Ok(())
    }

    /// Exchanges counts, lists and tokens with the other ranks.
    fn travel<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        tokens: RoutedTokens<'_, B>,
    ) -> Result<(), ShuffleError> {
        let Some(journey) = &mut self.journey else { return Ok(()) };
        let (h, k, w) = (self.hidden_size, self.dims.top_k, self.dims.ranks);
        journey.plan(device, self.dims, tokens)?;
        device.wait(&group.all_to_all(device, journey.send_counts.view(w), self.recv_counts.view_mut(w))?);
        let Learned { sent, received, crossed } = journey.learn_counts(device, group, &self.recv_counts)?;
        (self.bounds.sent, self.bounds.received) = (sent, received);
        self.crossed += crossed;
        scratch.home.reserve(device, sent * h)?;
        journey.arrived.reserve(device, received * h)?;
        journey.recv_experts.reserve(device, received * k)?;
        journey.recv_weights.reserve(device, received * k)?;
        let (out, home) = (journey.send_counts.view(w), self.recv_counts.view(w));
        let experts = journey.recv_experts.view_mut(received * k);
        device.wait(&group.all_to_all_v(device, k, journey.row_experts.view(sent * k), out, experts, home)?);
        let weights = journey.recv_weights.view_mut(received * k);
        device.wait(&group.all_to_all_v(device, k, journey.row_weights.view(sent * k), out, weights, home)?);
        let (rows, row_token) = (journey.sent_rows(sent), journey.row_token.view(sent));
        device.gather_rows(rows, h, row_token, tokens.x_TH, scratch.home.view_mut(sent * h));
        let arrived = journey.arrived.view_mut(received * h);
        device.wait(&group.all_to_all_v(device, h, scratch.home.view(sent * h), out, arrived, home)?);
        Ok(())
    }

    /// Rows exchanged with other ranks so far.
    pub fn shuffled_rows(&self) -> ShuffledRows {
        self.crossed
    }

    fn expand(&mut self, device: &B, tokens: RoutedTokens<'_, B>) -> Result<(), DeviceError> {
        let (k, local, received) = (self.dims.top_k, self.dims.local_experts(), self.bounds.received);
        let most = received * k.min(local);
        self.slots.reserve(device, received * k)?;
        self.source.reserve(device, most)?;
        self.origin.reserve(device, most)?;
        let plan = ExpandPlan {
            rows: self.received.view_mut(1),
            offsets: self.offsets.view_mut(local + 1),
            slots: self.slots.view_mut(received * k),
            source: self.source.view_mut(most),
            origin: self.origin.view_mut(most),
        };
        let experts = self.journey.as_ref().map_or(tokens.kept, |journey| journey.recv_experts.view(received * k));
        device.expand_plan(self.dims, self.recv_counts.view(self.dims.ranks), experts, plan);
        Ok(())
    }

    /// The expanded rows themselves, into `x_NH`: the tokens that [`Shuffle::dispatch`] was given, or what arrived for them.
    pub fn expanded(&self, device: &B, x_TH: View<'_, B, B::Act>, x_NH: ViewMut<'_, B, B::Act>) {
        let received = self.bounds.received * self.hidden_size;
        self.spread(device, self.journey.as_ref().map_or(x_TH, |journey| journey.arrived.view(received)), x_NH);
    }

    /// Copies each row to the experts it goes to.
    fn spread(&self, device: &B, rows: View<'_, B, B::Act>, to_NH: ViewMut<'_, B, B::Act>) {
        let (grouped, received, k) = (self.grouped().rows, self.bounds.received, self.dims.top_k);
        let arrived = Rows { bound: received, count: Some(self.received.view(1)) };
        let dims = CombineDims { slots: k, width: self.hidden_size };
        let (slots, source) = (self.slots.view(received * k), self.source.view(grouped.bound));
        device.expand_rows(arrived, grouped, dims, slots, source, rows, to_NH);
    }

    /// Weights and sums the experts' outputs `y_NH` of each token, brings them home and sums them over ranks into `out_TH`
    /// (overwritten; a token that was sent nowhere gets 0). `weights` `[T, k]` are those of the dispatch.
    pub fn combine<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        weights: View<'_, B, f32>,
        (y_NH, out_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), ShuffleError> {
        let weights = Some(self.weights_here(weights));
        self.bring_home(device, group, scratch, weights, (y_NH, out_TH))
    }

    /// Backward of [`Shuffle::combine`]: sends `dout_TH` out; `dy_NH` is overwritten by the gradient of what each expert's output is
    /// a weighted part of, without the weight.
    pub fn combine_backward<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        (dout_TH, dy_NH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), ShuffleError> {
        let Some(journey) = &self.journey else {
            self.spread(device, dout_TH, dy_NH);
            return Ok(());
        };
        let (h, Bounds { sent, received, .. }) = (self.hidden_size, self.bounds);
        scratch.away.reserve(device, received * h)?;
        let (rows, row_token) = (journey.sent_rows(sent), journey.row_token.view(sent));
        device.gather_rows(rows, h, row_token, dout_TH, scratch.home.view_mut(sent * h));
        let (out, home) = (journey.send_counts.view(self.dims.ranks), self.recv_counts.view(self.dims.ranks));
        let (send, recv) = (scratch.home.view(sent * h), scratch.away.view_mut(received * h));
        device.wait(&group.all_to_all_v(device, h, send, out, recv, home)?);
        self.spread(device, scratch.away.view(received * h), dy_NH);
        Ok(())
    }

    /// The combine weights as the experts' backward pass takes them: where each expanded row's weight is, and where its gradient goes.
    /// `weights` and `dweights` `[T, k]` are this rank's own; the gradient is complete after [`Shuffle::dweights_home`].
    pub fn gated<'a>(
        &'a self,
        device: &B,
        scratch: &'a mut ShuffleScratch<B>,
        weights: View<'a, B, f32>,
        dweights: ViewMut<'a, B, f32>,
    ) -> Result<GatedRows<'a, B>, DeviceError> {
        let mut dweights = match &self.journey {
            None => dweights,
            Some(_) => {
                let len = self.bounds.received * self.dims.top_k;
                scratch.row_dweights.reserve(device, len)?;
                scratch.row_dweights.view_mut(len)
            }
        };
        // A choice that was dropped has no row that would say so.
        device.fill(dweights.reborrow(), 0.0);
        let origin = self.origin.view(self.bounds.expanded);
        Ok(GatedRows { origin, weights: self.weights_here(weights), dweights })
    }

    /// Brings the gradient of the weights home: `dweights` `[T, k]`, 0 where a choice was dropped.
    pub fn dweights_home<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        dweights: ViewMut<'_, B, f32>,
    ) -> Result<(), ShuffleError> {
        let Some(journey) = &self.journey else { return Ok(()) };
        let (k, Bounds { sent, received, .. }) = (self.dims.top_k, self.bounds);
        scratch.home_dweights.reserve(device, sent * k)?;
        let (send, recv) = (scratch.row_dweights.view(received * k), scratch.home_dweights.view_mut(sent * k));
        let (out, home) = (journey.send_counts.view(self.dims.ranks), self.recv_counts.view(self.dims.ranks));
        device.wait(&group.all_to_all_v(device, k, send, home, recv, out)?);
        let (rows, choices) = (journey.sent_rows(sent), journey.row_choice.view(sent * k));
        device.scatter_choices(rows, k, choices, scratch.home_dweights.view(sent * k), dweights);
        Ok(())
    }

    /// Backward of [`Shuffle::dispatch`]: brings the expanded rows' gradient `dx_NH` home and sums it into `dx_TH` (overwritten).
    pub fn dispatch_backward<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        (dx_NH, dx_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), ShuffleError> {
        self.bring_home(device, group, scratch, None, (dx_NH, dx_TH))
    }

    /// Sums expanded rows where the experts are, sends the sums home and adds up those of several ranks.
    fn bring_home<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        weights: Option<View<'_, B, f32>>,
        (y_NH, out_TH): (View<'_, B, B::Act>, ViewMut<'_, B, B::Act>),
    ) -> Result<(), ShuffleError> {
        let (h, k, Bounds { sent, received, .. }) = (self.hidden_size, self.dims.top_k, self.bounds);
        let (slots, dims) = (self.slots.view(received * k), CombineDims { slots: k, width: h });
        let Some(journey) = &self.journey else {
            device.weighted_reduce(Rows::exactly(received), dims, slots, weights, y_NH, out_TH);
            return Ok(());
        };
        scratch.away.reserve(device, received * h)?;
        let rows = Rows { bound: received, count: Some(self.received.view(1)) };
        let away = scratch.away.view_mut(received * h);
        device.weighted_reduce(rows, dims, slots, weights, y_NH, away);
        let (out, home) = (journey.send_counts.view(self.dims.ranks), self.recv_counts.view(self.dims.ranks));
        let (send, recv) = (scratch.away.view(received * h), scratch.home.view_mut(sent * h));
        device.wait(&group.all_to_all_v(device, h, send, home, recv, out)?);
        let (t, each) = (self.dims.tokens, self.dims.rows_per_token());
        let (rows, dims) = (journey.token_rows.view(t * each), CombineDims { slots: each, width: h });
        device.weighted_reduce(Rows::exactly(t), dims, rows, None, scratch.home.view(sent * h), out_TH);
        Ok(())
    }

    /// The weights of the rows that are here, `[R', k]`.
    fn weights_here<'a>(&'a self, own: View<'a, B, f32>) -> View<'a, B, f32> {
        let len = self.bounds.received * self.dims.top_k;
        self.journey.as_ref().map_or(own, |journey| journey.recv_weights.view(len))
    }

    /// The expanded rows, grouped by local expert.
    pub fn grouped(&self) -> GroupedRows<'_, B> {
        let local = self.dims.local_experts();
        GroupedRows {
            rows: Rows { bound: self.bounds.expanded, count: Some(last(&self.offsets, local)) },
            offsets: self.offsets.view(local + 1),
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
