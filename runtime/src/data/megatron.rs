//! Data sets of Megatron-LM: an index (`.idx`) and tokens (`.bin`), read as they are.
//!
//! Owns the index's layout and the checks that it tells the truth about the tokens. Nothing is copied but where documents end.
//!
//! The index, little-endian: 9 bytes of magic, u64 version, u8 type of a token, u64 sequences n, u64 documents + 1 d; then n i32
//! lengths in tokens, n i64 places in the tokens' file in bytes, d i64 first sequences of documents; perhaps n i8 modes, which
//! are not used.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::DataError;
use super::stream::{DocumentList, MappedFile, MappedTokens, Segment, Tokens, Width};

/// First bytes of an index.
const MAGIC: [u8; 9] = *b"MMIDIDX\0\0";
/// The version there is.
const VERSION: u64 = 1;
/// Bytes before the tables.
const HEADER_BYTES: usize = 34;

/// Why a data set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MegatronFault {
    /// Another kind of file.
    #[error("is no Megatron index: it does not begin with MMIDIDX")]
    NotAnIndex,
    /// Another version.
    #[error("is a Megatron index of version {found}; version {VERSION} can be read")]
    Version {
        /// Its version.
        found: u64,
    },
    /// Tokens of a type that are no whole numbers, or an unknown one.
    #[error(
        "its tokens have type {code}; those that can be read are 1 (u8), 2 (i8), 3 (i16), 4 (i32), 5 (i64) and 8 (u16)"
    )]
    Type {
        /// The type's number.
        code: u8,
    },
    /// The index is too short for its own tables.
    #[error(
        "is {found} bytes long, but {sequences} sequences and {documents} documents take {expected}: the index was cut off"
    )]
    Length {
        /// Sequences it says it has.
        sequences: u64,
        /// Documents it says it has.
        documents: u64,
        /// Bytes they take.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// A sequence is not where the one before it ends.
    #[error(
        "says that sequence {sequence} has {length} tokens from byte {pointer} on, but the sequence before it ends at byte {expected}"
    )]
    Sequence {
        /// Which, from 0.
        sequence: usize,
        /// Its length.
        length: i64,
        /// Its place.
        pointer: i64,
        /// Where it should be.
        expected: u64,
    },
    /// Index and tokens have other lengths.
    #[error("describes {expected} bytes of tokens, but {data} has {found}")]
    Data {
        /// By the index.
        expected: u64,
        /// The tokens' file.
        data: String,
        /// What it has.
        found: u64,
    },
    /// The documents do not go from the first to the last sequence in order.
    #[error(
        "says that document {document} begins with sequence {sequence} of {sequences}, which is not after the one before it"
    )]
    Document {
        /// Which, from 0.
        document: usize,
        /// Its first sequence.
        sequence: i64,
        /// Sequences there are.
        sequences: usize,
    },
}

/// A data set that is open.
#[derive(Clone, Debug)]
pub struct Megatron {
    segment: Segment,
    tokens: MappedTokens,
    identity: [u8; 32],
}

impl Megatron {
    /// Opens the data set whose index is at `index`, with the tokens beside it, and checks all of the index.
    pub fn open(index: &Path) -> Result<Self, DataError> {
        let wrong = |fault| DataError::Megatron { path: index.into(), fault };
        if std::fs::metadata(index).map_err(DataError::unreadable(index))?.len() == 0 {
            return Err(DataError::Empty { path: index.into() });
        }
        let data_path = index.with_extension("bin");
        let data_bytes = std::fs::metadata(&data_path).map_err(DataError::unreadable(&data_path))?.len();
        if data_bytes == 0 {
            return Err(DataError::Empty { path: data_path });
        }
        let (index_file, data) = (MappedFile::open(index)?, MappedFile::open(&data_path)?);
        let tables = Tables::parse(index_file.bytes()).map_err(wrong)?;
        let count = tables.check(data.bytes().len() as u64, &data_path).map_err(wrong)?;
        let documents = tables.documents().map_err(wrong)?.finish();
        let tokens = MappedTokens { file: data, offset: 0, count, width: tables.width };
        let identity = Sha256::digest(index_file.bytes()).into();
        Ok(Self { segment: Segment { tokens: Tokens::Mapped(tokens.clone()), documents }, tokens, identity })
    }

    /// Its tokens and documents.
    pub fn segment(&self) -> Segment {
        self.segment.clone()
    }

    /// Hash of the index.
    pub fn identity(&self) -> [u8; 32] {
        self.identity
    }

    /// Reads all tokens and refuses those that a model with `vocab_size` tokens does not have.
    pub(super) fn check_fits(&self, vocab_size: usize) -> Result<(), DataError> {
        self.tokens.check(vocab_size)
    }
}

/// The tables of an index.
struct Tables<'a> {
    width: Width,
    /// i32 each.
    lengths: &'a [[u8; 4]],
    /// i64 each.
    pointers: &'a [[u8; 8]],
    /// i64 each.
    firsts: &'a [[u8; 8]],
}

impl<'a> Tables<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, MegatronFault> {
        let Some((header, tables)) =
            bytes.split_at_checked(HEADER_BYTES).filter(|(header, _)| header.starts_with(&MAGIC))
        else {
            return Err(MegatronFault::NotAnIndex);
        };
        let number = |at: usize| header[at..at + 8].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte));
        if number(9) != VERSION {
            return Err(MegatronFault::Version { found: number(9) });
        }
        let width = match header[17] {
            1 => Width::U8,
            2 => Width::I8,
            3 => Width::I16,
            4 => Width::I32,
            5 => Width::I64,
            8 => Width::U16,
            code => return Err(MegatronFault::Type { code }),
        };
        let (sequences, documents) = (number(18), number(26));
        let expected = sequences.saturating_mul(12).saturating_add(documents.saturating_mul(8));
        // Modes may follow.
        let found = tables.len() as u64;
        if expected > found {
            let header = HEADER_BYTES as u64;
            let (expected, found) = (expected.saturating_add(header), found + header);
            return Err(MegatronFault::Length { sequences, documents, expected, found });
        }
        let (lengths, rest) = tables.split_at(4 * sequences as usize);
        let (pointers, rest) = rest.split_at(8 * sequences as usize);
        let firsts = &rest[..8 * documents as usize];
        Ok(Self {
            width,
            lengths: lengths.as_chunks().0,
            pointers: pointers.as_chunks().0,
            firsts: firsts.as_chunks().0,
        })
    }

    /// Checks that the sequences are the `data_bytes` of tokens, one after the other, and returns how many tokens those are.
    fn check(&self, data_bytes: u64, data: &Path) -> Result<usize, MegatronFault> {
        let width = self.width.bytes() as u64;
        let mut expected = 0;
        for (sequence, (length, pointer)) in self.lengths.iter().zip(self.pointers).enumerate() {
            let (length, pointer) = (i64::from(i32::from_le_bytes(*length)), i64::from_le_bytes(*pointer));
            if length < 0 || u64::try_from(pointer) != Ok(expected) {
                return Err(MegatronFault::Sequence { sequence, length, pointer, expected });
            }
            expected += length as u64 * width;
        }
        if expected != data_bytes {
            let data = data.display().to_string();
            return Err(MegatronFault::Data { expected, data, found: data_bytes });
        }
        Ok((data_bytes / width) as usize)
    }

    /// Where documents end. Where the index names none, each sequence is one.
    fn documents(&self) -> Result<DocumentList, MegatronFault> {
        let sequences = self.lengths.len();
        let end_of = |sequence: usize| {
            let after = |last: usize| {
                let start = i64::from_le_bytes(self.pointers[last]) as u64 / self.width.bytes() as u64;
                start + i32::from_le_bytes(self.lengths[last]) as u64
            };
            sequence.checked_sub(1).map_or(0, after)
        };
        let mut list = DocumentList::default();
        if self.firsts.is_empty() {
            (1..=sequences).for_each(|sequence| list.push(end_of(sequence), 0));
            return Ok(list);
        }
        let mut before = 0;
        for (document, first) in self.firsts.iter().enumerate() {
            let sequence = i64::from_le_bytes(*first);
            match usize::try_from(sequence).ok().filter(|&first| first >= before && first <= sequences) {
                Some(first) => {
                    list.push(end_of(first), 0);
                    before = first;
                }
                None => return Err(MegatronFault::Document { document, sequence, sequences }),
            }
        }
        list.push(end_of(sequences), 0);
        Ok(list)
    }
}

#[cfg(test)]
#[path = "megatron_tests.rs"]
mod tests;
