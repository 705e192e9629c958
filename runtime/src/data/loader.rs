//! Which tokens a rank sees in which pass of which step.
//!
//! Owns the cut into training and held-out text, the windows of each source, and the share of a rank. Everything is a pure
//! function of the settings and a number: a loader has no position, so that resuming needs nothing but the step, and the same
//! samples come in the same order whatever the layout.
//!
//! Letters: S tokens of a sequence, B sequences of the global batch, W ranks.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::batch::{Batch, Window};
use super::mixture::Mixture;
use super::order::{self, Permutation};
use super::stream::Stream;
use super::{Corpus, DataError};
use crate::topology::share;

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
    /// Share of each source, at its end, that is held out; unused where the corpus has held-out text of its own.
    pub validation_fraction: f64,
    /// Global batches of an evaluation; 0: the whole held-out text.
    pub eval_batches: usize,
    /// Whether documents that share a sequence are kept apart: no token sees another document's, none is predicted from one.
    pub document_mask: bool,
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
    spec: LoaderSpec,
    parts: Vec<Part>,
    mixture: Mixture,
    held_out: Vec<HeldOut>,
}

/// A source in training.
#[derive(Clone, Debug)]
struct Part {
    stream: Stream,
    tag: i32,
    /// Tokens `0..train_tokens` are trained on, the rest is held out.
    train_tokens: usize,
    /// Training windows of an epoch.
    windows: u64,
    /// First tokens an epoch can start at.
    offsets: u64,
}

/// Tokens that are evaluated on and never trained on.
#[derive(Clone, Debug)]
struct HeldOut {
    stream: Stream,
    tag: i32,
    /// Which tokens of the stream.
    tokens: Range<usize>,
    /// Windows of an evaluation.
    windows: usize,
}

impl Loader {
    /// A loader of `corpus`, whose tokens are shared and not copied.
    ///
    /// Windows are S + 1 tokens and overlap by one, so that every token but the first of an epoch is a target once. An epoch
    /// of a source starts at a seeded offset below S where the text is long enough, so that epochs cut it differently; its windows
    /// come in a seeded order. Where nothing else is held out, the end of each source is, from the start of a document where
    /// documents are known. Fails where a source's training text is shorter than one window, or all held-out text shorter than
    /// two tokens.
    pub fn new(corpus: &Corpus, spec: LoaderSpec) -> Result<Self, DataError> {
        debug_assert!(
            spec.rank < spec.world && spec.global_batch > 0 && spec.micro_batch > 0 && spec.sequence_length > 0
        );
        let fraction = if corpus.validation.is_some() { 0.0 } else { spec.validation_fraction };
        let named = |name: &str| if name.is_empty() { String::new() } else { format!(" of data.sources.{name}") };
        let parts = corpus
            .sources
            .iter()
            .map(|source| Part::new(source, &named(&source.name), fraction, spec.sequence_length))
            .collect::<Result<Vec<_>, _>>()?;
        let weight = |(source, part): (&super::Source, &Part)| source.weight.unwrap_or(part.train_tokens as f64);
        let weights: Vec<_> = corpus.sources.iter().zip(&parts).map(weight).collect();
        let held_out = match &corpus.validation {
            Some(stream) => vec![(stream.clone(), 0, 0..stream.len())],
            None => {
                let tail = |part: &Part| (part.stream.clone(), part.tag, part.train_tokens..part.stream.len());
                parts.iter().map(tail).collect()
            }
        };
        let tokens: usize = held_out.iter().map(|(_, _, tokens)| tokens.len()).sum();
        if tokens < 2 && (corpus.validation.is_some() || spec.validation_fraction > 0.0) {
            let what = match &corpus.validation {
                Some(_) => "evaluation on data.validation_paths".to_owned(),
                None => format!("evaluation on data.validation_fraction = {}", spec.validation_fraction),
            };
            let remedy = "give more text, a larger data.validation_fraction, or 0 to hold nothing out";
            return Err(DataError::TooShort { part: "the held-out text".into(), tokens, what, needed: 2, remedy });
        }
        let limit = match spec.eval_batches {
            0 => usize::MAX,
            batches => batches.saturating_mul(spec.global_batch),
        };
        let held_out = HeldOut::share(held_out, spec.sequence_length, limit);
        Ok(Self { mixture: Mixture::new(&weights), spec, parts, held_out })
    }

    /// Tokens that are trained on; the rest of the corpus is held out.
    pub fn train_tokens(&self) -> usize {
        self.parts.iter().map(|part| part.train_tokens).sum()
    }

    /// Training windows of an epoch, over all sources.
    pub fn windows_per_epoch(&self) -> u64 {
        self.parts.iter().map(|part| part.windows).sum()
    }

    /// Held-out windows of an evaluation, over all ranks.
    pub fn eval_windows(&self) -> usize {
        self.held_out.iter().map(|part| part.windows).sum()
    }

    /// Passes of a step: the same on every rank, so that all join the same collectives.
    pub fn passes(&self) -> usize {
        self.passes_of(self.spec.global_batch)
    }

    /// Passes of an evaluation, the same on every rank; 0: nothing is held out.
    pub fn eval_passes(&self) -> usize {
        self.passes_of(self.eval_windows())
    }

    /// Where the data stands after `step` steps.
    pub fn cursor(&self, step: u64) -> Cursor {
        let samples_seen = step * self.spec.global_batch as u64;
        Cursor { step, samples_seen, epoch: samples_seen / self.windows_per_epoch() }
    }

    /// Fills `batch` with pass `pass`, from 0, of the step that follows `steps_done` steps (0: the first).
    pub fn train_pass(&self, steps_done: u64, pass: usize, batch: &mut Batch) {
        let share = self.pass_share(self.spec.global_batch, pass);
        let first = steps_done * self.spec.global_batch as u64 + share.start as u64;
        self.fill(batch, share, first, |number| self.sample(number));
    }

    /// Fills `batch` with pass `pass`, from 0, of an evaluation: the held-out text from its start, in windows whose targets do not
    /// overlap. The last one may lack targets.
    pub fn eval_pass(&self, pass: usize, batch: &mut Batch) {
        let share = self.pass_share(self.eval_windows(), pass);
        let first = share.start as u64;
        self.fill(batch, share, first, |number| self.eval_window(number));
    }

    /// Training sample `number`, counted from the start of the run.
    fn sample(&self, number: u64) -> Window<'_> {
        let (source, number) = self.mixture.at(number);
        let part = &self.parts[source];
        let (epoch, index) = (number / part.windows, number % part.windows);
        // Two keys for each source.
        let key = |purpose: u64| order::key([self.spec.seed, epoch, 2 * source as u64 + purpose]);
        let window = Permutation::new(part.windows, key(1)).at(index);
        let start = (key(0) % part.offsets) as usize + window as usize * self.spec.sequence_length;
        Window { stream: &part.stream, tag: part.tag, start, inputs: self.spec.sequence_length }
    }

    fn eval_window(&self, number: u64) -> Window<'_> {
        let (mut number, s) = (number as usize, self.spec.sequence_length);
        for part in &self.held_out {
            if number < part.windows {
                let start = part.tokens.start + number * s;
                let inputs = s.min(part.tokens.end - 1 - start);
                return Window { stream: &part.stream, tag: part.tag, start, inputs };
            }
            number -= part.windows;
        }
        unreachable!("an evaluation has as many windows as its parts")
    }

    fn fill<'a>(&self, batch: &mut Batch, share: Range<usize>, first: u64, window: impl Fn(u64) -> Window<'a>) {
        (batch.first_sample, batch.first_in_step) = (first, share.start as u64);
        let windows = (0..share.len()).map(|row| window(first + row as u64));
        batch.fill(self.spec.sequence_length, self.spec.document_mask, windows);
    }

    fn passes_of(&self, sequences: usize) -> usize {
        sequences.div_ceil(self.spec.world).div_ceil(self.spec.micro_batch)
    }

    /// Which of `sequences` this rank has in `pass`; empty where it has none left.
    fn pass_share(&self, sequences: usize, pass: usize) -> Range<usize> {
        let share = share(sequences, self.spec.world, self.spec.rank);
        let start = share.start.saturating_add(pass.saturating_mul(self.spec.micro_batch)).min(share.end);
        start..start.saturating_add(self.spec.micro_batch).min(share.end)
    }
}

impl Part {
    /// The part of `source` that is trained on; `name` is how messages go on.
    fn new(source: &super::Source, name: &str, validation_fraction: f64, s: usize) -> Result<Self, DataError> {
        let stream = &source.stream;
        let train_tokens = train_tokens(stream, validation_fraction);
        if train_tokens < s + 1 {
            return Err(DataError::TooShort {
                part: format!("the training text{name}"),
                tokens: train_tokens,
                what: format!("a sequence of train.sequence_length = {s} with its last target"),
                needed: s + 1,
                remedy: "give more text, or set a smaller train.sequence_length or data.validation_fraction",
            });
        }
        let windows = ((train_tokens - s) / s).max(1);
        let offsets = (train_tokens - windows * s).min(s) as u64;
        Ok(Self { stream: stream.clone(), tag: source.tag, train_tokens, windows: windows as u64, offsets })
    }
}

impl HeldOut {
    /// The held-out text of the streams in windows of `s` tokens, whose targets do not overlap: at most `limit` of them, each
    /// stream's part in proportion to its length.
    fn share(streams: Vec<(Stream, i32, Range<usize>)>, s: usize, limit: usize) -> Vec<Self> {
        let windows = |tokens: &Range<usize>| tokens.len().saturating_sub(1).div_ceil(s);
        let mut left: usize = streams.iter().map(|(_, _, tokens)| windows(tokens)).sum();
        let mut limit = limit.min(left);
        let share = |(stream, tag, tokens): (Stream, i32, Range<usize>)| {
            let all = windows(&tokens);
            // Of what is left; a product of two lengths needs the room.
            let windows = (limit as u128 * all as u128).div_ceil(left.max(1) as u128) as usize;
            left -= all;
            limit -= windows;
            Self { stream, tag, tokens, windows }
        };
        streams.into_iter().map(share).collect()
    }
}

/// Tokens of `stream` that are trained on: all but the share at its end. The cut moves back to the start of the document it falls
/// into, unless that would give up half of the training text.
fn train_tokens(stream: &Stream, validation_fraction: f64) -> usize {
    let length = stream.len();
    let position = ((length as f64 * (1.0 - validation_fraction)) as usize).min(length);
    if position == length {
        return length;
    }
    let start = stream.document_start(position);
    if start >= position.div_ceil(2) { start } else { position }
}

#[cfg(test)]
#[path = "loader_tests.rs"]
mod tests;
