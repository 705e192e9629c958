//! What a rank counts of its own run: bytes sent, rows exchanged, memory.
//!
//! Owns the difference between what steps cause and what evaluations and checkpoints do. The record itself is `plan`'s, which is
//! compared with it.

use std::collections::BTreeMap;

use super::ranked::Ranked;
use crate::collectives::Communicator;
use crate::data::Loader;
use crate::dispatch::ShuffledRows;
use crate::plan::{Sent, Usage};
use crate::system::memory_now;
use crate::training::Trainer;

type WorkerTrainer<B> = Trainer<B, <B as Ranked>::Group, Loader>;

/// Counters at one moment, which only grow.
#[derive(Clone, Default)]
struct Counters {
    rows: ShuffledRows,
    sent: BTreeMap<(String, &'static str), u64>,
}

impl Counters {
    fn read<B: Ranked>(trainer: &WorkerTrainer<B>) -> Self {
        let groups = trainer.groups();
        let mut sent = BTreeMap::new();
        for group in [&groups.world, &groups.expert, &groups.replica] {
            for (collective, bytes) in group.sent_bytes() {
                sent.insert((group.name().to_owned(), collective), bytes);
            }
        }
        Self { rows: trainer.model.shuffled_rows(), sent }
    }
}

/// Adds up what steps cause.
#[derive(Default)]
pub(super) struct Meter {
    start_bytes: u64,
    began: Counters,
    total: Counters,
    steps: u64,
}

impl Meter {
    /// A meter of a process whose resident memory before the model was built is `start_bytes`.
    pub(super) fn new(start_bytes: u64) -> Self {
        Self { start_bytes, ..Self::default() }
    }

    /// Counts from here.
    pub(super) fn begin<B: Ranked>(&mut self, trainer: &WorkerTrainer<B>) {
        self.began = Counters::read(trainer);
    }

    /// Counts up to here: one step.
    pub(super) fn end<B: Ranked>(&mut self, trainer: &WorkerTrainer<B>) {
        let now = Counters::read(trainer);
        self.total.rows.sent += now.rows.sent - self.began.rows.sent;
        self.total.rows.received += now.rows.received - self.began.rows.received;
        self.total.rows.again += now.rows.again - self.began.rows.again;
        for (key, bytes) in now.sent {
            let before = self.began.sent.get(&key).copied().unwrap_or(0);
            *self.total.sent.entry(key).or_default() += bytes - before;
        }
        self.steps += 1;
    }

    /// The record so far.
    pub(super) fn usage<B: Ranked>(&self, trainer: &WorkerTrainer<B>) -> Usage {
        let grid = trainer.model.setup().grid;
        let sent = |((group, collective), bytes): (&(String, &'static str), &u64)| Sent {
            group: group.clone(),
            collective: (*collective).to_owned(),
            bytes: *bytes,
        };
        Usage {
            rank: trainer.groups().world.rank(),
            world: grid.world(),
            ep: grid.ep(),
            steps: self.steps,
            start_bytes: self.start_bytes,
            peak_bytes: memory_now().map_or(0, |(_, most)| most),
            buffers: trainer.tally(),
            rows: self.total.rows,
            sent: self.total.sent.iter().map(sent).collect(),
        }
    }
}
