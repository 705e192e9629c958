//! Text and records, plain and compressed, whole and in ranges, and the line of everything that is wrong.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use flate2::write::GzEncoder;

use super::*;
use crate::data::inputs::expand;
use crate::exit::{Classified, ExitCode};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn file(path: PathBuf) -> InputFile {
    expand(&[path]).unwrap().remove(0)
}

/// The pieces as text, where an example is `prompt>completion`.
fn read(input: &InputFile, range: Option<Range<u64>>) -> Result<Vec<String>, DataError> {
    let mut pieces = Vec::new();
    read_pieces(input, range, &Reading { text_field: "text", meter: &|_| {} }, &mut |piece| {
        pieces.push(match piece {
            Piece::File { text, .. } | Piece::Record { text } => text.to_owned(),
            Piece::Example { prompt, completion } => format!("{prompt}>{completion}"),
        });
        Ok(())
    })?;
    Ok(pieces)
}

#[test]
fn records_are_the_same_plain_and_compressed_in_several_members() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (
        "{\"text\": \"a\\nb\"}\n\n{\"id\": 1, \"text\": \"\u{e9}\"}\r\n".as_bytes(),
        b"{\"prompt\": \"p\", \"completion\": \"c\"}",
    );
    let table = [
        ("a.jsonl", [first, second].concat()),
        ("a.jsonl.gz", [gzip(first), gzip(second)].concat()),
        ("a.ndjson.zst", [zstd(first), zstd(second)].concat()),
    ];
    for (name, bytes) in table {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        assert_eq!(read(&file(path), None).unwrap(), ["a\nb", "\u{e9}", "p>c"], "{name}");
    }
}

#[test]
fn a_long_text_comes_in_parts_that_end_with_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.txt.zst");
    let text = format!("{}\n", "é".repeat(300_000)).repeat(4);
    fs::write(&path, zstd(text.as_bytes())).unwrap();
    let mut lasts = Vec::new();
    let mut whole = String::new();
    read_pieces(&file(path), None, &Reading { text_field: "", meter: &|_| {} }, &mut |piece| {
        let Piece::File { text, last } = piece else { panic!("{piece:?}") };
        assert!(text.ends_with('\n'));
        whole += text;
        lasts.push(last);
        Ok(())
    })
    .unwrap();
    assert!(whole == text);
    assert_eq!(lasts, [false, true]);
}

#[test]
fn ranges_of_lines_are_the_whole_wherever_it_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    let lines: String = (0..9).map(|number| format!("{{\"text\": \"{}\"}}\n", "x".repeat(number))).collect();
    fs::write(&path, &lines).unwrap();
    let input = file(path.clone());
    let whole = read(&input, None).unwrap();
    let length = lines.len() as u64;
    for cut in 0..length {
        let at = line_start(&path, cut).unwrap();
        assert!(at >= cut && (at == 0 || lines.as_bytes()[at as usize - 1] == b'\n'));
        let mut parts = read(&input, Some(0..at)).unwrap();
        parts.extend(read(&input, Some(at..length)).unwrap());
        assert_eq!(parts, whole, "cut at {cut}");
    }
}

#[test]
fn what_is_wrong_is_named_with_its_line_and_class() {
    let folder = tempfile::tempdir().unwrap();
    let good = "{\"text\": \"fine\"}\n".repeat(20_000);
    let broken = format!("{good}{{\"text\": \"no end\n");
    let compressed = gzip(broken.as_bytes());
    let table: [(&str, &[u8], &str, ExitCode); 11] = [
        (
            "a.jsonl",
            broken.as_bytes(),
            "a.jsonl:20001:16: not a JSON object as expected: EOF while parsing a string",
            ExitCode::BadData,
        ),
        ("b.jsonl.gz", &compressed, "b.jsonl.gz:20001:16: not a JSON object", ExitCode::BadData),
        (
            "c.jsonl",
            b"\n{\"body\": 1, \"id\": 2}\n",
            "c.jsonl:2: has neither the field \"text\" (data.text_field) nor",
            ExitCode::BadData,
        ),
        ("d.jsonl", b"{\"body\": 1, \"id\": 2}\n", "its fields are [\"body\", \"id\"]", ExitCode::BadData),
        ("e.jsonl", b"{\"text\": 5}\n", "not a JSON object as expected: invalid type: integer `5`", ExitCode::BadData),
        ("f.jsonl", b"[\"text\"]\n", "expected a JSON object", ExitCode::BadData),
        (
            "g.jsonl",
            b"{\"text\": \"a\"}\n{\"text\": \"\xe9\"}\n",
            "g.jsonl: byte 24 (line 2) is 0xe9",
            ExitCode::BadData,
        ),
        ("h.txt.gz", &compressed[..compressed.len() / 2], "the gzip data is damaged or cut off", ExitCode::BadData),
        ("i.txt.gz", b"no gzip", "i.txt.gz: line 1: the gzip data is damaged", ExitCode::BadData),
        ("j.jsonl.zst", b"\x28\xb5\x2f\xfd broken", "the zstd data is damaged or cut off", ExitCode::BadData),
        ("k.txt.zst", b"no zstd", "k.txt.zst: line 1: the zstd data is damaged", ExitCode::BadData),
    ];
    for (name, bytes, message, code) in table {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = read(&file(path), None).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.exit_code(), code, "{error}");
    }
    let whole = zstd(good.as_bytes());
    let path = folder.path().join("l.jsonl.zst");
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(read(&file(path), None), Err(DataError::Compressed { .. })));
}

#[test]
fn a_fault_in_a_range_is_told_with_the_line_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    fs::write(&path, "{\"text\": \"a\"}\n{\"text\": \"b\"}\n{}\n").unwrap();
    let start = line_start(&path, 14).unwrap();
    let error = read(&file(path), Some(start..start + 17)).unwrap_err().to_string();
    assert!(error.contains("a.jsonl:3: has neither"), "{error}");
}
