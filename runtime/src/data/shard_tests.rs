//! A shard comes back as it was written, and every way it can be wrong is refused.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::data::encode::TokenSink;
use crate::data::{ShardSource, ShardWriter, Stream};
use crate::exit::{Classified, ExitCode};

/// Writes documents (tokens, prompt) to a shard of a new folder.
fn written(vocab_size: usize, documents: &[(Vec<u32>, u64)]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tokens");
    let source = ShardSource { vocab_size, tokenizer: [3; 32], origin: [4; 32] };
    let mut writer = ShardWriter::create(&path, source).unwrap();
    assert!(!path.exists(), "not there before it is whole");
    for (tokens, prompt) in documents {
        writer.push(tokens);
        writer.end_document(*prompt);
    }
    let header = writer.finish().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), header.file_bytes());
    (folder, path)
}

fn refused(path: &Path, bytes: &[u8]) -> String {
    fs::write(path, bytes).unwrap();
    let error = Shard::open(path).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::BadData, "{error}");
    error.to_string()
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        vocab_size in prop_oneof![Just(256usize), Just(60_000), Just(200_000)],
        documents in proptest::collection::vec((proptest::collection::vec(0u32..256, 1..9), 0u64..9), 0..20),
    ) {
        let documents: Vec<_> = documents.into_iter().map(|(ids, prompt)| {
            let prompt = prompt.min(ids.len() as u64);
            (ids.into_iter().map(|id| id * (vocab_size as u32 / 256)).collect::<Vec<_>>(), prompt)
        }).collect();
        let (_folder, path) = written(vocab_size, &documents);
        let shard = Shard::open(&path).unwrap();
        shard.verify().unwrap();
        shard.check_fits(("t", [3; 32]), vocab_size).unwrap();
        let stream = Stream::new([shard.segment()]);
        let tokens: Vec<i32> = documents.iter().flat_map(|(ids, _)| ids.iter().map(|&id| id as i32)).collect();
        let mut found = vec![0; tokens.len()];
        stream.copy_to(0, &mut found);
        prop_assert_eq!(&found, &tokens);
        stream.copy_targets_to(0, &mut found);
        let targets: Vec<i32> = documents.iter().flat_map(|(ids, prompt)| {
            ids.iter().enumerate().map(|(at, &id)| if (at as u64) < *prompt { -1 } else { id as i32 })
        }).collect();
        prop_assert_eq!(&found, &targets);
        prop_assert_eq!(stream.documents(), documents.len());
    }
}

#[test]
fn every_damage_has_its_own_message() {
    let (_folder, path) = written(256, &[(vec![1, 2, 3], 1), (vec![4, 5], 0)]);
    let good = fs::read(&path).unwrap();
    let changed = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    assert!(refused(&path, b"").ends_with("is empty"));
    assert!(refused(&path, b"plain text").contains("is no token shard: it does not begin with \"MOETOKEN\""));
    assert!(refused(&path, &good[..100]).contains("is 100 bytes long where its header says 256"));
    assert!(refused(&path, &good[..good.len() - 1]).contains("it was cut off or changed"));
    assert!(refused(&path, &[&good[..], b"x"].concat()).contains("it was cut off or changed"));
    assert!(refused(&path, &changed(8, 2)).contains("is a token shard of version 2; this program reads version 1"));
    assert!(refused(&path, &changed(24, 9)).contains("its header is damaged"));
    let ends = good.len() - 2 * 4 - 2 * 8;
    assert!(refused(&path, &changed(ends, 7)).contains("document 0 ends at token 7, outside of its 5 tokens"));
    assert!(refused(&path, &changed(ends + 8, 2)).contains("document 1 ends at token 2"));
    assert!(refused(&path, &changed(ends + 8, 4)).contains("the last document does not end with the last token"));

    fs::write(&path, changed(HEADER_BYTES + 1, 0)).unwrap();
    let text = Shard::open(&path).unwrap().verify().unwrap_err().to_string();
    assert!(text.contains("its tokens are damaged: their hash is "), "{text}");
}

#[test]
fn tokens_beyond_the_vocabulary_and_another_tokenizer_are_refused() {
    let (_folder, path) = written(5000, &[(vec![1, 4000, 3], 0)]);
    let shard = Shard::open(&path).unwrap();
    let error = shard.check_fits(("t", [3; 32]), 4000).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::BadData);
    let text = error.to_string();
    assert!(text.contains("a.tokens: token 1 is 4000, but the vocabulary has the tokens 0 to 3999"), "{text}");
    let text = shard.check_fits(("t.json", [9; 32]), 5000).unwrap_err().to_string();
    assert!(text.contains("was made with another tokenizer") && text.contains("data.tokenizer = \"t.json\""), "{text}");
    // A header that lies about the largest token does not help: the tokens themselves are read.
    let mut bytes = fs::read(&path).unwrap();
    let lie = ShardHeader { largest: 3, ..shard.header().clone() };
    bytes[..HEADER_BYTES].copy_from_slice(&lie.to_bytes());
    fs::write(&path, bytes).unwrap();
    let error = Shard::open(&path).unwrap().check_fits(("t", [3; 32]), 4000).unwrap_err();
    assert!(matches!(error, DataError::BeyondVocabulary { position: 1, id: 4000, .. }), "{error}");
}

#[test]
fn a_shard_that_is_given_up_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let source = ShardSource { vocab_size: 256, tokenizer: [0; 32], origin: [0; 32] };
    let mut writer = ShardWriter::create(&folder.path().join("a.tokens"), source).unwrap();
    writer.push(&[1, 2, 3]);
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
