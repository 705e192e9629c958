//! The text of a run that names none: what every machine that built this project has.
//!
//! Owns the choice between the sources of the project's dependencies and the generated corpus. It is told where cargo keeps
//! sources; only [`cargo_registry`] looks at the environment, as cargo itself does.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::corpus::CorpusBuilder;
use super::generated::generated_text;
use super::inputs::files_below;
use super::{ByteTokenizer, Corpus, DataError, EndOfDocument, Tokenizer, generated_corpus, hexadecimal};

/// The default corpus ends after so many bytes of text.
pub const DEFAULT_CORPUS_LIMIT_BYTES: usize = 16_000_000;

/// Longer files are left out: they are tables and bindings that a program wrote, and would make up half of the text.
const FILE_LIMIT_BYTES: u64 = 256 * 1024;

/// With less text than this there is nothing to learn from: the generated corpus is better.
const LEAST_BYTES: usize = 64 * 1024;

/// The packages this program was built from. Others come and go in cargo's folder with every project that is built there, and the
/// text would change with them, its held-out end most of all.
const LOCK_FILE: &str = include_str!("../../../Cargo.lock");

/// The folder names of the locked packages, `name-version`.
fn locked_packages() -> HashSet<String> {
    let lock: toml::Table = LOCK_FILE.parse().unwrap_or_default();
    let packages = lock.get("package").and_then(toml::Value::as_array);
    let text = |package: &toml::Value, key: &str| package.get(key)?.as_str().map(str::to_owned);
    packages
        .into_iter()
        .flatten()
        .filter_map(|package| Some(format!("{}-{}", text(package, "name")?, text(package, "version")?)))
        .collect()
}

/// Where cargo keeps the sources of packages: `registry/src` below `$CARGO_HOME`, or below `~/.cargo`.
pub fn cargo_registry() -> Option<PathBuf> {
    let home = || std::env::home_dir().map(|home| home.join(".cargo"));
    let cargo = std::env::var_os("CARGO_HOME").filter(|path| !path.is_empty()).map(PathBuf::from).or_else(home)?;
    Some(cargo.join("registry").join("src"))
}

/// The Rust sources and documentation below `registry`, sorted by path and cut after [`DEFAULT_CORPUS_LIMIT_BYTES`]; where
/// there are none, the generated corpus, whose entropy is known.
pub fn default_corpus(registry: Option<&Path>, tokenizer: &dyn Tokenizer) -> Result<Corpus, DataError> {
    let read = |registry| registry_corpus(registry, &locked_packages(), DEFAULT_CORPUS_LIMIT_BYTES, tokenizer);
    match registry.map(read).transpose()?.flatten() {
        Some(corpus) => Ok(corpus),
        None if tokenizer.name() == ByteTokenizer::NAME => Ok(generated_corpus()),
        None => {
            // Its entropy is known for bytes only.
            let mut builder = builder(tokenizer)?;
            builder.push(&generated_text())?;
            Ok(corpus_of(builder, "generated, Markov source of order 2"))
        }
    }
}

/// The corpus of `packages` below `registry`, of at most `limit` bytes; None: there is too little. Nobody named these files, so one
/// that cannot be read as text is left out.
fn registry_corpus(
    registry: &Path,
    packages: &HashSet<String>,
    limit: usize,
    tokenizer: &dyn Tokenizer,
) -> Result<Option<Corpus>, DataError> {
    let mut builder = builder(tokenizer)?;
    let wanted = |path: &Path| path.extension().is_some_and(|ending| ending == "rs" || ending == "md");
    for path in files_below(registry, wanted).flatten() {
        // registry/src/<index>/<name-version>/…
        let package = path.strip_prefix(registry).ok().and_then(|path| path.iter().nth(1)?.to_str());
        if !package.is_some_and(|package| packages.contains(package)) {
            continue;
        }
        if std::fs::metadata(&path).map_or(true, |file| file.len() > FILE_LIMIT_BYTES) {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let end = text.floor_char_boundary(limit - builder.bytes());
        builder.push(&text[..end])?;
        if end < text.len() {
            break;
        }
    }
    let name = format!("sources and documentation of the dependencies in {}", registry.display());
    Ok((builder.bytes() >= LEAST_BYTES).then(|| corpus_of(builder, &name)))
}

fn builder(tokenizer: &dyn Tokenizer) -> Result<CorpusBuilder<'_>, DataError> {
    Ok(CorpusBuilder::new(tokenizer, EndOfDocument::Auto.tokens(tokenizer)?, Sha256::new()))
}

fn corpus_of(builder: CorpusBuilder<'_>, name: &str) -> Corpus {
    let description = builder.describe(name);
    let (stream, hash) = builder.finish();
    Corpus::of_stream(stream, description, hexadecimal(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::Tokens;

    #[test]
    fn sources_are_taken_in_the_order_of_their_paths_up_to_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let package = folder.path().join("index-1/aaa-1.0.0");
        fs::create_dir_all(package.join("src")).unwrap();
        fs::write(package.join("README.md"), "r".repeat(40_000)).unwrap();
        fs::write(package.join("src/bindings.rs"), "b".repeat(300_000)).unwrap();
        fs::write(package.join("src/latin1.rs"), b"\xe9\xe9").unwrap();
        fs::write(package.join("src/lib.rs"), "é".repeat(30_000)).unwrap();
        fs::write(package.join("src/data.json"), "no".repeat(30_000)).unwrap();

        let other = folder.path().join("index-1/zzz-1.0.0");
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("lib.rs"), "z".repeat(80_000)).unwrap();
        let locked = HashSet::from(["aaa-1.0.0".to_owned()]);

        let whole = registry_corpus(folder.path(), &locked, 1_000_000, &ByteTokenizer).unwrap().unwrap();
        assert_eq!(
            whole.tokens(),
            100_000,
            "one file is not UTF-8, one a program's, one neither source nor text, one another project's"
        );
        assert_eq!(whole.entropy, None);
        // The limit falls inside an é of two bytes, which is left out whole.
        let cut = registry_corpus(folder.path(), &locked, 70_001, &ByteTokenizer).unwrap().unwrap();
        assert_eq!(cut.tokens(), 70_000);
        let Tokens::U8(bytes) = &cut.sources[0].stream.segments()[0].tokens else { panic!("bytes are narrow") };
        assert!(bytes.starts_with(b"rrr") && bytes.ends_with("é".as_bytes()));
    }

    #[test]
    fn the_lock_file_names_this_programs_dependencies() {
        let packages = locked_packages();
        let has = |name: &str| packages.iter().any(|package| package.starts_with(name));
        assert!(packages.len() > 50 && has("tonic-0") && has("safetensors-0"), "{packages:?}");
    }

    #[test]
    fn without_sources_the_corpus_is_generated() {
        let folder = tempfile::tempdir().unwrap();
        for registry in [None, Some(folder.path()), Some(&*folder.path().join("absent"))] {
            assert_eq!(default_corpus(registry, &ByteTokenizer).unwrap(), generated_corpus());
        }
    }
}
