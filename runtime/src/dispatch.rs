//! Stages 2 and 4 of an MoE layer: tokens travel to the ranks that hold their experts, and their results come home.
//!
//! Owns the handle that dispatch returns and combine takes: the plan of one shuffle and the rows it brought. A shuffled row is a
//! (token, destination rank) pair: a token travels once to each rank that holds any of its experts, and comes home as one row
//! already weighted and summed over them. It never decides where a token goes and never computes an expert.
//!
//! The backward passes are the same two journeys: the output's gradient travels out like a token, the input's gradient and the
//! weights' come home like a result.

use moe_kernels::{
    Accumulate, Backend, CombineDims, DeviceError, ExpandPlan, Rows, ShuffleDims, ShufflePlan, View, ViewMut,
};

use serde::{Deserialize, Serialize};

use crate::collectives::{CollectiveError, Communicator};
use crate::experts::GroupedRows;
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

/// Rows under way, shared by all layers: each journey is over before the next begins.
pub struct ShuffleScratch<B: Backend> {
    outbound: Slot<B, B::Act>,
    arrived: Slot<B, B::Act>,
    row_dweights: Slot<B, f32>,
    home_dweights: Slot<B, f32>,
}

impl<B: Backend> ShuffleScratch<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(
            Kind::Communication,
            [self.outbound.bytes(), self.arrived.bytes(), self.row_dweights.bytes(), self.home_dweights.bytes()],
        );
    }

    /// Empty scratch.
    pub fn new(device: &B) -> Result<Self, DeviceError> {
        Ok(Self {
            outbound: Slot::new(device, "rows at their token's rank")?,
            arrived: Slot::new(device, "rows at their expert's rank")?,
            row_dweights: Slot::new(device, "weight gradients at their expert's rank")?,
            home_dweights: Slot::new(device, "weight gradients at their token's rank")?,
        })
    }
}

/// The handle of one shuffle: made by [`Shuffle::dispatch`], used by everything after it until the next dispatch.
pub struct Shuffle<B: Backend> {
    dims: ShuffleDims,
    hidden_size: usize,
    send_counts: Slot<B, i32>,
    recv_counts: Slot<B, i32>,
    row_token: Slot<B, i32>,
    row_experts: Slot<B, i32>,
    row_choice: Slot<B, i32>,
    row_weights: Slot<B, f32>,
    token_rows: Slot<B, i32>,
    sent: Slot<B, i32>,
    recv_experts: Slot<B, i32>,
    recv_weights: Slot<B, f32>,
    received: Slot<B, i32>,
    offsets: Slot<B, i32>,
    slots: Slot<B, i32>,
    source: Slot<B, i32>,
    x: Slot<B, B::Act>,
    bounds: Bounds,
    crossed: ShuffledRows,
    host_counts: Vec<i32>,
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
        tally.add(Kind::Activations, [self.x.bytes()]);
        tally.add(
            Kind::Communication,
            [
                self.send_counts.bytes(),
                self.recv_counts.bytes(),
                self.row_token.bytes(),
                self.row_experts.bytes(),
                self.row_choice.bytes(),
                self.row_weights.bytes(),
                self.token_rows.bytes(),
                self.sent.bytes(),
                self.recv_experts.bytes(),
                self.recv_weights.bytes(),
                self.received.bytes(),
                self.offsets.bytes(),
                self.slots.bytes(),
                self.source.bytes(),
            ],
        );
    }

    /// An empty handle. `dims.tokens` is set by each dispatch.
    pub fn new(device: &B, dims: ShuffleDims, hidden_size: usize) -> Result<Self, DeviceError> {
        let ints = |what, len| {
            let mut slot = Slot::new(device, what)?;
            slot.reserve(device, len)?;
            Ok::<_, DeviceError>(slot)
        };
        Ok(Self {
            dims,
            hidden_size,
            send_counts: ints("shuffle send counts", dims.ranks)?,
            recv_counts: ints("shuffle receive counts", dims.ranks)?,
            row_token: ints("tokens of shuffled rows", 0)?,
            row_experts: ints("experts of shuffled rows", 0)?,
            row_choice: ints("choices of shuffled rows", 0)?,
            row_weights: Slot::new(device, "weights of shuffled rows")?,
            token_rows: ints("shuffled rows of tokens", 0)?,
            sent: ints("number of rows sent", 1)?,
            recv_experts: ints("experts of arrived rows", 0)?,
            recv_weights: Slot::new(device, "weights of arrived rows")?,
            received: ints("number of rows received", 1)?,
            offsets: ints("expert offsets", dims.local_experts() + 1)?,
            slots: ints("expanded rows of arrived rows", 0)?,
            source: ints("arrived rows of expanded rows", 0)?,
            x: Slot::new(device, "expanded rows")?,
            bounds: Bounds::default(),
            crossed: ShuffledRows::default(),
            host_counts: vec![0; dims.ranks],
        })
    }

    /// Sends each token of `x_TH` to the ranks of its `kept` experts `[T, k]` and groups what arrives by local expert.
    pub fn dispatch<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        tokens: RoutedTokens<'_, B>,
    ) -> Result<(), ShuffleError> {
        let RoutedTokens { x_TH, kept, weights } = tokens;
        let (h, k, w) = (self.hidden_size, self.dims.top_k, self.dims.ranks);
        self.plan(device, kept, weights)?;
        let (send, recv) = (self.send_counts.view(w), self.recv_counts.view_mut(w));
        device.wait(&group.all_to_all(device, send, recv)?);
        self.learn_counts(device, group.rank())?;
        let Bounds { sent, received, .. } = self.bounds;
        scratch.outbound.reserve(device, sent * h)?;
        scratch.arrived.reserve(device, received * h)?;
        self.recv_experts.reserve(device, received * k)?;
        self.recv_weights.reserve(device, received * k)?;
        device.gather_rows(self.sent_rows(), h, self.row_token.view(sent), x_TH, scratch.outbound.view_mut(sent * h));
        let counts = (self.send_counts.view(w), self.recv_counts.view(w));
        let (experts, weights) = (self.row_experts.view(sent * k), self.row_weights.view(sent * k));
        device.wait(&group.all_to_all_v(
            device,
            k,
            experts,
            counts.0,
            self.recv_experts.view_mut(received * k),
            counts.1,
        )?);
        device.wait(&group.all_to_all_v(
            device,
            k,
            weights,
            counts.0,
            self.recv_weights.view_mut(received * k),
            counts.1,
        )?);
        self.journey_out(device, group, scratch)?;
        Ok(self.expand(device, scratch)?)
    }

    fn plan(&mut self, device: &B, kept: View<'_, B, i32>, weights: View<'_, B, f32>) -> Result<(), DeviceError> {
        let k = self.dims.top_k;
        self.dims.tokens = kept.len() / k;
        let each = self.dims.rows_per_token();
        let bound = self.dims.tokens * each;
        self.row_token.reserve(device, bound)?;
        self.row_experts.reserve(device, bound * k)?;
        self.row_choice.reserve(device, bound * k)?;
        self.row_weights.reserve(device, bound * k)?;
        self.token_rows.reserve(device, self.dims.tokens * each)?;
        let plan = ShufflePlan {
            send_counts: self.send_counts.view_mut(self.dims.ranks),
            row_token: self.row_token.view_mut(bound),
            row_experts: self.row_experts.view_mut(bound * k),
            row_choice: self.row_choice.view_mut(bound * k),
            row_weights: self.row_weights.view_mut(bound * k),
            token_rows: self.token_rows.view_mut(self.dims.tokens * each),
            rows: self.sent.view_mut(1),
        };
        device.shuffle_plan(self.dims, kept, weights, plan);
        Ok(())
    }

    /// Reads the exchanged counts: a dropless layer must know how much memory its rows need.
    fn learn_counts(&mut self, device: &B, me: usize) -> Result<(), DeviceError> {
        let mut total = |counts: &Slot<B, i32>| {
            device.read_to_host(counts.view(self.dims.ranks), &mut self.host_counts)?;
            let all: usize = self.host_counts.iter().map(|&n| n as usize).sum();
            Ok::<_, DeviceError>((all, (all - self.host_counts[me] as usize) as u64))
        };
        let (sent, received);
        (self.bounds.sent, sent) = total(&self.send_counts)?;
        (self.bounds.received, received) = total(&self.recv_counts)?;
        self.crossed += ShuffledRows { sent, received };
        Ok(())
    }

    /// Rows exchanged with other ranks so far.
    pub fn shuffled_rows(&self) -> ShuffledRows {
        self.crossed
    }

    fn expand(&mut self, device: &B, scratch: &ShuffleScratch<B>) -> Result<(), DeviceError> {
        let (h, k, local) = (self.hidden_size, self.dims.top_k, self.dims.local_experts());
        let received = self.bounds.received;
        let most = received * k.min(local);
        self.slots.reserve(device, received * k)?;
        self.source.reserve(device, most)?;
        let plan = ExpandPlan {
            rows: self.received.view_mut(1),
            offsets: self.offsets.view_mut(local + 1),
            slots: self.slots.view_mut(received * k),
            source: self.source.view_mut(most),
        };
        let (counts, experts) = (self.recv_counts.view(self.dims.ranks), self.recv_experts.view(received * k));
        device.expand_plan(self.dims, counts, experts, plan);
        let count = last(&self.offsets, local);
        let mut expanded = [0];
        device.read_to_host(count, &mut expanded)?;
        let n = expanded[0] as usize;
        self.bounds.expanded = n;
        self.x.reserve(device, n * h)?;
        let (source, arrived) = (self.source.view(n), scratch.arrived.view(received * h));
        device.gather_rows(Rows { bound: n, count: Some(count) }, h, source, arrived, self.x.view_mut(n * h));
        Ok(())
    }

    /// Weights and sums the experts' outputs `y_NH` of each token, brings them home and sums them over ranks into `out_TH`
    /// (overwritten; a token that was sent nowhere gets 0).
    pub fn combine<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        y_NH: View<'_, B, B::Act>,
        out_TH: ViewMut<'_, B, B::Act>,
    ) -> Result<(), ShuffleError> {
        let (h, k, received) = (self.hidden_size, self.dims.top_k, self.bounds.received);
        let arrived = scratch.arrived.view_mut(received * h);
        let (slots, weights) = (self.slots.view(received * k), Some(self.recv_weights.view(received * k)));
        let dims = CombineDims { slots: k, width: h };
        device.weighted_reduce(self.received_rows(), dims, slots, weights, y_NH, arrived, Accumulate::Overwrite);
        self.journey_home(device, group, scratch)?;
        self.sum_over_ranks(device, scratch, out_TH, Accumulate::Overwrite);
        Ok(())
    }

    /// Backward of [`Shuffle::combine`]: sends `dout_TH` out; `dy_NH` and the gate weights' gradient `dweights` `[T, k]` are
    /// overwritten (0 where a choice was dropped).
    pub fn combine_backward<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        tensors: CombineBackward<'_, B>,
    ) -> Result<(), ShuffleError> {
        let CombineBackward { dout_TH, y_NH, dy_NH, dweights } = tensors;
        let (h, k) = (self.hidden_size, self.dims.top_k);
        let Bounds { sent, received, .. } = self.bounds;
        let row_token = self.row_token.view(sent);
        device.gather_rows(self.sent_rows(), h, row_token, dout_TH, scratch.outbound.view_mut(sent * h));
        self.journey_out(device, group, scratch)?;
        scratch.row_dweights.reserve(device, received * k)?;
        scratch.home_dweights.reserve(device, sent * k)?;
        device.weighted_reduce_grad(
            self.received_rows(),
            CombineDims { slots: k, width: h },
            self.slots.view(received * k),
            self.recv_weights.view(received * k),
            y_NH,
            scratch.arrived.view(received * h),
            dy_NH,
            scratch.row_dweights.view_mut(received * k),
        );
        let (send, recv) = (scratch.row_dweights.view(received * k), scratch.home_dweights.view_mut(sent * k));
        let (out, home) = (self.send_counts.view(self.dims.ranks), self.recv_counts.view(self.dims.ranks));
        device.wait(&group.all_to_all_v(device, k, send, home, recv, out)?);
        let choices = self.row_choice.view(sent * k);
        device.scatter_choices(self.sent_rows(), k, choices, scratch.home_dweights.view(sent * k), dweights);
        Ok(())
    }

    /// Backward of [`Shuffle::dispatch`]: brings the expanded rows' gradient `dx_NH` home and adds it to `dx_TH`.
    pub fn dispatch_backward<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        dx_NH: View<'_, B, B::Act>,
        dx_TH: ViewMut<'_, B, B::Act>,
    ) -> Result<(), ShuffleError> {
        let (h, k, received) = (self.hidden_size, self.dims.top_k, self.bounds.received);
        let (slots, arrived) = (self.slots.view(received * k), scratch.arrived.view_mut(received * h));
        let dims = CombineDims { slots: k, width: h };
        device.weighted_reduce(self.received_rows(), dims, slots, None, dx_NH, arrived, Accumulate::Overwrite);
        self.journey_home(device, group, scratch)?;
        self.sum_over_ranks(device, scratch, dx_TH, Accumulate::Add);
        Ok(())
    }

    /// Rows go from their token's rank to their experts': `outbound` here becomes `arrived` there.
    fn journey_out<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
    ) -> Result<(), CollectiveError> {
        let h = self.hidden_size;
        let (out, home) = (self.send_counts.view(self.dims.ranks), self.recv_counts.view(self.dims.ranks));
        let ShuffleScratch { outbound, arrived, .. } = scratch;
        let (send, recv) = (outbound.view(self.bounds.sent * h), arrived.view_mut(self.bounds.received * h));
        device.wait(&group.all_to_all_v(device, h, send, out, recv, home)?);
        Ok(())
    }

    /// Rows come back: `arrived` there becomes `outbound` here.
    fn journey_home<C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
    ) -> Result<(), CollectiveError> {
        let h = self.hidden_size;
        let (out, home) = (self.send_counts.view(self.dims.ranks), self.recv_counts.view(self.dims.ranks));
        let ShuffleScratch { outbound, arrived, .. } = scratch;
        let (send, recv) = (arrived.view(self.bounds.received * h), outbound.view_mut(self.bounds.sent * h));
        device.wait(&group.all_to_all_v(device, h, send, home, recv, out)?);
        Ok(())
    }

    fn sum_over_ranks(
        &self,
        device: &B,
        scratch: &ShuffleScratch<B>,
        out_TH: ViewMut<'_, B, B::Act>,
        accumulate: Accumulate,
    ) {
        let (h, t, each) = (self.hidden_size, self.dims.tokens, self.dims.rows_per_token());
        let (rows, home) = (self.token_rows.view(t * each), scratch.outbound.view(self.bounds.sent * h));
        let dims = CombineDims { slots: each, width: h };
        device.weighted_reduce(Rows::exactly(t), dims, rows, None, home, out_TH, accumulate);
    }

    fn sent_rows(&self) -> Rows<'_, B> {
        Rows { bound: self.bounds.sent, count: Some(self.sent.view(1)) }
    }

    fn received_rows(&self) -> Rows<'_, B> {
        Rows { bound: self.bounds.received, count: Some(self.received.view(1)) }
    }

    /// The expanded rows, grouped by local expert.
    pub fn grouped(&self) -> GroupedRows<'_, B> {
        let local = self.dims.local_experts();
        GroupedRows {
            rows: Rows { bound: self.bounds.expanded, count: Some(last(&self.offsets, local)) },
            offsets: self.offsets.view(local + 1),
        }
    }

    /// The expanded rows themselves, `[N, H]`.
    pub fn expanded(&self) -> View<'_, B, B::Act> {
        self.x.view(self.bounds.expanded * self.hidden_size)
    }
}

/// The number of expanded rows on the device: the last offset.
fn last<B: Backend>(offsets: &Slot<B, i32>, local_experts: usize) -> View<'_, B, i32> {
    offsets.view(local_experts + 1).slice(local_experts..local_experts + 1)
}

/// Tensors of [`Shuffle::combine_backward`].
pub struct CombineBackward<'a, B: Backend> {
    /// Gradient of the combined output.
    pub dout_TH: View<'a, B, B::Act>,
    /// The experts' outputs.
    pub y_NH: View<'a, B, B::Act>,
    /// Their gradient, overwritten.
    pub dy_NH: ViewMut<'a, B, B::Act>,
    /// `[T, k]`, overwritten.
    pub dweights: ViewMut<'a, B, f32>,
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
