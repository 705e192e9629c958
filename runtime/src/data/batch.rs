//! Sequences cut out of streams, as a model takes them in.
//!
//! Owns the form of a batch: inputs, targets, padding, and where documents start. Which windows it holds is the loader's.
//!
//! Letters: S tokens of a sequence, n sequences of a pass.

use super::stream::{NO_TARGET, Stream};

/// The sequences of one pass. Filled again and again without allocating.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// n; 0 where a rank has nothing left in a pass that others need.
    pub sequences: usize,
    /// S.
    pub sequence_length: usize,
    /// `[n, S]`: token ids.
    pub inputs: Vec<i32>,
    /// `[n, S]`: the token after each input; −1: none, or one that is given and not learned.
    pub targets: Vec<i32>,
    /// `[n, S]`: where in its sequence each input's document begins; None: documents are not kept apart.
    pub starts: Option<Vec<i32>>,
    /// `[n]`: the tag of each sequence's source.
    pub tags: Vec<i32>,
    /// Number of the first sequence: in training since the start of the run, in evaluation of the held-out windows. The others
    /// follow it.
    pub first_sample: u64,
    /// The same, from the start of the step or of the evaluation: its token `t` is token `first_in_step · S + t` of the step.
    pub first_in_step: u64,
}

impl Batch {
    /// Becomes the sequences of `windows`, each padded to `sequence_length`, with their documents kept apart if asked for.
    pub(crate) fn fill<'a>(
        &mut self,
        sequence_length: usize,
        keep_apart: bool,
        windows: impl ExactSizeIterator<Item = Window<'a>>,
    ) {
        let (s, len) = (sequence_length, windows.len() * sequence_length);
        (self.sequences, self.sequence_length) = (windows.len(), s);
        self.inputs.resize(len, 0);
        self.targets.resize(len, 0);
        self.starts = keep_apart.then(|| self.starts.take().unwrap_or_default());
        if let Some(starts) = &mut self.starts {
            starts.resize(len, 0);
        }
        self.tags.clear();
        for (row, window) in windows.enumerate() {
            self.tags.push(window.tag);
            let row = row * s..(row + 1) * s;
            let targets = &mut self.targets[row.clone()];
            window.copy_to(&mut self.inputs[row.clone()], targets);
            if let Some(starts) = &mut self.starts {
                window.keep_apart(&mut starts[row], targets);
            }
        }
    }

    /// Tokens of the pass: n · S.
    pub fn tokens(&self) -> usize {
        self.inputs.len()
    }

    /// Positions that have a target.
    pub fn valid_targets(&self) -> usize {
        self.targets.iter().filter(|&&target| target != NO_TARGET).count()
    }
}

/// The tokens of one sequence and their targets, each the token after.
pub(crate) struct Window<'a> {
    /// Where they lie.
    pub(crate) stream: &'a Stream,
    /// Their source's tag.
    pub(crate) tag: i32,
    /// The first input's position in the stream.
    pub(crate) start: usize,
    /// Inputs that there are; the rest of the sequence is padding.
    pub(crate) inputs: usize,
}

impl Window<'_> {
    pub(super) fn copy_to(&self, inputs: &mut [i32], targets: &mut [i32]) {
        let (known, rest) = inputs.split_at_mut(self.inputs);
        self.stream.copy_to(self.start, known);
        rest.fill(0);
        let (known, rest) = targets.split_at_mut(self.inputs);
        self.stream.copy_targets_to(self.start + 1, known);
        rest.fill(NO_TARGET);
    }

    /// Says where the documents of the inputs start, and takes away the targets that begin one: what stands before is another's.
    fn keep_apart(&self, starts: &mut [i32], targets: &mut [i32]) {
        let (known, rest) = starts.split_at_mut(self.inputs);
        self.stream.copy_starts_to(self.start, known);
        rest.fill(known.last().copied().unwrap_or(0));
        self.stream.mask_first_tokens(self.start + 1, &mut targets[..self.inputs]);
    }
}
