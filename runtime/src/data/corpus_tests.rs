//! Files and directories as corpora, and the errors of those that cannot be one.

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::data::ByteTokenizer;
use crate::exit::{Classified, ExitCode};

fn read(paths: &[PathBuf]) -> Result<Corpus, DataError> {
    Corpus::from_paths(paths, &ByteTokenizer)
}

fn text_of(corpus: &Corpus) -> String {
    let mut ids = vec![0; corpus.tokens()];
    corpus.sources[0].stream.copy_to(0, &mut ids);
    ByteTokenizer.decode(&ids)
}

#[test]
fn a_directory_is_read_in_the_order_of_its_paths_without_hidden_and_foreign_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for sub in ["b/deep", ".git"] {
        fs::create_dir_all(at(sub)).unwrap();
    }
    for (name, text) in [
        ("c.txt", "C"),
        ("a.md", "A"),
        ("b/deep/z.rs", "B"),
        ("b/empty.py", ""),
        (".hidden.txt", "no"),
        (".git/x.txt", "no"),
        ("image.png", "no"),
        ("noending", "no"),
    ] {
        fs::write(at(name), text).unwrap();
    }
    let corpus = read(&[folder.path().into()]).unwrap();
    assert_eq!(text_of(&corpus), "ABC");
    assert_eq!(corpus.sha256, hexadecimal(&Sha256::digest("ABC")));
    assert!(
        corpus.description.contains("3 files") && corpus.description.contains("3 tokens"),
        "{}",
        corpus.description
    );
    let named = read(&[at("c.txt"), at("image.png"), at(".hidden.txt")]).unwrap();
    assert_eq!(text_of(&named), "Cnono", "a file that is named is read whatever it is called, in the order given");
}

#[test]
fn what_cannot_be_read_as_text_is_named_with_place_and_reason() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("bad.txt"), b"one\ntwo \xc3\x28").unwrap();
    fs::write(at("empty.txt"), "").unwrap();
    fs::create_dir(at("bare")).unwrap();
    fs::write(at("bare/x.png"), "x").unwrap();
    let table = [
        (at("bad.txt"), "bad.txt: byte 8 (line 2) is 0xc3, which is not UTF-8", ExitCode::BadData),
        (folder.path().into(), "bad.txt: byte 8 (line 2)", ExitCode::BadData),
        (at("empty.txt"), "empty.txt: is empty", ExitCode::BadData),
        (at("bare"), "bare: holds no text; files in a directory are read when they end in adoc bib", ExitCode::BadData),
        (at("absent.txt"), "absent.txt: cannot be read: No such file", ExitCode::Io),
        ("/dev/null".into(), "/dev/null: is neither a regular file nor a directory", ExitCode::BadData),
    ];
    for (path, message, code) in table {
        let error = read(&[path]).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.exit_code(), code, "{error}");
    }
}

#[cfg(unix)]
#[test]
fn a_circle_of_links_is_an_error_and_not_an_endless_walk() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(folder.path(), folder.path().join("again")).unwrap();
    assert_eq!(read(&[folder.path().into()]).unwrap_err().exit_code(), ExitCode::Io);
}

#[test]
fn a_damaged_corpus_is_refused() {
    let corpus = Corpus { entropy: Some(1.5), ..Corpus::of_tokens(Tokens::U8([1, 2, 3].into()), "d", "h") };
    let bytes = corpus.to_bytes();
    for end in 0..bytes.len() {
        assert!(Corpus::from_bytes(&bytes[..end]).is_err(), "cut at {end}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(Corpus::from_bytes(&longer).is_err());
    let mut other = bytes;
    other[0] = 0;
    assert!(Corpus::from_bytes(&other).is_err());
}

proptest! {
    #[test]
    fn what_is_shared_out_arrives_as_it_was(
        ids in proptest::collection::vec(any::<u32>(), 0..50),
        wide in any::<bool>(),
        description in "\\PC*",
        entropy in proptest::option::of(0.0f64..9.0),
    ) {
        let tokens = if wide { Tokens::U32(ids.into()) } else { Tokens::U8(ids.iter().map(|&id| id as u8).collect()) };
        let held_out = Corpus::of_tokens(Tokens::U8([7, 8].into()), "", "").sources.remove(0);
        let mut corpus = Corpus { entropy, validation: Some(held_out.stream), ..Corpus::of_tokens(tokens, description, "0f") };
        corpus.sources[0].weight = entropy;
        prop_assert_eq!(Corpus::from_bytes(&corpus.to_bytes()).unwrap(), corpus);
    }
}
