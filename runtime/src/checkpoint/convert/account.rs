//! What was read and what was written, tensor by tensor.
//!
//! Owns the comparison that a conversion's success rests on. It reads and writes nothing itself.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use sha2::{Digest, Sha256};

use crate::checkpoint::CheckpointError;
use crate::data::hexadecimal;

/// What a conversion moved: the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Tensors.
    pub tensors: usize,
    /// Their elements.
    pub parameters: u64,
    /// Their bytes, as written.
    pub bytes: u64,
    /// One hash of names, types, shapes and hashes of all tensors as written, in the order of their names.
    pub sha256: String,
}

/// Type, shape and hash of every tensor of one side.
#[derive(Debug, Default)]
pub(super) struct Account(BTreeMap<String, Entry>);

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    sha256: String,
}

impl Account {
    /// Enters a tensor with its bytes.
    pub(super) fn enter(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
        let entry = Entry { dtype, shape: shape.to_vec(), sha256: hexadecimal(&Sha256::digest(bytes)) };
        self.0.insert(name.to_owned(), entry);
    }

    /// The account of what was read, where `written`, read back from `dir`, holds the same.
    ///
    /// # Errors
    /// Every tensor that is on one side only, or not the same on both.
    pub(super) fn settle(&self, written: &Self, dir: &Path) -> Result<Transfer, CheckpointError> {
        let mut differences = Vec::new();
        for (name, entry) in &self.0 {
            match written.0.get(name) {
                None => differences.push(format!("{name} is missing")),
                Some(found) if found != entry => differences.push(format!(
                    "{name} is {} {:?} with sha256 {}, not {} {:?} with {}",
                    found.dtype, found.shape, found.sha256, entry.dtype, entry.shape, entry.sha256
                )),
                Some(_) => {}
            }
        }
        let extra = written.0.keys().filter(|name| !self.0.contains_key(*name));
        differences.extend(extra.map(|name| format!("{name} is too many")));
        if !differences.is_empty() {
            return Err(CheckpointError::NotAsRead { dir: dir.to_owned(), differences });
        }
        Ok(self.transfer())
    }

    fn transfer(&self) -> Transfer {
        let mut hash = Sha256::new();
        let (mut parameters, mut bytes) = (0, 0);
        for (name, Entry { dtype, shape, sha256 }) in &self.0 {
            hash.update(format!("{name} {dtype} {shape:?} {sha256}\n"));
            let elements = shape.iter().product::<usize>() as u64;
            parameters += elements;
            bytes += elements * dtype.bitsize() as u64 / 8;
        }
        Transfer { tensors: self.0.len(), parameters, bytes, sha256: hexadecimal(&hash.finalize()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(tensors: &[(&str, &[u8])]) -> Account {
        let mut account = Account::default();
        for (name, bytes) in tensors {
            account.enter(name, Dtype::F32, &[bytes.len() / 4], bytes);
        }
        account
    }

    #[test]
    fn only_the_same_tensors_settle() {
        let read = account(&[("a", &[0; 4]), ("b", &[1; 8])]);
        let same = read.settle(&account(&[("b", &[1; 8]), ("a", &[0; 4])]), Path::new("d")).unwrap();
        assert_eq!((same.tensors, same.parameters, same.bytes), (2, 3, 12));
        for (written, said) in [
            (account(&[("a", &[0; 4])]), "b is missing"),
            (account(&[("a", &[0; 4]), ("b", &[1; 8]), ("c", &[0; 4])]), "c is too many"),
            (account(&[("a", &[0; 4]), ("b", &[2; 8])]), "b is F32 [2]"),
        ] {
            let error = read.settle(&written, Path::new("d")).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
