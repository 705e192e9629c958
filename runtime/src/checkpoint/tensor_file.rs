//! One safetensors file: its header checked, its tensors read one at a time.
//!
//! Owns the way from a file's bytes to f32 values and back. It knows no model and no name.
//!
//! Tensors are read at their offset rather than through a memory map: the values are converted and uploaded anyway, so a map
//! would save nothing, and a file that is cut short or lost on network storage while it is read is an error here where it would
//! be a signal there.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde_json::Value;

use super::CheckpointError;

/// Bytes before the header: its length.
const PREFIX_BYTES: u64 = 8;
/// The longest header that is read; the safetensors library has the same limit.
const LONGEST_HEADER_BYTES: u64 = 100_000_000;

/// A safetensors file that is open and whose header is consistent with its size.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Offset of the first tensor.
    data_start: u64,
}

impl TensorFile {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// It cannot be read, is not a safetensors file, has a tensor of a type that the format does not know, or is longer or
    /// shorter than its header says.
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let malformed = |reason: String| CheckpointError::NotSafetensors { path: path.to_owned(), reason };
        let mut file = File::open(path).map_err(CheckpointError::io("open", path))?;
        let found_bytes = file.metadata().map_err(CheckpointError::io("read", path))?.len();
        let mut prefix = [0; PREFIX_BYTES as usize];
        if found_bytes < PREFIX_BYTES {
            return Err(malformed(format!("{found_bytes} bytes are too few for a header")));
        }
        file.read_exact(&mut prefix).map_err(CheckpointError::io("read", path))?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > LONGEST_HEADER_BYTES || header_bytes > found_bytes - PREFIX_BYTES {
            return Err(malformed(format!("a header of {header_bytes} bytes in a file of {found_bytes}")));
        }
        let mut text = vec![0; header_bytes as usize];
        file.read_exact(&mut text).map_err(CheckpointError::io("read", path))?;
        let header: Metadata = serde_json::from_slice(&text).map_err(|error| match unknown_dtype(&text) {
            Some((tensor, found)) => CheckpointError::UnknownDtype { path: path.to_owned(), tensor, found },
            None => malformed(error.to_string()),
        })?;
        let data_start = PREFIX_BYTES + header_bytes;
        let expected_bytes = data_start + header.data_len() as u64;
        if expected_bytes != found_bytes {
            return Err(CheckpointError::Length { path: path.to_owned(), expected_bytes, found_bytes });
        }
        Ok(Self { path: path.to_owned(), file, header, data_start })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its tensors, in the order of their data.
    pub(super) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// Type and shape of a tensor.
    pub(super) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// The values of a tensor of one of the types that [`readable`] accepts.
    ///
    /// # Errors
    /// The file cannot be read, or has no such tensor of such a type.
    pub(super) fn read(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let missing = || CheckpointError::NotSafetensors {
            path: self.path.clone(),
            reason: format!("it has no tensor {name} of a type that can be read"),
        };
        let info = self.header.info(name).filter(|info| readable(info.dtype)).ok_or_else(missing)?;
        Ok(decode(info.dtype, &self.bytes_of(info)?))
    }

    /// The bytes of a tensor, whatever its type; `info` is from this file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) fn bytes_of(&self, info: &TensorInfo) -> Result<Vec<u8>, CheckpointError> {
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        let at = self.data_start + start as u64;
        self.file.read_exact_at(&mut bytes, at).map_err(CheckpointError::io("read", &self.path))?;
        Ok(bytes)
    }
}

/// The file that `list`, an index or a manifest, names as being beside it.
///
/// # Errors
/// The name leads elsewhere, or there is no such file.
pub(super) fn plain_file(list: &Path, name: &str) -> Result<PathBuf, CheckpointError> {
    let wrong = |reason| CheckpointError::FileName { path: list.to_owned(), name: name.to_owned(), reason };
    // A list is data from elsewhere: it does not choose what is read outside its folder.
    if !matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(_)]) {
        return Err(wrong("not the plain name of a file in the same folder"));
    }
    let file = list.with_file_name(name);
    if file.is_file() { Ok(file) } else { Err(wrong("there is no such file in the folder")) }
}

/// Whether values of a type can be read as f32 without loss.
pub(super) fn readable(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16)
}

/// The types of [`readable`], for messages.
pub(super) const READABLE: &str = "F32, BF16 or F16";

/// The header of a safetensors file with these tensors of one type, in this order, with its length before it. The same tensors
/// give the same bytes.
pub(super) fn header_of<'a>(dtype: Dtype, tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>) -> Vec<u8> {
    let mut end = 0;
    let infos = tensors.into_iter().map(|(name, shape)| {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name.to_owned(), TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (start, end) })
    });
    // transformers opens only files that say which framework's tensors they hold.
    let framework = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(framework), infos.collect()).and_then(|header| Ok(serde_json::to_vec(&header)?));
    let Ok(mut header) = header else { unreachable!("offsets are consecutive and strings are JSON") };
    // Readers that map the file want the data aligned.
    header.resize(header.len().next_multiple_of(PREFIX_BYTES as usize), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    bytes
}

/// The values as they are stored: little-endian.
pub(super) fn encode(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter().map(|&half| u16::from_le_bytes(half));
    match dtype {
        Dtype::BF16 => halves().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect(),
        Dtype::F16 => halves().map(from_f16).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|&word| f32::from_le_bytes(word)).collect(),
    }
}

/// The exact value of an IEEE 754 binary16 number.
fn from_f16(bits: u16) -> f32 {
    let (sign, exponent, fraction) = (u32::from(bits >> 15) << 31, u32::from(bits >> 10) & 31, u32::from(bits) & 1023);
    match exponent {
        // Subnormal: a multiple of 2⁻²⁴.
        0 => f32::from_bits(sign | (fraction as f32 * f32::from_bits((127 - 24) << 23)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 127 - 15) << 23 | fraction << 13),
    }
}

/// The first tensor of a header whose type the format does not know: (name, type).
fn unknown_dtype(header: &[u8]) -> Option<(String, String)> {
    let tensors: serde_json::Map<String, Value> = serde_json::from_slice(header).ok()?;
    tensors.into_iter().find_map(|(name, info)| {
        let dtype = info.get("dtype")?;
        Dtype::deserialize(dtype).is_err().then(|| (name, dtype.to_string()))
    })
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn what_is_written_here_is_what_the_library_reads() {
        let (a, b) = ([1.0, -2.5, f32::MIN_POSITIVE, 3.0], [7.0]);
        let mut bytes = header_of(Dtype::F32, [("b", [2, 2].as_slice()), ("a", [1].as_slice())]);
        bytes.extend(encode(&a));
        bytes.extend(encode(&b));
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("b").unwrap().shape(), [2, 2]);
        assert_eq!(read.tensor("b").unwrap().data(), encode(&a));
        assert_eq!(read.tensor("a").unwrap().data(), encode(&b));
        let (_dir, path) = file(&bytes);
        let file = TensorFile::open(&path).unwrap();
        assert_eq!((file.read("b").unwrap(), file.read("a").unwrap()), (a.to_vec(), b.to_vec()));
    }

    #[test]
    fn half_precision_values_are_read_exactly() {
        let bits: [u16; 6] = [0x3c00, 0xc100, 0x0001, 0x8000, 0x7c00, 0x7bff];
        let raw: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let half = TensorView::new(Dtype::F16, vec![6], &raw).unwrap();
        let brain = TensorView::new(Dtype::BF16, vec![6], &raw).unwrap();
        let (_dir, path) = file(&safetensors::serialize([("half", half), ("brain", brain)], None).unwrap());
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.read("half").unwrap(), [1.0, -2.5, 2f32.powi(-24), -0.0, f32::INFINITY, 65504.0]);
        let brain = file.read("brain").unwrap();
        assert_eq!((brain[0], brain[1], brain[5]), (0.007_812_5, -8.0, f32::from_bits(0x7bff_0000)));
    }

    #[test]
    fn every_binary16_number_has_the_value_its_fields_give() {
        for bits in 0..=u16::MAX {
            let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
            let magnitude = match exponent {
                31 if fraction == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                0 => fraction / 1024.0 * 2f64.powi(-14),
                _ => (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15),
            };
            let expected = if bits >> 15 == 1 { -magnitude } else { magnitude };
            let found = f64::from(from_f16(bits));
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{bits:#x}: {found} {expected}");
        }
    }

    #[test]
    fn each_way_a_file_can_be_broken_has_its_own_error() {
        let mut whole = header_of(Dtype::F32, [("a", [4].as_slice())]);
        whole.extend(encode(&[1.0; 4]));
        let opened = |bytes: &[u8]| {
            let (_dir, path) = file(bytes);
            TensorFile::open(&path).unwrap_err()
        };
        assert!(matches!(TensorFile::open(Path::new("/nowhere")), Err(CheckpointError::Io { .. })));
        assert!(matches!(opened(&whole[..5]), CheckpointError::NotSafetensors { .. }));
        assert!(matches!(opened(&whole[..20]), CheckpointError::NotSafetensors { .. }));
        assert!(matches!(opened(b"PK\x03\x04 this is a zip archive"), CheckpointError::NotSafetensors { .. }));
        let short = whole.len() as u64 - 3;
        match opened(&whole[..whole.len() - 3]) {
            CheckpointError::Length { expected_bytes, found_bytes, .. } => {
                assert_eq!((expected_bytes, found_bytes), (short + 3, short));
            }
            other => panic!("{other}"),
        }
        let text = String::from_utf8_lossy(&whole).replace("\"F32\"", "\"F12\"");
        match opened(text.as_bytes()) {
            CheckpointError::UnknownDtype { tensor, found, .. } => assert_eq!((&*tensor, &*found), ("a", "\"F12\"")),
            other => panic!("{other}"),
        }
    }
}
