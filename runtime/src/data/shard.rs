//! Token shards: the project's own file of tokens, and every way it can be wrong.
//!
//! Owns the layout, as docs/data.md describes it, and the checks at opening. Writing is `shard_writer`'s. All numbers are
//! little-endian.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::stream::{Documents, MappedFile, MappedTokens, Row, Segment, Tokens, Width};
use super::{DataError, hexadecimal};

/// First bytes of a shard.
pub(super) const MAGIC: [u8; 8] = *b"MOETOKEN";
/// The version that is written, and the only one that is read.
pub const SHARD_VERSION: u32 = 1;
/// Bytes of the header; the tokens follow.
pub(super) const HEADER_BYTES: usize = 256;
/// Bytes of the header that its own hash covers; the hash follows.
const SEALED_BYTES: usize = 160;
/// Flag: there is a table of prompts.
const HAS_PROMPTS: u8 = 1;

/// Why a file is no shard that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ShardFault {
    /// Another kind of file.
    #[error("is no token shard: it does not begin with {:?}", String::from_utf8_lossy(&MAGIC))]
    NotAShard,
    /// A later version.
    #[error(
        "is a token shard of version {found}; this program reads version {SHARD_VERSION}: make it again with `moe-launch data prepare`"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// The header was changed.
    #[error(
        "its header is damaged: the hash of its first {SEALED_BYTES} bytes is another; make it again with `moe-launch data prepare`"
    )]
    HeaderHash,
    /// The header describes something that cannot be.
    #[error("its header cannot be: {reason}")]
    Header {
        /// What cannot be.
        reason: &'static str,
    },
    /// Cut off, or longer than it says.
    #[error("is {found} bytes long where its header says {expected}: it was cut off or changed; make it again")]
    Length {
        /// By the header.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// Tokens or tables were changed.
    #[error("its tokens are damaged: their hash is {found}, by the header {expected}; make it again")]
    Hash {
        /// By the header.
        expected: String,
        /// What it has.
        found: String,
    },
    /// The table of documents is wrong.
    #[error(
        "its document {document} ends at token {end}, outside of its {tokens} tokens or before the document before it"
    )]
    Document {
        /// Which, from 0.
        document: usize,
        /// Where it ends.
        end: u64,
        /// Tokens of the shard.
        tokens: u64,
    },
    /// Made with another tokenizer.
    #[error(
        "was made with another tokenizer (sha256 {found}) than data.tokenizer = {tokenizer} (sha256 {expected}); set \
         data.tokenizer to the one it was prepared with"
    )]
    OtherTokenizer {
        /// The tokenizer of the run.
        tokenizer: String,
        /// Its hash.
        expected: String,
        /// That of the shard's.
        found: String,
    },
}

/// What the header of a shard says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardHeader {
    /// Bytes of a token: 1, 2 or 4.
    pub token_bytes: u8,
    /// Different tokens the tokenizer makes.
    pub vocab_size: u64,
    /// Tokens.
    pub tokens: u64,
    /// Documents.
    pub documents: u64,
    /// Whether documents have prompts.
    pub prompts: bool,
    /// The largest token.
    pub largest: u64,
    /// Hash of everything after the header.
    pub content: [u8; 32],
    /// Identity of the tokenizer.
    pub tokenizer: [u8; 32],
    /// What the shard was made of: `prepare` finds its own by it.
    pub origin: [u8; 32],
}

impl ShardHeader {
    /// Where the ends of documents begin: after the tokens, at a multiple of 8.
    pub(super) fn ends_offset(&self) -> u64 {
        (HEADER_BYTES as u64 + self.tokens * u64::from(self.token_bytes)).next_multiple_of(8)
    }

    /// Where the prompts begin.
    pub(super) fn prompts_offset(&self) -> u64 {
        self.ends_offset() + 8 * self.documents
    }

    /// Bytes of the whole file.
    pub(super) fn file_bytes(&self) -> u64 {
        self.prompts_offset() + if self.prompts { 4 * self.documents } else { 0 }
    }

    /// The header as it is written.
    pub(super) fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &MAGIC);
        put(8, &SHARD_VERSION.to_le_bytes());
        put(12, &[self.token_bytes, if self.prompts { HAS_PROMPTS } else { 0 }]);
        let offsets = [self.ends_offset(), if self.prompts { self.prompts_offset() } else { 0 }];
        let numbers = [self.vocab_size, self.tokens, self.documents, offsets[0], offsets[1], self.largest];
        for (index, number) in numbers.into_iter().enumerate() {
            put(16 + 8 * index, &number.to_le_bytes());
        }
        put(64, &self.content);
        put(96, &self.tokenizer);
        put(128, &self.origin);
        let seal: [u8; 32] = Sha256::digest(&bytes[..SEALED_BYTES]).into();
        bytes[SEALED_BYTES..SEALED_BYTES + 32].copy_from_slice(&seal);
        bytes
    }

    /// Reads a header; its own hash must fit. What it says about the file is not looked at.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ShardFault> {
        if !bytes.starts_with(&MAGIC) {
            return Err(ShardFault::NotAShard);
        }
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(ShardFault::Length { expected: HEADER_BYTES as u64, found: bytes.len() as u64 });
        };
        let number = |at: usize, count: usize| {
            bytes[at..at + count].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
        };
        let hash = |at: usize| std::array::from_fn::<u8, 32, _>(|index| bytes[at + index]);
        let version = number(8, 4) as u32;
        if version != SHARD_VERSION {
            return Err(ShardFault::Version { found: version });
        }
        let seal: [u8; 32] = Sha256::digest(&bytes[..SEALED_BYTES]).into();
        if seal != hash(SEALED_BYTES) {
            return Err(ShardFault::HeaderHash);
        }
        let header = Self {
            token_bytes: bytes[12],
            vocab_size: number(16, 8),
            tokens: number(24, 8),
            documents: number(32, 8),
            prompts: bytes[13] & HAS_PROMPTS != 0,
            largest: number(56, 8),
            content: hash(64),
            tokenizer: hash(96),
            origin: hash(128),
        };
        if !matches!(header.token_bytes, 1 | 2 | 4) {
            return Err(ShardFault::Header { reason: "a token has 1, 2 or 4 bytes" });
        }
        // No file is that long; below, sizes cannot overflow.
        if header.tokens >= 1 << 56 || header.documents > header.tokens {
            return Err(ShardFault::Header {
                reason: "there are more documents than tokens, or more tokens than a file holds",
            });
        }
        Ok(header)
    }
}

/// A shard that is open.
#[derive(Clone, Debug)]
pub struct Shard {
    file: MappedFile,
    header: ShardHeader,
}

impl Shard {
    /// Opens the shard at `path` and checks header, length and documents. The tokens are not read: [`Shard::verify`] does that.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let wrong = |fault| DataError::Shard { path: path.into(), fault };
        if std::fs::metadata(path).map_err(DataError::unreadable(path))?.len() == 0 {
            return Err(DataError::Empty { path: path.into() });
        }
        let file = MappedFile::open(path)?;
        let header = ShardHeader::parse(file.bytes()).map_err(wrong)?;
        let found = file.bytes().len() as u64;
        if found != header.file_bytes() {
            return Err(wrong(ShardFault::Length { expected: header.file_bytes(), found }));
        }
        let shard = Self { file, header };
        shard.check_documents().map_err(wrong)?;
        Ok(shard)
    }

    /// What its header says.
    pub fn header(&self) -> &ShardHeader {
        &self.header
    }

    /// Refuses a shard that another tokenizer made, or whose tokens a model with `vocab_size` tokens does not have.
    pub(super) fn check_fits(&self, tokenizer: (&str, [u8; 32]), vocab_size: usize) -> Result<(), DataError> {
        // First: with the right one, a token beyond the vocabulary has another reason.
        let (name, identity) = tokenizer;
        if self.header.tokenizer != identity {
            let (expected, found) = (hexadecimal(&identity), hexadecimal(&self.header.tokenizer));
            let fault = ShardFault::OtherTokenizer { tokenizer: format!("{name:?}"), expected, found };
            return Err(DataError::Shard { path: self.file.path().to_owned(), fault });
        }
        self.tokens().check(vocab_size)
    }

    /// Reads everything and compares its hash with the header's.
    pub fn verify(&self) -> Result<(), DataError> {
        let found: [u8; 32] = Sha256::digest(&self.file.bytes()[HEADER_BYTES..]).into();
        if found == self.header.content {
            return Ok(());
        }
        let fault = ShardFault::Hash { expected: hexadecimal(&self.header.content), found: hexadecimal(&found) };
        Err(DataError::Shard { path: self.file.path().into(), fault })
    }

    /// Its tokens and documents.
    pub fn segment(&self) -> Segment {
        let header = &self.header;
        let row = |offset: u64| (self.file.clone(), offset as usize, header.documents as usize);
        let (file, offset, count) = row(header.ends_offset());
        let ends = Row::Mapped { file, offset, count };
        let (file, offset, count) = row(header.prompts_offset());
        let prompts = if header.prompts { Row::Mapped { file, offset, count } } else { Row::default() };
        Segment { tokens: Tokens::Mapped(self.tokens()), documents: Documents { ends, prompts } }
    }

    fn tokens(&self) -> MappedTokens {
        let width = match self.header.token_bytes {
            1 => Width::U8,
            2 => Width::U16,
            _ => Width::U32,
        };
        MappedTokens { file: self.file.clone(), offset: HEADER_BYTES, count: self.header.tokens as usize, width }
    }

    fn check_documents(&self) -> Result<(), ShardFault> {
        let Documents { ends, .. } = self.segment().documents;
        let tokens = self.header.tokens;
        let mut before = 0;
        for document in 0..ends.len() {
            let end = ends.at(document);
            if end <= before || end > tokens {
                return Err(ShardFault::Document { document, end, tokens });
            }
            before = end;
        }
        if before == tokens {
            Ok(())
        } else {
            Err(ShardFault::Header { reason: "the last document does not end with the last token" })
        }
    }
}

#[cfg(test)]
#[path = "shard_tests.rs"]
mod tests;
