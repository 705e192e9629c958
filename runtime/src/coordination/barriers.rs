//! Named barriers: who has arrived, how long each is willing to wait.
//!
//! Pure, part of the rendezvous state machine. A rank whose deadline passes counts as not arrived, so that the others never pass
//! a barrier together with a rank that has given it up.

use std::collections::BTreeMap;
use std::time::Duration;

use super::event::{Action, BarrierFailure, Refusal, Verdict};

/// All barriers of an epoch, by name.
#[derive(Debug, Clone, Default)]
pub(super) struct Barriers(BTreeMap<String, Barrier>);

/// One barrier: how often it has opened, and who waits for the next time until when.
#[derive(Debug, Clone, Default)]
struct Barrier {
    passed: u64,
    waiting: BTreeMap<u32, Duration>,
}

/// How a rank enters a barrier.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// How often it has passed this barrier before, plus one.
    pub(super) generation: u64,
    /// When it gives up.
    pub(super) deadline: Duration,
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
        let Entry { generation, deadline } = entry;
        let expected = self.0.get(&name).map_or(1, |barrier| barrier.passed + 1);
        if generation == 0 || generation > expected {
            return Err(Refusal::BarrierOutOfOrder { name, rank, theirs: generation, expected });
        }
        if generation < expected {
            // It opened before; the answer was lost on the way.
            return Ok(vec![Action::BarrierPassed { name, generation, rank }]);
        }
        let barrier = self.0.entry(name.clone()).or_default();
        barrier.waiting.insert(rank, deadline);
        if barrier.waiting.len() < world_size {
            return Ok(Vec::new());
        }
        barrier.passed = generation;
        let ranks = std::mem::take(&mut barrier.waiting).into_keys();
        Ok(ranks.map(|rank| Action::BarrierPassed { name: name.clone(), generation, rank }).collect())
    }

    /// Fails whoever has waited long enough, naming the ranks that had not arrived.
    pub(super) fn expire(&mut self, now: Duration, world_size: u32) -> Vec<Action> {
        let mut actions = Vec::new();
        for (name, barrier) in &mut self.0 {
            let missing: Vec<u32> = (0..world_size).filter(|rank| !barrier.waiting.contains_key(rank)).collect();
            let generation = barrier.passed + 1;
            let late = barrier.waiting.extract_if(.., |_, deadline| *deadline <= now);
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
