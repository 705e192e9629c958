//! Text to token shards: many at a time, each whole or absent.
//!
//! Owns the cut of the input into shards, the note in the output folder that says what it is made of, and what is done already. The
//! cut follows from the input alone, so that the same work begun again finds its own finished shards.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::encode::Encoder;
use super::inputs::{Compression, Format, InputFile, SHARD_EXTENSION, expand};
use super::reader::{Reading, line_start, read_pieces};
use super::shard::{HEADER_BYTES, ShardHeader};
use super::shard_writer::{PARTIAL, ShardSource, ShardWriter};
use super::tokenizer::EndTokens;
use super::{DataError, EndOfDocument, Tokenizer, hexadecimal};

/// The note in a folder of shards.
const NOTE: &str = "prepare.json";
/// Its version.
const FORMAT: u32 = 1;
/// How the names of shards begin.
const SHARD_PREFIX: &str = "part-";
/// Shards that a large input makes, where no size is asked for.
const SHARDS: u64 = 64;
/// The smallest and the largest part of the input that makes a shard then.
const PART_BYTES: Range<u64> = 4 << 20..256 << 20;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct PrepareSpec {
    /// Text and record files, directories of them, patterns.
    pub paths: Vec<PathBuf>,
    /// Folder of the shards.
    pub out: PathBuf,
    /// The field of records that holds their text.
    pub text_field: String,
    /// What ends a document.
    pub end_of_document: EndOfDocument,
    /// Bytes of input, as they lie on the disk, that make a shard; None: chosen from the size of the input.
    pub part_bytes: Option<u64>,
}

/// What was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// Shards in the folder.
    pub shards: usize,
    /// Those that were there already.
    pub kept: usize,
    /// Tokens of all shards.
    pub tokens: u64,
    /// Documents of all shards.
    pub documents: u64,
}

impl Prepared {
    fn with(self, other: Self) -> Self {
        Self {
            shards: self.shards + other.shards,
            kept: self.kept + other.kept,
            tokens: self.tokens + other.tokens,
            documents: self.documents + other.documents,
        }
    }
}

/// The note.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    format: u32,
    /// Hash of everything that decides what is in the shards.
    origin: String,
    shards: usize,
}

/// A part of the input that makes one shard: files, or a range of one.
type Part = Vec<(InputFile, Option<Range<u64>>)>;

/// Work that is planned.
pub struct Prepare<'a> {
    tokenizer: &'a dyn Tokenizer,
    ends: EndTokens,
    spec: PrepareSpec,
    parts: Vec<Part>,
    bytes: u64,
    origin: [u8; 32],
}

impl<'a> Prepare<'a> {
    /// Plans the work: finds the input and cuts it into shards. Nothing is written.
    pub fn plan(spec: PrepareSpec, tokenizer: &'a dyn Tokenizer) -> Result<Self, DataError> {
        let ends = spec.end_of_document.tokens(tokenizer)?;
        let mut hash = Sha256::new();
        let end = |token: Option<u32>| token.map_or_else(String::new, |token| token.to_string());
        hash.update(tokenizer.identity());
        hash.update(format!("{FORMAT}\n{}\n{}\n{}\n", spec.text_field, end(ends.record), end(ends.file)));
        let mut files = Vec::new();
        let mut bytes = 0;
        for file in expand(&spec.paths)? {
            let facts = fs::metadata(&file.path).map_err(DataError::unreadable(&file.path))?;
            if matches!(file.format, Format::Shard | Format::Megatron) {
                let reason = "holds tokens already: train on it as it is, beside the folder of shards";
                return Err(DataError::Unsuitable { path: file.path, reason });
            }
            if facts.len() == 0 && file.named {
                return Err(DataError::Empty { path: file.path });
            }
            // A file that was changed makes other shards; where the system knows no time of change its length must do.
            let changed = facts.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
            hash.update(format!("{}\n{}\n{changed:?}\n", file.path.display(), facts.len()));
            bytes += facts.len();
            files.push((file, facts.len()));
        }
        if let (0, Some(path)) = (bytes, spec.paths.first()) {
            return Err(DataError::Empty { path: path.clone() });
        }
        let part_bytes = spec.part_bytes.unwrap_or((bytes / SHARDS).clamp(PART_BYTES.start, PART_BYTES.end)).max(1);
        hash.update(part_bytes.to_le_bytes());
        let parts = cut(files, part_bytes)?;
        Ok(Self { tokenizer, ends, spec, parts, bytes, origin: hash.finalize().into() })
    }

    /// Bytes of input, as they lie on the disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Shards it makes.
    pub fn shards(&self) -> usize {
        self.parts.len()
    }

    /// Makes the shards that are not there yet. `meter` is told, from several threads, how many more bytes of input are done.
    pub fn run(&self, meter: &(dyn Fn(u64) + Sync)) -> Result<Prepared, DataError> {
        self.claim()?;
        let work = |(index, part): (usize, &Part)| self.shard(index, part, meter);
        self.parts.par_iter().enumerate().map(work).try_reduce(Prepared::default, |a, b| Ok(a.with(b)))
    }

    /// Makes the folder ours, or finds that it is; removes what an interrupted run left half-written.
    fn claim(&self) -> Result<(), DataError> {
        let out = &self.spec.out;
        fs::create_dir_all(out).map_err(DataError::unwritable(out))?;
        let note = Note { format: FORMAT, origin: hexadecimal(&self.origin), shards: self.parts.len() };
        if read_note(out)?.is_some_and(|found| found != note) {
            let reason = "holds shards of other input, of input that was changed, or made with other settings".into();
            return Err(DataError::Occupied { path: out.clone(), reason });
        }
        let entries = fs::read_dir(out).map_err(DataError::unreadable(out))?;
        for entry in entries {
            let path = entry.map_err(DataError::unreadable(out))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with('.') && name.ends_with(PARTIAL) {
                fs::remove_file(&path).map_err(DataError::unwritable(&path))?;
            } else if name != NOTE && !self.is_mine(&name) {
                return Err(DataError::Occupied { path: out.clone(), reason: format!("holds {name} already") });
            }
        }
        self.write_note(&note)
    }

    fn is_mine(&self, name: &str) -> bool {
        let number = name.strip_prefix(SHARD_PREFIX).and_then(|rest| rest.strip_suffix(&format!(".{SHARD_EXTENSION}")));
        let index = number.and_then(|number| number.parse().ok());
        index.is_some_and(|index| index < self.parts.len() && shard_name(index) == name)
    }

    fn write_note(&self, note: &Note) -> Result<(), DataError> {
        let (path, partial) = (self.spec.out.join(NOTE), self.spec.out.join(format!(".{NOTE}{PARTIAL}")));
        let write = || {
            let mut file = File::create(&partial)?;
            file.write_all(&serde_json::to_vec_pretty(note)?)?;
            file.sync_all()?;
            fs::rename(&partial, &path)
        };
        write().map_err(DataError::unwritable(&path))
    }

    fn shard(&self, index: usize, part: &Part, meter: &(dyn Fn(u64) + Sync)) -> Result<Prepared, DataError> {
        let path = self.spec.out.join(shard_name(index));
        let origin: [u8; 32] =
            Sha256::new().chain_update(self.origin).chain_update(index.to_le_bytes()).finalize().into();
        if let Some(header) = finished(&path, &origin)? {
            meter(part.iter().map(|(file, range)| size(file, range.as_ref())).sum());
            return Ok(Prepared { kept: 1, ..prepared(&header) });
        }
        let source =
            ShardSource { vocab_size: self.tokenizer.vocab_size(), tokenizer: self.tokenizer.identity(), origin };
        let mut writer = ShardWriter::create(&path, source)?;
        let mut encoder = Encoder::new(self.tokenizer, self.ends);
        let reading = Reading { text_field: &self.spec.text_field, meter };
        for (file, range) in part {
            read_pieces(file, range.clone(), &reading, &mut |piece| encoder.encode(piece, &mut writer))?;
        }
        Ok(prepared(&writer.finish()?))
    }
}

fn prepared(header: &ShardHeader) -> Prepared {
    Prepared { shards: 1, kept: 0, tokens: header.tokens, documents: header.documents }
}

/// The header of the shard at `path`, if it is there, whole, and of `origin`. It was renamed when it was complete, so a length that
/// fits is enough.
fn finished(path: &Path, origin: &[u8; 32]) -> Result<Option<ShardHeader>, DataError> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    let length = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(reason) => return Err(DataError::Unreadable { path: path.into(), reason }),
        Ok(file) => {
            let length = file.metadata().map_err(DataError::unreadable(path))?.len();
            file.take(HEADER_BYTES as u64).read_to_end(&mut bytes).map_err(DataError::unreadable(path))?;
            length
        }
    };
    let header = ShardHeader::parse(&bytes).ok();
    Ok(header.filter(|header| header.origin == *origin && header.file_bytes() == length))
}

/// The files in parts of about `part_bytes`: small ones together, a large plain one in ranges of lines, a large compressed one
/// whole, since it can only be read from its start.
fn cut(files: Vec<(InputFile, u64)>, part_bytes: u64) -> Result<Vec<Part>, DataError> {
    let mut parts = Vec::new();
    let (mut open, mut open_bytes) = (Part::new(), 0);
    for (file, length) in files {
        if open_bytes > 0 && open_bytes + length > part_bytes {
            parts.push(std::mem::take(&mut open));
            open_bytes = 0;
        }
        if length <= part_bytes || file.compression != Compression::None {
            open.push((file, None));
            open_bytes += length;
            continue;
        }
        let mut start = 0;
        while start < length {
            let end = match start + part_bytes {
                end if end >= length => length,
                end => line_start(&file.path, end)?,
            };
            parts.push(vec![(file.clone(), Some(start..end))]);
            start = end;
        }
    }
    if !open.is_empty() {
        parts.push(open);
    }
    Ok(parts)
}

fn size(file: &InputFile, range: Option<&Range<u64>>) -> u64 {
    let whole = || fs::metadata(&file.path).map_or(0, |facts| facts.len());
    range.map_or_else(whole, |range| range.end - range.start)
}

fn shard_name(index: usize) -> String {
    format!("{SHARD_PREFIX}{index:05}.{SHARD_EXTENSION}")
}

/// Refuses a folder that `prepare` has not finished.
pub(super) fn check_finished(folder: &Path) -> Result<(), DataError> {
    let Some(note) = read_note(folder)? else { return Ok(()) };
    let present = (0..note.shards).filter(|&index| folder.join(shard_name(index)).exists()).count();
    if present == note.shards {
        return Ok(());
    }
    Err(DataError::Unfinished { path: folder.into(), present, shards: note.shards })
}

fn read_note(folder: &Path) -> Result<Option<Note>, DataError> {
    let path = folder.join(NOTE);
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fs::read(&path).map_err(DataError::unreadable(&path))?;
    let wrong = |error: serde_json::Error| {
        let (line, column) = (error.line() as u64, error.column());
        DataError::Json { path: path.clone(), line, column, reason: error.to_string() }
    };
    serde_json::from_slice(&bytes).map(Some).map_err(wrong)
}

#[cfg(test)]
#[path = "prepare_tests.rs"]
mod tests;
