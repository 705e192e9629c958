//! A chunk's rows stored straight into other ranks' memory.
//!
//! Owns where they land. Each `push_…` returns false where rows go by the communicator's exchange instead.

use moe_kernels::{Backend, Leaving, View};

use super::super::scratch::{Landings, ShuffleScratch, stretch};
use super::super::traffic::Traffic;
use super::{Homeward, Journey};
use crate::collectives::{Berth, CollectiveError, Communicator, Push};
use crate::pass_error::PassError;

/// Where rows that are stored straight into other ranks' memory land.
pub(super) struct Lands {
    /// `[W]`: among the rows that reach each rank in the chunk.
    away: Vec<usize>,
    /// `[W]`: among the rows that are home at each rank.
    home: Vec<usize>,
    /// Whether another chunk is computed while this one's results leave.
    results_beside: bool,
    /// Whether there is no other chunk, which would write to what results are summed from.
    alone: bool,
}

impl<B: Backend> Journey<B> {
    /// Has rows of `chunk`, of rank `me`, go straight into the other ranks' memory, if all come in one round. False: it can't be reached.
    pub(in super::super) fn land<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        traffic: &Traffic,
        (chunk, me): (usize, usize),
    ) -> Result<bool, PassError> {
        if self.landing.is_none() {
            let (ids, weights) = (Some(self.recv_experts.all()), Some(self.recv_weights.all()));
            self.landing = group.landing(device, &Berth { rows: self.arrived.all(), ids, weights })?;
        }
        if self.landing.is_some() && self.rounds() == 1 {
            let (away, home) = traffic.landings(chunk, me);
            self.course.lands =
                Some(Lands { away, home, results_beside: chunk + 1 < traffic.chunks, alone: traffic.chunks == 1 });
        }
        Ok(self.landing.is_some())
    }

    /// Has rows go by the communicator's exchange after all.
    pub(in super::super) fn use_exchange(&mut self) {
        self.course.lands = None;
    }

    /// Tokens with their experts and weights; `beside`: while something else computes.
    pub(super) fn push_tokens(
        &mut self,
        device: &B,
        x_TH: View<'_, B, B::Act>,
        beside: bool,
    ) -> Result<bool, CollectiveError> {
        let Some((lands, landing)) = self.course.lands.as_ref().zip(self.landing.as_ref()) else { return Ok(false) };
        let (sent, k) = (self.course.home.1, self.k);
        let push = Push {
            width: self.h,
            what: Leaving::Rows {
                index: Some(self.row_token.view(sent)),
                from: x_TH,
                k,
                ids: Some(self.row_experts.view(sent * k)),
                weights: Some(self.row_weights.view(sent * k)),
            },
            rows: &self.course.rounds[0].parts.home,
            at: &lands.away,
            beside,
        };
        self.course.under_way = Some(landing.push(device, &push)?);
        Ok(true)
    }

    /// Gradients of results; `beside`: while something else computes.
    pub(super) fn push_gradients(
        &mut self,
        device: &B,
        scratch: &ShuffleScratch<B>,
        dout_TH: View<'_, B, B::Act>,
        beside: bool,
    ) -> Result<bool, CollectiveError> {
        let Some((lands, Landings { away, .. })) = self.course.lands.as_ref().zip(scratch.landings()) else {
            return Ok(false);
        };
        let at: Vec<_> = lands.away.iter().map(|row| self.course.away_at + row).collect();
        let index = Some(self.row_token.view(self.course.home.1));
        let push = Push {
            width: self.h,
            what: Leaving::Rows { index, from: dout_TH, k: 0, ids: None, weights: None },
            rows: &self.course.rounds[0].parts.home,
            at: &at,
            beside,
        };
        self.course.under_way = Some(away.push(device, &push)?);
        Ok(true)
    }

    /// Rows home as they are summed: row i of those that are here is the sum of the rows of `y` in its `slots`, weighted where it is a
    /// result. Until they are home `y` must stay. False: they are to be summed first.
    pub(in super::super) fn push_sums(
        &mut self,
        device: &B,
        scratch: &ShuffleScratch<B>,
        what: Homeward,
        (slots, y): (View<'_, B, i32>, View<'_, B, B::Act>),
    ) -> Result<bool, CollectiveError> {
        let lands = self.course.lands.as_ref().filter(|lands| lands.alone);
        let Some((lands, Landings { home, .. })) = lands.zip(scratch.landings()) else { return Ok(false) };
        let gradients = what == Homeward::Gradients;
        let weights = (!gradients).then(|| self.weights(self.coming(0).0));
        let along = gradients.then(|| self.dweights(scratch));
        let push = Push {
            width: self.h,
            what: Leaving::Sums { k: self.k, slots, weights, y, along },
            rows: &self.course.rounds[0].parts.away,
            at: &lands.home,
            // Other gradients are computed meanwhile.
            beside: gradients,
        };
        self.course.under_way = Some(home.push(device, &push)?);
        Ok(true)
    }

    /// Rows home that have been summed.
    pub(super) fn push_home(
        &mut self,
        device: &B,
        scratch: &ShuffleScratch<B>,
        what: Homeward,
    ) -> Result<bool, CollectiveError> {
        let Some((lands, Landings { home, .. })) = self.course.lands.as_ref().zip(scratch.landings()) else {
            return Ok(false);
        };
        let gradients = what == Homeward::Gradients;
        let (from, weights) = (stretch(&scratch.away, self.away(0), self.h), || self.dweights(scratch));
        let push = Push {
            width: self.h,
            what: Leaving::Rows { index: None, from, k: self.k, ids: None, weights: gradients.then(weights) },
            rows: &self.course.rounds[0].parts.away,
            at: &lands.home,
            beside: gradients || lands.results_beside,
        };
        self.course.under_way = Some(home.push(device, &push)?);
        Ok(true)
    }

    /// The weights' gradients of the rows that came.
    fn dweights<'a>(&self, scratch: &'a ShuffleScratch<B>) -> View<'a, B, f32> {
        stretch(&scratch.row_dweights, self.away(0), self.k)
    }

    /// Has all ranks wait for each other behind gradients that have gone home in messages, if those of another layer may come straight into
    /// this one's memory: an exchange orders only ranks that have rows for each other.
    pub(super) fn meet(&mut self, device: &B, scratch: &ShuffleScratch<B>) -> Result<(), CollectiveError> {
        let Some(Landings { home, .. }) = scratch.landings() else { return Ok(()) };
        let ranks = self.course.rounds[0].parts.home.len();
        let push = Push {
            width: self.h,
            what: Leaving::Rows { index: None, from: self.arrived.view(0), k: 0, ids: None, weights: None },
            rows: &vec![0..0; ranks],
            at: &vec![0; ranks],
            beside: false,
        };
        self.course.under_way = Some(home.push(device, &push)?);
        Ok(())
    }
}
