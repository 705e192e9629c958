//! What all layers' shuffles share: rows under way, and the counts of the layer that is about to send.

use moe_kernels::{Backend, DeviceError, Element, View, ViewMut};

use super::Shuffle;
use super::traffic::Traffic;
use crate::collectives::{BERTH_PAGE, Berth, Communicator, Landing};
use crate::memory::{Kind, Slot, Tally};
use crate::pass_error::PassError;

/// Rows under way, shared by all layers: a layer's journeys are over before the next one's begin. Each chunk of a layer has a stretch of
/// its own. A lone rank has none.
pub struct ShuffleScratch<B: Backend> {
    /// Before the buffers that it lets others into.
    landings: Option<Landings<B>>,
    /// Rows at their token's rank.
    pub(super) home: Slot<B, B::Act>,
    /// Rows at their experts' rank, but for the tokens of the forward pass, which stay.
    pub(super) away: Slot<B, B::Act>,
    pub(super) row_dweights: Slot<B, f32>,
    pub(super) home_dweights: Slot<B, f32>,
    /// `[chunks, 2, W]`: what this rank sends.
    counts: Slot<B, i32>,
    /// `[W, chunks, 2, W]`: what all send.
    all_counts: Slot<B, i32>,
    traffic: Traffic,
    /// Whether rows may be stored straight into other ranks' memory.
    direct: bool,
}

/// The ways into the scratch of the other ranks.
pub(super) struct Landings<B: Backend> {
    pub(super) home: Box<dyn Landing<B>>,
    pub(super) away: Box<dyn Landing<B>>,
    /// Rows that there is room for at home and away, on every rank.
    room: (usize, usize),
}

impl<B: Backend> ShuffleScratch<B> {
    /// Counts its buffers.
    pub fn tally(&self, tally: &mut Tally) {
        tally.add(
            Kind::Communication,
            [self.home.bytes(), self.away.bytes(), self.row_dweights.bytes(), self.home_dweights.bytes()],
        );
        tally.add(Kind::Communication, [self.counts.bytes(), self.all_counts.bytes()]);
    }

    /// Empty scratch. `direct`: rows are stored straight into other ranks' memory where that can be.
    pub fn new(device: &B, direct: bool) -> Result<Self, DeviceError> {
        Ok(Self {
            home: Slot::new(device, "rows at their token's rank")?,
            away: Slot::new(device, "rows at their expert's rank")?,
            row_dweights: Slot::new(device, "weight gradients at their expert's rank")?,
            home_dweights: Slot::new(device, "weight gradients at their token's rank")?,
            counts: Slot::new(device, "shuffle counts")?,
            all_counts: Slot::new(device, "shuffle counts of all ranks")?,
            traffic: Traffic::default(),
            direct,
            landings: None,
        })
    }

    /// Makes the counts of `chunks` chunks among `ranks` ranks ready to be written.
    pub(super) fn begin(&mut self, device: &B, ranks: usize, chunks: usize) -> Result<(), DeviceError> {
        if (self.traffic.ranks, self.traffic.chunks) != (ranks, chunks) {
            self.traffic = Traffic::sized(ranks, chunks);
        }
        self.counts.reserve(device, Traffic::own_len(ranks, chunks))?;
        self.all_counts.reserve(device, Traffic::len(ranks, chunks))
    }

    /// Where the plan of a chunk leaves its counts.
    pub(super) fn counts_of(&mut self, chunk: usize) -> ViewMut<'_, B, i32> {
        let Traffic { ranks, chunks, .. } = self.traffic;
        self.counts.view_mut(Traffic::own_len(ranks, chunks)).slice(Traffic::own(ranks, chunk))
    }

    /// Tells all ranks of the group how many rows the chunks of a layer bring them, in one exchange, and finds room for them. It is the one
    /// time that a layer's shuffle waits for the device: buffers must hold what comes, and NCCL wants numbers from the host.
    /// `shuffles` have been planned, in the order of their chunks.
    ///
    /// # Errors
    /// The device's or the collective's.
    pub fn settle<'a, C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        shuffles: impl Iterator<Item = &'a mut Shuffle<B>>,
    ) -> Result<(), PassError> {
        let Traffic { ranks, chunks, .. } = self.traffic;
        if ranks < 2 {
            return Ok(());
        }
        let (own, all) = (Traffic::own_len(ranks, chunks), Traffic::len(ranks, chunks));
        device.wait(&group.all_gather(device, self.counts.view(own), self.all_counts.view_mut(all))?);
        device.read_to_host(self.all_counts.view(all), &mut self.traffic.counts)?;
        // Counts of an exchange that was given up are anything.
        group.check()?;
        self.direct &= group.may_land();
        let (mut home, mut away, mut top_k, mut hidden) = (0, 0, 0, 0);
        let mut shuffles: Vec<_> = shuffles.collect();
        for (chunk, shuffle) in shuffles.iter_mut().enumerate() {
            let place = (chunk, group.rank());
            let needs = shuffle.settle(device, &self.traffic, place, (home, away), self.direct)?;
            (home, away) = needs;
            (top_k, hidden) = (shuffle.dims.top_k, shuffle.hidden_size);
        }
        self.row_dweights.reserve(device, away * top_k)?;
        if self.direct {
            return self.land(device, group, (away, top_k, hidden), &mut shuffles);
        }
        self.home.reserve(device, home * hidden)?;
        self.away.reserve(device, away * hidden)?;
        self.home_dweights.reserve(device, home * top_k)?;
        Ok(())
    }

    /// Sees to it that all ranks reach each other's buffers and that these hold what comes, and has the chunks use them. All ranks have
    /// the same counts and the same room, so all of them come to the same end.
    fn land<C: Communicator<B>>(
        &mut self,
        device: &B,
        group: &C,
        (away, top_k, hidden): (usize, usize, usize),
        shuffles: &mut [&mut Shuffle<B>],
    ) -> Result<(), PassError> {
        // Nobody can offer nothing.
        let needed = (self.traffic.most_sent().max(1), away.max(1));
        let fits = |landings: &Landings<B>| needed.0 <= landings.room.0 && needed.1 <= landings.room.1;
        if !self.landings.as_ref().is_some_and(fits) {
            // Everybody's way in is gone before anybody's buffer moves.
            self.landings = None;
            group.barrier()?;
            self.home.reserve_pages(device, needed.0 * hidden, BERTH_PAGE)?;
            self.away.reserve_pages(device, needed.1 * hidden, BERTH_PAGE)?;
            self.home_dweights.reserve_pages(device, needed.0 * top_k, BERTH_PAGE)?;
            let home = Berth { rows: self.home.all(), ids: None, weights: Some(self.home_dweights.all()) };
            let home = group.landing(device, &home)?;
            let away = group.landing(device, &Berth { rows: self.away.all(), ids: None, weights: None })?;
            self.direct = home.is_some() && away.is_some();
            if !self.direct && group.rank() == 0 {
                tracing::info!("ranks do not reach each other's memory: rows go through NCCL");
            }
            // Alike on all ranks, whose buffers have grown by the same needs.
            let at_home = (self.home.all().len() / hidden).min(self.home_dweights.all().len() / top_k);
            let room = (at_home, self.away.all().len() / hidden);
            self.landings = home.zip(away).map(|(home, away)| Landings { home, away, room });
        }
        for (chunk, shuffle) in shuffles.iter_mut().enumerate() {
            self.direct &=
                self.landings.is_some() && shuffle.land(device, group, &self.traffic, (chunk, group.rank()))?;
        }
        if !self.direct {
            self.landings = None;
            shuffles.iter_mut().for_each(|shuffle| shuffle.use_exchange());
        }
        Ok(())
    }

    /// The ways into the other ranks' scratch.
    pub(super) fn landings(&self) -> Option<&Landings<B>> {
        self.landings.as_ref()
    }
}

/// Rows `at.0 .. at.0 + at.1` of `width`.
pub(super) fn stretch<B: Backend, T: Element>(slot: &Slot<B, T>, at: (usize, usize), width: usize) -> View<'_, B, T> {
    slot.view((at.0 + at.1) * width).slice(at.0 * width..(at.0 + at.1) * width)
}

/// As [`stretch`], writable.
pub(super) fn stretch_mut<B: Backend, T: Element>(
    slot: &mut Slot<B, T>,
    at: (usize, usize),
    width: usize,
) -> ViewMut<'_, B, T> {
    slot.view_mut((at.0 + at.1) * width).slice(at.0 * width..(at.0 + at.1) * width)
}
