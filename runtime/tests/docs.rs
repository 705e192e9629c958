//! What the documents say is what the program does: every key with its type, default and choices, every preset's value, and every
//! `moe-worker` command line in the README.
//!
//! The program itself is asked, through what it tells a user: the keys are those it lists when it refuses an unknown one.

// Helpers of tests may stop at the first surprise like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use clap::Parser;
use moe_runtime::config::{Config, ConfigBuilder, ConfigError, PRESETS};
use moe_runtime::worker::WorkerArgs;
use toml::{Table, Value};

/// Like no key that there could be.
const NOTHING: &str = "qqqqqqqqqqqqqqqq";
/// What the reference writes for a key that has no value by default.
const ABSENT: &str = "absent";

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Why `--set assignment` is refused.
fn refusal(assignment: &str) -> ConfigError {
    ConfigBuilder::new().set(assignment).build().expect_err("nobody documents such a value")
}

fn advice(assignment: &str) -> String {
    match refusal(assignment) {
        ConfigError::UnknownKey { advice, .. } => advice,
        other => panic!("--set {assignment}: {other}"),
    }
}

/// Every key of the program, dotted.
fn keys() -> BTreeSet<String> {
    let sections = advice(&format!("{NOTHING}=1"));
    let sections = sections.split(&['[', ']']).skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    assert!(sections.len() > 5, "{sections:?}");
    let fields = |section: &String| {
        let advice = advice(&format!("{section}.{NOTHING}=1"));
        let list = advice.strip_prefix(&format!("[{section}] has ")).unwrap_or_else(|| panic!("{advice}")).to_owned();
        list.split(", ").map(|field| format!("{section}.{field}")).collect::<Vec<_>>()
    };
    sections.iter().flat_map(fields).collect()
}

/// The values of a configuration as TOML writes them, by key; keys without a value are not there.
fn values(config: &Config) -> BTreeMap<String, String> {
    let table: Table = config.to_toml().unwrap().parse().unwrap();
    let section = |(section, keys): (String, Value)| {
        let keys: Table = keys.try_into().unwrap();
        keys.into_iter().map(move |(key, value)| (format!("{section}.{key}"), value.to_string()))
    };
    table.into_iter().flat_map(section).collect()
}

/// The cells of the tables whose first cell is a key, in order of appearance.
fn rows(text: &str, columns: usize) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('|').trim().to_owned()).collect()
    };
    let rows = text.lines().filter(|line| line.starts_with("| `")).map(cells);
    rows.filter(|cells| cells.len() == columns).collect()
}

fn plain(cell: &str) -> &str {
    cell.trim_matches('`')
}

#[test]
fn the_reference_has_every_key_once_with_its_default() {
    let text = document("docs/configuration.md");
    let defaults = values(&Config::default());
    let rows = rows(&text, 4);
    let documented: BTreeSet<_> = rows.iter().map(|row| plain(&row[0]).to_owned()).collect();
    assert_eq!(documented, keys(), "keys of docs/configuration.md, and of the program");
    assert_eq!(documented.len(), rows.len(), "a key is documented twice");
    for row in rows {
        let key = plain(&row[0]);
        let default = defaults.get(key).map_or(ABSENT, String::as_str);
        assert_eq!(plain(&row[2]), default, "default of {key}");
    }
}

#[test]
fn the_reference_has_every_types_name_and_every_choice() {
    for row in rows(&document("docs/configuration.md"), 4) {
        let (key, kind) = (plain(&row[0]), row[1].as_str());
        if let Some(choices) = kind.strip_prefix("one of ") {
            let documented: BTreeSet<_> = choices.split_whitespace().map(plain).collect();
            let resolved = ConfigBuilder::new().set(format!("{key}={NOTHING}")).build();
            let message = match resolved {
                Ok(resolved) => resolved.validate(1).expect_err(key).to_string(),
                Err(error) => error.to_string(),
            };
            let offered = message.rsplit_once("must be ").unwrap_or_else(|| panic!("{message}")).1;
            let offered: BTreeSet<_> = offered.split('"').skip(1).step_by(2).collect();
            assert_eq!(documented, offered, "choices of {key}");
            continue;
        }
        let accepts = |value: &str| ConfigBuilder::new().set(format!("{key}={value}")).build().is_ok();
        let found = [accepts("1"), accepts("0.5"), accepts("true"), accepts("[]"), accepts("auto")];
        let expected = match kind {
            "integer" => [true, false, false, false, false],
            "integer or `\"auto\"`" => [true, false, false, false, true],
            "number" => [true, true, false, false, false],
            "boolean" => [false, false, true, false, false],
            "text" => [false, false, false, false, true],
            "table" => [false; 5],
            "list of text" => [false, false, false, true, false],
            "list of integers" => [false, false, false, true, false],
            "list of paths, or one path" => [false, false, false, true, true],
            other => panic!("{key}: {other:?} is no type that this test knows"),
        };
        assert_eq!(found, expected, "{key}, said to be {kind}: accepts 1, 0.5, true, [], auto");
    }
}

#[test]
fn the_reference_has_every_value_that_a_preset_changes() {
    let text = document("docs/configuration.md");
    let header = format!("| key | {} |", PRESETS.map(|(name, _)| name).join(" | "));
    let (_, table) = text.split_once(&header).unwrap_or_else(|| panic!("no table {header}"));
    let rows = rows(table, 1 + PRESETS.len());
    let presets = PRESETS.map(|(name, _)| values(&Config::preset(name).unwrap()));
    for row in &rows {
        let key = plain(&row[0]);
        let found: Vec<_> = row[1..].iter().map(|cell| plain(cell)).collect();
        let expected: Vec<_> = presets.iter().map(|values| values.get(key).map_or(ABSENT, String::as_str)).collect();
        assert_eq!(found, expected, "{key} of the presets");
    }
    let defaults = values(&Config::default());
    let changed = presets.iter().flatten().filter(|(key, value)| defaults.get(*key) != Some(value));
    let changed: BTreeSet<_> = changed.map(|(key, _)| key.as_str()).collect();
    assert_eq!(rows.iter().map(|row| plain(&row[0])).collect::<BTreeSet<_>>(), changed, "keys that presets change");
}

/// The commands in a document: indented lines up to a comment, and what stands between backticks.
fn commands(text: &str) -> Vec<&str> {
    let is_indented = |line: &&str| line.starts_with("    ");
    let indented = text.lines().filter(is_indented).map(|line| line.split('#').next().unwrap_or_default());
    let quoted = text.lines().filter(|line| !is_indented(line)).flat_map(|line| line.split('`').skip(1).step_by(2));
    indented.chain(quoted).collect()
}

#[test]
fn every_command_line_of_the_readme_is_understood() {
    let text = document("README.md");
    let worker = |command: &&str| command.split_whitespace().any(|word| word == "moe-worker");
    let lines: Vec<_> = commands(&text).into_iter().filter(worker).collect();
    assert!(lines.len() >= 8, "the README shows how to start the worker: {lines:?}");
    for line in lines {
        let arguments = line.split_whitespace().skip_while(|word| *word != "moe-worker");
        if let Err(error) = WorkerArgs::try_parse_from(arguments) {
            panic!("README.md: {line}\n{error}");
        }
    }
}
