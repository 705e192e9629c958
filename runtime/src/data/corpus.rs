//! A corpus: the tokens of a text, what it is, and its hash.
//!
//! Owns reading files and directories, and the bytes in which rank 0 shares a corpus out. It cuts no windows.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use walkdir::{DirEntry, WalkDir};

use super::{DataError, Tokenizer, hexadecimal};

/// Endings of the files that are read in a directory; a file that is named itself is read whatever it is called.
pub const TEXT_EXTENSIONS: [&str; 34] = [
    "adoc", "bib", "c", "cc", "cfg", "cpp", "cs", "css", "cu", "cuh", "go", "h", "hpp", "html", "java", "jl", "js",
    "kt", "md", "org", "proto", "py", "rb", "rs", "rst", "scala", "sh", "sql", "swift", "tex", "toml", "ts", "txt",
    "yaml",
];

/// Token ids, as narrow as the vocabulary allows; cloning shares them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// Ids below 256.
    U8(Arc<[u8]>),
    /// Any ids.
    U32(Arc<[u32]>),
}

impl Tokens {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(ids) => ids.len(),
            Self::U32(ids) => ids.len(),
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
        }
    }
}

/// The tokens that are trained and evaluated on.
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    /// The tokens.
    pub tokens: Tokens,
    /// What it is, for people: where it comes from and how large it is.
    pub description: String,
    /// SHA-256 of the text, in hexadecimal: that of all its files one after the other.
    pub sha256: String,
    /// The least mean loss any model can reach, in nats per token, where it is known.
    pub entropy: Option<f64>,
}

/// First bytes of a corpus that is shared out.
const MAGIC: [u8; 4] = *b"moeC";

impl Corpus {
    /// Reads `paths` in the order given: UTF-8 files, and directories with all they hold below them, sorted by path, without
    /// hidden files and without those that do not end in one of [`TEXT_EXTENSIONS`]. Nothing is put between two files.
    pub fn from_paths(paths: &[PathBuf], tokenizer: &dyn Tokenizer) -> Result<Self, DataError> {
        let mut builder = CorpusBuilder::new(tokenizer);
        for path in paths {
            let kind = std::fs::metadata(path).map_err(|reason| unreadable(path, reason))?;
            if kind.is_file() {
                let text = read_text(path)?;
                if text.is_empty() {
                    return Err(DataError::Empty { path: path.clone() });
                }
                builder.push(&text);
            } else if kind.is_dir() {
                let before = builder.bytes;
                for entry in text_files(path, |extension| TEXT_EXTENSIONS.contains(&extension)) {
                    builder.push(&read_text(&entry.map_err(|error| walk_error(path, error))?)?);
                }
                if builder.bytes == before {
                    return Err(DataError::NoText { path: path.clone() });
                }
            } else {
                return Err(DataError::NotRegular { path: path.clone() });
            }
        }
        let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        Ok(builder.finish(&names.join(", ")))
    }

    /// The corpus as bytes, for rank 0 to share out; [`Corpus::from_bytes`] reads them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.entropy.unwrap_or(f64::NAN).to_le_bytes());
        for text in [&self.description, &self.sha256] {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        let width: u8 = match &self.tokens {
            Tokens::U8(_) => 1,
            Tokens::U32(_) => 4,
        };
        bytes.push(width);
        bytes.extend((self.tokens.len() as u64).to_le_bytes());
        match &self.tokens {
            Tokens::U8(ids) => bytes.extend_from_slice(ids),
            Tokens::U32(ids) => bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
        }
        bytes
    }

    /// Reads what [`Corpus::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DataError> {
        let mut rest = bytes;
        if take(&mut rest, MAGIC.len())? != MAGIC {
            return Err(DataError::Damaged { reason: "its first bytes are not those of a corpus" });
        }
        let entropy = f64::from_bits(take_u64(&mut rest)?);
        let description = take_text(&mut rest)?;
        let sha256 = take_text(&mut rest)?;
        let width = take(&mut rest, 1)?[0];
        let tokens = take_u64(&mut rest)?;
        if tokens.checked_mul(u64::from(width)) != Some(rest.len() as u64) {
            return Err(DataError::Damaged { reason: "its length is not the one it states" });
        }
        let tokens = match width {
            1 => Tokens::U8(rest.into()),
            4 => Tokens::U32(rest.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect()),
            _ => return Err(DataError::Damaged { reason: "its tokens have an unknown width" }),
        };
        Ok(Self { tokens, description, sha256, entropy: Some(entropy).filter(|entropy| !entropy.is_nan()) })
    }
}

/// Collects texts into a corpus.
pub(super) struct CorpusBuilder<'a> {
    tokenizer: &'a dyn Tokenizer,
    narrow: Vec<u8>,
    wide: Vec<u32>,
    hash: Sha256,
    files: usize,
    bytes: usize,
}

impl<'a> CorpusBuilder<'a> {
    pub(super) fn new(tokenizer: &'a dyn Tokenizer) -> Self {
        Self { tokenizer, narrow: Vec::new(), wide: Vec::new(), hash: Sha256::new(), files: 0, bytes: 0 }
    }

    /// Bytes of text so far.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends a text; an empty one does not count.
    pub(super) fn push(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        self.hash.update(text);
        self.files += 1;
        self.bytes += text.len();
        self.tokenizer.encode_into(text, &mut self.wide);
        if self.tokenizer.vocab_size() <= 256 {
            self.narrow.extend(self.wide.drain(..).map(|id| id as u8));
        }
    }

    /// The corpus, described as `name` and its size.
    pub(super) fn finish(self, name: &str) -> Corpus {
        let narrow = self.tokenizer.vocab_size() <= 256;
        let tokens = if narrow { Tokens::U8(self.narrow.into()) } else { Tokens::U32(self.wide.into()) };
        let files = if self.files == 1 { "1 file".into() } else { format!("{} files", self.files) };
        Corpus {
            description: format!("{name} ({files}, {:.2} MB, {} tokens)", self.bytes as f64 / 1e6, tokens.len()),
            sha256: hexadecimal(&self.hash.finalize()),
            tokens,
            entropy: None,
        }
    }
}

/// The files below `folder` whose ending `wanted` accepts, sorted by path, hidden ones left out.
pub(super) fn text_files(
    folder: &Path,
    wanted: impl Fn(&str) -> bool,
) -> impl Iterator<Item = Result<PathBuf, walkdir::Error>> {
    let visible = |entry: &DirEntry| entry.depth() == 0 || !entry.file_name().as_encoded_bytes().starts_with(b".");
    WalkDir::new(folder)
        .follow_links(true)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(visible)
        .filter(move |entry| match entry {
            Ok(entry) => {
                let extension = entry.path().extension().and_then(|extension| extension.to_str());
                entry.file_type().is_file() && extension.is_some_and(&wanted)
            }
            Err(_) => true,
        })
        .map(|entry| entry.map(DirEntry::into_path))
}

fn read_text(path: &Path) -> Result<String, DataError> {
    let bytes = std::fs::read(path).map_err(|reason| unreadable(path, reason))?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..offset].iter().filter(|&&byte| byte == b'\n').count() + 1;
        DataError::NotUtf8 { path: path.into(), offset, line, byte: error.as_bytes()[offset] }
    })
}

fn unreadable(path: &Path, reason: std::io::Error) -> DataError {
    DataError::Unreadable { path: path.into(), reason }
}

fn walk_error(folder: &Path, error: walkdir::Error) -> DataError {
    let path = error.path().unwrap_or(folder).to_path_buf();
    DataError::Unreadable { path, reason: error.into() }
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], DataError> {
    let (head, tail) = rest.split_at_checked(count).ok_or(DataError::Damaged { reason: "it ends too early" })?;
    *rest = tail;
    Ok(head)
}

fn take_u64(rest: &mut &[u8]) -> Result<u64, DataError> {
    let bytes = take(rest, 8)?;
    Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

fn take_text(rest: &mut &[u8]) -> Result<String, DataError> {
    let length = take_u64(rest)?;
    let length = usize::try_from(length).map_err(|_| DataError::Damaged { reason: "it ends too early" })?;
    String::from_utf8(take(rest, length)?.to_vec())
        .map_err(|_| DataError::Damaged { reason: "its description is not UTF-8" })
}

#[cfg(test)]
#[path = "corpus_tests.rs"]
mod tests;
