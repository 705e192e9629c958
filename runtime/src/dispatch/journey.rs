//! One chunk's rows between ranks: their lists, where they lie, and the exchanges that carry them.
//!
//! Owns the buffers of rows that leave and arrive. It never groups a row by expert.

mod direct;

use std::ops::Range;

use moe_kernels::{Backend, DeviceError, Element, Rows, ShuffleDims, ShufflePlan, View};

use super::scratch::{ShuffleScratch, stretch, stretch_mut};
use super::traffic::{Parts, Room, Traffic};
use super::{RoutedTokens, ShuffledRows};
use crate::collectives::{BERTH_PAGE, CollectiveError, Communicator, Landing};
use crate::memory::{Kind, Slot, Tally};
use direct::Lands;

/// The lists of a shuffle between ranks, the rows that came, and the rounds they come in.
pub(super) struct Journey<B: Backend> {
    /// The way into the other ranks' `arrived`, `recv_experts` and `recv_weights`; before these.
    landing: Option<Box<dyn Landing<B>>>,
    h: usize,
    k: usize,
    room: Room,
    row_token: Slot<B, i32>,
    row_experts: Slot<B, i32>,
    row_choice: Slot<B, i32>,
    row_weights: Slot<B, f32>,
    token_rows: Slot<B, i32>,
    sent: Slot<B, i32>,
    recv_experts: Slot<B, i32>,
    recv_weights: Slot<B, f32>,
    /// `[R', H]`: the tokens that arrived. The backward pass expands them again where all came in one round.
    arrived: Slot<B, B::Act>,
    course: Course<B>,
}

/// What goes home.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Homeward {
    /// The experts' outputs, weighted.
    Results,
    /// The tokens' gradients, and with them those of the weights.
    Gradients,
}

/// What the counts of a chunk say, and what is under way.
struct Course<B: Backend> {
    /// Rows that this rank sends, and where they begin in the scratch.
    home: (usize, usize),
    /// Where those that come begin.
    away_at: usize,
    /// Rounds in which this rank takes what comes.
    rounds_here: usize,
    /// Expanded rows of a round.
    expanded: usize,
    rounds: Vec<Round>,
    /// None: rows go by the communicator's exchange.
    lands: Option<Lands>,
    /// When what is under way has come.
    under_way: Option<B::Event>,
}

#[derive(Clone)]
struct Round {
    parts: Parts,
    /// Of these, what is sent again in the backward pass, since its rank has not kept it.
    again: Parts,
}

impl<B: Backend> Default for Course<B> {
    fn default() -> Self {
        Self { home: (0, 0), away_at: 0, rounds_here: 1, expanded: 0, rounds: Vec::new(), lands: None, under_way: None }
    }
}

impl<B: Backend> Journey<B> {
    /// For rows of `h` elements that go to at most `k` experts.
    pub(super) fn new(device: &B, (h, k): (usize, usize), room: Room) -> Result<Self, DeviceError> {
        let list = |what| Slot::new(device, what);
        Ok(Self {
            h,
            k,
            room,
            row_token: list("tokens of shuffled rows")?,
            row_experts: list("experts of shuffled rows")?,
            row_choice: list("choices of shuffled rows")?,
            row_weights: Slot::new(device, "weights of shuffled rows")?,
            token_rows: list("shuffled rows of tokens")?,
            sent: Slot::sized(device, "number of rows sent", 1)?,
            recv_experts: list("experts of arrived rows")?,
            recv_weights: Slot::new(device, "weights of arrived rows")?,
            arrived: Slot::new(device, "arrived rows")?,
            landing: None,
            course: Course::default(),
        })
    }

    pub(super) fn tally(&self, tally: &mut Tally) {
        tally.add(Kind::Activations, [self.arrived.bytes()]);
        let lists =
            [&self.row_token, &self.row_experts, &self.row_choice, &self.token_rows, &self.sent, &self.recv_experts];
        tally.add(Kind::Communication, lists.map(Slot::bytes));
        tally.add(Kind::Communication, [self.row_weights.bytes(), self.recv_weights.bytes()]);
    }

    /// Plans what leaves; the counts go to the scratch's for `chunk`.
    pub(super) fn plan(
        &mut self,
        device: &B,
        scratch: &mut ShuffleScratch<B>,
        (dims, chunk): (ShuffleDims, usize),
        tokens: RoutedTokens<'_, B>,
    ) -> Result<(), DeviceError> {
        let (k, bound) = (dims.top_k, dims.tokens * dims.rows_per_token());
        self.row_token.reserve(device, bound)?;
        self.row_experts.reserve(device, bound * k)?;
        self.row_choice.reserve(device, bound * k)?;
        self.row_weights.reserve(device, bound * k)?;
        self.token_rows.reserve(device, bound)?;
        let plan = ShufflePlan {
            send_counts: scratch.counts_of(chunk),
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

    /// Learns from `traffic` what leaves and comes in `chunk` for rank `me`, whose rows lie in the scratch from `at` on, home and away.
    /// Returns where they end, and what crosses between ranks.
    pub(super) fn settle(
        &mut self,
        device: &B,
        traffic: &Traffic,
        (chunk, me): (usize, usize),
        at: (usize, usize),
        (local_experts, direct): (usize, bool),
    ) -> Result<((usize, usize), ShuffledRows), DeviceError> {
        let (h, k, room) = (self.h, self.k, self.room);
        let most = k.min(local_experts);
        let coming = traffic.coming(chunk, me);
        let rounds_of = |rank| traffic.rounds_of(chunk, rank, room, most);
        let round = |round| {
            let parts = traffic.parts((chunk, round), me, room, most);
            let again = parts.only(|rank| rounds_of(rank) > 1, me);
            Round { parts, again }
        };
        let rounds: Vec<_> = (0..traffic.rounds(chunk, room, most)).map(round).collect();
        let received = rounds.iter().map(|round| round.parts.received()).max().unwrap_or(0);
        let rounds_here = rounds_of(me);
        let expanded = if rounds_here == 1 { coming.expanded } else { received * most };
        self.course = Course {
            home: (at.0, traffic.sent(me, chunk)),
            away_at: at.1,
            rounds_here,
            expanded,
            rounds,
            lands: None,
            under_way: None,
        };
        let rows = room.rows.max(received);
        // Others may have the way into these, which have had room for `room.rows`, the most that comes in a round, since then.
        if self.landing.is_none() {
            let page = if direct { BERTH_PAGE } else { 1 };
            self.arrived.reserve_pages(device, rows * h, page)?;
            self.recv_experts.reserve_pages(device, rows * k, page)?;
            self.recv_weights.reserve_pages(device, rows * k, page)?;
        }
        let stays = traffic.rows(me, chunk, me);
        let elsewhere = |home: &[Range<usize>]| -> usize {
            home.iter().enumerate().filter(|(to, _)| *to != me).map(|(_, rows)| rows.len()).sum()
        };
        let again = match self.rounds() {
            1 => 0,
            _ => self.course.rounds.iter().map(|round| elsewhere(&round.again.home)).sum(),
        };
        let crossed = ShuffledRows {
            sent: (self.course.home.1 - stays) as u64,
            received: (coming.rows - stays) as u64,
            again: again as u64,
        };
        Ok(((at.0 + self.course.home.1, at.1 + rows), crossed))
    }

    /// Rounds of this chunk, the same on all ranks.
    pub(super) fn rounds(&self) -> usize {
        self.course.rounds.len()
    }

    /// Those of them in which this rank has rows to compute on; at least the first.
    pub(super) fn rounds_here(&self) -> usize {
        self.course.rounds_here
    }

    /// The most rows that arrive and that they expand to at a time, as buffers are planned for.
    pub(super) fn room(&self) -> Room {
        let most = self.course.rounds.first().map_or(0, |first| first.parts.received());
        Room { rows: self.room.rows.max(most), expanded: self.room.expanded.max(self.course.expanded) }
    }

    /// Rows that come in a round, and what they expand to at most.
    pub(super) fn coming(&self, round: usize) -> (usize, usize) {
        let received = self.course.rounds.get(round).map_or(0, |round| round.parts.received());
        (received, if received == 0 { 0 } else { self.course.expanded })
    }

    /// Rows of a round by the rank they come from.
    pub(super) fn coming_from(&self, round: usize) -> impl Iterator<Item = usize> {
        self.course.rounds[round].parts.away.iter().map(ExactSizeIterator::len)
    }

    /// The experts of the rows of a round.
    pub(super) fn experts(&self, rows: usize) -> View<'_, B, i32> {
        self.recv_experts.view(rows * self.k)
    }

    /// Their weights.
    pub(super) fn weights(&self, rows: usize) -> View<'_, B, f32> {
        self.recv_weights.view(rows * self.k)
    }

    /// The rows themselves.
    pub(super) fn arrived(&self, rows: usize) -> View<'_, B, B::Act> {
        self.arrived.view(rows * self.h)
    }

    /// The stretch of the scratch's rows that are away in a round.
    pub(super) fn away(&self, round: usize) -> (usize, usize) {
        (self.course.away_at, self.coming(round).0)
    }

    /// The stretch of the scratch's rows that are home.
    pub(super) fn home(&self) -> (usize, usize) {
        self.course.home
    }

    /// The lists that say where rows lie at their tokens' rank: `token_rows`, `row_choice`.
    pub(super) fn lists(&self, dims: ShuffleDims) -> (View<'_, B, i32>, View<'_, B, i32>) {
        let (_, sent) = self.course.home;
        (self.token_rows.view(dims.tokens * dims.rows_per_token()), self.row_choice.view(sent * dims.top_k))
    }

    /// The queue goes on once what is under way has come.
    pub(super) fn wait(&mut self, device: &B) {
        if let Some(event) = self.course.under_way.take() {
            device.wait(&event);
        }
    }

    /// Copies the `rows` of `tokens_TH` to their places at home.
    fn gather(
        &self,
        device: &B,
        scratch: &mut ShuffleScratch<B>,
        rows: &[Range<usize>],
        tokens_TH: View<'_, B, B::Act>,
    ) {
        let (h, (at, sent)) = (self.h, self.course.home);
        for rows in rows.iter().filter(|rows| !rows.is_empty()) {
            let index = self.row_token.view(sent).slice(rows.clone());
            let to = stretch_mut(&mut scratch.home, (at + rows.start, rows.len()), h);
            device.gather_rows(Rows::exactly(rows.len()), h, index, tokens_TH, to);
        }
    }

    /// Sends the tokens of `round` with their experts and weights; `beside`: while something else computes.
    pub(super) fn send_tokens<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        (round, beside): (usize, bool),
        x_TH: View<'_, B, B::Act>,
    ) -> Result<(), CollectiveError> {
        if self.push_tokens(device, x_TH, beside)? {
            return Ok(());
        }
        let parts = self.course.rounds[round].parts.clone();
        self.carry_lists(device, group, &parts)?;
        if round == 0 {
            // A token's result comes back to the place that it was sent from.
            let all = 0..self.course.home.1;
            self.gather(device, scratch, &[all], x_TH);
        }
        self.carry_tokens(device, group, scratch, &parts)
    }

    /// The experts and weights of rows on their way. They leave before the rows are gathered, which they travel beside.
    fn carry_lists<C: Communicator<B>>(&mut self, device: &B, group: &C, parts: &Parts) -> Result<(), CollectiveError> {
        let (k, (_, sent), received) = (self.k, self.course.home, parts.received());
        let Parts { home, away } = parts;
        let experts = self.recv_experts.view_mut(received * k);
        group.all_to_all_v(device, k, (self.row_experts.view(sent * k), home), (experts, away))?;
        let weights = self.recv_weights.view_mut(received * k);
        group.all_to_all_v(device, k, (self.row_weights.view(sent * k), home), (weights, away))?;
        Ok(())
    }

    fn carry_tokens<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &ShuffleScratch<B>,
        parts: &Parts,
    ) -> Result<(), CollectiveError> {
        let (h, Parts { home, away }) = (self.h, parts);
        let arrived = self.arrived.view_mut(parts.received() * h);
        let rows = stretch(&scratch.home, self.course.home, h);
        self.course.under_way = Some(group.all_to_all_v(device, h, (rows, home), (arrived, away))?);
        Ok(())
    }

    /// Sends the gradients `dout_TH` of the combined outputs of `round` to where the experts are, and once more the tokens that
    /// were not kept there; `beside`: while something else computes.
    pub(super) fn send_gradients<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        (round, beside): (usize, bool),
        (x_TH, dout_TH): (View<'_, B, B::Act>, View<'_, B, B::Act>),
    ) -> Result<(), CollectiveError> {
        let (h, all) = (self.h, 0..self.course.home.1);
        if self.push_gradients(device, scratch, dout_TH, beside)? {
            return Ok(());
        }
        let Round { parts, again } = self.course.rounds[round].clone();
        if self.rounds() == 1 {
            self.gather(device, scratch, &[all], dout_TH);
        } else {
            self.carry_lists(device, group, &again)?;
            self.gather(device, scratch, &again.home, x_TH);
            self.carry_tokens(device, group, scratch, &again)?;
            self.wait(device);
            self.gather(device, scratch, &parts.home, dout_TH);
        }
        let rows = stretch(&scratch.home, self.course.home, h);
        let away = stretch_mut(&mut scratch.away, (self.course.away_at, parts.received()), h);
        self.course.under_way = Some(group.all_to_all_v(device, h, (rows, &parts.home), (away, &parts.away))?);
        Ok(())
    }

    /// Sends the rows away in `round` home: results, or gradients of tokens after [`Journey::send_dweights`].
    pub(super) fn send_home<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        round: usize,
        what: Homeward,
    ) -> Result<(), CollectiveError> {
        if self.push_home(device, scratch, what)? {
            return Ok(());
        }
        let ShuffleScratch { away, home, .. } = scratch;
        self.course.under_way = Some(self.carry_home(device, group, round, self.h, (away, home))?);
        if what == Homeward::Gradients && round + 1 == self.rounds() {
            self.meet(device, scratch)?;
        }
        Ok(())
    }

    /// Sends the weights' gradients of `round` home where they do not go with their rows; [`Journey::send_home`] comes after it.
    pub(super) fn send_dweights<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        scratch: &mut ShuffleScratch<B>,
        round: usize,
    ) -> Result<(), CollectiveError> {
        if self.course.lands.is_some() {
            return Ok(());
        }
        let ShuffleScratch { row_dweights, home_dweights, .. } = scratch;
        self.carry_home(device, group, round, self.k, (row_dweights, home_dweights)).map(drop)
    }

    /// Rows of `width` elements from where they are away in `round` to where they were sent from.
    fn carry_home<T: Element, C: Communicator<B>>(
        &self,
        device: &B,
        group: &C,
        round: usize,
        width: usize,
        (from, to): (&Slot<B, T>, &mut Slot<B, T>),
    ) -> Result<B::Event, CollectiveError> {
        let Parts { home, away } = &self.course.rounds[round].parts;
        let rows = stretch(from, self.away(round), width);
        group.all_to_all_v(device, width, (rows, away), (stretch_mut(to, self.course.home, width), home))
    }
}
