//! What lies beside the tensors of a Hugging Face folder: the tokenizer's files, generation settings, special tokens.
//!
//! Owns which files these are. It understands none of them but for the ids of the special tokens.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::CheckpointError;
use crate::data::FileTokenizer;

/// The tokenizer as the `tokenizers` library has it.
const TOKENIZER: &str = FileTokenizer::FILE;
/// What transformers wants to know of it beside.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION: &str = "generation_config.json";
const CONFIG: &str = "config.json";

/// Files that are carried as they are.
const FILES: [&str; 10] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
];

/// The keys of config.json that are no model's and are carried all the same.
const SPECIAL: [&str; 2] = ["bos_token_id", "eos_token_id"];

/// Files to go beside a model, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Companions {
    files: BTreeMap<String, Vec<u8>>,
    special: Map<String, Value>,
}

impl Companions {
    /// Those of a folder; none where it has none.
    ///
    /// # Errors
    /// A file that is there cannot be read, or its config.json is no JSON object.
    pub fn of_folder(dir: &Path) -> Result<Self, CheckpointError> {
        let mut companions = Self::default();
        for name in FILES.into_iter().filter(|name| dir.join(name).is_file()) {
            let path = dir.join(name);
            let bytes = fs::read(&path).map_err(CheckpointError::io("read", &path))?;
            companions.files.insert(name.to_owned(), bytes);
        }
        let path = dir.join(CONFIG);
        if path.is_file() {
            let text = fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
            let config: Map<String, Value> =
                serde_json::from_str(&text).map_err(|source| CheckpointError::Json { path, source })?;
            let special = |(key, _): &(String, Value)| SPECIAL.contains(&key.as_str());
            companions.special = config.into_iter().filter(special).collect();
        }
        Ok(companions)
    }

    /// The byte-level tokenizer in the form of the `tokenizers` library: token i is the byte i.
    pub fn of_bytes() -> Self {
        let vocab: Map<String, Value> = (0..=u8::MAX).map(|byte| (stand_in(byte).to_string(), json!(byte))).collect();
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": null,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let files = [(TOKENIZER, tokenizer), (TOKENIZER_CONFIG, tokenizer_config(None))].map(as_file);
        Self { files: files.into(), special: Map::new() }
    }

    /// A tokenizer's file, with its settings where they lie beside it; else with those that follow from its token after documents.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of_tokenizer(tokenizer: &FileTokenizer) -> Result<Self, CheckpointError> {
        let (file, end) = (tokenizer.file(), tokenizer.end());
        let bytes = fs::read(file).map_err(CheckpointError::io("read", file))?;
        let mut companions = match file.parent() {
            Some(dir) if file.file_name().is_some_and(|name| name == TOKENIZER) => Self::of_folder(dir)?,
            _ => Self::default(),
        };
        companions.files.insert(TOKENIZER.to_owned(), bytes);
        if !companions.files.contains_key(TOKENIZER_CONFIG) {
            let (name, config) = as_file((TOKENIZER_CONFIG, tokenizer_config(end.map(|(token, _)| token))));
            companions.files.insert(name, config);
        }
        if let Some((_, id)) = end {
            companions.special.entry("eos_token_id").or_insert(json!(id));
        }
        Ok(companions)
    }

    /// These with the files that only `other` has.
    #[must_use]
    pub fn or(mut self, other: Self) -> Self {
        for (name, bytes) in other.files {
            self.files.entry(name).or_insert(bytes);
        }
        for (key, id) in other.special {
            self.special.entry(key).or_insert(id);
        }
        self
    }

    /// These without a tokenizer.
    #[must_use]
    pub fn without_tokenizer(mut self) -> Self {
        self.files.retain(|name, _| name == GENERATION);
        self
    }

    /// Whether a tokenizer is among them.
    pub fn has_tokenizer(&self) -> bool {
        ["tokenizer.json", "tokenizer.model", "vocab.json"].iter().any(|name| self.files.contains_key(*name))
    }

    /// Writes them into a folder, with generation settings where there were none.
    ///
    /// # Errors
    /// A file cannot be written.
    pub(super) fn write(&self, dir: &Path) -> Result<(), CheckpointError> {
        let generation = json!({
            "_from_model_config": true,
            "bos_token_id": self.special_token("bos_token_id"),
            "eos_token_id": self.special_token("eos_token_id"),
        });
        let default = (GENERATION.to_owned(), format!("{generation:#}\n").into_bytes());
        let files = self.files.iter().chain((!self.files.contains_key(GENERATION)).then_some((&default.0, &default.1)));
        for (name, bytes) in files {
            let path = dir.join(name);
            fs::write(&path, bytes).map_err(CheckpointError::io("write", &path))?;
        }
        Ok(())
    }

    /// Keeps them in a folder of their own, for a later export to find with [`Companions::of_folder`].
    ///
    /// # Errors
    /// The folder cannot be made or a file not be written.
    pub fn keep(&self, dir: &Path) -> Result<(), CheckpointError> {
        fs::create_dir_all(dir).map_err(CheckpointError::io("create", dir))?;
        self.write(dir)?;
        let path = dir.join(CONFIG);
        let text = format!("{:#}\n", Value::Object(self.special.clone()));
        fs::write(&path, text).map_err(CheckpointError::io("write", &path))
    }

    /// The id of a special token; null where there is none.
    pub(super) fn special_token(&self, key: &str) -> Value {
        self.special.get(key).cloned().unwrap_or(Value::Null)
    }
}

/// What transformers needs to open a tokenizer.json by itself.
fn tokenizer_config(end: Option<&str>) -> Value {
    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    if let Some(token) = end {
        config["eos_token"] = json!(token);
    }
    config
}

fn as_file((name, value): (&str, Value)) -> (String, Vec<u8>) {
    (name.to_owned(), format!("{value:#}\n").into_bytes())
}

/// The character that stands for a byte in the vocabulary of a byte-level BPE: itself where it is printable Latin-1, else one of
/// the 68 characters from U+0100 on (GPT-2).
fn stand_in(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&other| !printable(other)).count() as u32;
    char::from_u32(0x100 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let all: BTreeSet<char> = (0..=u8::MAX).map(stand_in).collect();
        assert_eq!(all.len(), 256);
        assert_eq!((stand_in(b'a'), stand_in(b' '), stand_in(0), stand_in(b'\n')), ('a', 'Ġ', 'Ā', 'Ċ'));
        assert_eq!((stand_in(0xad), stand_in(0xa0), stand_in(0xff)), ('Ń', 'ł', 'ÿ'));
    }

    #[test]
    fn what_is_kept_is_found_again() {
        let (folder, kept) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("config.json", r#"{"eos_token_id": [2, 3], "hidden_size": 64}"#);
        write("tokenizer.json", "{}");
        write("README.md", "not carried");
        let read = Companions::of_folder(folder.path()).unwrap();
        read.keep(kept.path()).unwrap();
        let again = Companions::of_folder(kept.path()).unwrap();
        assert!(again.has_tokenizer());
        assert_eq!(again.special_token("eos_token_id"), json!([2, 3]));
        assert_eq!(again.special_token("bos_token_id"), Value::Null);
        assert!(!kept.path().join("README.md").exists());
    }
}
