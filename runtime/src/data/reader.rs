//! A text or record file, plain or compressed, as pieces of text.
//!
//! Owns decompression, the cut of long texts, the form of a record, and the line of everything that is wrong. It knows no tokens.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::DataError;
use super::inputs::{Compression, Format, InputFile};
use super::records::{Content, parse};

/// A text file is read in parts of so many bytes and the rest of their last line.
const PART_BYTES: u64 = 1 << 20;

/// Buffer of a file.
const BUFFER_BYTES: usize = 256 << 10;

/// The largest window of a zstd frame, as a power of two: what `zstd --long=31` makes.
const ZSTD_WINDOW_LOG: u32 = 31;

/// A piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// A part of a text file: whole lines.
    File {
        /// The text.
        text: &'a str,
        /// Whether the file ends here.
        last: bool,
    },
    /// The text of a record: a document.
    Record {
        /// The text.
        text: &'a str,
    },
    /// An example to learn from: a document whose first part is given and not learned.
    Example {
        /// What is given.
        prompt: &'a str,
        /// What is to be learned.
        completion: &'a str,
    },
}

impl Piece<'_> {
    /// Bytes of text.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::File { text, .. } | Self::Record { text } => text.len(),
            Self::Example { prompt, completion } => prompt.len() + completion.len(),
        }
    }
}

/// How files are read.
pub(super) struct Reading<'a> {
    /// The field of a record that holds its text.
    pub text_field: &'a str,
    /// Told how many more bytes of the file, as it lies on the disk, were read.
    pub meter: &'a (dyn Fn(u64) + Sync),
}

/// Hands the pieces of `file` to `sink`, in order; of a plain file perhaps only those of `range`, which begins and ends where
/// [`line_start`] says.
pub(super) fn read_pieces(
    file: &InputFile,
    range: Option<Range<u64>>,
    reading: &Reading,
    sink: &mut dyn FnMut(Piece<'_>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let first_byte = range.as_ref().map_or(0, |range| range.start);
    let mut text = Text { file, reader: open(file, range, reading)?, offset: first_byte, line: 1, first_byte };
    match file.format {
        Format::Text => text.read_file(sink),
        Format::Records => text.read_records(reading.text_field, sink),
        Format::Shard | Format::Megatron => {
            let reason = "holds tokens, not text: train on it as it is; text is .txt, .jsonl or any other file";
            Err(DataError::Unsuitable { path: file.path.clone(), reason })
        }
    }
}

/// Where the first line that begins at or after byte `at` of a plain file begins.
pub(super) fn line_start(path: &Path, at: u64) -> Result<u64, DataError> {
    let find = || -> io::Result<u64> {
        if at == 0 {
            return Ok(0);
        }
        let mut reader = BufReader::new(File::open(path)?);
        reader.seek(SeekFrom::Start(at - 1))?;
        Ok(at - 1 + reader.skip_until(b'\n')? as u64)
    };
    find().map_err(DataError::unreadable(path))
}

fn open<'a>(
    input: &InputFile,
    range: Option<Range<u64>>,
    reading: &Reading<'a>,
) -> Result<Box<dyn BufRead + 'a>, DataError> {
    let open = || -> io::Result<Box<dyn BufRead + 'a>> {
        let mut file = File::open(&input.path)?;
        let mut length = u64::MAX;
        if let Some(range) = range {
            file.seek(SeekFrom::Start(range.start))?;
            length = range.end - range.start;
        }
        let raw = BufReader::with_capacity(BUFFER_BYTES, Metered { inner: file.take(length), meter: reading.meter });
        Ok(match input.compression {
            Compression::None => Box::new(raw),
            Compression::Gzip => Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(raw))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(raw)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
            }
        })
    };
    open().map_err(DataError::unreadable(&input.path))
}

/// A file on its way past a meter.
struct Metered<'a> {
    inner: io::Take<File>,
    meter: &'a (dyn Fn(u64) + Sync),
}

impl Read for Metered<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(into)?;
        (self.meter)(count as u64);
        Ok(count)
    }
}

/// A file that is being read, and where in it.
struct Text<'a> {
    file: &'a InputFile,
    reader: Box<dyn BufRead + 'a>,
    /// Bytes before what is read next.
    offset: u64,
    /// Its line, counted from the first byte that is read.
    line: u64,
    /// Where reading began.
    first_byte: u64,
}

impl Text<'_> {
    fn read_file(&mut self, sink: &mut dyn FnMut(Piece<'_>) -> Result<(), DataError>) -> Result<(), DataError> {
        let mut part = Vec::new();
        loop {
            part.clear();
            self.read_part(&mut part).map_err(|error| self.failed(error))?;
            if part.is_empty() {
                return Ok(());
            }
            let next = self.reader.fill_buf().map(<[u8]>::is_empty);
            let last = next.map_err(|error| self.failed(error))?;
            let text = std::str::from_utf8(&part).map_err(|error| self.not_utf8(&part, error))?;
            sink(Piece::File { text, last })?;
            self.offset += part.len() as u64;
            self.line += newlines(&part);
        }
    }

    fn read_part(&mut self, part: &mut Vec<u8>) -> io::Result<()> {
        self.reader.by_ref().take(PART_BYTES).read_to_end(part)?;
        if part.len() as u64 == PART_BYTES && part.last() != Some(&b'\n') {
            self.reader.read_until(b'\n', part)?;
        }
        Ok(())
    }

    fn read_records(
        &mut self,
        text_field: &str,
        sink: &mut dyn FnMut(Piece<'_>) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            self.reader.read_until(b'\n', &mut bytes).map_err(|error| self.failed(error))?;
            if bytes.is_empty() {
                return Ok(());
            }
            let line = std::str::from_utf8(&bytes).map_err(|error| self.not_utf8(&bytes, error))?;
            if !line.trim_ascii().is_empty() {
                match parse(line.trim_ascii_end(), text_field).map_err(|error| self.not_json(&error))? {
                    Content::Text(text) => sink(Piece::Record { text: &text })?,
                    Content::Example { prompt, completion } => {
                        sink(Piece::Example { prompt: &prompt, completion: &completion })?;
                    }
                    Content::Neither { fields } => {
                        let (path, line) = (self.file.path.clone(), self.line_of(0));
                        return Err(DataError::NoField { path, line, field: text_field.into(), found: fields });
                    }
                }
            }
            self.offset += bytes.len() as u64;
            self.line += 1;
        }
    }

    /// The line, from 1, that is `below` lines below the next one to be read. Where reading began inside the file, the lines
    /// before are counted now that somebody asks.
    fn line_of(&self, below: u64) -> u64 {
        let mut before = 0;
        if let Ok(file) = File::open(&self.file.path) {
            let mut reader = BufReader::new(file.take(self.first_byte));
            while let Ok(part @ [_, ..]) = reader.fill_buf() {
                before += newlines(part);
                let length = part.len();
                reader.consume(length);
            }
        }
        before + self.line + below
    }

    fn failed(&self, reason: io::Error) -> DataError {
        let path = self.file.path.clone();
        let format = match self.file.compression {
            Compression::None => return DataError::Unreadable { path, reason },
            // The system's own errors have a number, the decoders' have none.
            _ if reason.raw_os_error().is_some() => return DataError::Unreadable { path, reason },
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        };
        DataError::Compressed { path, line: self.line_of(0), format, reason }
    }

    fn not_utf8(&self, bytes: &[u8], error: std::str::Utf8Error) -> DataError {
        let at = error.valid_up_to();
        let line = self.line_of(newlines(&bytes[..at]));
        DataError::NotUtf8 { path: self.file.path.clone(), offset: self.offset + at as u64, line, byte: bytes[at] }
    }

    fn not_json(&self, error: &serde_json::Error) -> DataError {
        let text = error.to_string();
        // Each line is parsed alone: the parser's own line is always 1.
        let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason).to_owned();
        DataError::Json { path: self.file.path.clone(), line: self.line_of(0), column: error.column(), reason }
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
