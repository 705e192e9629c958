//! Tokenizers from Hugging Face `tokenizer.json` files.
//!
//! Owns the file and what it says about the end of a document. How text becomes tokens is the `tokenizers` crate's.

use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer as Inner;

use super::{DataError, Tokenizer};

/// The file beside it that names the special tokens.
const CONFIG: &str = "tokenizer_config.json";

/// Names that tokenizers give the token after a document; the first that exists counts where `tokenizer_config.json` is silent.
pub(super) const END_TOKENS: [&str; 7] =
    ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]"];

/// A tokenizer from a file.
pub struct FileTokenizer {
    name: String,
    file: PathBuf,
    inner: Inner,
    vocab_size: usize,
    identity: [u8; 32],
    end: Option<(String, u32)>,
}

impl FileTokenizer {
    /// The file in a model folder.
    pub const FILE: &'static str = "tokenizer.json";

    /// Reads the `tokenizer.json` at `path`, or in the folder at `path`.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let file: PathBuf = if path.is_dir() { path.join(Self::FILE) } else { path.into() };
        let bytes = std::fs::read(&file).map_err(DataError::unreadable(&file))?;
        if bytes.is_empty() {
            return Err(DataError::Empty { path: file });
        }
        let wrong = |reason: String| DataError::NotATokenizer { path: file.clone(), reason };
        // The library panics where the text ends inside a decoder.
        serde_json::from_slice::<IgnoredAny>(&bytes).map_err(|error| wrong(error.to_string()))?;
        let inner = Inner::from_bytes(&bytes).map_err(|error| wrong(error.to_string()))?;
        // Ids may have gaps: what counts for a model is the largest.
        let largest = inner.get_vocab(true).into_values().max().ok_or_else(|| wrong("it has no tokens".into()))?;
        let end = end_token(&file, &inner)?;
        Ok(Self {
            name: path.display().to_string(),
            file,
            inner,
            vocab_size: largest as usize + 1,
            identity: Sha256::digest(&bytes).into(),
            end,
        })
    }

    /// The file it was read from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The token after a document, and its id.
    pub fn end(&self) -> Option<(&str, u32)> {
        self.end.as_ref().map(|(token, id)| (token.as_str(), *id))
    }
}

/// The token after a document: what `tokenizer_config.json` beside `file` calls `eos_token`, else a well-known name.
fn end_token(file: &Path, inner: &Inner) -> Result<Option<(String, u32)>, DataError> {
    let with_id = |token: &str| inner.token_to_id(token).map(|id| (token.to_owned(), id));
    let config = file.with_file_name(CONFIG);
    if config.exists() {
        let bytes = std::fs::read(&config).map_err(DataError::unreadable(&config))?;
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|error| DataError::NotATokenizer { path: config, reason: error.to_string() })?;
        let token = &value["eos_token"];
        if let Some(end) = token.as_str().or(token["content"].as_str()).and_then(with_id) {
            return Ok(Some(end));
        }
    }
    Ok(END_TOKENS.iter().find_map(|token| with_id(token)))
}

impl Tokenizer for FileTokenizer {
    fn name(&self) -> &str {
        &self.name
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn encode_into(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), DataError> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| DataError::Encoding { tokenizer: self.name.clone(), reason: error.to_string() })?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    fn decode(&self, ids: &[i32]) -> String {
        // An id that is none of the tokenizer's has no text: it stands between two parts that are decoded on their own.
        let known = |id: &i32| u32::try_from(*id).is_ok_and(|id| (id as usize) < self.vocab_size);
        let parts = ids.split(|id| !known(id)).map(|part| {
            let ids: Vec<u32> = part.iter().map(|&id| id as u32).collect();
            self.inner.decode(&ids, true).unwrap_or_else(|_| char::REPLACEMENT_CHARACTER.to_string())
        });
        parts.collect::<Vec<_>>().join("\u{fffd}")
    }

    fn identity(&self) -> [u8; 32] {
        self.identity
    }

    fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn end_of_document(&self) -> Option<u32> {
        self.end().map(|(_, id)| id)
    }

    fn ends_files(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[path = "tokenizer_file_tests.rs"]
mod tests;
