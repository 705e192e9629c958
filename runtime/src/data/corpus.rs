//! A corpus: the tokens that are trained on, by source, what they are, and their hash.
//!
//! Owns the reading of files, shards and data sets into streams. It cuts no windows and mixes nothing.

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::encode::{Encoder, TokenSink};
use super::inputs::{Format, InputFile, expand};
use super::megatron::Megatron;
use super::reader::{Reading, read_pieces};
use super::shard::Shard;
use super::stream::{DocumentList, Documents, Segment, Stream, Tokens};
use super::tokenizer::{EndOfDocument, EndTokens};
use super::{DataError, Piece, Tokenizer, hexadecimal};

/// A named source of a mixture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceSpec {
    /// Its name; empty where there is only one.
    pub name: String,
    /// Files, directories, patterns.
    pub paths: Vec<PathBuf>,
    /// Its share of the samples in proportion to the others'; None: by its tokens.
    pub weight: Option<f64>,
    /// What gates with a router a tag know its sequences by.
    pub tag: i32,
}

/// What a corpus is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct CorpusSpec {
    /// The sources.
    pub sources: Vec<SourceSpec>,
    /// Paths of text that is held out; none: the end of each source is.
    pub validation: Vec<PathBuf>,
    /// The field of records that holds their text.
    pub text_field: String,
    /// What ends a document.
    pub end_of_document: EndOfDocument,
    /// Tokens the model has.
    pub vocab_size: usize,
}

impl CorpusSpec {
    /// The field of records where none is named.
    pub const TEXT_FIELD: &'static str = "text";

    /// A corpus of `paths` alone, for a model with `vocab_size` tokens.
    pub fn of_paths(paths: &[PathBuf], vocab_size: usize) -> Self {
        Self {
            sources: vec![SourceSpec { paths: paths.into(), ..SourceSpec::default() }],
            validation: Vec::new(),
            text_field: Self::TEXT_FIELD.into(),
            end_of_document: EndOfDocument::Auto,
            vocab_size,
        }
    }
}

/// A source, open.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Its share in proportion to the others'; None: by its tokens.
    pub weight: Option<f64>,
    /// What gates with a router a tag know its sequences by.
    pub tag: i32,
    /// Its tokens.
    pub stream: Stream,
}

/// The tokens that are trained and evaluated on.
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    /// The sources, at least one.
    pub sources: Vec<Source>,
    /// Tokens that are held out; None: the end of each source is.
    pub validation: Option<Stream>,
    /// What it is, for people: where it comes from and how large it is.
    pub description: String,
    /// SHA-256, in hexadecimal, of all text one after the other; a shard takes part with its own hash.
    pub sha256: String,
    /// The least mean loss any model can reach, in nats per token, where it is known.
    pub entropy: Option<f64>,
}

impl Corpus {
    /// A corpus of one text's tokens.
    pub fn of_tokens(tokens: Tokens, description: impl Into<String>, sha256: impl Into<String>) -> Self {
        let stream = Stream::new([Segment { tokens, documents: Documents::default() }]);
        Self::of_stream(stream, description.into(), sha256.into())
    }

    pub(super) fn of_stream(stream: Stream, description: String, sha256: String) -> Self {
        let source = Source { name: String::new(), weight: None, tag: 0, stream };
        Self { sources: vec![source], validation: None, description, sha256, entropy: None }
    }

    /// Tokens of all sources.
    pub fn tokens(&self) -> usize {
        self.sources.iter().map(|source| source.stream.len()).sum()
    }

    /// Reads `paths` in the order given, as [`Corpus::read`] does.
    pub fn from_paths(paths: &[PathBuf], tokenizer: &dyn Tokenizer) -> Result<Self, DataError> {
        Self::read(&CorpusSpec::of_paths(paths, tokenizer.vocab_size()), tokenizer)
    }

    /// Reads what `spec` names: files in the order given, directories with all they hold below them, sorted by path, without
    /// hidden files and without those whose ending says nothing. Text is encoded; token shards are mapped.
    pub fn read(spec: &CorpusSpec, tokenizer: &dyn Tokenizer) -> Result<Self, DataError> {
        let ends = spec.end_of_document.tokens(tokenizer)?;
        let mut hash = Sha256::new();
        let mut parts = Vec::new();
        let mut read = |name: &str, paths: &[PathBuf]| {
            let mut builder = CorpusBuilder::new(tokenizer, ends, std::mem::take(&mut hash));
            for file in expand(paths)? {
                builder.add(&file, spec)?;
            }
            let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            let label = if name.is_empty() { String::new() } else { format!("{name}: ") };
            parts.push(label + &builder.describe(&names.join(", ")));
            let stream;
            (stream, hash) = builder.finish();
            Ok::<_, DataError>(stream)
        };
        let mut sources = Vec::with_capacity(spec.sources.len());
        for source in &spec.sources {
            let stream = read(&source.name, &source.paths)?;
            sources.push(Source { name: source.name.clone(), weight: source.weight, tag: source.tag, stream });
        }
        let validation = match spec.validation.as_slice() {
            [] => None,
            paths => Some(read("held out", paths)?),
        };
        let (description, sha256) = (parts.join("; "), hexadecimal(&hash.finalize()));
        Ok(Self { sources, validation, description, sha256, entropy: None })
    }
}

/// Collects files into a stream.
pub(super) struct CorpusBuilder<'a> {
    tokenizer: &'a dyn Tokenizer,
    encoder: Encoder<'a>,
    memory: Memory,
    segments: Vec<Segment>,
    hash: Sha256,
    files: usize,
    bytes: usize,
    /// Of them those that are no prompt.
    learned: usize,
}

impl<'a> CorpusBuilder<'a> {
    /// A builder that goes on with `hash`.
    pub(super) fn new(tokenizer: &'a dyn Tokenizer, ends: EndTokens, hash: Sha256) -> Self {
        let memory = Memory::new(tokenizer.vocab_size());
        let encoder = Encoder::new(tokenizer, ends);
        Self { tokenizer, encoder, memory, segments: Vec::new(), hash, files: 0, bytes: 0, learned: 0 }
    }

    /// Bytes of text so far.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends a whole text; an empty one does not count.
    pub(super) fn push(&mut self, text: &str) -> Result<(), DataError> {
        if text.is_empty() {
            return Ok(());
        }
        self.files += 1;
        self.piece(Piece::File { text, last: true })
    }

    fn piece(&mut self, piece: Piece<'_>) -> Result<(), DataError> {
        self.learned += match piece {
            Piece::File { text, .. } | Piece::Record { text } => {
                self.hash.update(text);
                text.len()
            }
            Piece::Example { prompt, completion } => {
                self.hash.update(prompt);
                self.hash.update(completion);
                completion.len()
            }
        };
        self.bytes += piece.bytes();
        self.encoder.encode(piece, &mut self.memory)
    }

    /// Appends what `file` holds.
    fn add(&mut self, file: &InputFile, spec: &CorpusSpec) -> Result<(), DataError> {
        match file.format {
            Format::Text | Format::Records => {
                let (before, learned) = (self.bytes, self.learned);
                let reading = Reading { text_field: &spec.text_field, meter: &|_| {} };
                read_pieces(file, None, &reading, &mut |piece| self.piece(piece))?;
                if self.bytes == before && file.named {
                    return Err(DataError::Empty { path: file.path.clone() });
                }
                if self.bytes > before && self.learned == learned {
                    return Err(DataError::NothingToLearn { path: file.path.clone() });
                }
                self.files += usize::from(self.bytes > before);
            }
            Format::Shard => {
                let shard = Shard::open(&file.path)?;
                shard.check_fits((self.tokenizer.name(), self.tokenizer.identity()), spec.vocab_size)?;
                self.mapped(shard.segment(), &shard.header().content);
            }
            Format::Megatron => {
                let set = Megatron::open(&file.path)?;
                set.check_fits(spec.vocab_size)?;
                self.mapped(set.segment(), &set.identity());
            }
        }
        Ok(())
    }

    fn mapped(&mut self, segment: Segment, identity: &[u8; 32]) {
        self.hash.update(identity);
        self.files += 1;
        let memory = std::mem::replace(&mut self.memory, Memory::new(self.tokenizer.vocab_size()));
        self.segments.extend([memory.finish(), segment]);
    }

    /// What was collected, as `name` and its size.
    pub(super) fn describe(&self, name: &str) -> String {
        let files = if self.files == 1 { "1 file".into() } else { format!("{} files", self.files) };
        let tokens = self.memory.len() + self.segments.iter().map(|segment| segment.tokens.len()).sum::<usize>();
        let text = if self.bytes > 0 { format!("{:.2} MB, ", self.bytes as f64 / 1e6) } else { String::new() };
        format!("{name} ({files}, {text}{tokens} tokens)")
    }

    /// The stream, and the hash to go on with.
    pub(super) fn finish(mut self) -> (Stream, Sha256) {
        self.segments.push(self.memory.finish());
        (Stream::new(self.segments), self.hash)
    }
}

/// Tokens in memory, as narrow as the vocabulary allows.
enum Memory {
    Narrow(Vec<u8>, DocumentList),
    Wide(Vec<u32>, DocumentList),
}

impl Memory {
    fn new(vocab_size: usize) -> Self {
        let list = DocumentList::default();
        if vocab_size <= 256 { Self::Narrow(Vec::new(), list) } else { Self::Wide(Vec::new(), list) }
    }

    fn len(&self) -> usize {
        match self {
            Self::Narrow(ids, _) => ids.len(),
            Self::Wide(ids, _) => ids.len(),
        }
    }

    fn finish(mut self) -> Segment {
        // What is open ends here.
        self.end_document(0);
        match self {
            Self::Narrow(ids, list) => Segment { tokens: Tokens::U8(ids.into()), documents: list.finish() },
            Self::Wide(ids, list) => Segment { tokens: Tokens::U32(ids.into()), documents: list.finish() },
        }
    }
}

impl TokenSink for Memory {
    fn push(&mut self, ids: &[u32]) {
        match self {
            Self::Narrow(all, _) => all.extend(ids.iter().map(|&id| id as u8)),
            Self::Wide(all, _) => all.extend_from_slice(ids),
        }
    }

    fn end_document(&mut self, prompt: u64) {
        let end = self.len() as u64;
        match self {
            Self::Narrow(_, list) | Self::Wide(_, list) => list.push(end, prompt),
        }
    }
}

#[cfg(test)]
#[path = "corpus_tests.rs"]
mod tests;
