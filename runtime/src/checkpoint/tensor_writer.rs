//! Writing one safetensors file, whose hash is known as soon as it is there.
//!
//! Owns the way to the disk. What the tensors are and where their values come from is the caller's.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use safetensors::Dtype;
use sha2::{Digest, Sha256};

use super::CheckpointError;
use super::manifest::{FileEntry, TensorEntry};
use super::tensor_file::header_of;
use crate::data::hexadecimal;

/// Writes a new file `name` in `dir` with these tensors, flushed to the disk. `bytes_of` gives the values of the tensor of an
/// index, in its type: one tensor at a time is in host memory, never the model.
///
/// # Errors
/// The file is there already or cannot be written, or `bytes_of` failed.
pub(super) fn write_tensors(
    dir: &Path,
    name: &str,
    dtype: Dtype,
    tensors: &[(&str, &[usize])],
    mut bytes_of: impl FnMut(usize) -> Result<Vec<u8>, CheckpointError>,
) -> Result<FileEntry, CheckpointError> {
    let path = dir.join(name);
    let file = File::create_new(&path).map_err(CheckpointError::io("create", &path))?;
    let mut out = Hashing { file: BufWriter::new(file), hash: Sha256::new(), bytes: 0 };
    out.write(&header_of(dtype, tensors.iter().copied())).map_err(CheckpointError::io("write", &path))?;
    for at in 0..tensors.len() {
        let bytes = bytes_of(at)?;
        out.write(&bytes).map_err(CheckpointError::io("write", &path))?;
    }
    let (bytes, sha256) = out.finish().map_err(CheckpointError::io("write", &path))?;
    let entry = |(name, shape): &(&str, &[usize])| TensorEntry {
        name: (*name).to_owned(),
        dtype: dtype.to_string(),
        shape: shape.to_vec(),
    };
    Ok(FileEntry { name: name.to_owned(), bytes, sha256, tensors: tensors.iter().map(entry).collect() })
}

struct Hashing {
    file: BufWriter<File>,
    hash: Sha256,
    bytes: u64,
}

impl Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    /// Flushes to the disk: (length, hash).
    fn finish(self) -> io::Result<(u64, String)> {
        let file = self.file.into_inner().map_err(|error| error.into_error())?;
        file.sync_all()?;
        Ok((self.bytes, hexadecimal(&self.hash.finalize())))
    }
}
