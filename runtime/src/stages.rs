//! Where a step's time goes.
//!
//! Owns the names of the stages and their sums on the host's clock. On a CPU, where operations run at once, that is the time the
//! stage took.

use std::time::{Duration, Instant};

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
        match self {
            Stage::Embedding => "embedding",
            Stage::Attention => "attention",
            Stage::Route => "route",
            Stage::Dispatch => "dispatch",
            Stage::Experts => "experts",
            Stage::Combine => "combine",
            Stage::Aggregate => "aggregate",
            Stage::Head => "head",
            Stage::Reduce => "reduce",
            Stage::Optimizer => "optimizer",
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

/// Sums of time by stage: each lap is the time since the last. Laps themselves are kept where they are asked for.
#[derive(Clone, Debug)]
pub struct StageClock {
    last: Instant,
    sums: [Duration; Stage::ALL.len()],
    spans: Option<Vec<Span>>,
}

impl Default for StageClock {
    fn default() -> Self {
        Self { last: Instant::now(), sums: Default::default(), spans: None }
    }
}

impl StageClock {
    /// Starts a lap that belongs to no stage yet.
    pub fn start(&mut self) {
        self.last = Instant::now();
    }

    /// Gives the time since the last lap to `stage`.
    pub fn lap(&mut self, stage: Stage) {
        let now = Instant::now();
        self.sums[stage as usize] += now - self.last;
        if let Some(spans) = &mut self.spans {
            spans.push(Span { stage, begin: self.last, end: now });
        }
        self.last = now;
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
    pub fn take(&mut self) -> impl Iterator<Item = (Stage, Duration)> + use<> {
        let sums = std::mem::take(&mut self.sums);
        Stage::ALL.into_iter().zip(sums)
    }
}
