//! One line of a record file: which of its fields is text.
//!
//! Owns the form of a record. What other fields hold is skipped without being kept.

use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

/// Fields of an example.
const PROMPT: &str = "prompt";
const COMPLETION: &str = "completion";

/// Names of fields that a message lists.
const LISTED: usize = 12;

/// What a record holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Text.
    Text(String),
    /// An example.
    Example {
        /// What is given.
        prompt: String,
        /// What is to be learned.
        completion: String,
    },
    /// Neither.
    Neither {
        /// The fields there are.
        fields: Vec<String>,
    },
}

/// The content of `line`: the field `text_field`, else `prompt` and `completion`.
pub(super) fn parse(line: &str, text_field: &str) -> Result<Content, serde_json::Error> {
    let mut parser = serde_json::Deserializer::from_str(line);
    let content = parser.deserialize_map(RecordVisitor { text_field })?;
    parser.end()?;
    Ok(content)
}

struct RecordVisitor<'a> {
    text_field: &'a str,
}

impl<'de> Visitor<'de> for RecordVisitor<'_> {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let (mut text, mut prompt, mut completion) = (None, None, None);
        let mut fields = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                key if key == self.text_field => text = Some(map.next_value::<String>()?),
                // Where the text is there, a prompt beside it may be anything.
                PROMPT if text.is_none() => prompt = map.next_value::<Text>()?.0,
                COMPLETION if text.is_none() => completion = map.next_value::<Text>()?.0,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            if fields.len() < LISTED {
                fields.push(key);
            }
        }
        Ok(match (text, prompt, completion) {
            (Some(text), ..) => Content::Text(text),
            (None, Some(prompt), Some(completion)) => Content::Example { prompt, completion },
            _ => Content::Neither { fields },
        })
    }
}

/// A text, or None for anything else.
struct Text(Option<String>);

impl<'de> serde::Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(serde_json::Value::deserialize(deserializer)?.as_str().map(str::to_owned)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_field_comes_first_and_an_example_needs_both_its_fields() {
        let text = |text: &str| Content::Text(text.into());
        let example = Content::Example { prompt: "p".into(), completion: "c".into() };
        let neither = |fields: &[&str]| Content::Neither { fields: fields.iter().map(|&f| f.into()).collect() };
        let table = [
            (r#"{"text": "a\nb", "x": [1, {"text": 2}]}"#, text("a\nb")),
            (r#"{"prompt": "p", "completion": "c", "text": "t"}"#, text("t")),
            (r#"{"text": "t", "prompt": {"of": 3}}"#, text("t")),
            (r#" {"completion": "c", "id": 7, "prompt": "p"} "#, example),
            (r#"{"prompt": "p"}"#, neither(&["prompt"])),
            (r#"{"prompt": 1, "completion": "c"}"#, neither(&["prompt", "completion"])),
            ("{}", neither(&[])),
        ];
        for (line, content) in table {
            assert_eq!(parse(line, "text").unwrap(), content, "{line}");
        }
        assert_eq!(parse(r#"{"body": "b"}"#, "body").unwrap(), text("b"));
    }

    #[test]
    fn what_is_not_an_object_with_text_is_refused() {
        for line in ["[1]", "3", r#"{"text": 5}"#, r#"{"text": "a""#, r#"{"text": "a"} x"#, r#"{"text": null}"#] {
            assert!(parse(line, "text").is_err(), "{line}");
        }
    }
}
