//! Shards of any cut hold the same text, finished ones are kept, half-written ones go.

use super::*;
use crate::data::{ByteTokenizer, Corpus};
use crate::exit::{Classified, ExitCode};

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// Records in one file, texts in three.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let texts = folder.path().join("texts");
        fs::create_dir(&texts).unwrap();
        let records: String = (0..200).map(|number| format!("{{\"text\": \"record {number}\"}}\n")).collect();
        fs::write(texts.join("records.jsonl"), records).unwrap();
        for name in ["a.txt", "b.txt", "c.txt"] {
            fs::write(texts.join(name), format!("text of {name}\n").repeat(3)).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn spec(&self, part_bytes: u64) -> PrepareSpec {
        PrepareSpec {
            paths: vec![self.path("texts")],
            out: self.path("shards"),
            text_field: "text".into(),
            end_of_document: EndOfDocument::Auto,
            part_bytes: Some(part_bytes),
        }
    }

    fn prepare(&self, part_bytes: u64) -> Result<Prepared, DataError> {
        Prepare::plan(self.spec(part_bytes), &ByteTokenizer)?.run(&|_| {})
    }

    fn tokens(&self, name: &str) -> Vec<i32> {
        let corpus = Corpus::from_paths(&[self.path(name)], &ByteTokenizer).unwrap();
        let mut tokens = vec![0; corpus.tokens()];
        corpus.sources[0].stream.copy_to(0, &mut tokens);
        tokens
    }
}

#[test]
fn shards_hold_what_the_text_holds_however_it_is_cut() {
    for part_bytes in [1, 100, 700, 1 << 20] {
        let place = Place::new();
        let done = place.prepare(part_bytes).unwrap();
        assert_eq!((done.kept, done.tokens), (0, place.tokens("texts").len() as u64));
        assert!(part_bytes > 700 || done.shards > 3, "{done:?}");
        assert_eq!(place.tokens("shards"), place.tokens("texts"), "parts of {part_bytes}");
        if part_bytes > 100 {
            // A text file that is cut becomes several documents.
            assert_eq!(done.documents, 203);
        }
    }
}

#[test]
fn the_same_work_again_makes_only_what_is_missing() {
    let place = Place::new();
    let first = place.prepare(500).unwrap();
    let whole = place.tokens("shards");
    let kept = fs::metadata(place.path("shards/part-00001.tokens")).unwrap().modified().unwrap();
    fs::remove_file(place.path("shards/part-00000.tokens")).unwrap();
    let cut = place.path("shards/part-00002.tokens");
    let bytes = fs::read(&cut).unwrap();
    fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    fs::write(place.path("shards/.part-00003.tokens.partial"), "half").unwrap();

    let unfinished = Corpus::from_paths(&[place.path("shards")], &ByteTokenizer).unwrap_err();
    assert_eq!(unfinished.exit_code(), ExitCode::BadData);
    let message = format!("{} of {} shards are there", first.shards - 1, first.shards);
    assert!(unfinished.to_string().contains(&message), "{unfinished}");

    let again = place.prepare(500).unwrap();
    assert_eq!(again, Prepared { kept: first.shards - 2, ..first });
    assert_eq!(place.tokens("shards"), whole);
    assert_eq!(fs::metadata(place.path("shards/part-00001.tokens")).unwrap().modified().unwrap(), kept);
    assert!(!place.path("shards/.part-00003.tokens.partial").exists());
}

#[test]
fn shards_of_something_else_are_never_touched() {
    let place = Place::new();
    place.prepare(500).unwrap();
    for (spec, what) in [
        (place.spec(600), "other settings"),
        (PrepareSpec { end_of_document: EndOfDocument::None, ..place.spec(500) }, "other settings"),
    ] {
        let error = Prepare::plan(spec, &ByteTokenizer).unwrap().run(&|_| {}).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(error.exit_code(), ExitCode::Usage);
    }
    fs::create_dir(place.path("full")).unwrap();
    fs::write(place.path("full/thesis.txt"), "years of work").unwrap();
    let spec = PrepareSpec { out: place.path("full"), ..place.spec(500) };
    let error = Prepare::plan(spec, &ByteTokenizer).unwrap().run(&|_| {}).unwrap_err();
    assert!(error.to_string().contains("full: holds thesis.txt already"), "{error}");
    assert_eq!(fs::read_dir(place.path("full")).unwrap().count(), 1);
}

#[test]
fn a_broken_record_ends_the_work_and_leaves_no_half_of_its_shard() {
    let place = Place::new();
    let records = place.path("texts/records.jsonl");
    let text = fs::read_to_string(&records).unwrap().replace("{\"text\": \"record 150\"}", "{\"text\": ");
    fs::write(&records, text).unwrap();
    let error = place.prepare(500).unwrap_err();
    assert!(error.to_string().contains("records.jsonl:151:"), "{error}");
    for entry in fs::read_dir(place.path("shards")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.starts_with('.'), "{name}");
    }
    let shards = PrepareSpec { paths: vec![place.path("shards")], out: place.path("again"), ..place.spec(500) };
    assert!(Prepare::plan(shards, &ByteTokenizer).is_err());
}
