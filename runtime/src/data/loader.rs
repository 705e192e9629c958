//! Which tokens a rank sees in which pass of which step.
//!
//! Owns the cut into training and held-out text, the windows, and the share of a rank. Everything is a pure function of the
//! settings and a number: a loader has no position, so that resuming needs nothing but the step, and the same samples come in the
//! same order whatever the layout.
//!
//! Letters: S tokens of a sequence, B sequences of the global batch, W ranks.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::order::{self, Permutation};
use super::{Corpus, DataError, Tokens};

/// Marks a position without a target.
const NO_TARGET: i32 = -1;

/// What a loader is made for.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderSpec {
    /// This rank.
    pub rank: usize,
    /// W.
    pub world: usize,
    /// Seeds the order of samples.
    pub seed: u64,
    /// B.
    pub global_batch: usize,
    /// Most sequences of a pass.
    pub micro_batch: usize,
    /// S.
    pub sequence_length: usize,
    /// Share of the text, at its end, that is held out.
    pub validation_fraction: f64,
    /// Global batches of an evaluation; 0: the whole held-out text.
    pub eval_batches: usize,
}

/// The sequences of one pass. Filled again and again without allocating.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// n; 0 where a rank has nothing left in a pass that others need.
    pub sequences: usize,
    /// S.
    pub sequence_length: usize,
    /// `[n, S]`: token ids.
    pub inputs: Vec<i32>,
    /// `[n, S]`: the token after each input; −1: none.
    pub targets: Vec<i32>,
    /// Number of the first sequence: in training since the start of the run, in evaluation of the held-out windows. The others
    /// follow it.
    pub first_sample: u64,
    /// The same, from the start of the step or of the evaluation: its token `t` is token `first_in_step · S + t` of the step.
    pub first_in_step: u64,
}

impl Batch {
    /// Tokens of the pass: n · S.
    pub fn tokens(&self) -> usize {
        self.inputs.len()
    }

    /// Positions that have a target.
    pub fn valid_targets(&self) -> usize {
        self.targets.iter().filter(|&&target| target != NO_TARGET).count()
    }
}

/// How far the data has been read; it follows from the step alone and is saved for people and for checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Steps done.
    pub step: u64,
    /// Samples they saw, over all ranks.
    pub samples_seen: u64,
    /// Times every training window had been seen, on average: the epoch of the next sample, from 0.
    pub epoch: u64,
}

/// Cuts a corpus into the passes of one rank.
#[derive(Clone, Debug)]
pub struct Loader {
    tokens: Tokens,
    spec: LoaderSpec,
    /// Tokens `0..train_tokens` are trained on, the rest is held out.
    train_tokens: usize,
    /// Training windows of an epoch.
    windows: u64,
    /// First tokens an epoch can start at.
    offsets: u64,
    eval_windows: usize,
}

impl Loader {
    /// A loader of `corpus`, whose tokens are shared and not copied.
    ///
    /// Windows are S + 1 tokens and overlap by one, so that every token but the first of an epoch is a target once. An epoch
    /// starts at a seeded offset below S where the text is long enough, so that epochs cut it differently; its windows come in a
    /// seeded order. Fails where the training text is shorter than one window, or the held-out text shorter than two tokens.
    pub fn new(corpus: &Corpus, spec: LoaderSpec) -> Result<Self, DataError> {
        debug_assert!(
            spec.rank < spec.world && spec.global_batch > 0 && spec.micro_batch > 0 && spec.sequence_length > 0
        );
        let length = corpus.tokens.len();
        let train_tokens = ((length as f64 * (1.0 - spec.validation_fraction)) as usize).min(length);
        let s = spec.sequence_length;
        let remedy = "give more text, or set a smaller train.sequence_length or data.validation_fraction";
        if train_tokens < s + 1 {
            let what = format!("a sequence of train.sequence_length = {s} with its last target");
            return Err(DataError::TooShort {
                part: "the training text",
                tokens: train_tokens,
                what,
                needed: s + 1,
                remedy,
            });
        }
        let held_out = length - train_tokens;
        if spec.validation_fraction > 0.0 && held_out < 2 {
            let what = format!("evaluation on data.validation_fraction = {}", spec.validation_fraction);
            let remedy = "give more text, a larger data.validation_fraction, or 0 to hold nothing out";
            return Err(DataError::TooShort { part: "the held-out text", tokens: held_out, what, needed: 2, remedy });
        }
        let windows = ((train_tokens - s) / s).max(1);
        let offsets = (train_tokens - windows * s).min(s) as u64;
        let all = held_out.saturating_sub(1).div_ceil(s);
        let eval_windows = match spec.eval_batches {
            0 => all,
            batches => all.min(batches.saturating_mul(spec.global_batch)),
        };
        Ok(Self { tokens: corpus.tokens.clone(), spec, train_tokens, windows: windows as u64, offsets, eval_windows })
    }

    /// Tokens that are trained on; the rest of the corpus is held out.
    pub fn train_tokens(&self) -> usize {
        self.train_tokens
    }

    /// Training windows of an epoch.
    pub fn windows_per_epoch(&self) -> u64 {
        self.windows
    }

    /// Held-out windows of an evaluation, over all ranks.
    pub fn eval_windows(&self) -> usize {
        self.eval_windows
    }

    /// Passes of a step: the same on every rank, so that all join the same collectives.
    pub fn passes(&self) -> usize {
        self.passes_of(self.spec.global_batch)
    }

    /// Passes of an evaluation, the same on every rank; 0: nothing is held out.
    pub fn eval_passes(&self) -> usize {
        self.passes_of(self.eval_windows)
    }

    /// Where the data stands after `step` steps.
    pub fn cursor(&self, step: u64) -> Cursor {
        let samples_seen = step * self.spec.global_batch as u64;
        Cursor { step, samples_seen, epoch: samples_seen / self.windows }
    }

    /// Fills `batch` with pass `pass`, from 0, of the step that follows `steps_done` steps (0: the first).
    pub fn train_pass(&self, steps_done: u64, pass: usize, batch: &mut Batch) {
        let share = self.pass_share(self.spec.global_batch, pass);
        let first = steps_done * self.spec.global_batch as u64 + share.start as u64;
        self.fill(batch, share, first, |number, inputs, targets| self.sample(number, inputs, targets));
    }

    /// Fills `batch` with pass `pass`, from 0, of an evaluation: the held-out text from its start, in windows whose targets do not
    /// overlap. The last one may lack targets.
    pub fn eval_pass(&self, pass: usize, batch: &mut Batch) {
        let share = self.pass_share(self.eval_windows, pass);
        let first = share.start as u64;
        self.fill(batch, share, first, |number, inputs, targets| self.eval_window(number, inputs, targets));
    }

    /// Training sample `number`, counted from the start of the run: S inputs and S targets.
    pub fn sample(&self, number: u64, inputs: &mut [i32], targets: &mut [i32]) {
        let (epoch, index) = (number / self.windows, number % self.windows);
        let offset = order::key([self.spec.seed, epoch, 0]) % self.offsets;
        let window = Permutation::new(self.windows, order::key([self.spec.seed, epoch, 1])).at(index);
        let start = offset as usize + window as usize * self.spec.sequence_length;
        self.tokens.copy_to(start..start + inputs.len(), inputs);
        self.tokens.copy_to(start + 1..start + 1 + targets.len(), targets);
    }

    fn eval_window(&self, number: u64, inputs: &mut [i32], targets: &mut [i32]) {
        let start = self.train_tokens + number as usize * self.spec.sequence_length;
        let valid = inputs.len().min(self.tokens.len() - 1 - start);
        let (known, rest) = inputs.split_at_mut(valid);
        self.tokens.copy_to(start..start + valid, known);
        rest.fill(0);
        let (known, rest) = targets.split_at_mut(valid);
        self.tokens.copy_to(start + 1..start + 1 + valid, known);
        rest.fill(NO_TARGET);
    }

    fn fill(&self, batch: &mut Batch, share: Range<usize>, first: u64, read: impl Fn(u64, &mut [i32], &mut [i32])) {
        let s = self.spec.sequence_length;
        (batch.sequences, batch.sequence_length) = (share.len(), s);
        (batch.first_sample, batch.first_in_step) = (first, share.start as u64);
        batch.inputs.resize(share.len() * s, 0);
        batch.targets.resize(share.len() * s, 0);
        let rows = batch.inputs.chunks_exact_mut(s).zip(batch.targets.chunks_exact_mut(s));
        for (number, (inputs, targets)) in (first..).zip(rows) {
            read(number, inputs, targets);
        }
    }

    fn passes_of(&self, sequences: usize) -> usize {
        sequences.div_ceil(self.spec.world).div_ceil(self.spec.micro_batch)
    }

    /// Which of `sequences` this rank has in `pass`; empty where it has none left.
    fn pass_share(&self, sequences: usize, pass: usize) -> Range<usize> {
        let share = share(sequences, self.spec.rank, self.spec.world);
        let start = share.start.saturating_add(pass.saturating_mul(self.spec.micro_batch)).min(share.end);
        start..start.saturating_add(self.spec.micro_batch).min(share.end)
    }
}

/// The contiguous part of `0..count` that is `rank`'s: parts differ by at most one, the longer ones come first.
fn share(count: usize, rank: usize, world: usize) -> Range<usize> {
    let (each, longer) = (count / world, count % world);
    let start = rank * each + rank.min(longer);
    start..start + each + usize::from(rank < longer)
}

#[cfg(test)]
#[path = "loader_tests.rs"]
mod tests;
