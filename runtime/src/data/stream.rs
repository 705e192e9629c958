//! Tokens in a row, wherever they lie: in memory or in mapped files.
//!
//! Owns the lookup of positions, documents and prompts. It never reads a whole file: what is mapped is fetched where it is used.
//! A mapped file must not be changed or cut off while a run uses it; the system ends a program that reads beyond its end.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::DataError;

/// Marks a position without a target.
pub(super) const NO_TARGET: i32 = -1;

/// A file in the address space.
#[derive(Clone, Debug)]
pub(super) struct MappedFile {
    map: Arc<Mmap>,
    path: Arc<Path>,
}

impl MappedFile {
    /// Maps the file at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(DataError::unreadable(path))?;
        // SAFETY: the map is read-only and its bytes are only ever copied out as integers, of which every bit pattern is valid.
        // That nobody changes the file meanwhile is the user's part, as the module says.
        let map = unsafe { Mmap::map(&file) }.map_err(DataError::unreadable(path))?;
        Ok(Self { map: Arc::new(map), path: path.into() })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl PartialEq for MappedFile {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

/// How a token lies in a file, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    I64,
}

impl Width {
    /// Bytes of a token.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    /// Whether every token of this width is one of a vocabulary of `vocab_size`.
    fn fits(self, vocab_size: usize) -> bool {
        match self {
            Self::U8 => vocab_size > 0xff,
            Self::U16 => vocab_size > 0xffff,
            _ => false,
        }
    }

    fn each(self, bytes: &[u8], mut take: impl FnMut(usize, i64)) {
        macro_rules! read {
            ($int:ty) => {
                for (index, token) in bytes.as_chunks::<{ size_of::<$int>() }>().0.iter().enumerate() {
                    take(index, i64::from(<$int>::from_le_bytes(*token)));
                }
            };
        }
        match self {
            Self::U8 => read!(u8),
            Self::I8 => read!(i8),
            Self::U16 => read!(u16),
            Self::I16 => read!(i16),
            Self::U32 => read!(u32),
            Self::I32 => read!(i32),
            Self::I64 => read!(i64),
        }
    }
}

/// Tokens in a mapped file.
#[derive(Clone, Debug, PartialEq)]
pub struct MappedTokens {
    pub(super) file: MappedFile,
    /// Where they begin.
    pub(super) offset: usize,
    /// How many.
    pub(super) count: usize,
    pub(super) width: Width,
}

impl MappedTokens {
    fn slice(&self, range: Range<usize>) -> &[u8] {
        let at = |token: usize| self.offset + token * self.width.bytes();
        &self.file.bytes()[at(range.start)..at(range.end)]
    }

    /// Reads all tokens, in parallel, and refuses the first that a vocabulary of `vocab_size` does not have.
    pub(super) fn check(&self, vocab_size: usize) -> Result<(), DataError> {
        if self.width.fits(vocab_size) {
            return Ok(());
        }
        let find = |range: Range<usize>| {
            let (start, mut beyond) = (range.start, None);
            self.width.each(self.slice(range), |index, id| {
                if beyond.is_none() && !usize::try_from(id).is_ok_and(|id| id < vocab_size) {
                    beyond = Some((start + index, id));
                }
            });
            beyond
        };
        // Threads of its own: those of computing are started later, once it is known how many there may be.
        let part = self.count.div_ceil(std::thread::available_parallelism().map_or(1, usize::from)).max(1);
        let beyond = std::thread::scope(|scope| {
            let parts = (0..self.count).step_by(part).map(|start| start..self.count.min(start + part));
            let threads: Vec<_> = parts.map(|range| scope.spawn(move || find(range))).collect();
            threads.into_iter().find_map(|thread| thread.join().ok().flatten())
        });
        beyond.map_or(Ok(()), |(position, id)| {
            Err(DataError::BeyondVocabulary { path: self.file.path().into(), position, id, vocab_size })
        })
    }
}

/// Token ids; cloning shares them.
#[derive(Clone, Debug, PartialEq)]
pub enum Tokens {
    /// Ids below 256, in memory.
    U8(Arc<[u8]>),
    /// Any ids, in memory.
    U32(Arc<[u32]>),
    /// Ids in a file.
    Mapped(MappedTokens),
}

impl Tokens {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(ids) => ids.len(),
            Self::U32(ids) => ids.len(),
            Self::Mapped(tokens) => tokens.count,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the ids of `range` to `into`, of the same length.
    pub fn copy_to(&self, range: Range<usize>, into: &mut [i32]) {
        match self {
            Self::U8(ids) => into.iter_mut().zip(&ids[range]).for_each(|(to, &id)| *to = i32::from(id)),
            Self::U32(ids) => into.iter_mut().zip(&ids[range]).for_each(|(to, &id)| *to = id as i32),
            Self::Mapped(tokens) => tokens.width.each(tokens.slice(range), |index, id| into[index] = id as i32),
        }
    }
}

/// A row of numbers, in memory or at a place in a file, little-endian.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Row<const BYTES: usize> {
    Memory(Arc<[u64]>),
    Mapped { file: MappedFile, offset: usize, count: usize },
}

impl<const BYTES: usize> Default for Row<BYTES> {
    fn default() -> Self {
        Self::Memory(Arc::default())
    }
}

impl<const BYTES: usize> Row<BYTES> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Memory(numbers) => numbers.len(),
            Self::Mapped { count, .. } => *count,
        }
    }

    pub(super) fn at(&self, index: usize) -> u64 {
        match self {
            Self::Memory(numbers) => numbers[index],
            Self::Mapped { file, offset, .. } => {
                let bytes = &file.bytes()[offset + index * BYTES..][..BYTES];
                bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
            }
        }
    }

    /// The first index whose number is above `limit`; the numbers ascend.
    fn first_above(&self, limit: u64) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.at(middle) > limit { high = middle } else { low = middle + 1 }
        }
        low
    }
}

/// Where documents end, and how much of each is a prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Documents {
    /// The position after the last token of each document, ascending.
    pub(super) ends: Row<8>,
    /// Tokens at each document's start that are given and not learned; empty: none anywhere.
    pub(super) prompts: Row<4>,
}

impl Documents {
    /// How many.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none: nothing is known of documents then.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The document with token `position`, below the last document's end.
    fn holding(&self, position: usize) -> usize {
        self.ends.first_above(position as u64)
    }

    fn start(&self, document: usize) -> usize {
        document.checked_sub(1).map_or(0, |before| self.ends.at(before) as usize)
    }

    /// Sets the targets that are prompts to [`NO_TARGET`]; `targets` begin at token `first`.
    fn mask(&self, first: usize, targets: &mut [i32]) {
        if self.prompts.len() == 0 {
            return;
        }
        let end = first + targets.len();
        let mut document = self.holding(first);
        let mut start = self.start(document);
        while start < end && document < self.len() {
            let prompt = start..start + self.prompts.at(document) as usize;
            let masked = prompt.start.max(first)..prompt.end.min(end);
            if !masked.is_empty() {
                targets[masked.start - first..masked.end - first].fill(NO_TARGET);
            }
            start = self.ends.at(document) as usize;
            document += 1;
        }
    }
}

/// Tokens that lie together.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// The tokens.
    pub tokens: Tokens,
    /// Their documents, by positions in this segment.
    pub documents: Documents,
}

/// Segments one after the other; cloning shares them.
#[derive(Clone, Debug, PartialEq)]
pub struct Stream {
    segments: Arc<[Segment]>,
    /// The position after each segment.
    ends: Arc<[usize]>,
}

impl Stream {
    /// The stream of `segments`, of which empty ones do not count.
    pub fn new(segments: impl IntoIterator<Item = Segment>) -> Self {
        let segments: Arc<[_]> = segments.into_iter().filter(|segment| !segment.tokens.is_empty()).collect();
        let mut end = 0;
        let ends = segments.iter().map(|segment| {
            end += segment.tokens.len();
            end
        });
        Self { ends: ends.collect(), segments }
    }

    /// Its segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// How many tokens.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Documents that are known of.
    pub fn documents(&self) -> usize {
        self.segments.iter().map(|segment| segment.documents.len()).sum()
    }

    /// Copies the tokens from `start` on to `into`.
    pub fn copy_to(&self, start: usize, into: &mut [i32]) {
        self.each_segment(start, into, |segment, first, into| {
            segment.tokens.copy_to(first..first + into.len(), into);
        });
    }

    /// Copies the tokens from `start` on to `into` as targets: −1 where a token is part of a prompt.
    pub fn copy_targets_to(&self, start: usize, into: &mut [i32]) {
        self.each_segment(start, into, |segment, first, into| {
            segment.tokens.copy_to(first..first + into.len(), into);
            segment.documents.mask(first, into);
        });
    }

    /// For each of the tokens from `start` on how far behind `start` its document begins, 0 where it does before; a segment of
    /// which no documents are known is one.
    pub fn copy_starts_to(&self, start: usize, into: &mut [i32]) {
        let mut done = 0;
        while done < into.len() {
            let document = self.document_at(start + done);
            let count = (into.len() - done).min(document.end - (start + done));
            into[done..done + count].fill(document.start.saturating_sub(start) as i32);
            done += count;
        }
    }

    /// Sets to −1 each of the targets from `start` on that begins a document: what stands before it is another one's.
    pub fn mask_first_tokens(&self, start: usize, targets: &mut [i32]) {
        let mut position = start;
        while position < start + targets.len() {
            let document = self.document_at(position);
            if document.start == position {
                targets[position - start] = NO_TARGET;
            }
            position = document.end;
        }
    }

    /// The tokens of the document that holds token `position`; of the segment, where nothing is known of its documents.
    fn document_at(&self, position: usize) -> Range<usize> {
        let Some(index) = self.segment_of(position) else { return position..usize::MAX };
        let (segment, first) = (&self.segments[index], self.start_of(index));
        let documents = &segment.documents;
        if documents.is_empty() {
            return first..self.ends[index];
        }
        let document = documents.holding(position - first);
        first + documents.start(document)..first + documents.ends.at(document) as usize
    }

    /// Where the document that holds token `position` begins; the segment, where nothing is known of its documents.
    pub(super) fn document_start(&self, position: usize) -> usize {
        self.document_at(position).start
    }

    fn segment_of(&self, position: usize) -> Option<usize> {
        Some(self.ends.partition_point(|&end| end <= position)).filter(|&index| index < self.segments.len())
    }

    fn start_of(&self, segment: usize) -> usize {
        segment.checked_sub(1).map_or(0, |before| self.ends[before])
    }

    fn each_segment(&self, start: usize, into: &mut [i32], work: impl Fn(&Segment, usize, &mut [i32])) {
        let Some(mut index) = self.segment_of(start) else { return };
        let (mut start, mut rest) = (start, into);
        while !rest.is_empty() {
            let count = rest.len().min(self.ends[index] - start);
            let (now, later) = rest.split_at_mut(count);
            work(&self.segments[index], start - self.start_of(index), now);
            (start, rest, index) = (start + count, later, index + 1);
        }
    }
}

/// Where documents end while they are collected.
#[derive(Debug, Default)]
pub(super) struct DocumentList {
    ends: Vec<u64>,
    prompts: Vec<u64>,
    any_prompt: bool,
}

impl DocumentList {
    /// A document ends at `end`, of which the first `prompt` tokens are a prompt. One without tokens is none.
    pub(super) fn push(&mut self, end: u64, prompt: u64) {
        if end > self.ends.last().copied().unwrap_or(0) {
            self.ends.push(end);
            self.prompts.push(prompt);
            self.any_prompt |= prompt > 0;
        }
    }

    pub(super) fn ends(&self) -> &[u64] {
        &self.ends
    }

    /// Empty where no document has a prompt.
    pub(super) fn prompts(&self) -> &[u64] {
        if self.any_prompt { &self.prompts } else { &[] }
    }

    pub(super) fn finish(self) -> Documents {
        let prompts = self.prompts().into();
        Documents { ends: Row::Memory(self.ends.into()), prompts: Row::Memory(prompts) }
    }
}

/// The files of mapped segments, for messages.
pub(super) fn mapped_path(segment: &Segment) -> Option<PathBuf> {
    match &segment.tokens {
        Tokens::Mapped(tokens) => Some(tokens.file.path().into()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
