//! Tokenizers from files, and files that are none.

use std::fs;

use super::*;
use crate::exit::{Classified, ExitCode};

/// A tokenizer of whole words with a gap in its ids.
const WORDS: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
    "added_tokens": [{"id": 9, "content": "<eos>", "single_word": false, "lstrip": false, "rstrip": false,
                      "normalized": false, "special": true}],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "end": 2, "<eos>": 9}, "unk_token": "<unk>"}
}"#;

#[test]
fn a_file_or_its_folder_is_a_tokenizer_and_says_what_ends_a_document() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    fs::write(&file, WORDS).unwrap();
    for path in [file.as_path(), folder.path()] {
        let tokenizer = FileTokenizer::open(path).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_document()), (10, Some(9)), "ids may have gaps");
        assert_eq!(tokenizer.encode("b a b").unwrap(), [1, 0, 1]);
        assert_eq!(tokenizer.decode(&[1, 0, 77, -1, 1]), "b a\u{fffd}\u{fffd}b");
    }
    for (config, end) in [(r#"{"eos_token": "end"}"#, 2), (r#"{"eos_token": {"content": "b"}}"#, 1), ("{}", 9)] {
        fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        assert_eq!(FileTokenizer::open(&file).unwrap().end_of_document(), Some(end), "{config}");
    }
}

#[test]
fn what_is_no_tokenizer_and_what_it_cannot_encode_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    let table = [
        (None, "cannot be read: No such file", ExitCode::Io),
        (Some(""), "is empty", ExitCode::BadData),
        (Some("{}"), "tokenizer.json: is not a Hugging Face tokenizer.json: ", ExitCode::BadData),
        (Some("text"), "is not a Hugging Face tokenizer.json: ", ExitCode::BadData),
    ];
    for (content, message, code) in table {
        if let Some(content) = content {
            fs::write(&file, content).unwrap();
        }
        let error = FileTokenizer::open(&file).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.exit_code(), code, "{error}");
    }
    fs::write(&file, WORDS).unwrap();
    let error = FileTokenizer::open(&file).unwrap().encode("a c").unwrap_err();
    assert!(error.to_string().contains("tokenizer.json: cannot encode the text: "), "{error}");
    assert_eq!(error.exit_code(), ExitCode::BadData);
}
