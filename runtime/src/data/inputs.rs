//! Which files a list of paths means, and what each of them is.
//!
//! Owns file endings, directories and patterns. It opens no file: what is inside is its reader's.

use std::path::{Path, PathBuf};

use walkdir::{DirEntry, WalkDir};

use super::{DataError, prepare};

/// Endings of the text files that are read in a directory; a file that is named itself is read whatever it is called.
pub const TEXT_EXTENSIONS: [&str; 34] = [
    "adoc", "bib", "c", "cc", "cfg", "cpp", "cs", "css", "cu", "cuh", "go", "h", "hpp", "html", "java", "jl", "js",
    "kt", "md", "org", "proto", "py", "rb", "rs", "rst", "scala", "sh", "sql", "swift", "tex", "toml", "ts", "txt",
    "yaml",
];

/// Endings of files of one JSON object a line.
pub const RECORD_EXTENSIONS: [&str; 2] = ["jsonl", "ndjson"];

/// Further endings of compressed text and records.
pub const COMPRESSED_EXTENSIONS: [&str; 2] = ["gz", "zst"];

/// Ending of token shards.
pub const SHARD_EXTENSION: &str = "tokens";

/// What a file is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Text.
    Text,
    /// One JSON object a line.
    Records,
    /// A token shard.
    Shard,
    /// A Megatron data set: the index; the data lie beside it.
    Megatron,
}

/// How it is compressed, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    /// Not at all.
    None,
    /// gzip (RFC 1952), of one or several members.
    Gzip,
    /// Zstandard (RFC 8878), of one or several frames.
    Zstd,
}

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InputFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// How it is compressed; shards never are.
    pub compression: Compression,
    /// Whether it was named itself, so that it must not be empty.
    pub named: bool,
}

impl InputFile {
    /// The file at `path`, which was named itself: what its ending does not tell is text.
    fn named(path: &Path) -> Self {
        let (format, compression) = kind_of(path).unwrap_or((Format::Text, Compression::None));
        let path = if format == Format::Megatron { path.with_extension("idx") } else { path.to_owned() };
        Self { path, format, compression, named: true }
    }
}

/// What the name of a file says of it; None: nothing.
fn kind_of(path: &Path) -> Option<(Format, Compression)> {
    let ending = |path: &Path| path.extension().and_then(|ending| ending.to_str()).map(str::to_owned);
    let (compression, inner) = match ending(path)?.as_str() {
        "gz" => (Compression::Gzip, path.with_extension("")),
        "zst" => (Compression::Zstd, path.with_extension("")),
        _ => (Compression::None, path.to_owned()),
    };
    let compressed = compression != Compression::None;
    let format = match ending(&inner).as_deref() {
        Some(ending) if TEXT_EXTENSIONS.contains(&ending) => Format::Text,
        Some(ending) if RECORD_EXTENSIONS.contains(&ending) => Format::Records,
        Some(SHARD_EXTENSION) if !compressed => Format::Shard,
        Some("idx" | "bin") if !compressed => Format::Megatron,
        // A name may end in .gz alone; what is inside is text then.
        _ if compressed => Format::Text,
        _ => return None,
    };
    Some((format, compression))
}

/// The files that `paths` mean, in their order: files, directories with all they hold below them, sorted by path, patterns
/// (`data/**/*.jsonl.gz`), and Megatron data sets by their common prefix.
pub(super) fn expand(paths: &[PathBuf]) -> Result<Vec<InputFile>, DataError> {
    let mut files = Vec::new();
    for path in paths {
        match std::fs::metadata(path) {
            Ok(_) => push(path, &mut files)?,
            Err(_) if with_suffix(path, ".idx").is_file() => files.push(InputFile::named(&with_suffix(path, ".idx"))),
            Err(reason) => match path.to_str().filter(|text| text.contains(['*', '?', '['])) {
                Some(pattern) => push_matches(pattern, &mut files)?,
                None => return Err(DataError::Unreadable { path: path.clone(), reason }),
            },
        }
    }
    Ok(files)
}

fn push(path: &Path, files: &mut Vec<InputFile>) -> Result<(), DataError> {
    let kind = std::fs::metadata(path).map_err(DataError::unreadable(path))?;
    if kind.is_file() {
        files.push(InputFile::named(path));
        return Ok(());
    }
    if !kind.is_dir() {
        return Err(DataError::NotRegular { path: path.into() });
    }
    prepare::check_finished(path)?;
    let before = files.len();
    for entry in files_below(path, |path| data_kind(path).is_some()) {
        let path = entry.map_err(|error| walk_error(path, error))?;
        let (format, compression) = data_kind(&path).unwrap_or((Format::Text, Compression::None));
        files.push(InputFile { path, format, compression, named: false });
    }
    if files.len() == before { Err(DataError::NoText { path: path.into() }) } else { Ok(()) }
}

/// What a file in a directory is, if it is data. Of a Megatron data set the index counts; compressed files only where their name
/// says of what.
fn data_kind(path: &Path) -> Option<(Format, Compression)> {
    let (format, compression) = kind_of(path)?;
    let plain = kind_of(&path.with_extension("")).is_some();
    let bin = path.extension().is_some_and(|ending| ending == "bin");
    (!bin && (compression == Compression::None || plain)).then_some((format, compression))
}

fn push_matches(pattern: &str, files: &mut Vec<InputFile>) -> Result<(), DataError> {
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::default() };
    let matches = glob::glob_with(pattern, options)
        .map_err(|error| DataError::BadPattern { pattern: pattern.into(), reason: error.msg })?;
    let before = files.len();
    for path in matches {
        let path = path.map_err(|error| DataError::Unreadable { path: error.path().into(), reason: error.into() })?;
        // A pattern that matches both halves of a Megatron data set means it once.
        let half = path.extension().is_some_and(|ending| ending == "bin") && path.with_extension("idx").exists();
        if !half {
            push(&path, files)?;
        }
    }
    if files.len() == before { Err(DataError::NoMatch { pattern: pattern.into() }) } else { Ok(()) }
}

/// The files below `folder` that `wanted` accepts, sorted by path, hidden ones left out.
pub(super) fn files_below(
    folder: &Path,
    wanted: impl Fn(&Path) -> bool,
) -> impl Iterator<Item = Result<PathBuf, walkdir::Error>> {
    let visible = |entry: &DirEntry| entry.depth() == 0 || !entry.file_name().as_encoded_bytes().starts_with(b".");
    WalkDir::new(folder)
        .follow_links(true)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(visible)
        .filter(move |entry| match entry {
            Ok(entry) => entry.file_type().is_file() && wanted(entry.path()),
            Err(_) => true,
        })
        .map(|entry| entry.map(DirEntry::into_path))
}

fn walk_error(folder: &Path, error: walkdir::Error) -> DataError {
    let path = error.path().unwrap_or(folder).to_path_buf();
    DataError::Unreadable { path, reason: error.into() }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_a_file_is() {
        use Compression::{Gzip, None as Plain, Zstd};
        let table = [
            ("a.txt", Some((Format::Text, Plain))),
            ("a.md.gz", Some((Format::Text, Gzip))),
            ("a.jsonl", Some((Format::Records, Plain))),
            ("a.jsonl.zst", Some((Format::Records, Zstd))),
            ("a.tokens", Some((Format::Shard, Plain))),
            ("a.idx", Some((Format::Megatron, Plain))),
            ("a.gz", Some((Format::Text, Gzip))),
            ("a.png", None),
            ("a", None),
        ];
        for (name, kind) in table {
            assert_eq!(kind_of(Path::new(name)), kind, "{name}");
        }
    }

    #[test]
    fn directories_and_patterns_find_what_is_data_in_order() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        for name in ["c.txt", "a.jsonl.gz", "b/x.tokens", "m.idx", "m.bin", "other.gz", "p.png", ".hidden.txt"] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        let names = |path: PathBuf| -> Vec<String> {
            let name = |file: InputFile| file.path.strip_prefix(folder.path()).unwrap().display().to_string();
            expand(&[path]).unwrap().into_iter().map(name).collect()
        };
        assert_eq!(names(folder.path().into()), ["a.jsonl.gz", "b/x.tokens", "c.txt", "m.idx"]);
        assert_eq!(names(folder.path().join("m")), ["m.idx"], "a Megatron prefix");
        assert_eq!(names(folder.path().join("m.bin")), ["m.idx"]);
        assert_eq!(names(folder.path().join("m.*")), ["m.idx"]);
        assert_eq!(names(folder.path().join("**/*.t*")), ["b/x.tokens", "c.txt"]);
        let missing = expand(&[folder.path().join("*.nothing")]).unwrap_err();
        assert!(missing.to_string().ends_with("*.nothing: no file matches this pattern"), "{missing}");
    }
}
