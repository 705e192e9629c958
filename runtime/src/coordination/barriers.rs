//! Named barriers: who has arrived with what, how long each is willing to wait.
//!
//! Pure, part of the rendezvous state machine. A rank whose deadline passes counts as not arrived, so that the others never pass
//! a barrier together with a rank that has given it up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::event::{Action, BarrierFailure, Refusal, Verdict};

/// All barriers of an epoch, by name.
#[derive(Debug, Clone, Default)]
pub(super) struct Barriers(BTreeMap<String, Barrier>);

/// One barrier: how often it has opened, what was brought then, and who waits for the next time.
#[derive(Debug, Clone, Default)]
struct Barrier {
    passed: u64,
    brought: Arc<[Vec<u8>]>,
    waiting: BTreeMap<u32, Waiting>,
}

/// Until when a rank waits, and what it brings.
#[derive(Debug, Clone)]
struct Waiting {
    deadline: Duration,
    payload: Vec<u8>,
}

/// How a rank enters a barrier.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// How often it has passed this barrier before, plus one.
    pub(super) generation: u64,
    /// When it gives up.
    pub(super) deadline: Duration,
    /// What it brings for all.
    pub(super) payload: Vec<u8>,
}

impl Barriers {
    /// A rank arrives. Opens the barrier when it is the last of `world_size`. Refuses a generation that is not next.
    pub(super) fn enter(
        &mut self,
        rank: u32,
        name: String,
        entry: Entry,
        world_size: usize,
    ) -> Result<Vec<Action>, Refusal> {
        let Entry { generation, deadline, payload } = entry;
        let expected = self.0.get(&name).map_or(1, |barrier| barrier.passed + 1);
        if generation == 0 || generation > expected {
            return Err(Refusal::BarrierOutOfOrder { name, rank, theirs: generation, expected });
        }
        if generation < expected {
            // It opened before; the answer was lost on the way. It cannot have opened again since: that takes this rank.
            let payloads = self.0.get(&name).map(|barrier| Arc::clone(&barrier.brought)).unwrap_or_default();
            return Ok(vec![Action::BarrierPassed { name, generation, rank, payloads }]);
        }
        let barrier = self.0.entry(name.clone()).or_default();
        barrier.waiting.insert(rank, Waiting { deadline, payload });
        if barrier.waiting.len() < world_size {
            return Ok(Vec::new());
        }
        barrier.passed = generation;
        let (ranks, brought): (Vec<_>, Vec<_>) =
            std::mem::take(&mut barrier.waiting).into_iter().map(|(rank, waiting)| (rank, waiting.payload)).unzip();
        barrier.brought = brought.into();
        let payloads = &barrier.brought;
        let passed =
            |rank| Action::BarrierPassed { name: name.clone(), generation, rank, payloads: Arc::clone(payloads) };
        Ok(ranks.into_iter().map(passed).collect())
    }

    /// Fails whoever has waited long enough, naming the ranks that had not arrived.
    pub(super) fn expire(&mut self, now: Duration, world_size: u32) -> Vec<Action> {
        let mut actions = Vec::new();
        for (name, barrier) in &mut self.0 {
            let missing: Vec<u32> = (0..world_size).filter(|rank| !barrier.waiting.contains_key(rank)).collect();
            let generation = barrier.passed + 1;
            let late = barrier.waiting.extract_if(.., |_, waiting| waiting.deadline <= now);
            actions.extend(late.map(|(rank, _)| Action::BarrierFailed {
                name: name.clone(),
                generation,
                rank,
                why: BarrierFailure::Deadline { missing: missing.clone() },
            }));
        }
        actions
    }

    /// Fails everyone who waits: the epoch is over.
    pub(super) fn give_up(&mut self, verdict: &Verdict) -> Vec<Action> {
        let mut actions = Vec::new();
        for (name, barrier) in std::mem::take(&mut self.0) {
            actions.extend(barrier.waiting.into_keys().map(|rank| Action::BarrierFailed {
                name: name.clone(),
                generation: barrier.passed + 1,
                rank,
                why: BarrierFailure::Aborted(verdict.clone()),
            }));
        }
        actions
    }
}
