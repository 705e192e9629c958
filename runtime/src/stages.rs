//! Where a step's time goes.
//!
//! Owns the names of the stages and their sums. Time is the queue's: a stage on a GPU takes as long as the GPU works on it, whenever the
//! host has issued it, so laps are only added up once a step is over and the host waits for nothing in between. Profilers see each lap
//! as a range of the stage's name.

use std::ffi::CStr;
use std::time::{Duration, Instant};

use moe_kernels::Device;

/// A part of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Token embedding and its gradient.
    Embedding,
    /// Norms, projections and attention of all blocks.
    Attention,
    /// Stage 1 of MoE layers: gate, choice, capacity.
    Route,
    /// Stage 2: plan, all-to-all, expansion.
    Dispatch,
    /// Stage 3: the experts.
    Experts,
    /// Stage 4: weighting, all-to-all home, sums.
    Combine,
    /// Stage 5: residual, shared experts; dense feed-forward blocks.
    Aggregate,
    /// Final norm, head and cross-entropy.
    Head,
    /// Sums of gradients over ranks, and their norm.
    Reduce,
    /// The optimizer.
    Optimizer,
}

impl Stage {
    /// All stages, in the order of a step.
    pub const ALL: [Stage; 10] = [
        Stage::Embedding,
        Stage::Attention,
        Stage::Route,
        Stage::Dispatch,
        Stage::Experts,
        Stage::Combine,
        Stage::Aggregate,
        Stage::Head,
        Stage::Reduce,
        Stage::Optimizer,
    ];

    /// The name in metrics and tables.
    pub fn name(self) -> &'static str {
        self.label().to_str().unwrap_or_default()
    }

    /// The name as profilers take it.
    fn label(self) -> &'static CStr {
        match self {
            Stage::Embedding => c"embedding",
            Stage::Attention => c"attention",
            Stage::Route => c"route",
            Stage::Dispatch => c"dispatch",
            Stage::Experts => c"experts",
            Stage::Combine => c"combine",
            Stage::Aggregate => c"aggregate",
            Stage::Head => c"head",
            Stage::Reduce => c"reduce",
            Stage::Optimizer => c"optimizer",
        }
    }
}

/// One lap: a stage at work once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The stage.
    pub stage: Stage,
    /// When it began.
    pub begin: Instant,
    /// When it ended.
    pub end: Instant,
}

/// Sums of time by stage: a lap lasts until the next stage is entered. Laps themselves are kept where they are asked for.
pub struct StageClock<B: Device> {
    device: Option<B>,
    /// The moments of this step, each with the stage that begins there; None: none does.
    moments: Vec<(Option<Stage>, B::Stamp)>,
    /// The host's time at the first of them.
    began: Instant,
    sums: [Duration; Stage::ALL.len()],
    spans: Option<Vec<Span>>,
}

/// A clock that stands still, for passes that nobody measures.
impl<B: Device> Default for StageClock<B> {
    fn default() -> Self {
        Self { device: None, moments: Vec::new(), began: Instant::now(), sums: Default::default(), spans: None }
    }
}

impl<B: Device> StageClock<B> {
    /// The clock of a queue.
    pub fn of(device: &B) -> Self {
        Self { device: Some(device.clone()), ..Self::default() }
    }

    /// What is issued from here on belongs to `stage`.
    pub fn enter(&mut self, stage: Stage) {
        self.note(Some(stage));
    }

    /// What is issued from here on belongs to no stage.
    pub fn leave(&mut self) {
        self.note(None);
    }

    fn note(&mut self, stage: Option<Stage>) {
        let Some(device) = &self.device else { return };
        let before = self.moments.last().and_then(|(stage, _)| *stage);
        if before == stage {
            return;
        }
        if before.is_some() {
            device.end_range();
        }
        if let Some(stage) = stage {
            device.begin_range(stage.label());
        }
        if self.moments.is_empty() {
            self.began = Instant::now();
        }
        self.moments.push((stage, device.stamp()));
    }

    /// Adds up the laps of a step, the last of which has been left, whose queue has been waited for.
    pub fn settle(&mut self) {
        let (Some(device), Some((_, first))) = (&self.device, self.moments.first()) else { return };
        for pair in self.moments.windows(2) {
            let [(stage, from), (_, to)] = pair else { continue };
            let Some(stage) = *stage else { continue };
            self.sums[stage as usize] += device.between(from, to);
            if let Some(spans) = &mut self.spans {
                let at = |moment| self.began + device.between(first, moment);
                spans.push(Span { stage, begin: at(from), end: at(to) });
            }
        }
        self.moments.clear();
    }

    /// Keeps laps from now on, until they are taken.
    pub fn keep_spans(&mut self) {
        self.spans.get_or_insert_default();
    }

    /// The laps since they were last taken; none where they are not kept.
    pub fn take_spans(&mut self) -> Vec<Span> {
        self.spans.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The sums since they were last taken.
    pub fn take(&mut self) -> impl Iterator<Item = (Stage, Duration)> + use<B> {
        let sums = std::mem::take(&mut self.sums);
        Stage::ALL.into_iter().zip(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_kernels::Cpu;

    #[test]
    fn a_lap_lasts_until_another_stage_is_entered_or_none() {
        let mut clock = StageClock::of(&Cpu);
        clock.keep_spans();
        clock.leave();
        for stage in [Stage::Route, Stage::Route, Stage::Experts] {
            clock.enter(stage);
        }
        clock.leave();
        clock.enter(Stage::Head);
        clock.leave();
        clock.settle();
        let spans = clock.take_spans();
        let stages: Vec<_> = spans.iter().map(|span| span.stage).collect();
        assert_eq!(stages, [Stage::Route, Stage::Experts, Stage::Head]);
        assert_eq!(spans[0].end, spans[1].begin);
        assert!(spans[1].end <= spans[2].begin && spans.iter().all(|span| span.begin <= span.end));
        let summed: Duration = clock.take().map(|(_, time)| time).sum();
        assert_eq!(summed, spans.iter().map(|span| span.end - span.begin).sum());
    }
}
