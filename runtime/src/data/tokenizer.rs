//! Text to tokens and back.
//!
//! Owns what a tokenizer is, the byte tokenizer, and what ends a document. Files are `tokenizer_file`'s.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::DataError;
use super::tokenizer_file::FileTokenizer;

/// The names [`tokenizer`] knows; everything else is a path.
pub const TOKENIZERS: [&str; 1] = [ByteTokenizer::NAME];

/// Turns text into token ids below [`Tokenizer::vocab_size`] and back.
pub trait Tokenizer: Send + Sync {
    /// The name in configurations and checkpoints.
    fn name(&self) -> &str;
    /// Different ids there are: one more than the largest.
    fn vocab_size(&self) -> usize;
    /// Appends the ids of `text` to `ids`. Fails where the tokenizer has no token for a part of the text.
    fn encode_into(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), DataError>;
    /// The text of `ids`, with U+FFFD where they are not whole characters or not ids of this tokenizer.
    fn decode(&self, ids: &[i32]) -> String;
    /// Hash of what makes it this tokenizer: two with the same make the same tokens.
    fn identity(&self) -> [u8; 32];
    /// The id of one token by its name.
    fn id_of(&self, token: &str) -> Option<u32>;
    /// The token that ends documents unless another is asked for.
    fn end_of_document(&self) -> Option<u32>;
    /// Whether that token ends text files as well as records.
    fn ends_files(&self) -> bool;

    /// The ids of `text`.
    fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut ids = Vec::new();
        self.encode_into(text, &mut ids)?;
        Ok(ids)
    }
}

/// The tokenizer called `name`: `bytes`, or the path of a `tokenizer.json` or of a folder that holds one.
pub fn tokenizer(name: &str) -> Result<Box<dyn Tokenizer>, DataError> {
    match name {
        ByteTokenizer::NAME => Ok(Box::new(ByteTokenizer)),
        _ if is_path(name) => Ok(Box::new(FileTokenizer::open(Path::new(name))?)),
        _ => Err(DataError::UnknownTokenizer { name: name.into() }),
    }
}

/// Whether the name of a tokenizer means a file: an unknown word is more likely a name that does not exist.
pub fn is_path(name: &str) -> bool {
    !TOKENIZERS.contains(&name)
        && (name.contains(std::path::MAIN_SEPARATOR) || name.ends_with(".json") || Path::new(name).exists())
}

/// Refuses a tokenizer that makes tokens a model with `vocab_size` tokens does not have.
pub fn check_vocabulary(tokenizer: &dyn Tokenizer, vocab_size: usize) -> Result<(), DataError> {
    let tokens = tokenizer.vocab_size();
    if tokens <= vocab_size {
        return Ok(());
    }
    Err(DataError::Vocabulary { tokenizer: tokenizer.name().into(), tokens, vocab_size })
}

/// One token a byte of UTF-8: no training, no file, every text, 256 ids. The zero byte, which text does not hold, ends records;
/// text files follow one another as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByteTokenizer;

impl ByteTokenizer {
    /// Its name.
    pub const NAME: &'static str = "bytes";
}

impl Tokenizer for ByteTokenizer {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn vocab_size(&self) -> usize {
        256
    }

    fn encode_into(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), DataError> {
        ids.extend(text.bytes().map(u32::from));
        Ok(())
    }

    fn decode(&self, ids: &[i32]) -> String {
        // 0xff occurs nowhere in UTF-8, so an id beyond the bytes, which a larger vocabulary allows, becomes U+FFFD as well.
        let bytes: Vec<u8> = ids.iter().map(|&id| u8::try_from(id).unwrap_or(0xff)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn identity(&self) -> [u8; 32] {
        Sha256::digest(Self::NAME).into()
    }

    fn id_of(&self, token: &str) -> Option<u32> {
        match token.as_bytes() {
            [byte] => Some(u32::from(*byte)),
            _ => None,
        }
    }

    fn end_of_document(&self) -> Option<u32> {
        Some(0)
    }

    fn ends_files(&self) -> bool {
        false
    }
}

/// What ends a document: `data.end_of_document`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EndOfDocument {
    /// The tokenizer's own token: `auto`.
    #[default]
    Auto,
    /// Nothing: `none`.
    None,
    /// The token of this name.
    Token(String),
}

impl EndOfDocument {
    /// The meaning of a word in a configuration.
    pub fn of_word(word: &str) -> Self {
        match word {
            "auto" => Self::Auto,
            "none" => Self::None,
            token => Self::Token(token.into()),
        }
    }

    /// The tokens that `tokenizer` ends records and text files with.
    pub(super) fn tokens(&self, tokenizer: &dyn Tokenizer) -> Result<EndTokens, DataError> {
        match self {
            Self::None => Ok(EndTokens::default()),
            Self::Auto => {
                let record = tokenizer.end_of_document();
                Ok(EndTokens { record, file: record.filter(|_| tokenizer.ends_files()) })
            }
            Self::Token(token) => match tokenizer.id_of(token) {
                id @ Some(_) => Ok(EndTokens { record: id, file: id }),
                None => Err(DataError::NoEndToken { token: token.clone(), tokenizer: tokenizer.name().into() }),
            },
        }
    }
}

/// The tokens after documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct EndTokens {
    /// After a record.
    pub(super) record: Option<u32>,
    /// After a text file.
    pub(super) file: Option<u32>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_that_are_no_text_become_the_replacement_character() {
        assert_eq!(ByteTokenizer.decode(&[104, 105, 256, 4095, -1]), "hi\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(ByteTokenizer.decode(&[0xc3]), "\u{fffd}");
        assert!(matches!(tokenizer("words"), Err(DataError::UnknownTokenizer { .. })));
        assert!(matches!(tokenizer("words/tokenizer.json"), Err(DataError::Unreadable { .. })));
    }

    #[test]
    fn what_ends_a_document_can_be_chosen() {
        let ends = |word| EndOfDocument::of_word(word).tokens(&ByteTokenizer);
        assert_eq!(ends("auto").unwrap(), EndTokens { record: Some(0), file: None });
        assert_eq!(ends("none").unwrap(), EndTokens::default());
        assert_eq!(ends("\n").unwrap(), EndTokens { record: Some(10), file: Some(10) });
        let text = ends("<eos>").unwrap_err().to_string();
        assert!(text.starts_with("data.end_of_document = \"<eos>\": bytes has no such token"), "{text}");
    }

    proptest! {
        #[test]
        fn every_text_comes_back(text in "\\PC*") {
            let tokenizer = tokenizer("bytes").unwrap();
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
            prop_assert_eq!(tokenizer.decode(&ids), text);
        }
    }
}
