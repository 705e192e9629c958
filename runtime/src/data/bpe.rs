//! Training of a byte-level BPE tokenizer (Sennrich et al. 2016; over bytes as GPT-2 does).
//!
//! Owns the settings that make the file work everywhere: all 256 bytes are tokens, so that every text can be encoded. Counting
//! and merging are the `tokenizers` crate's.

use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer as Inner, Trainer,
};

use super::inputs::expand;
use super::reader::{Reading, read_pieces};
use super::{DataError, Piece};

/// Texts that are read ahead.
const QUEUE: usize = 64;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct BpeSpec {
    /// Text and record files, directories of them, patterns.
    pub paths: Vec<PathBuf>,
    /// The field of records that holds their text.
    pub text_field: String,
    /// Tokens of the vocabulary, all included.
    pub vocab_size: usize,
    /// The token that ends documents.
    pub end_token: String,
    /// Pairs that are rarer are not merged.
    pub min_frequency: u64,
    /// Whether the merging shows a bar on stderr.
    pub show_progress: bool,
}

/// A trained tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trained {
    /// The `tokenizer.json`.
    pub json: String,
    /// Tokens it has: fewer than asked for where the text is too short for so many merges.
    pub vocab_size: usize,
}

impl BpeSpec {
    /// The smallest vocabulary: every byte, and the token that ends documents.
    pub const LEAST_VOCABULARY: usize = 257;

    /// Bytes of input, as they lie on the disk.
    pub fn bytes(&self) -> Result<u64, DataError> {
        let size = |path: &Path| std::fs::metadata(path).map(|facts| facts.len()).map_err(DataError::unreadable(path));
        expand(&self.paths)?.iter().map(|file| size(&file.path)).sum()
    }
}

/// Trains a tokenizer. `meter` is told how many more bytes of input were read; the merging comes after the last.
pub fn train_bpe(spec: &BpeSpec, meter: &(dyn Fn(u64) + Sync)) -> Result<Trained, DataError> {
    if spec.vocab_size < BpeSpec::LEAST_VOCABULARY {
        let least = BpeSpec::LEAST_VOCABULARY;
        let reason = format!(
            "a vocabulary of {} is too small: the 256 bytes and the token after documents take {least}",
            spec.vocab_size
        );
        return Err(DataError::Training { reason });
    }
    let failed = |error: tokenizers::Error| DataError::Training { reason: error.to_string() };
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(spec.vocab_size)
        .min_frequency(spec.min_frequency)
        .show_progress(spec.show_progress)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(spec.end_token.clone(), true)])
        .build();
    let bytes = ByteLevel::new(false, true, true);
    let (sender, texts) = sync_channel::<String>(QUEUE);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let reading = Reading { text_field: &spec.text_field, meter };
            let mut send = |text: &str| {
                // Nobody listens any more: the counting failed, and says so itself.
                let _ = sender.send(text.to_owned());
            };
            for file in expand(&spec.paths)? {
                let mut bytes = 0;
                read_pieces(&file, None, &reading, &mut |piece| {
                    bytes += piece.bytes();
                    match piece {
                        Piece::File { text, .. } | Piece::Record { text } => send(text),
                        Piece::Example { prompt, completion } => [prompt, completion].into_iter().for_each(&mut send),
                    }
                    Ok(())
                })?;
                if bytes == 0 && file.named {
                    return Err(DataError::Empty { path: file.path });
                }
            }
            Ok::<_, DataError>(())
        });
        let counted = trainer.feed(texts.into_iter(), |text| {
            let mut words = PreTokenizedString::from(text);
            bytes.pre_tokenize(&mut words)?;
            let words = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
            Ok(words.into_iter().map(|(word, ..)| word.to_owned()).collect())
        });
        // A thread only ends without a result where it panicked, which is told already.
        reader.join().unwrap_or(Ok(()))?;
        counted.map_err(failed)
    })?;
    let mut model = BPE::default();
    let special = trainer.train(&mut model).map_err(failed)?;
    let vocab_size = model.get_vocab_size();
    let mut tokenizer = Inner::new(model);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(ByteLevel::default()));
    tokenizer.add_special_tokens(special).map_err(failed)?;
    Ok(Trained { json: tokenizer.to_string(true).map_err(failed)?, vocab_size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{FileTokenizer, Tokenizer};

    #[test]
    fn a_trained_tokenizer_is_a_file_that_encodes_every_text_with_fewer_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let (text, records) = (folder.path().join("a.txt"), folder.path().join("b.jsonl"));
        std::fs::write(&text, "the cat sat on the mat, and the dog ate the hat.\n".repeat(50)).unwrap();
        std::fs::write(&records, "{\"text\": \"the end of the story\"}\n".repeat(20)).unwrap();
        let spec = BpeSpec {
            paths: vec![text.clone(), records],
            text_field: "text".into(),
            vocab_size: 280,
            end_token: "<|endoftext|>".into(),
            min_frequency: 2,
            show_progress: false,
        };
        let trained = train_bpe(&spec, &|_| {}).unwrap();
        assert_eq!(trained.vocab_size, 280);
        assert_eq!(train_bpe(&spec, &|_| {}).unwrap(), trained, "the same text makes the same tokenizer");
        let file = folder.path().join("tokenizer.json");
        std::fs::write(&file, &trained.json).unwrap();
        let tokenizer = FileTokenizer::open(&file).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_document()), (280, Some(0)));
        for text in ["the cat and the dog", "née Ω 漢字 🙂\r\n\t", ""] {
            let ids = tokenizer.encode(text).unwrap();
            let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
            assert_eq!(tokenizer.decode(&ids), text);
        }
        assert!(tokenizer.encode("the cat and the dog").unwrap().len() < 10);

        let refused = train_bpe(&BpeSpec { vocab_size: 256, ..spec.clone() }, &|_| {}).unwrap_err();
        assert!(refused.to_string().contains("take 257"), "{refused}");
        std::fs::write(&text, b"\xff").unwrap();
        assert!(matches!(train_bpe(&spec, &|_| {}), Err(DataError::NotUtf8 { .. })));
    }
}
