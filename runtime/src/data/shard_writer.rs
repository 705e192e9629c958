//! Writing a token shard: it is complete and at its place, or not there.
//!
//! Owns the temporary file, its hash and the rename. Tokens go to the disk as they come; only the table of documents is kept.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::DataError;
use super::encode::TokenSink;
use super::shard::{HEADER_BYTES, ShardHeader};
use super::stream::DocumentList;

/// Ending of the names of files that are being written; they also begin with a dot.
pub(super) const PARTIAL: &str = ".partial";

/// Buffer of a file.
const BUFFER_BYTES: usize = 1 << 20;

/// Who makes a shard.
#[derive(Clone, Copy, Debug)]
pub struct ShardSource {
    /// Different tokens the tokenizer makes.
    pub vocab_size: usize,
    /// Identity of the tokenizer.
    pub tokenizer: [u8; 32],
    /// What the shard is made of.
    pub origin: [u8; 32],
}

/// A shard that is being written.
pub struct ShardWriter {
    path: PathBuf,
    partial: PathBuf,
    out: BufWriter<File>,
    hash: Sha256,
    header: ShardHeader,
    documents: DocumentList,
    bytes: Vec<u8>,
    failed: Option<io::Error>,
    finished: bool,
}

impl ShardWriter {
    /// Begins the shard that will be at `path`; until [`ShardWriter::finish`] it is a hidden file beside it.
    pub fn create(path: &Path, source: ShardSource) -> Result<Self, DataError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = path.with_file_name(format!(".{name}{PARTIAL}"));
        let create = || -> io::Result<_> {
            let mut out = BufWriter::with_capacity(BUFFER_BYTES, File::create(&partial)?);
            out.write_all(&[0; HEADER_BYTES])?;
            Ok(out)
        };
        let out = create().map_err(DataError::unwritable(&partial))?;
        let token_bytes = match source.vocab_size {
            ..=0x100 => 1,
            0x101..=0x1_0000 => 2,
            _ => 4,
        };
        let header = ShardHeader {
            token_bytes,
            vocab_size: source.vocab_size as u64,
            tokens: 0,
            documents: 0,
            prompts: false,
            largest: 0,
            content: [0; 32],
            tokenizer: source.tokenizer,
            origin: source.origin,
        };
        Ok(Self {
            path: path.into(),
            partial,
            out,
            hash: Sha256::new(),
            header,
            documents: DocumentList::default(),
            bytes: Vec::new(),
            failed: None,
            finished: false,
        })
    }

    /// Puts the finished shard at its place and returns what it holds.
    pub fn finish(mut self) -> Result<ShardHeader, DataError> {
        self.finish_file().map_err(DataError::unwritable(&self.path))?;
        self.finished = true;
        Ok(self.header.clone())
    }

    fn finish_file(&mut self) -> io::Result<()> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        // What is open ends here.
        self.documents.push(self.header.tokens, 0);
        self.header.documents = self.documents.ends().len() as u64;
        self.header.prompts = !self.documents.prompts().is_empty();
        let end = HEADER_BYTES as u64 + self.header.tokens * u64::from(self.header.token_bytes);
        let mut tables = vec![0; (self.header.ends_offset() - end) as usize];
        tables.extend(self.documents.ends().iter().flat_map(|end| end.to_le_bytes()));
        // A prompt longer than 2³² tokens would need a file of gigabytes in one line.
        tables.extend(self.documents.prompts().iter().flat_map(|&prompt| (prompt as u32).to_le_bytes()));
        self.write(&tables)?;
        self.header.content = self.hash.finalize_reset().into();
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&self.header.to_bytes())?;
        self.out.flush()?;
        self.out.get_ref().sync_all()?;
        fs::rename(&self.partial, &self.path)?;
        match self.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.out.write_all(bytes)
    }
}

impl TokenSink for ShardWriter {
    fn push(&mut self, ids: &[u32]) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        match self.header.token_bytes {
            1 => bytes.extend(ids.iter().map(|&id| id as u8)),
            2 => bytes.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
            _ => bytes.extend(ids.iter().flat_map(|&id| id.to_le_bytes())),
        }
        self.header.largest = ids.iter().fold(self.header.largest, |largest, &id| largest.max(u64::from(id)));
        self.header.tokens += ids.len() as u64;
        if self.failed.is_none() {
            // Kept until the end: whoever pushes tokens cannot do anything about a full disk.
            self.failed = self.write(&bytes).err();
        }
        self.bytes = bytes;
    }

    fn end_document(&mut self, prompt: u64) {
        self.documents.push(self.header.tokens, prompt);
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if !self.finished {
            // What cannot be removed now is removed when the same work is begun again.
            let _ = fs::remove_file(&self.partial);
        }
    }
}
