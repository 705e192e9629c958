//! How a file of deploy/ becomes the file of one run.
//!
//! Owns the two marks: `# render: KEY` behind a value of a YAML file, and `#SBATCH --KEY=` in a batch script. So the files of
//! deploy/ are whole as they stand, and are the only source.

use std::collections::BTreeMap;

use super::error::RenderError;

/// Stands between a value and the name of what it is.
const MARK: &str = " # render: ";
/// Begins the line that explains the mark, of no use once the values are set.
const EXPLANATION: &str = "# Values with render: behind them";

/// A template: its file name, and its text.
pub(super) type Template = (&'static str, &'static str);

/// Sets every marked value of a YAML file. A value that was quoted stays so.
pub(super) fn fill((name, text): Template, values: &BTreeMap<&str, String>) -> Result<String, RenderError> {
    let mut filled = String::with_capacity(text.len());
    for line in text.lines().filter(|line| !line.starts_with(EXPLANATION)) {
        match line.split_once(MARK) {
            Some((before, key)) => {
                let value =
                    values.get(key).ok_or_else(|| RenderError::Template { template: name, key: key.to_owned() })?;
                let at = before.find(": ").or_else(|| before.find("- ")).map_or(0, |at| at + 2);
                let (keep, old) = before.split_at(at);
                let quote = if old.starts_with('"') { "\"" } else { "" };
                filled.extend([keep, quote, value, quote]);
            }
            None => filled.push_str(line),
        }
        filled.push('\n');
    }
    Ok(filled)
}

/// Sets options of a batch script: in their line where there is one, else behind the last one.
pub(super) fn set_options(script: &str, options: &[(&str, String)]) -> String {
    let mut lines: Vec<String> = script.lines().map(str::to_owned).collect();
    for (key, value) in options {
        let start = format!("#SBATCH --{key}=");
        let line = format!("{start}{value}");
        match lines.iter().position(|line| line.starts_with(&start)) {
            Some(at) => lines[at] = line,
            None => {
                let last = lines.iter().rposition(|line| line.starts_with("#SBATCH ")).map_or(1, |at| at + 1);
                lines.insert(last, line);
            }
        }
    }
    lines.join("\n") + "\n"
}

/// `text` as one word of a shell, whatever is in it.
pub(super) fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_values_are_set_and_everything_else_stays() {
        let template = "# Values with render: behind them are set.\na: 1 # render: n\nb:\n  - \"1\" # render: n\n  - name: x # render: s\nc: 1 # kept\n";
        let values = BTreeMap::from([("n", "7".to_owned()), ("s", "run".to_owned())]);
        let filled = fill(("t.yaml", template), &values).unwrap();
        assert_eq!(filled, "a: 7\nb:\n  - \"7\"\n  - name: run\nc: 1 # kept\n");
        let error = fill(("t.yaml", "a: 1 # render: other\n"), &values).unwrap_err();
        assert_eq!(error.to_string(), "the built-in t.yaml asks for other, which is not known");
    }

    #[test]
    fn options_are_set_where_they_stand_or_behind_the_last() {
        let script = "#!/bin/sh\n#SBATCH --nodes=1\n#SBATCH --requeue\ntrue\n";
        let set = set_options(script, &[("nodes", "4".into()), ("partition", "gpu".into())]);
        assert_eq!(set, "#!/bin/sh\n#SBATCH --nodes=4\n#SBATCH --requeue\n#SBATCH --partition=gpu\ntrue\n");
    }

    #[test]
    fn words_for_the_shell_are_quoted_where_they_must_be() {
        for (text, word) in [("/a/b.toml", "/a/b.toml"), ("", "''"), ("a b", "'a b'"), ("$(x)'s", r"'$(x)'\''s'")] {
            assert_eq!(shell_word(text), word);
        }
    }
}
