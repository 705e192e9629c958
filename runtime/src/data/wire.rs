//! A corpus as bytes, for rank 0 to share out.
//!
//! Owns their form: a head in JSON, then the tokens that are in memory. Mapped files travel as paths: every rank maps them itself,
//! so that a large corpus goes through no rank.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::corpus::Source;
use super::inputs::SHARD_EXTENSION;
use super::megatron::Megatron;
use super::shard::Shard;
use super::stream::{Documents, Row, Segment, Stream, Tokens, mapped_path};
use super::{Corpus, DataError};

/// First bytes of a corpus that is shared out.
const MAGIC: [u8; 4] = *b"moeC";

/// Everything but the tokens in memory. Numbers that must arrive as they are travel as their bits.
#[derive(Serialize, Deserialize)]
struct Head {
    description: String,
    sha256: String,
    entropy: Option<u64>,
    sources: Vec<SourceHead>,
    validation: Option<Vec<SegmentHead>>,
}

#[derive(Serialize, Deserialize)]
struct SourceHead {
    name: String,
    weight: Option<u64>,
    tag: i32,
    segments: Vec<SegmentHead>,
}

#[derive(Serialize, Deserialize)]
enum SegmentHead {
    /// Its tokens and documents follow the head.
    Memory { width: u8, tokens: usize, documents: usize, prompts: usize },
    /// A shard or a Megatron index, and how many tokens it has.
    Mapped { path: PathBuf, tokens: usize },
}

impl Corpus {
    /// The corpus as bytes; [`Corpus::from_bytes`] reads them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let mut heads = |stream: &Stream| -> Vec<SegmentHead> {
            stream.segments().iter().map(|segment| segment_to(segment, &mut body)).collect()
        };
        let source = |source: &Source, segments| SourceHead {
            name: source.name.clone(),
            weight: source.weight.map(f64::to_bits),
            tag: source.tag,
            segments,
        };
        let head = Head {
            description: self.description.clone(),
            sha256: self.sha256.clone(),
            entropy: self.entropy.map(f64::to_bits),
            sources: self.sources.iter().map(|each| source(each, heads(&each.stream))).collect(),
            validation: self.validation.as_ref().map(heads),
        };
        // A path that is not UTF-8 cannot be written; it arrives as a head that cannot be read.
        let head = serde_json::to_vec(&head).unwrap_or_default();
        let mut bytes = Vec::with_capacity(MAGIC.len() + 8 + head.len() + body.len());
        bytes.extend(MAGIC);
        bytes.extend((head.len() as u64).to_le_bytes());
        bytes.extend(head);
        bytes.extend(body);
        bytes
    }

    /// Reads what [`Corpus::to_bytes`] wrote, and maps the files it names.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DataError> {
        let mut rest = bytes;
        if take(&mut rest, MAGIC.len())? != MAGIC {
            return Err(DataError::Damaged { reason: "its first bytes are not those of a corpus" });
        }
        let [length] = take_u64s(&mut rest, 1)?[..] else { return Err(TOO_SHORT) };
        let length = usize::try_from(length).map_err(|_| TOO_SHORT)?;
        let head: Head = serde_json::from_slice(take(&mut rest, length)?)
            .map_err(|_| DataError::Damaged { reason: "its head cannot be read" })?;
        let mut stream = |heads: Vec<SegmentHead>| -> Result<Stream, DataError> {
            let segments: Result<Vec<_>, _> = heads.into_iter().map(|head| segment_of(head, &mut rest)).collect();
            Ok(Stream::new(segments?))
        };
        let mut sources = Vec::with_capacity(head.sources.len());
        for source in head.sources {
            let (name, weight, tag) = (source.name, source.weight.map(f64::from_bits), source.tag);
            sources.push(Source { name, weight, tag, stream: stream(source.segments)? });
        }
        let validation = head.validation.map(&mut stream).transpose()?;
        if !rest.is_empty() {
            return Err(DataError::Damaged { reason: "it is longer than it says" });
        }
        let (description, sha256) = (head.description, head.sha256);
        Ok(Self { sources, validation, description, sha256, entropy: head.entropy.map(f64::from_bits) })
    }
}

fn segment_to(segment: &Segment, body: &mut Vec<u8>) -> SegmentHead {
    if let Some(path) = mapped_path(segment) {
        return SegmentHead::Mapped { path, tokens: segment.tokens.len() };
    }
    let width = match &segment.tokens {
        Tokens::U8(ids) => {
            body.extend_from_slice(ids);
            1
        }
        Tokens::U32(ids) => {
            body.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
            4
        }
        // Told by their path above.
        Tokens::Mapped(_) => 0,
    };
    let Documents { ends, prompts } = &segment.documents;
    body.extend((0..ends.len()).flat_map(|index| ends.at(index).to_le_bytes()));
    body.extend((0..prompts.len()).flat_map(|index| prompts.at(index).to_le_bytes()));
    let tokens = segment.tokens.len();
    SegmentHead::Memory { width, tokens, documents: ends.len(), prompts: prompts.len() }
}

fn segment_of(head: SegmentHead, rest: &mut &[u8]) -> Result<Segment, DataError> {
    let (width, count, documents, prompts) = match head {
        SegmentHead::Mapped { path, tokens } => return map(path, tokens),
        SegmentHead::Memory { width, tokens, documents, prompts } => (width, tokens, documents, prompts),
    };
    let bytes = take(rest, count.checked_mul(usize::from(width)).ok_or(TOO_SHORT)?)?;
    let tokens = match width {
        1 => Tokens::U8(bytes.into()),
        4 => Tokens::U32(bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect()),
        _ => return Err(DataError::Damaged { reason: "its tokens have an unknown width" }),
    };
    let ends = Row::Memory(take_u64s(rest, documents)?);
    let prompts = Row::Memory(take_u64s(rest, prompts)?);
    Ok(Segment { tokens, documents: Documents { ends, prompts } })
}

/// Opens what rank 0 opened under `path`: the tokens of a shard, or those beside a Megatron index.
fn map(path: PathBuf, tokens: usize) -> Result<Segment, DataError> {
    let segment = match path.extension() {
        Some(ending) if ending == SHARD_EXTENSION => Shard::open(&path)?.segment(),
        _ => Megatron::open(&path.with_extension("idx"))?.segment(),
    };
    if segment.tokens.len() == tokens { Ok(segment) } else { Err(DataError::Different { path }) }
}

const TOO_SHORT: DataError = DataError::Damaged { reason: "it ends too early" };

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], DataError> {
    let (head, tail) = rest.split_at_checked(count).ok_or(TOO_SHORT)?;
    *rest = tail;
    Ok(head)
}

fn take_u64s(rest: &mut &[u8], count: usize) -> Result<Arc<[u64]>, DataError> {
    let bytes = take(rest, count.checked_mul(8).ok_or(TOO_SHORT)?)?;
    Ok(bytes.as_chunks().0.iter().map(|number| u64::from_le_bytes(*number)).collect())
}
