//! Text to tokens and back.
//!
//! Owns the tokenizers by name. It reads no file.

use super::DataError;

/// The names [`tokenizer`] knows.
pub const TOKENIZERS: [&str; 1] = [ByteTokenizer::NAME];

/// Turns text into token ids below [`Tokenizer::vocab_size`] and back.
pub trait Tokenizer: Send + Sync {
    /// The name in configurations and checkpoints.
    fn name(&self) -> &str;
    /// Different ids there are.
    fn vocab_size(&self) -> usize;
    /// Appends the ids of `text` to `ids`.
    fn encode_into(&self, text: &str, ids: &mut Vec<u32>);
    /// The text of `ids`, with U+FFFD where they are not whole characters or not ids of this tokenizer.
    fn decode(&self, ids: &[i32]) -> String;

    /// The ids of `text`.
    fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.encode_into(text, &mut ids);
        ids
    }
}

/// The tokenizer called `name`.
pub fn tokenizer(name: &str) -> Result<Box<dyn Tokenizer>, DataError> {
    match name {
        ByteTokenizer::NAME => Ok(Box::new(ByteTokenizer)),
        _ => Err(DataError::UnknownTokenizer { name: name.into() }),
    }
}

/// One token a byte of UTF-8: no training, no file, every text, 256 ids.
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

    fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        ids.extend(text.bytes().map(u32::from));
    }

    fn decode(&self, ids: &[i32]) -> String {
        // 0xff occurs nowhere in UTF-8, so an id beyond the bytes, which a larger vocabulary allows, becomes U+FFFD as well.
        let bytes: Vec<u8> = ids.iter().map(|&id| u8::try_from(id).unwrap_or(0xff)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_that_are_no_text_become_the_replacement_character() {
        assert_eq!(ByteTokenizer.decode(&[104, 105, 256, 4095, -1]), "hi\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(ByteTokenizer.decode(&[0xc3]), "\u{fffd}");
        assert!(tokenizer("words").is_err());
    }

    proptest! {
        #[test]
        fn every_text_comes_back(text in "\\PC*") {
            let tokenizer = tokenizer("bytes").unwrap();
            let ids = tokenizer.encode(&text);
            prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
            prop_assert_eq!(tokenizer.decode(&ids), text);
        }
    }
}
