//! Data sets as Megatron writes them, and indexes that lie.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::data::Stream;
use crate::exit::{Classified, ExitCode};

/// An index of 16-bit tokens: sequences as (length, place), and the first sequences of documents.
fn index(sequences: &[(i32, i64)], firsts: &[i64]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(1u64.to_le_bytes());
    bytes.push(8);
    bytes.extend((sequences.len() as u64).to_le_bytes());
    bytes.extend((firsts.len() as u64).to_le_bytes());
    bytes.extend(sequences.iter().flat_map(|(length, _)| length.to_le_bytes()));
    bytes.extend(sequences.iter().flat_map(|(_, place)| place.to_le_bytes()));
    bytes.extend(firsts.iter().flat_map(|first| first.to_le_bytes()));
    bytes
}

fn written(index: &[u8], tokens: &[u16]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("corpus_text_document.idx");
    fs::write(&path, index).unwrap();
    fs::write(path.with_extension("bin"), tokens.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    (folder, path)
}

const SEQUENCES: [(i32, i64); 3] = [(3, 0), (1, 6), (2, 8)];
const TOKENS: [u16; 6] = [1, 2, 3, 400, 50_000, 6];

#[test]
fn tokens_and_documents_are_read_as_they_are() {
    let (_folder, path) = written(&index(&SEQUENCES, &[0, 1, 3]), &TOKENS);
    let set = Megatron::open(&path).unwrap();
    let stream = Stream::new([set.segment()]);
    let mut ids = [0; 6];
    stream.copy_to(0, &mut ids);
    assert_eq!(ids, [1, 2, 3, 400, 50_000, 6]);
    let starts: Vec<_> = (0..6).map(|position| stream.document_start(position)).collect();
    assert_eq!(starts, [0, 0, 0, 3, 3, 3]);
    set.check_fits(50_001).unwrap();
    let error = set.check_fits(50_000).unwrap_err();
    assert!(
        error.to_string().contains(".bin: token 4 is 50000, but the vocabulary has the tokens 0 to 49999"),
        "{error}"
    );
}

#[test]
fn an_index_that_lies_is_refused() {
    let mut version = index(&SEQUENCES, &[0, 3]);
    version[9] = 2;
    let mut float = index(&SEQUENCES, &[0, 3]);
    float[17] = 6;
    let mut many = index(&SEQUENCES, &[0, 3]);
    many[18..26].fill(0xff);
    let whole = index(&SEQUENCES, &[0, 3]);
    let table: [(&[u8], &str); 12] = [
        (b"", "is empty"),
        (b"something else that is long enough for it", "is no Megatron index"),
        (&version, "version 2"),
        (&float, "its tokens have type 6"),
        (&many, "the index was cut off"),
        (&whole[..whole.len() - 1], "the index was cut off"),
        (
            &index(&[(3, 0), (1, 8), (2, 8)], &[0, 3]),
            "sequence 1 has 1 tokens from byte 8 on, but the sequence before it ends at byte 6",
        ),
        (&index(&[(3, 0), (-1, 6), (4, 4)], &[0, 3]), "sequence 1 has -1 tokens"),
        (&index(&[(3, 0), (1, 6)], &[0, 2]), "describes 8 bytes of tokens, but"),
        (&index(&[(3, 0), (1, 6), (9, 8)], &[0, 3]), "describes 26 bytes of tokens, but"),
        (&index(&SEQUENCES, &[0, 4]), "document 1 begins with sequence 4 of 3"),
        (&index(&SEQUENCES, &[2, 1]), "document 1 begins with sequence 1 of 3"),
    ];
    for (index, message) in table {
        let (_folder, path) = written(index, &TOKENS);
        let error = Megatron::open(&path).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.exit_code(), ExitCode::BadData, "{error}");
    }
    let (_folder, path) = written(&index(&SEQUENCES, &[0, 3]), &TOKENS);
    fs::remove_file(path.with_extension("bin")).unwrap();
    assert_eq!(Megatron::open(&path).unwrap_err().exit_code(), ExitCode::Io);
}
