//! Pieces of text to tokens with their documents.
//!
//! Owns what a document is: a record, an example, or a text file, each with the token that ends it. Where the tokens go is the
//! sink's business.

use super::tokenizer::EndTokens;
use super::{DataError, Piece, Tokenizer};

/// Longer texts are encoded in parts that end with a line, so that memory stays bounded.
const PART_BYTES: usize = 1 << 20;

/// Takes tokens.
pub(super) trait TokenSink {
    /// Appends `ids` to the document that is open.
    fn push(&mut self, ids: &[u32]);
    /// Ends it; its first `prompt` tokens are given and not learned.
    fn end_document(&mut self, prompt: u64);
}

/// Encodes pieces.
pub(super) struct Encoder<'a> {
    tokenizer: &'a dyn Tokenizer,
    ends: EndTokens,
    ids: Vec<u32>,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(tokenizer: &'a dyn Tokenizer, ends: EndTokens) -> Self {
        Self { tokenizer, ends, ids: Vec::new() }
    }

    /// Appends the tokens of `piece` to `sink`.
    pub(super) fn encode(&mut self, piece: Piece<'_>, sink: &mut dyn TokenSink) -> Result<(), DataError> {
        match piece {
            Piece::File { text, last } => {
                self.text(text, sink)?;
                if last {
                    Self::end(self.ends.file, 0, sink);
                }
            }
            // A record without text is no document.
            Piece::Record { text: "" } => {}
            Piece::Record { text } => {
                self.text(text, sink)?;
                Self::end(self.ends.record, 0, sink);
            }
            Piece::Example { prompt, completion } => {
                let given = self.text(prompt, sink)?;
                self.text(completion, sink)?;
                Self::end(self.ends.record, given, sink);
            }
        }
        Ok(())
    }

    /// Appends the tokens of `text` and returns how many.
    fn text(&mut self, text: &str, sink: &mut dyn TokenSink) -> Result<u64, DataError> {
        let mut count = 0;
        for part in parts(text) {
            self.ids.clear();
            self.tokenizer.encode_into(part, &mut self.ids)?;
            sink.push(&self.ids);
            count += self.ids.len() as u64;
        }
        Ok(count)
    }

    fn end(token: Option<u32>, prompt: u64, sink: &mut dyn TokenSink) {
        if let Some(token) = token {
            sink.push(&[token]);
        }
        sink.end_document(prompt);
    }
}

/// `text` in parts of at least [`PART_BYTES`], each but the last up to the end of a line.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        // A newline is never part of another character, so the cut behind it is a character's boundary.
        let from = PART_BYTES.saturating_sub(1).min(rest.len());
        let cut = rest.as_bytes()[from..].iter().position(|&byte| byte == b'\n').map_or(rest.len(), |at| from + at + 1);
        let (part, later) = rest.split_at(cut);
        rest = later;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ByteTokenizer;
    use crate::data::tokenizer::EndOfDocument;

    /// Documents as (text, tokens of the prompt).
    #[derive(Default)]
    struct Documents(Vec<(Vec<u32>, u64)>, Vec<u32>);

    impl TokenSink for Documents {
        fn push(&mut self, ids: &[u32]) {
            self.1.extend(ids);
        }

        fn end_document(&mut self, prompt: u64) {
            self.0.push((std::mem::take(&mut self.1), prompt));
        }
    }

    #[test]
    fn documents_end_with_their_token_and_prompts_are_counted() {
        let mut encoder = Encoder::new(&ByteTokenizer, EndOfDocument::Auto.tokens(&ByteTokenizer).unwrap());
        let mut documents = Documents::default();
        for piece in [
            Piece::File { text: "a\n", last: false },
            Piece::File { text: "b", last: true },
            Piece::Record { text: "c" },
            Piece::Record { text: "" },
            Piece::Example { prompt: "dé", completion: "f" },
        ] {
            encoder.encode(piece, &mut documents).unwrap();
        }
        let expected: [(&[u8], u64); 3] = [(b"a\nb", 0), (b"c\0", 0), ("déf\0".as_bytes(), 3)];
        let expected = expected.map(|(text, prompt)| (text.iter().map(|&byte| u32::from(byte)).collect(), prompt));
        assert_eq!(documents.0, expected);
    }

    #[test]
    fn long_texts_are_cut_behind_a_line() {
        let line = format!("{}\n", "é".repeat(400_000));
        let text = line.repeat(4) + "end";
        let cut: Vec<_> = parts(&text).collect();
        assert_eq!(cut.concat(), text);
        assert_eq!(cut.iter().map(|part| part.len()).collect::<Vec<_>>(), [1_600_002, 1_600_002, 3]);
        assert_eq!(parts("").count(), 0);
    }
}
